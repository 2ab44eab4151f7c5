"""Idle power: of the GPU before any load, and of the engine that is loaded and waits."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.errors import StoreError
from bench.telemetry.energy import window_energy
from bench.telemetry.sampler import Sampler
from bench.telemetry.series import Series, read_series
from bench.telemetry.source import Rates
from bench.telemetry.window import mean_in


@dataclass(frozen=True, slots=True)
class PowerBaseline:
    """Mean power of a device over a quiet while. ``power_w`` is None where it cannot be read.

    ``method`` is ``counter`` (energy counter over the window) or ``power`` (mean of power readings).
    """

    device: str
    power_w: float | None
    uncertainty_w: float = 0.0
    duration_s: float = 0.0
    method: str = ""
    problem: str | None = None


def baseline_of(series: Series, start_s: float, end_s: float) -> PowerBaseline:
    """Mean power over a window: from the energy counter, else from power readings."""
    energy = window_energy(series, start_s, end_s)
    duration_s = end_s - start_s
    if energy.energy_j is not None:
        return PowerBaseline(
            series.device, energy.energy_j / duration_s, energy.uncertainty_j / duration_s, duration_s, "counter"
        )
    for column in ("power_average_w", "power_w"):
        mean_w = mean_in(series, column, start_s, end_s)
        if mean_w is not None:
            _, readings = series.readings_in(column, start_s, end_s)
            return PowerBaseline(series.device, mean_w, float(readings.std()), duration_s, "power")
    return PowerBaseline(series.device, None, problem=energy.problem)


def measure_idle(
    devices: Sequence[str], duration_s: float = 5.0, *, source: str = "auto", rates: Rates | None = None
) -> dict[str, PowerBaseline]:
    """Samples ``devices`` for ``duration_s`` while nothing runs, and gives each one's mean power.

    Call it before the engine starts (idle GPU), and once the engine is loaded and has nothing to do (loaded idle engine).
    Never raises: a device that cannot be read has ``problem`` set.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-idle-") as folder:
        path = Path(folder) / "idle.arrow"
        with Sampler(path, start, devices=devices, source=source, rates=rates) as sampler:
            begun_s = time.monotonic() - start
            if sampler.error is None:
                time.sleep(duration_s)
            ended_s = time.monotonic() - start
        try:
            series = {} if sampler.error else read_series(path)
        except StoreError as exc:
            return {d: PowerBaseline(d, None, problem=str(exc)) for d in devices}
    missing = sampler.error or "no samples"
    return {
        d: baseline_of(series[d], begun_s, ended_s) if d in series else PowerBaseline(d, None, problem=missing)
        for d in devices
    }
