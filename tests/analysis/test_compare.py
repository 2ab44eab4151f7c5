"""Verdicts."""

from __future__ import annotations

import numpy as np

from bench.analysis.compare import TimedValue, are_interleaved, compare, judge
from bench.records import Estimate


def runs(values: list[float], start: float = 0.0, step: float = 2.0) -> list[TimedValue]:
    return [TimedValue(start + i * step, v) for i, v in enumerate(values)]


def test_interleaving_is_seen() -> None:
    a, b = runs([1, 1, 1]), runs([1, 1, 1], start=1.0)
    assert are_interleaved(a, b)  # A B A B A B
    swapped = [TimedValue(0, 1), TimedValue(3, 1)], [TimedValue(1, 1), TimedValue(2, 1)]
    assert are_interleaved(*swapped)  # A B B A
    assert not are_interleaved(runs([1, 1, 1]), runs([1, 1, 1], start=10))
    assert not are_interleaved(runs([1, 1]), runs([1, 1, 1], start=1.0))


def test_faster_and_slower_follow_the_metric() -> None:
    high, low = runs([110, 111, 109, 110]), runs([100, 101, 99, 100], start=1.0)
    assert compare("output_tokens_per_s", high, low).verdict == "faster"
    assert compare("output_tokens_per_s", low, high).verdict == "slower"
    assert compare("tpot_p50_s", high, low).verdict == "slower"


def test_no_difference_needs_a_narrow_interval() -> None:
    a, b = runs([100.0, 100.1, 99.9, 100.0]), runs([100.1, 100.0, 100.0, 99.9], start=1.0)
    assert compare("output_tokens_per_s", a, b).verdict == "no difference"
    wide = runs([90.0, 110.0, 105.0, 96.0])
    assert compare("output_tokens_per_s", wide, b).verdict == "undecided"


def test_too_few_runs_are_undecided_however_far_apart() -> None:
    found = compare("output_tokens_per_s", runs([200.0, 201.0]), runs([100.0, 101.0], start=1.0))
    assert found.verdict == "undecided" and "too few" in found.reason


def test_pairs_see_through_drift() -> None:
    drift = np.array([1.0, 1.3, 0.8, 1.1, 1.4])  # the machine's mood, shared by both of a pair
    a, b = runs(list(103 * drift)), runs(list(100 * drift), start=1.0)
    assert compare("output_tokens_per_s", a, b).verdict == "faster"
    apart = runs(list(100 * drift), start=100.0)
    assert compare("output_tokens_per_s", a, apart).verdict == "undecided"


def test_false_alarms_are_rare() -> None:
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(300):
        a, b = runs(list(rng.normal(100, 3, 5))), runs(list(rng.normal(100, 3, 5)), start=50.0)
        alarms += compare("output_tokens_per_s", a, b).verdict in ("faster", "slower")
    assert alarms / 300 <= 0.09


def test_judge_at_the_borders() -> None:
    def of(low: float, high: float) -> Estimate:
        return Estimate((low + high) / 2, low, high)

    assert judge(of(0.995, 1.005), 3, True)[0] == "no difference"
    assert judge(of(1.001, 1.2), 3, True)[0] == "faster"
    assert judge(of(1.001, 1.2), 3, False)[0] == "slower"
    assert judge(of(0.98, 1.2), 3, True)[0] == "undecided"
    assert judge(of(1.1, 1.2), 2, True)[0] == "undecided"
