"""Energy of a window of time from a cumulative counter, with its uncertainty; the same from power, to check it.

The counters of NVIDIA GPUs move in steps of about 100 ms, so reading one at the two ends of a window is wrong by up to a
step at each end. Here the counter is interpolated linearly between the moments at which it was seen to change. What is
left is written down: one counter period times the power, at each end. Since power sensors of A100 and H100 see only part
of the time (Yang, Adamek, Armour, "Part-time power measurements: nvidia-smi's lack of attention", arXiv 2312.02741), a
single window is not to be believed: repeat the run and average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.records import Estimate, Warning_
from bench.telemetry.series import Array, Series
from bench.telemetry.source import CPU_DEVICE
from bench.units import significant

#: Energy per token is refused below this many counter periods, and in any case below ``MIN_WINDOW_S``.
MIN_COUNTER_PERIODS = 20
MIN_WINDOW_S = 2.0
#: Below this a figure is given, with a warning.
SHORT_WINDOW_S = 30.0
#: Counter and integrated power may differ by this share before it is a warning.
MAX_DISAGREEMENT_RATIO = 0.05
# At most this many counter periods may be read beyond the last known change of the counter.
_MAX_EXTRAPOLATED_PERIODS = 2.5


@dataclass(frozen=True, slots=True)
class WindowEnergy:
    """Energy that one device, or several together, took in a window.

    ``energy_j`` is None where it cannot be told; ``problem`` says why. The true value is within ``± uncertainty_j`` as far
    as the counter's resolution goes; the sensor's own error (a few percent) is not in it. ``integrated_j`` is the
    trapezoid over power readings, beside the counter and never instead of it.
    """

    device: str
    start_s: float
    end_s: float
    energy_j: float | None
    uncertainty_j: float = 0.0
    counter_period_s: float | None = None
    integrated_j: float | None = None
    problem: str | None = None
    warnings: tuple[Warning_, ...] = field(default=())

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def mean_power_w(self) -> float | None:
        return None if self.energy_j is None or self.duration_s <= 0 else self.energy_j / self.duration_s

    @property
    def disagreement_ratio(self) -> float | None:
        """Integrated power relative to the counter, minus 1; None where one of them is missing."""
        if self.energy_j is None or self.integrated_j is None or self.energy_j <= 0:
            return None
        return self.integrated_j / self.energy_j - 1.0

    @property
    def min_duration_s(self) -> float:
        """The shortest window from which energy per token may be taken."""
        return max(MIN_WINDOW_S, MIN_COUNTER_PERIODS * (self.counter_period_s or 0.0))

    def estimate(self) -> Estimate | None:
        """The energy with its bounds, in J."""
        if self.energy_j is None:
            return None
        low = max(0.0, self.energy_j - self.uncertainty_j)
        high = self.energy_j + self.uncertainty_j
        return Estimate(self.energy_j, low, high, 1.0, "counter, interpolated; bounds of its resolution", 1, "J")


def change_points(times_s: Array, counter: Array) -> tuple[Array, Array]:
    """The readings at which a counter was first seen with a new value.

    The first reading is not one of them: nobody knows how long the counter had stood there.

    Args:
        times_s, counter: 1-d arrays of one length, ascending times, no NaN.
    """
    changed = np.flatnonzero(np.diff(counter) != 0) + 1
    return times_s[changed], counter[changed]


def window_energy(series: Series, start_s: float, end_s: float) -> WindowEnergy:
    """Energy of one device between two moments of the run, from its counter."""
    integrated = None if series.device == CPU_DEVICE else integrate_power(series, start_s, end_s)

    def refuse(problem: str) -> WindowEnergy:
        return WindowEnergy(series.device, start_s, end_s, None, integrated_j=integrated, problem=problem)

    if end_s <= start_s:
        return refuse("the window is empty")
    lost = series.lost & (series.t_s >= start_s) & (series.t_s <= end_s)
    if lost.any():
        return refuse(f"the GPU was lost at {series.t_s[lost][0]:.1f} s")
    times, counter = _counter_readings(series)
    if len(times) == 0:
        return refuse("this device has no readable energy counter")
    if np.any(np.diff(counter[(times >= start_s - 1) & (times <= end_s + 1)]) < 0):
        return refuse("the energy counter was reset during the window")
    times, counter = _unbroken(times, counter, (start_s + end_s) / 2)
    points_s, points_j = change_points(times, counter)
    if len(points_s) < 2:
        return refuse("the energy counter changed less than twice")
    period_s = float(np.median(np.diff(points_s)))
    reach_s = _MAX_EXTRAPOLATED_PERIODS * period_s
    if start_s < points_s[0] - reach_s or end_s > points_s[-1] + reach_s:
        return refuse("the window is not covered by samples of the energy counter")
    values, slopes_w, gaps_s = _interpolate(points_s, points_j, np.array([start_s, end_s]))
    energy_j = float(values[1] - values[0])
    # where ticks were missed the counter's changes were seen later than a period: the gap itself bounds the error
    uncertainty_j = float(np.sum(slopes_w * np.maximum(period_s, gaps_s)))
    result = WindowEnergy(series.device, start_s, end_s, energy_j, uncertainty_j, period_s, integrated)
    return WindowEnergy(
        series.device, start_s, end_s, energy_j, uncertainty_j, period_s, integrated, warnings=_doubts(result)
    )


def _counter_readings(series: Series) -> tuple[Array, Array]:
    """(driver's stamp or sample time, J) of every reading of the counter, in ascending time."""
    energy = series.columns["energy_j"]
    there = np.isfinite(energy)
    stamps = series.columns["energy_t_s"]
    times = np.where(np.isfinite(stamps), stamps, series.t_s)[there]
    return np.maximum.accumulate(times) if len(times) else times, energy[there]


def _unbroken(times: Array, counter: Array, at_s: float) -> tuple[Array, Array]:
    """The stretch around ``at_s`` in which the counter never went back."""
    breaks = np.flatnonzero(np.diff(counter) < 0) + 1
    if len(breaks) == 0:
        return times, counter
    before = breaks[times[breaks] <= at_s]
    after = breaks[times[breaks] > at_s]
    part = slice(int(before[-1]) if len(before) else 0, int(after[0]) if len(after) else len(times))
    return times[part], counter[part]


def _interpolate(points_s: Array, points_j: Array, at_s: Array) -> tuple[Array, Array, Array]:
    """(counter, power, seconds between the changes around it) at ``at_s``; beyond the outermost points their next segment goes on."""
    segment = np.clip(np.searchsorted(points_s, at_s, side="right") - 1, 0, len(points_s) - 2)
    gaps_s = np.maximum(points_s[segment + 1] - points_s[segment], 1e-9)
    slopes_w = (points_j[segment + 1] - points_j[segment]) / gaps_s
    return points_j[segment] + slopes_w * (at_s - points_s[segment]), slopes_w, gaps_s


def integrate_power(series: Series, start_s: float, end_s: float) -> float | None:
    """Trapezoid over power readings, in J: instantaneous ones, or the driver's 1 s mean where there are no others.

    None where fewer than two readings lie in the window, or where they leave out more than a tenth of it.
    """
    for column in ("power_w", "power_average_w"):
        times, power = series.readings(column)
        if len(times) >= 2:
            break
    else:
        return None
    inside = (times > start_s) & (times < end_s)
    if inside.sum() < 2:
        return None
    uncovered = max(0.0, times[0] - start_s) + max(0.0, end_s - times[-1]) + _gaps(times[inside])
    if uncovered > 0.1 * (end_s - start_s):
        return None
    at = np.concatenate(([start_s], times[inside], [end_s]))
    power_w = np.interp(at, times, power)
    return float(np.sum((power_w[1:] + power_w[:-1]) / 2 * np.diff(at)))


def _gaps(times: Array) -> float:
    """Seconds in gaps of more than a second between readings."""
    gaps = np.diff(times)
    return float(gaps[gaps > 1.0].sum())


def _doubts(energy: WindowEnergy) -> tuple[Warning_, ...]:
    found = []
    if energy.duration_s < SHORT_WINDOW_S:
        found.append(
            Warning_(
                "energy-window-short",
                f"energy of {energy.device} comes from {energy.duration_s:.1f} s; "
                f"the counter's resolution alone leaves ± {significant(energy.uncertainty_j)} J",
                f"measure for at least {SHORT_WINDOW_S:.0f} s, and repeat",
                scope=energy.device,
            )
        )
    gap = energy.disagreement_ratio
    if gap is not None and abs(gap) > MAX_DISAGREEMENT_RATIO:
        found.append(
            Warning_(
                "energy-disagrees",
                f"integrated power of {energy.device} is {gap:+.1%} off its energy counter",
                "repeat the run and average: the power sensor sees only part of the time on A100 and H100 (arXiv 2312.02741)",
                scope=energy.device,
            )
        )
    return tuple(found)


def total_energy(parts: Sequence[WindowEnergy]) -> WindowEnergy:
    """Several devices together over the same window. One that cannot be told makes the sum unknown, never smaller.

    Raises:
        ValueError: no parts, or parts of different windows.
    """
    if not parts or any((p.start_s, p.end_s) != (parts[0].start_s, parts[0].end_s) for p in parts):
        raise ValueError("energies of the same window are needed")
    names = "+".join(p.device for p in parts)
    warnings = tuple(w for p in parts for w in p.warnings)
    problems = [f"{p.device}: {p.problem}" for p in parts if p.energy_j is None]
    start_s, end_s = parts[0].start_s, parts[0].end_s
    if problems:
        return WindowEnergy(names, start_s, end_s, None, problem="; ".join(problems), warnings=warnings)
    integrated = [p.integrated_j for p in parts if p.integrated_j is not None]
    return WindowEnergy(
        device=names,
        start_s=start_s,
        end_s=end_s,
        energy_j=sum(p.energy_j for p in parts if p.energy_j is not None),
        uncertainty_j=sum(p.uncertainty_j for p in parts),
        counter_period_s=max((p.counter_period_s or 0.0) for p in parts),
        integrated_j=sum(integrated) if len(integrated) == len(parts) else None,
        warnings=warnings,
    )


def net_energy_j(gross: WindowEnergy, baseline_w: float | None, baseline_uncertainty_w: float = 0.0) -> Estimate | None:
    """Energy above a baseline (idle GPU before load, or loaded idle engine), in J, with the bounds of both.

    It may come out negative where the load is lost in the noise; that is reported, not hidden.
    """
    if gross.energy_j is None or baseline_w is None:
        return None
    value = gross.energy_j - baseline_w * gross.duration_s
    spread = gross.uncertainty_j + baseline_uncertainty_w * gross.duration_s
    return Estimate(value, value - spread, value + spread, 1.0, "counter minus baseline power × time", 1, "J")


def energy_per_token(energy: WindowEnergy, num_tokens: int, net: Estimate | None = None) -> Estimate | Warning_:
    """J/token of a window, or the reason why there is none.

    Refused below ``MIN_COUNTER_PERIODS`` periods of the counter (2 s for the GPUs' 100 ms): the uncertainty of the ends
    would be a tenth of the figure or more.

    Args:
        energy: of all devices that the engine held.
        num_tokens: tokens of that very window.
        net: energy above a baseline (:func:`net_energy_j`), in place of the gross one.
    """

    def refuse(code: str, message: str, remedy: str) -> Warning_:
        return Warning_(code, message, remedy, scope=energy.device)

    if energy.energy_j is None:
        return refuse(
            "energy-unknown", f"no energy per token: {energy.problem}", "bench doctor says what can be read here"
        )
    if num_tokens <= 0:
        return refuse("energy-unknown", "no energy per token: no tokens in the window", "measure for longer")
    if energy.duration_s < energy.min_duration_s:
        return refuse(
            "energy-window-too-short",
            f"no energy per token: the window is {energy.duration_s:.2f} s, "
            f"less than {energy.min_duration_s:.1f} s ({MIN_COUNTER_PERIODS} periods of the counter)",
            f"measure for at least {SHORT_WINDOW_S:.0f} s",
        )
    joules = net or energy.estimate()
    assert joules is not None
    return joules.scaled(1.0 / num_tokens, "J/token")
