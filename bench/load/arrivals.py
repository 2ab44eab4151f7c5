"""When requests are due: pure functions from a seed to due times, in seconds, quantised to nanoseconds.

An arrival process is a unit-rate process (constant, Poisson or gamma gaps) mapped through the inverse of the cumulative
rate, so every process works with every rate profile (steps or ramps). All of it runs before the clock starts, once, in
one place: splitting a schedule over processes never draws again. Gaps are rounded to whole nanoseconds before they are
added up, so the same seed gives the same bytes whatever the CPU's last bit of ``log``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from bench.errors import BadInput

ArrivalKind = Literal["constant", "poisson", "gamma"]


@dataclass(frozen=True, slots=True)
class RateProfile:
    """Request rate over time: ``rates_per_s[k]`` from ``times_s[k]`` on (``step``), or linear between the points
    (``linear``). After the last point the last rate holds. ``times_s`` starts at 0 and ascends.

    Raises:
        BadInput: not ascending, negative rates, or a last rate of 0 (the schedule would never end).
    """

    times_s: tuple[float, ...]
    rates_per_s: tuple[float, ...]
    kind: Literal["step", "linear"] = "step"

    def __post_init__(self) -> None:
        t, r = np.asarray(self.times_s, dtype=float), np.asarray(self.rates_per_s, dtype=float)
        if len(t) == 0 or len(t) != len(r) or t[0] != 0 or not np.all(np.diff(t) > 0):
            raise BadInput(
                f"expected times that start at 0 and ascend, one rate each, got {self.times_s} and {self.rates_per_s}",
                where="rate profile",
            )
        if not np.all(np.isfinite(r)) or r.min() < 0 or r[-1] <= 0:
            raise BadInput(
                f"expected rates >= 0 requests/s and a last rate > 0, got {self.rates_per_s}", where="rate profile"
            )

    @classmethod
    def constant(cls, rate_per_s: float) -> RateProfile:
        return cls((0.0,), (rate_per_s,))

    @classmethod
    def ramp(cls, start_per_s: float, end_per_s: float, duration_s: float) -> RateProfile:
        """Linear from one rate to another over ``duration_s``, then constant."""
        return cls((0.0, duration_s), (start_per_s, end_per_s), "linear")

    def rate_at(self, t_s: float) -> float:
        """Requests per second at time ``t_s``."""
        if self.kind == "linear":
            return float(np.interp(t_s, self.times_s, self.rates_per_s))
        k = int(np.searchsorted(self.times_s, t_s, side="right")) - 1
        return self.rates_per_s[max(k, 0)]

    def expected_requests(self, t_s: float) -> float:
        """Integral of the rate from 0 to ``t_s``."""
        t, r = np.asarray(self.times_s), np.asarray(self.rates_per_s)
        edges = np.append(t[t < t_s], t_s)
        total = 0.0
        for k in range(len(edges) - 1):
            width = edges[k + 1] - edges[k]
            if self.kind == "step":
                total += width * r[k]
            else:
                total += width * (r[k] + self.rate_at(float(edges[k + 1]))) / 2
        return float(total)

    def time_of(self, cumulative: np.ndarray) -> np.ndarray:
        """Inverse of the cumulative rate: when ``cumulative`` expected requests have come. Ascending in, ascending out.

        On a linear piece with rate r0 + a x, the integral r0 x + a x^2 / 2 = c gives x = 2c / (r0 + sqrt(r0^2 + 2 a c)),
        which is exact for a = 0 too.
        """
        t, r = np.asarray(self.times_s, dtype=float), np.asarray(self.rates_per_s, dtype=float)
        widths = np.diff(t)
        if self.kind == "step":
            slope = np.zeros(len(t))
            area = widths * r[:-1]
        else:
            slope = np.append(np.diff(r) / widths, 0.0)
            area = widths * (r[:-1] + r[1:]) / 2
        before = np.concatenate([[0.0], np.cumsum(area)])
        k = np.clip(np.searchsorted(before, cumulative, side="right") - 1, 0, len(t) - 1)
        c = cumulative - before[k]
        root = np.sqrt(np.maximum(r[k] ** 2 + 2 * slope[k] * c, 0.0))
        denominator = r[k] + root
        x = np.divide(2 * c, denominator, out=np.zeros_like(c), where=denominator > 0)
        return t[k] + x


def unit_gaps(kind: ArrivalKind, n: int, rng: np.random.Generator, burstiness: float = 1.0) -> np.ndarray:
    """``n`` gaps of mean 1. Gamma has shape ``burstiness`` as in ``vllm bench serve``: 1 is Poisson, below 1 burstier.

    Its squared coefficient of variation is 1 / burstiness, which is also the index of dispersion of counts over long
    windows.
    """
    if kind == "constant":
        return np.ones(n)
    if kind == "poisson":
        return rng.standard_exponential(n)
    if kind == "gamma":
        if not burstiness > 0:
            raise BadInput(f"expected burstiness > 0, got {burstiness}", where="load.burstiness")
        return rng.standard_gamma(burstiness, n) / burstiness
    raise BadInput(f'unknown arrival process "{kind}"', next_step="write constant, poisson or gamma")


def due_times(
    kind: ArrivalKind, n: int, profile: RateProfile | float, rng: np.random.Generator, *, burstiness: float = 1.0
) -> np.ndarray:
    """``n`` ascending due times in seconds (float64, whole nanoseconds). The first request is due after one gap for the
    random processes and at 0 for the constant one."""
    if isinstance(profile, (int, float)):
        if not profile > 0 or not np.isfinite(profile):
            raise BadInput(f"expected a rate > 0 requests/s, got {profile}", where="load.rate_per_s")
        profile = RateProfile.constant(float(profile))
    gaps = unit_gaps(kind, n, rng, burstiness)
    cumulative = np.cumsum(gaps)
    if kind == "constant":
        cumulative = cumulative - 1.0
    # Quantise in the unit process (1e-12 of a mean gap), then in time: integers add up alike everywhere.
    cumulative = np.rint(cumulative * 1e9) / 1e9
    return np.rint(profile.time_of(cumulative) * 1e9) / 1e9


def due_times_until(
    kind: ArrivalKind,
    duration_s: float,
    profile: RateProfile | float,
    rng: np.random.Generator,
    *,
    burstiness: float = 1.0,
) -> np.ndarray:
    """All due times before ``duration_s``. The number is random for random processes, as it should be."""
    if isinstance(profile, (int, float)):
        profile = RateProfile.constant(float(profile))
    expected = profile.expected_requests(duration_s)
    spread = np.sqrt(expected / max(min(burstiness, 1.0), 1e-6))
    n = int(expected + 8 * spread + 16)
    while True:
        state = rng.bit_generator.state
        times = due_times(kind, n, profile, rng, burstiness=burstiness)
        if times[-1] >= duration_s:
            return times[times < duration_s]
        rng.bit_generator.state = state
        n *= 2


def index_of_dispersion(due_s: np.ndarray, window_s: float) -> float:
    """Variance over mean of the counts in consecutive windows: 1 for Poisson, 1 / burstiness for gamma in long windows,
    about 0 for constant arrivals."""
    num_windows = int(due_s[-1] / window_s)
    counts = np.histogram(due_s, bins=num_windows, range=(0.0, num_windows * window_s))[0]
    return float(counts.var(ddof=1) / counts.mean())
