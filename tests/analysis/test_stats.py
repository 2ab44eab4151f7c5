"""Intervals, ratios and percentiles: by hand, and by simulation of their coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.analysis.stats import estimate, outliers, percentile, ratio_estimate, t_quantile


def test_percentile_by_hand() -> None:
    values = np.arange(1.0, 11.0)  # 1..10; type 7: position (n - 1) * q
    assert percentile(values, 50) == 5.5
    assert percentile(values, 90) == pytest.approx(9.1)
    assert percentile(values, 95) is None  # 10 values hold none above p95
    assert percentile(np.arange(100.0), 99) == pytest.approx(98.01)
    assert percentile(np.arange(99.0), 99) is None
    assert percentile(np.array([3.0]), 50) == 3.0
    assert percentile(np.array([np.nan, 1.0, 3.0]), 50) == 2.0
    assert percentile(np.array([]), 50) is None


def test_t_interval_by_hand() -> None:
    e = estimate([10.0, 12.0, 14.0], "tokens/s")
    # mean 12, s = 2, t(2) = 4.3027: half width 4.3027 * 2 / sqrt(3) = 4.968
    assert t_quantile(2, 0.95) == pytest.approx(4.3027, abs=1e-4)
    assert (e.value, e.low, e.high) == (12.0, pytest.approx(7.0317, abs=1e-3), pytest.approx(16.9683, abs=1e-3))
    assert e.method == "t, 3 runs" and e.num_runs == 3 and e.unit == "tokens/s"


def test_one_run_has_no_interval() -> None:
    e = estimate([5.0])
    assert (e.value, e.low, e.high, e.num_runs) == (5.0, None, None, 1)


def test_interval_stops_at_zero_only_for_what_cannot_be_negative() -> None:
    assert estimate([0.1, 2.0]).low == 0.0
    low = estimate([0.1, 2.0], nonnegative=False).low
    assert low is not None and low < 0


def test_no_values_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one run"):
        estimate([])


def test_bootstrap_from_ten_runs_is_deterministic_and_near_t() -> None:
    values = list(np.random.default_rng(3).normal(100, 5, 30))
    a, b = estimate(values), estimate(values)
    assert a == b and "bootstrap" in a.method
    half = t_quantile(29, 0.95) * np.std(values, ddof=1) / math.sqrt(30)
    assert a.low == pytest.approx(np.mean(values) - half, abs=0.5)
    assert estimate([4.0] * 12).low == 4.0


@pytest.mark.parametrize("n", [3, 5, 12])
def test_intervals_cover_the_truth(n: int) -> None:
    rng = np.random.default_rng(n)
    trials = 400
    hits = 0
    for _ in range(trials):
        e = estimate(list(rng.normal(50, 4, n)))
        assert e.low is not None and e.high is not None
        hits += e.low <= 50 <= e.high
    # 95 % nominal; the bootstrap of 12 values is known to be a little narrow
    assert hits / trials >= 0.88
    assert hits / trials <= 0.99


def test_ratio_by_hand() -> None:
    r = ratio_estimate([20.0, 20.0], [10.0, 10.0])
    assert r.value == pytest.approx(2.0) and r.low == pytest.approx(2.0) and r.high == pytest.approx(2.0)
    # pairs cancel what both share: 2x exactly in every pair although the pairs differ a lot
    paired = ratio_estimate([20.0, 40.0, 80.0], [10.0, 20.0, 40.0], paired=True)
    assert paired.low == pytest.approx(2.0) and paired.high == pytest.approx(2.0)
    loose = ratio_estimate([20.0, 40.0, 80.0], [10.0, 20.0, 40.0])
    assert loose.low is not None and loose.low < 1 < 2 < (loose.high or 0)


def test_ratio_refuses_what_has_none() -> None:
    with pytest.raises(ValueError, match="positive"):
        ratio_estimate([1.0], [0.0])
    with pytest.raises(ValueError, match="pairs"):
        ratio_estimate([1.0, 2.0], [1.0], paired=True)
    assert ratio_estimate([3.0], [2.0]).low is None


@given(st.lists(st.floats(0.1, 1e6), min_size=2, max_size=20), st.lists(st.floats(0.1, 1e6), min_size=2, max_size=20))
def test_ratio_turned_round_is_its_inverse(a: list[float], b: list[float]) -> None:
    there, back = ratio_estimate(a, b), ratio_estimate(b, a)
    assert there.value == pytest.approx(1 / back.value, rel=1e-6)
    assert there.low is not None and there.high is not None and there.low <= there.value * (1 + 1e-9)
    assert there.value <= there.high * (1 + 1e-9)


@given(st.lists(st.floats(1e-3, 1e9), min_size=2, max_size=25))
def test_estimates_lie_within_their_interval(values: list[float]) -> None:
    e = estimate(values)
    assert e.low is not None and e.high is not None
    assert e.low <= e.value * (1 + 1e-9) and e.value <= e.high * (1 + 1e-9) + 1e-12


def test_outliers_are_named() -> None:
    assert outliers([100, 101, 99, 100, 60]) == [4]
    assert outliers([100, 100, 100, 100.4]) == []  # far in deviations, but within 1 %
    assert outliers([1, 2, 3]) == []


def test_a_share_is_never_above_one() -> None:
    e = estimate([0.99, 1.0, 0.97], at_most=1.0)
    assert e.high == 1.0 and e.low is not None and e.low < 0.97
