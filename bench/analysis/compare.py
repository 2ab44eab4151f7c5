"""A against B: a ratio with its interval, and one of four verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bench.analysis.metrics import METRICS
from bench.analysis.stats import CONFIDENCE, ratio_estimate
from bench.records import Estimate

Verdict = Literal["faster", "slower", "no difference", "undecided"]
#: Differences within ±1 % are of no consequence to anybody who chooses hardware or settings.
NO_DIFFERENCE_RATIO = 0.01
MIN_RUNS = 3


@dataclass(frozen=True, slots=True)
class Comparison:
    """``ratio`` = A / B of ``metric``; ``verdict`` says what A is against B (for a cost, "faster" reads "better")."""

    metric: str
    ratio: Estimate
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class TimedValue:
    """One run's value with the moment the run started (any clock that both sides share)."""

    started_s: float
    value: float


def are_interleaved(a: Sequence[TimedValue], b: Sequence[TimedValue]) -> bool:
    """True if the runs of both sides alternate in time pair by pair (A B A B or A B B A): then pairs cancel drift."""
    if len(a) != len(b) or not a:
        return False
    order = sorted([(r.started_s, "a") for r in a] + [(r.started_s, "b") for r in b])
    return all({order[i][1], order[i + 1][1]} == {"a", "b"} for i in range(0, len(order), 2))


def compare(
    metric: str,
    a: Sequence[TimedValue],
    b: Sequence[TimedValue],
    *,
    no_difference_ratio: float = NO_DIFFERENCE_RATIO,
    confidence: float = CONFIDENCE,
) -> Comparison:
    """A against B on ``metric`` (a key of METRICS, whose direction tells what is better).

    Interleaved runs are compared in pairs in order of time. The verdict:

    * fewer than 3 runs on a side: undecided.
    * interval of the ratio within 1 ± ``no_difference_ratio``: no difference.
    * interval wholly on one side of 1: faster or slower.
    * otherwise: undecided (more runs could tell).
    """
    a, b = sorted(a, key=lambda r: r.started_s), sorted(b, key=lambda r: r.started_s)
    paired = are_interleaved(a, b)
    ratio = ratio_estimate([r.value for r in a], [r.value for r in b], paired=paired, confidence=confidence)
    higher_is_better = METRICS[metric].better != "lower"
    verdict, reason = judge(ratio, min(len(a), len(b)), higher_is_better, no_difference_ratio)
    return Comparison(metric, ratio, verdict, reason)


def judge(
    ratio: Estimate, num_runs: int, higher_is_better: bool, no_difference_ratio: float = NO_DIFFERENCE_RATIO
) -> tuple[Verdict, str]:
    """The verdict of a ratio, and why."""
    if num_runs < MIN_RUNS or ratio.low is None or ratio.high is None:
        return "undecided", f"{num_runs} runs a side are too few: at least {MIN_RUNS} are needed"
    if ratio.low >= 1 - no_difference_ratio and ratio.high <= 1 + no_difference_ratio:
        return "no difference", f"the whole interval lies within ±{no_difference_ratio:.0%}"
    if ratio.low > 1:
        return ("faster" if higher_is_better else "slower"), "the interval lies above 1"
    if ratio.high < 1:
        return ("slower" if higher_is_better else "faster"), "the interval lies below 1"
    return "undecided", "the interval holds 1 and is too wide to exclude a difference; more repeats narrow it"
