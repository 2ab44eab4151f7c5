"""Percentiles inside a run, intervals across runs.

The replicate is the run, never the request: requests of one run share its clocks, its temperature and its neighbours, so
an interval over requests would be far too narrow. Nothing is dropped as an outlier; outliers are named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bench.records import Estimate

CONFIDENCE = 0.95
#: From this many runs on the interval is a bootstrap; below, Student's t (a bootstrap of few values is too narrow).
BOOTSTRAP_FROM_RUNS = 10
BOOTSTRAP_RESAMPLES = 4000
#: A run this many (scaled) median absolute deviations from the median is named as an outlier (and kept).
OUTLIER_MADS = 5.0

PERCENTILE_METHOD = "linear interpolation between closest ranks (Hyndman and Fan type 7)"


def percentile(values: np.ndarray, q: float) -> float | None:
    """The ``q``-th percentile (0-100) of ``values`` by linear interpolation between closest ranks (Hyndman-Fan type 7).

    NaN are left out. None when the sample does not allow it: a percentile needs at least one value expected beyond it,
    n * (1 - q/100) >= 1, i.e. 2 values for p50, 10 for p90, 20 for p95, 100 for p99. p50 of one value is that value.
    """
    data = values[~np.isnan(values)]
    if len(data) == 0 or (len(data) * (100.0 - q) < 100.0 - 1e-9 and not (len(data) == 1 and q == 50)):
        return None
    return float(np.percentile(data, q, method="linear"))


def estimate(
    values: Sequence[float],
    unit: str = "",
    *,
    confidence: float = CONFIDENCE,
    nonnegative: bool = True,
    at_most: float | None = None,
) -> Estimate:
    """Mean of one value per run, with the interval of that mean.

    * 1 run: no interval (low and high None).
    * 2 to 9 runs: Student's t, mean ± t(n-1) * s / sqrt(n).
    * 10 and more: bias-corrected accelerated bootstrap (4,000 resamples, fixed seed).

    An interval is cut where the quantity cannot go: at 0 where ``nonnegative``, at ``at_most`` (1 for a share).
    Raises ValueError for no values.
    """
    data = np.asarray(values, dtype=np.float64)
    n = len(data)
    if n == 0:
        raise ValueError("an estimate needs at least one run")
    mean = float(data.mean())
    if n == 1:
        return Estimate(mean, None, None, confidence, "one run: no interval", 1, unit)
    spread = float(data.std(ddof=1))
    if n < BOOTSTRAP_FROM_RUNS:
        half = t_quantile(n - 1, confidence) * spread / math.sqrt(n)
        low, high, method = mean - half, mean + half, f"t, {n} runs"
    else:
        low, high = _bca(data, confidence)
        method = f"BCa bootstrap, {n} runs"
    if nonnegative and mean >= 0:
        low = max(low, 0.0)
    if at_most is not None and mean <= at_most:
        high = min(high, at_most)
    return Estimate(mean, low, high, confidence, method, n, unit)


def t_quantile(degrees: int, confidence: float) -> float:
    """Two-sided Student t quantile: 4.303 for 2 degrees of freedom at 0.95."""
    from scipy.stats import t

    return float(t.ppf(0.5 + confidence / 2, degrees))


def _bca(data: np.ndarray, confidence: float) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval of the mean (Efron 1987)."""
    from scipy.stats import norm

    mean = data.mean()
    if np.ptp(data) == 0:
        return float(mean), float(mean)
    n = len(data)
    rng = np.random.Generator(np.random.PCG64(20260101))
    means = data[rng.integers(0, n, size=(BOOTSTRAP_RESAMPLES, n))].mean(axis=1)
    below = (np.count_nonzero(means < mean) + 0.5 * np.count_nonzero(means == mean)) / BOOTSTRAP_RESAMPLES
    bias = norm.ppf(min(max(below, 1 / BOOTSTRAP_RESAMPLES), 1 - 1 / BOOTSTRAP_RESAMPLES))
    jack = (data.sum() - data) / (n - 1)
    diff = jack.mean() - jack
    denominator = 6 * (diff**2).sum() ** 1.5
    acceleration = (diff**3).sum() / denominator if denominator else 0.0
    ends = []
    for q in ((1 - confidence) / 2, (1 + confidence) / 2):
        z = bias + norm.ppf(q)
        ends.append(float(np.quantile(means, norm.cdf(bias + z / (1 - acceleration * z)))))
    return ends[0], ends[1]


def ratio_estimate(
    a: Sequence[float], b: Sequence[float], *, paired: bool = False, confidence: float = CONFIDENCE
) -> Estimate:
    """a / b as a ratio of geometric means, one value per run on each side, all > 0.

    The interval is taken on the log scale, where it is symmetric: paired (interleaved runs) by t over the logs of the
    pairs' ratios; otherwise by Welch's t over the logs of both sides. No interval where a side has fewer than 2 runs.

    Raises:
        ValueError: a value is not positive, a side is empty, or pairs do not match in number.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if not len(x) or not len(y) or (x <= 0).any() or (y <= 0).any():
        raise ValueError("a ratio needs positive values on both sides")
    if paired and len(x) != len(y):
        raise ValueError(f"{len(x)} and {len(y)} runs do not make pairs")
    lx, ly = np.log(x), np.log(y)
    centre = float(lx.mean() - ly.mean())
    n = min(len(x), len(y))
    if n < 2:
        return Estimate(math.exp(centre), None, None, confidence, "too few runs for an interval", n, "")
    if paired:
        error = float((lx - ly).std(ddof=1)) / math.sqrt(n)
        degrees, method = float(n - 1), f"t over the logs of {n} pairs"
    else:
        vx, vy = float(lx.var(ddof=1)) / len(x), float(ly.var(ddof=1)) / len(y)
        error = math.sqrt(vx + vy)
        total = vx**2 / (len(x) - 1) + vy**2 / (len(y) - 1)
        degrees = (vx + vy) ** 2 / total if total > 0 else float(len(x) + len(y) - 2)
        method = f"Welch t over logs, {len(x)} and {len(y)} runs"
    from scipy.stats import t

    half = float(t.ppf(0.5 + confidence / 2, degrees)) * error
    return Estimate(math.exp(centre), math.exp(centre - half), math.exp(centre + half), confidence, method, n, "")


def outliers(values: Sequence[float]) -> list[int]:
    """Positions of values far from the rest (over 5 scaled median absolute deviations, and over 1 % off). For naming only."""
    data = np.asarray(values, dtype=np.float64)
    if len(data) < 4:
        return []
    median = np.median(data)
    mad = 1.4826 * np.median(np.abs(data - median))
    far = np.abs(data - median)
    return [int(i) for i in np.flatnonzero((far > OUTLIER_MADS * mad) & (far > 0.01 * abs(median)))]
