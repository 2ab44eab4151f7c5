"""The sampling process: ``python -m bench.telemetry.loop``, started by :class:`bench.telemetry.sampler.Sampler`.

It reads one JSON line of settings from standard input, answers ``ready``, and samples until that input ends, which is how
it is stopped and how it notices that its parent was killed. Then it writes its own cost as a last JSON line and exits.
Ticks have absolute deadlines on CLOCK_MONOTONIC: a late tick never moves the ones after it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import sys
import time
from array import array
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.priority import ask_for_short_slices, real_time
from bench.telemetry.columns import SampleWriter, warm_up
from bench.telemetry.source import CPU_DEVICE, Rates, Source, Tick

_PR_SET_TIMERSLACK = 29
_FLUSH_S = 1.0


def clock_pair_ns() -> tuple[int, int]:
    """(wall, monotonic) nanoseconds of one moment: the wall clock is read between two readings of the monotonic one."""
    before = time.monotonic_ns()
    wall = time.time_ns()
    return wall, (before + time.monotonic_ns()) // 2


def open_sources(source: str, devices: list[str], rates: Rates, own_pids: list[int], gpm: bool = True) -> list[Source]:
    """The sources that serve ``devices``: ``auto`` takes the host for ``cpu`` and NVML for the rest.

    Raises:
        BenchError: no driver, an unknown device, or an unreadable recording.
    """
    if source.startswith("replay:"):
        from bench.telemetry.replay import ReplaySource

        return [ReplaySource(source.removeprefix("replay:"), devices)]
    if source != "auto":
        raise BenchError(f'unknown telemetry source "{source}"', next_step="use auto or replay:FILE")
    sources: list[Source] = []
    gpus = [d for d in devices if d != CPU_DEVICE]
    if gpus:
        from bench.telemetry.nvml import NvmlSource

        sources.append(NvmlSource(gpus, rates, own_pids, gpm))
    if CPU_DEVICE in devices:
        from bench.telemetry.host import HostSource

        sources.append(HostSource(rates))
    return sources


class Loop:
    """Ticks, their deadlines, and what they cost."""

    def __init__(self, sources: list[Source], writer: SampleWriter, rates: Rates, t0_monotonic_s: float) -> None:
        self._sources, self._writer, self._rates, self._t0_s = sources, writer, rates, t0_monotonic_s
        self._jitter_s = array("d")
        self._read_s = array("d")
        self._num_missed = 0
        self._num_failed_reads = 0
        self._first_failure: str | None = None
        self._flush_every = max(1, round(_FLUSH_S * rates.fast_hz))
        self._first_pair = self._last_pair = clock_pair_ns()
        self.stopped = False

    def run(self, stop_fd: int) -> None:
        """Samples until ``stop_fd`` reaches its end, :attr:`stopped` is set, or the parent is gone."""
        period_s, parent = self._rates.period_s, os.getppid()
        self._cpu_start_s, self._start_s = time.process_time(), time.monotonic()
        deadline = self._start_s
        index = 0
        while not self.stopped:
            if self._wait_until(deadline, stop_fd):
                break
            woke_s = time.monotonic()
            self._jitter_s.append(woke_s - deadline)
            self._read(index)
            if index % self._flush_every == self._flush_every - 1:
                self._last_pair = clock_pair_ns()
                self._writer.flush(*self._last_pair)
                if os.getppid() != parent:  # a descendant of the parent may still hold our input open
                    break
            now = time.monotonic()
            self._read_s.append(now - woke_s)
            passed = max(1, int((now - deadline) / period_s) + 1)
            self._num_missed += passed - 1
            index += passed
            deadline += passed * period_s

    def _wait_until(self, deadline: float, stop_fd: int) -> bool:
        """True if the stop came before the deadline."""
        while not self.stopped:
            left_s = deadline - time.monotonic()
            ready, _, _ = select.select([stop_fd], [], [], max(0.0, left_s))
            if ready and not os.read(stop_fd, 4096):
                return True
            if left_s <= 0 or time.monotonic() >= deadline:
                return False
        return True

    def _read(self, index: int) -> None:
        tick = Tick(index, self._t0_s, time.time() - time.monotonic())
        for source in self._sources:
            try:
                self._writer.add(source.read(tick))
            except Exception as exc:  # one bad source must not end the others
                self._num_failed_reads += 1
                self._first_failure = self._first_failure or f"{type(exc).__name__}: {exc}"

    def stats(self) -> dict[str, Any]:
        """What goes into the manifest: rates, own cost, deadlines, clocks, and facts of each device."""
        import numpy as np

        elapsed_s = time.monotonic() - self._start_s
        jitter = np.maximum(np.frombuffer(self._jitter_s, dtype=np.float64), 0.0) if self._jitter_s else np.zeros(1)
        reading = np.frombuffer(self._read_s, dtype=np.float64) if self._read_s else np.zeros(1)
        (wall0, mono0), (wall1, mono1) = self._first_pair, self._last_pair
        devices: dict[str, Any] = {}
        for source in self._sources:
            devices.update(source.facts())
        return {
            "rates_hz": {"fast": self._rates.fast_hz, "middle": self._rates.middle_hz, "slow": self._rates.slow_hz},
            "duration_s": elapsed_s,
            "num_samples": self._writer.num_rows,
            "num_ticks": len(self._jitter_s),
            "num_missed_deadlines": self._num_missed,
            "cpu_share_of_one_core": (time.process_time() - self._cpu_start_s) / elapsed_s if elapsed_s else None,
            "jitter_s": {
                "p50": float(np.quantile(jitter, 0.5)),
                "p99": float(np.quantile(jitter, 0.99)),
                "max": float(jitter.max()),
            },
            "read_time_s": {"p50": float(np.quantile(reading, 0.5)), "p99": float(np.quantile(reading, 0.99))},
            "num_failed_reads": self._num_failed_reads,
            "first_failed_read": self._first_failure,
            "num_rows_lost": self._writer.num_rows_lost,
            "write_error": self._writer.error,
            "clock_pairs_ns": {"first": [wall0, mono0], "last": [wall1, mono1]},
            "wall_clock_step_s": ((wall1 - mono1) - (wall0 - mono0)) * 1e-9,
            "devices": devices,
        }


class _WithoutPandas(MetaPathFinder):
    """pyarrow imports pandas, if it is there, at the first array it makes: a third of a second and 50 MB for nothing."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name, name=name)


def _answer(message: dict[str, Any]) -> None:
    # the parent may be gone: then nobody needs the answer
    with contextlib.suppress(OSError):
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()


def _prepare_process(loop: Loop) -> None:
    """Stop signals end the loop; Ctrl-C is the parent's business; the timer wakes us on time."""
    import ctypes

    def stop(*_: object) -> None:
        loop.stopped = True

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)  # ns; the default of 50 us is most of the jitter
        ask_for_short_slices()
    warm_up()
    gc.collect()
    gc.freeze()
    gc.disable()  # nothing here makes cycles, and a collection would make a tick late


def _read_settings() -> dict[str, Any] | None:
    """The first line of standard input, read without buffering so that the rest stays for ``select``."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 1)
        if not part:
            return None
        line += part
    settings: dict[str, Any] = json.loads(line)
    return settings


def main() -> int:
    """0: sampled and stopped. 1: could not start, with the reason as JSON on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.meta_path.insert(0, _WithoutPandas())
    settings = _read_settings()
    if settings is None:
        return 1
    sources: list[Source] = []
    try:
        rates = Rates(**settings["rates"])
        sources = open_sources(
            settings["source"], settings["devices"], rates, settings["own_pids"], bool(settings["gpm"])
        )
        t0_s = float(settings["t0_monotonic_s"])
        wall, monotonic = clock_pair_ns()
        metadata = {"t0_monotonic_s": repr(t0_s), "wall_ns": str(wall), "monotonic_ns": str(monotonic)}
        writer = SampleWriter(Path(settings["path"]), metadata)
    except Exception as exc:
        _answer({"error": str(exc) if isinstance(exc, BenchError) else f"{type(exc).__name__}: {exc}"})
        for source in sources:
            source.close()
        return 1
    loop = Loop(sources, writer, rates, t0_s)
    _prepare_process(loop)
    _answer({"ready": True, "devices": [d for s in sources for d in s.devices]})
    with real_time() as allowed:
        loop.run(0)
    writer.close(*clock_pair_ns())
    _answer({"stats": {**loop.stats(), "real_time": allowed}})
    for source in sources:
        source.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
