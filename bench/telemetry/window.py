"""What the samples of a window say besides energy: throttling, clocks, power limit, temperature, activity.

Pure functions of samples. Limits and maxima come from the sampler's facts of each device (``stats["devices"]``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bench.records import Warning_
from bench.telemetry.energy import WindowEnergy, window_energy
from bench.telemetry.series import Series
from bench.telemetry.source import CPU_DEVICE

THROTTLE_COLUMNS = {
    "throttled_sw_power_s": "power cap",
    "throttled_sync_boost_s": "sync boost",
    "throttled_sw_thermal_s": "thermal, by software",
    "throttled_hw_thermal_s": "thermal, by hardware",
    "throttled_hw_power_s": "power brake",
}
#: nvml.h, nvmlClocksEventReasons: what the bits of ``throttle_reasons`` mean.
REASON_BITS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal, by software",
    0x40: "thermal, by hardware",
    0x80: "power brake",
    0x100: "display clocks",
}
#: A reading this close to the limit counts as at the limit (the driver regulates around it).
AT_LIMIT_RATIO = 0.97
_THROTTLED_WARNING_RATIO = 0.01
_CLOCK_DROP_WARNING_RATIO = 0.10
_DRIFT_WARNING_C = 10.0


@dataclass(frozen=True, slots=True)
class WindowReport:
    """One device over one window. None = not readable here.

    ``throttled_s`` maps a reason to seconds; ``clock_drop_ratio`` is 1 - mean SM clock / the clock's maximum;
    ``at_power_limit_ratio`` the share of time within 3 % of the limit; ``temperature_drift_c`` last tenth minus first
    tenth of the window. ``means`` holds time-weighted means of the utilisation and activity columns, ``num_samples`` the
    rows in the window.
    """

    device: str
    start_s: float
    end_s: float
    num_samples: int
    energy: WindowEnergy
    throttled_s: dict[str, float]
    clock_drop_ratio: float | None
    at_power_limit_ratio: float | None
    temperature_drift_c: float | None
    max_temperature_c: float | None
    max_memory_used_bytes: int | None
    num_foreign_processes: int | None
    means: dict[str, float] = field(default_factory=dict)
    warnings: tuple[Warning_, ...] = ()


MEAN_COLUMNS = (
    "power_w",
    "gpu_util_ratio",
    "memory_util_ratio",
    "sm_active_ratio",
    "sm_occupancy_ratio",
    "tensor_active_ratio",
    "dram_bandwidth_ratio",
    "pcie_tx_bytes_per_s",
    "pcie_rx_bytes_per_s",
    "nvlink_tx_bytes_per_s",
    "nvlink_rx_bytes_per_s",
    "sm_clock_hz",
    "memory_clock_hz",
    "temperature_c",
    "memory_used_bytes",
)


def mean_in(series: Series, column: str, start_s: float, end_s: float) -> float | None:
    """Time-weighted mean of a reading over a window: each reading stands until halfway to its neighbours.

    None without a reading in the window.
    """
    times, values = series.readings_in(column, start_s, end_s)
    if len(times) == 0:
        return None
    return float(np.average(values, weights=_weights(times, start_s, end_s)))


def share_of_time(series: Series, column: str, at_least: float, start_s: float, end_s: float) -> float | None:
    """Share (0-1) of the window during which a reading was ``at_least`` this; None without a reading."""
    times, values = series.readings_in(column, start_s, end_s)
    if len(times) == 0:
        return None
    weights = _weights(times, start_s, end_s)
    return float(weights[values >= at_least].sum() / weights.sum())


def _weights(times: np.ndarray, start_s: float, end_s: float) -> np.ndarray:
    edges = np.concatenate(([start_s], (times[1:] + times[:-1]) / 2, [end_s]))
    weights = np.diff(edges)
    return weights if weights.sum() > 0 else np.ones(len(times))


def counted_in(series: Series, column: str, start_s: float, end_s: float) -> float | None:
    """How much a cumulative counter grew in a window, interpolated between readings; None where it is not readable,
    was reset, or the window is not covered."""
    times, values = series.readings(column)
    if len(times) < 2 or times[0] > start_s + 1.5 or times[-1] < end_s - 1.5:
        return None
    near = values[(times >= start_s) & (times <= end_s)]
    if np.any(np.diff(near) < 0):
        return None
    first, last = np.interp([start_s, end_s], times, values)
    return float(max(0.0, last - first))


def throttled_s(series: Series, start_s: float, end_s: float) -> dict[str, float]:
    """Reason -> seconds of the window during which the clocks were held back. Reasons that are not readable are left out."""
    found = {}
    for column, reason in THROTTLE_COLUMNS.items():
        seconds = counted_in(series, column, start_s, end_s)
        if seconds is not None:
            found[reason] = min(seconds, end_s - start_s)
    return found


def temperature_drift_c(series: Series, start_s: float, end_s: float) -> float | None:
    """Mean temperature of the window's last tenth minus that of its first; None with fewer than two readings."""
    times, values = series.readings_in("temperature_c", start_s, end_s)
    if len(times) < 2:
        return None
    tenth = max(1, len(times) // 10)
    return float(values[-tenth:].mean() - values[:tenth].mean())


def reasons_text(mask: int) -> str:
    """The bits of a throttle mask in words: 0x24 -> 'power cap, thermal, by software'."""
    return ", ".join(name for bit, name in REASON_BITS.items() if mask & bit) or "none"


def report_window(series: Series, facts: Mapping[str, Any], start_s: float, end_s: float) -> WindowReport:
    """Everything about one device in one window, with its doubts.

    Args:
        series: the device's samples.
        facts: the sampler's facts of this device (``stats["devices"][device]``); missing ones give None.
        start_s, end_s: seconds since the run's start.
    """
    max_clock, limit_w = facts.get("max_sm_clock_hz"), facts.get("power_limit_w")
    clock = mean_in(series, "sm_clock_hz", start_s, end_s)
    _, temperatures = series.readings_in("temperature_c", start_s, end_s)
    _, memory = series.readings_in("memory_used_bytes", start_s, end_s)
    _, foreign = series.readings_in("num_foreign_processes", start_s, end_s)
    at_limit = None
    if limit_w:
        at_limit = share_of_time(series, "power_w", AT_LIMIT_RATIO * limit_w, start_s, end_s)
        if at_limit is None:
            at_limit = share_of_time(series, "power_average_w", AT_LIMIT_RATIO * limit_w, start_s, end_s)
    means = {c: m for c in MEAN_COLUMNS if (m := mean_in(series, c, start_s, end_s)) is not None}
    report = WindowReport(
        device=series.device,
        start_s=start_s,
        end_s=end_s,
        num_samples=int(((series.t_s >= start_s) & (series.t_s <= end_s)).sum()),
        energy=window_energy(series, start_s, end_s),
        throttled_s=throttled_s(series, start_s, end_s),
        clock_drop_ratio=1.0 - clock / max_clock if clock is not None and max_clock else None,
        at_power_limit_ratio=at_limit,
        temperature_drift_c=temperature_drift_c(series, start_s, end_s),
        max_temperature_c=float(temperatures.max()) if len(temperatures) else None,
        max_memory_used_bytes=int(memory.max()) if len(memory) else None,
        num_foreign_processes=int(foreign.max()) if len(foreign) else None,
        means=means,
    )
    return _with_warnings(report, bool(series.lost.any()))


def _with_warnings(report: WindowReport, lost: bool) -> WindowReport:
    device, duration_s = report.device, report.end_s - report.start_s
    found = list(report.energy.warnings)

    def warn(code: str, message: str, remedy: str) -> None:
        found.append(Warning_(code, message, remedy, scope=device))

    if lost:
        found.append(
            Warning_(
                "gpu-lost", f"the driver lost {device} during the run", "see dmesg for its Xid error", "serious", device
            )
        )
    for reason, seconds in report.throttled_s.items():
        if seconds > _THROTTLED_WARNING_RATIO * duration_s:
            share = f"{seconds:.1f} s of {duration_s:.1f} s"
            remedy = (
                "cool the machine, or wait"
                if "thermal" in reason
                else "raise the power limit, or state it with the result"
            )
            warn("clocks-throttled", f"{device}: clocks were held back for {share} ({reason})", remedy)
    drop = report.clock_drop_ratio
    if drop is not None and drop > _CLOCK_DROP_WARNING_RATIO and report.means.get("gpu_util_ratio", 0) > 0.5:
        warn(
            "clocks-low",
            f"{device}: SM clock {drop:.0%} below its maximum on average",
            "state the clocks with the result",
        )
    drift = report.temperature_drift_c
    if drift is not None and abs(drift) > _DRIFT_WARNING_C:
        warn("temperature-drifts", f"{device}: {drift:+.0f} °C over the window", "warm up for longer before measuring")
    if report.num_foreign_processes:
        what = f"{report.num_foreign_processes} process(es) not of this benchmark ran on {device}"
        warn("foreign-process", what, "end them, or measure on another GPU, and repeat the run")
    if report.num_samples == 0:
        warn("no-telemetry", f"no samples of {device} in the window", "see telemetry.error in the run's manifest")
    return replace(report, warnings=tuple(found))


def cross_check_activity(
    device: str,
    *,
    mfu: float | None,
    mbu: float | None,
    tensor_active_ratio: float | None,
    dram_bandwidth_ratio: float | None,
) -> tuple[Warning_, ...]:
    """Lays MFU and MBU by arithmetic beside the measured activity of tensor cores and DRAM (Hopper and newer).

    A tensor pipe that is active 30 % of the time cannot have done 40 % of the peak FLOP/s; DRAM busy at 50 % cannot have
    moved 70 % of the peak bytes. The converse is no contradiction: dense math at low efficiency keeps the pipes active.
    A tenth is allowed for sampling and for peaks quoted at other clocks.
    """
    found = []
    pairs = (
        ("mfu-contradicted", "MFU", mfu, "tensor cores active", tensor_active_ratio),
        ("mbu-contradicted", "MBU", mbu, "DRAM bandwidth used", dram_bandwidth_ratio),
    )
    for code, name, computed, what, measured in pairs:
        if computed is None or measured is None or device == CPU_DEVICE:
            continue
        if computed > measured * 1.1 + 0.02:
            found.append(
                Warning_(
                    code,
                    f"{name} by arithmetic is {computed:.0%}, but {device} reports {what} {measured:.0%}",
                    "check the peak, the dtype and the model's arithmetic behind this figure",
                    scope=device,
                )
            )
    return tuple(found)
