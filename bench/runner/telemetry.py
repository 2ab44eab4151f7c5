"""The sampler of one run: which devices, which readings, and what goes into the manifest of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.config.experiment import TelemetrySpec
from bench.errors import StoreError
from bench.records import EngineInfo
from bench.telemetry.sampler import Sampler
from bench.telemetry.source import CPU_DEVICE, Rates


class RunTelemetry:
    """What the run's manifest says of its telemetry."""

    def __init__(self, sampler: Sampler | None, devices: Sequence[str]) -> None:
        self._sampler, self._devices = sampler, tuple(devices)

    def facts(self) -> dict[str, Any]:
        """After the run: devices, rates, the sampler's own cost, and why there is none where there is none."""
        if self._sampler is None:
            return {"source": "none", "devices": {}, "error": "turned off in the experiment"}
        return dict(self._sampler.stats)


def devices_of(spec: TelemetrySpec, info: EngineInfo) -> tuple[str, ...]:
    """The GPUs that the engine holds, by UUID, and the host; the host alone where there is no GPU."""
    if spec.source == "host":
        return (CPU_DEVICE,)
    if spec.source == "nvml":
        return info.device_uuids
    return (*info.device_uuids, CPU_DEVICE)


def rates_of(spec: TelemetrySpec) -> Rates:
    """The experiment's rate for the fast group; the slower groups keep their own, at most that fast."""
    usual = Rates()
    return Rates(spec.rate_hz, min(usual.middle_hz, spec.rate_hz), min(usual.slow_hz, spec.rate_hz))


@contextmanager
def sampled(
    spec: TelemetrySpec, path: Path, t0_monotonic_s: float, info: EngineInfo, pids: Sequence[int]
) -> Iterator[RunTelemetry]:
    """Sample while the block runs. Telemetry that cannot be had never fails a run: the manifest says why."""
    if spec.source == "none":
        yield RunTelemetry(None, ())
        return
    devices = devices_of(spec, info)
    with Sampler(path, t0_monotonic_s, devices=devices, rates=rates_of(spec), own_pids=pids, gpm=spec.gpm) as sampler:
        yield RunTelemetry(sampler, devices)


def loaded_idle_power(path: Path, start_s: float, end_s: float) -> dict[str, float | None]:
    """Watts of each sampled device over a window in which the loaded engine had nothing to do; None where not readable."""
    from bench.telemetry.baseline import baseline_of
    from bench.telemetry.series import read_series

    try:
        series = read_series(path)
    except StoreError:
        return {}
    out: dict[str, float | None] = {}
    for device, s in series.items():
        # the sampler needs a moment to come up: the window begins with its first sample
        begin = max(start_s, float(s.t_s[0])) if len(s.t_s) else start_s
        out[device] = baseline_of(s, begin, end_s).power_w
    return out
