"""A source that plays back a recorded telemetry file, so that every consumer can be tested without a GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.errors import BadInput
from bench.records import GpuSample
from bench.telemetry.columns import read_samples
from bench.telemetry.source import Tick


class ReplaySource:
    """Gives the rows of a recording in their own time: the row recorded x seconds after the first comes x seconds after
    the first tick. Times are moved to the new run's origin; nothing else is changed. After the last row there is silence.

    Args:
        path: a telemetry file.
        devices: the devices to play; empty means all.
        speed: 2 plays twice as fast (times between rows are halved; powers and counters stay, so energies do not hold).

    Raises:
        StoreError: not a telemetry file.
        BadInput: a device that the recording lacks.
    """

    def __init__(self, path: Path | str, devices: Sequence[str] = (), speed: float = 1.0) -> None:
        recording = read_samples(path)
        missing = [d for d in devices if d not in recording.devices]
        if missing:
            raise BadInput(
                f"no device {missing[0]} in this recording",
                where=str(path),
                next_step=f"it holds {', '.join(recording.devices) or 'none'}",
            )
        self.devices = tuple(devices) or recording.devices
        rows = [s for s in recording.samples() if s.device in self.devices]
        rows.sort(key=lambda s: s.t_s)
        self._rows = rows
        self._first_s = rows[0].t_s if rows else 0.0
        self._next = 0
        self._speed = speed
        self._started_s: float | None = None
        self._path = str(path)

    def read(self, tick: Tick) -> list[GpuSample]:
        now = time.monotonic()
        if self._started_s is None:
            self._started_s = now
        played_s = (now - self._started_s) * self._speed
        origin_s = self._started_s - tick.t0_monotonic_s
        out = []
        while self._next < len(self._rows) and self._rows[self._next].t_s - self._first_s <= played_s:
            row = self._rows[self._next]
            energy_t_s = None if row.energy_t_s is None else self._moved(row.energy_t_s, origin_s)
            out.append(replace(row, t_s=self._moved(row.t_s, origin_s), energy_t_s=energy_t_s))
            self._next += 1
        return out

    def _moved(self, t_s: float, origin_s: float) -> float:
        return origin_s + (t_s - self._first_s) / self._speed

    def facts(self) -> dict[str, dict[str, Any]]:
        return {d: {"name": "replayed", "replayed_from": Path(self._path).name} for d in self.devices}

    def close(self) -> None:
        self._rows = []
