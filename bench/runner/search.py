"""Searches over the load of one running engine: the highest level that meets an SLO, and the knee of a saturation sweep.

Pure logic: a probe (one run at a level) is passed in, so the same code drives a real server, the mock and a simulation,
and is tested against known optima. Verdicts are interval-aware: a level is *met* or *not met* only when the interval over
its runs lies on one side of the limit; else it is *unresolved*, more runs are made, and if they do not help the answer
says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from bench.errors import BadInput

Verdict = Literal["met", "not met", "unresolved"]
CONFIDENCE = 0.95
MIN_RUNS, MAX_RUNS = 2, 6


@dataclass(frozen=True, slots=True)
class Margin:
    """How one run stands to one condition: ``value`` must be <= ``limit`` (or >= with ``at_least``). None: undefined."""

    name: str
    value: float | None
    limit: float
    at_least: bool = False

    @property
    def room(self) -> float | None:
        """Distance to the limit relative to it, positive when it is met."""
        if self.value is None:
            return None
        gap = self.value - self.limit if self.at_least else self.limit - self.value
        return gap / abs(self.limit) if self.limit else gap


@dataclass(frozen=True, slots=True)
class Probe:
    """One run at one level: its margins, one per condition."""

    level: float
    margins: tuple[Margin, ...]
    run: str = ""


@dataclass(frozen=True, slots=True)
class LevelResult:
    """All runs at one level and what they say together."""

    level: float
    verdict: Verdict
    probes: tuple[Probe, ...]
    why: str


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found.

    ``highest_met`` is the answer; the true optimum lies in [``highest_met``, ``lowest_not_met``]. ``status``:

    * ``found``: that interval is as narrow as asked for;
    * ``unresolved``: noise allows no verdict at the levels in between (``unresolved_levels``);
    * ``none meets``: not even the lowest level; ``all meet``: even the highest.
    """

    status: Literal["found", "unresolved", "none meets", "all meet"]
    highest_met: float | None
    lowest_not_met: float | None
    unresolved_levels: tuple[float, ...]
    levels: tuple[LevelResult, ...]
    notes: tuple[str, ...] = ()


def _t_quantile(degrees: int, confidence: float) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + confidence / 2, degrees))


def judge(probes: Sequence[Probe], confidence: float = CONFIDENCE) -> tuple[Verdict, str]:
    """The verdict on a level from its runs: Student's t interval of each condition's room over runs.

    A condition without a value in any run (too few requests for its percentile, nothing completed) is unresolved, unless
    another condition is clearly not met.
    """
    rooms: dict[str, list[float | None]] = {}
    for p in probes:
        for m in p.margins:
            rooms.setdefault(m.name, []).append(m.room)
    verdict: Verdict = "met"
    why = []
    for name, values in rooms.items():
        known = [v for v in values if v is not None]
        if len(known) < len(values) or not known:
            verdict = "unresolved" if verdict == "met" else verdict
            why.append(f"{name}: undefined in {len(values) - len(known)} of {len(values)} runs")
            continue
        mean = float(np.mean(known))
        half = math.inf
        if len(known) > 1:
            half = _t_quantile(len(known) - 1, confidence) * float(np.std(known, ddof=1)) / math.sqrt(len(known))
        if mean + half < 0:
            return "not met", f"{name} is beyond its limit by {-mean:.1%}"
        if mean - half < 0:
            verdict = "unresolved"
            why.append(f"{name}: room {mean:+.1%} ± {half:.1%}")
    return verdict, "; ".join(why) or "every limit is met"


@dataclass(slots=True)
class _Levels:
    """Runs levels, each once, with as many repeats as its verdict needs."""

    probe: Callable[[float, int], Probe]
    min_runs: int
    max_runs: int
    confidence: float
    results: dict[float, LevelResult] = field(default_factory=dict)
    on_level: Callable[[LevelResult], None] | None = None

    def verdict(self, level: float) -> Verdict:
        if level not in self.results:
            probes: list[Probe] = []
            verdict: Verdict = "unresolved"
            why = ""
            while len(probes) < self.max_runs:
                probes.append(self.probe(level, len(probes)))
                if len(probes) < self.min_runs:
                    continue
                verdict, why = judge(probes, self.confidence)
                if verdict != "unresolved":
                    break
            result = LevelResult(level, verdict, tuple(probes), why)
            self.results[level] = result
            if self.on_level is not None:
                self.on_level(result)
        return self.results[level].verdict


def find_highest(
    probe: Callable[[float, int], Probe],
    *,
    start: float,
    lowest: float,
    highest: float,
    tolerance_ratio: float = 0.05,
    whole: bool = False,
    min_runs: int = MIN_RUNS,
    max_runs: int = MAX_RUNS,
    confidence: float = CONFIDENCE,
    on_level: Callable[[LevelResult], None] | None = None,
) -> SearchResult:
    """The highest level that meets every condition: doubling from ``start``, then bisection.

    Args:
        probe: called with (level, number of the repeat); makes one run.
        lowest, highest: bounds of the search. whole: levels are whole numbers (a concurrency).
        tolerance_ratio: stop when lowest_not_met <= highest_met x (1 + this), or when whole levels are neighbours.

    Raises:
        BadInput: bounds that make no sense.
    """
    if not 0 < lowest <= start <= highest or not 0 < tolerance_ratio < 1 or not 1 <= min_runs <= max_runs:
        raise BadInput(f"expected 0 < lowest <= start <= highest, got {lowest}, {start}, {highest}", where="search")
    levels = _Levels(probe, min_runs, max_runs, confidence, on_level=on_level)

    def rounded(x: float) -> float:
        return float(round(x)) if whole else float(f"{x:.6g}")

    met, not_met = _bracket(levels, rounded, rounded(start), rounded(lowest), rounded(highest))
    if met is not None and not_met is not None:
        met, not_met = _bisect(levels, rounded, met, not_met, tolerance_ratio, whole)
    return _result(levels, met, not_met, tolerance_ratio, whole)


def _bracket(
    levels: _Levels, rounded: Callable[[float], float], start: float, lowest: float, highest: float
) -> tuple[float | None, float | None]:
    """(a level that is met, a higher one that is not), by doubling up or halving down; None where there is none."""
    level = start
    met: float | None = None
    not_met: float | None = None
    while True:
        verdict = levels.verdict(level)
        if verdict == "met":
            met = level
            if level >= highest or not_met is not None:
                return met, not_met
            level = min(rounded(level * 2), highest)
        elif verdict == "not met":
            not_met = level
            if level <= lowest or met is not None:
                return met, not_met
            level = max(rounded(level / 2), lowest)
        elif met is None and not_met is None:
            # No verdict at the start: look for one on both sides.
            up = min(rounded(level * 2), highest)
            above = levels.verdict(up) if up > level else "unresolved"
            if above == "met":
                met, level = up, min(rounded(up * 2), highest)
                if up >= highest:
                    return met, not_met
                continue
            if above == "not met":
                not_met = up
            if level <= lowest:
                return met, not_met
            level = max(rounded(level / 2), lowest)
        elif met is not None:
            if level >= highest:
                return met, not_met
            level = min(rounded(level * 2), highest)
        else:
            if level <= lowest:
                return met, not_met
            level = max(rounded(level / 2), lowest)


def _narrow(met: float, not_met: float, tolerance_ratio: float, whole: bool) -> bool:
    return not_met <= met * (1 + tolerance_ratio) or (whole and not_met - met <= 1)


def _bisect(
    levels: _Levels, rounded: Callable[[float], float], met: float, not_met: float, tolerance_ratio: float, whole: bool
) -> tuple[float, float]:
    """Close in from both sides around what is unresolved."""
    for _ in range(64):
        if _narrow(met, not_met, tolerance_ratio, whole):
            break
        inside = sorted(x for x, r in levels.results.items() if met < x < not_met and r.verdict == "unresolved")
        # With an unresolved level inside, the gaps to its left and right are what can still be narrowed.
        gaps = [(met, inside[0]), (inside[-1], not_met)] if inside else [(met, not_met)]
        # A level right at the optimum stays unresolved; come closer from both sides so that the whole is narrow.
        finest = tolerance_ratio / 4 if inside else tolerance_ratio
        gaps = [(a, b) for a, b in gaps if not _narrow(a, b, finest, whole)]
        if not gaps:
            break
        low, high = max(gaps, key=lambda g: g[1] / g[0])
        middle = rounded((low + high) / 2)
        if middle in levels.results or not low < middle < high:
            break
        verdict = levels.verdict(middle)
        if verdict == "met":
            met = max(met, middle)
        elif verdict == "not met":
            not_met = min(not_met, middle)
    return met, not_met


def _result(
    levels: _Levels, met: float | None, not_met: float | None, tolerance_ratio: float, whole: bool
) -> SearchResult:
    results = tuple(sorted(levels.results.values(), key=lambda r: r.level))
    unresolved = tuple(
        r.level
        for r in results
        if r.verdict == "unresolved" and (met is None or r.level > met) and (not_met is None or r.level < not_met)
    )
    notes = []
    above = [r.level for r in results if r.verdict == "met" and not_met is not None and r.level > not_met]
    if above:
        notes.append(f"not monotone: {above[0]:g} was met although {not_met:g} was not")
    if met is None and not_met is None:
        status: Literal["found", "unresolved", "none meets", "all meet"] = "unresolved"
    elif met is None:
        status = "unresolved" if unresolved else "none meets"
    elif not_met is None:
        status = "unresolved" if unresolved else "all meet"
    else:
        status = "found" if _narrow(met, not_met, tolerance_ratio, whole) else "unresolved"
    return SearchResult(status, met, not_met, unresolved, results, tuple(notes))


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One run of a saturation sweep."""

    level: float
    throughput_per_s: float
    latency_s: float
    run: str = ""


@dataclass(frozen=True, slots=True)
class Knee:
    """The knee by Kleinrock's power (throughput / latency), and where throughput saturates.

    ``low`` and ``high`` bound the knee over resampled runs; equal when the runs agree. ``saturation_level`` is the lowest
    level whose mean throughput reaches ``SATURATION_RATIO`` of the highest. ``at_edge``: the knee is the first or last
    level swept, so the sweep does not bracket it.
    """

    level: float
    low: float
    high: float
    saturation_level: float
    max_throughput_per_s: float
    at_edge: bool


SATURATION_RATIO = 0.95
_RESAMPLES = 500


def find_knee(points: Sequence[SweepPoint], seed: int = 0) -> Knee:
    """Where more load stops paying: the level with the greatest power, throughput / latency (Kleinrock 1979, "Power and
    deterministic rules of thumb for probabilistic problems in computer communications").

    Raises:
        BadInput: fewer than three levels.
    """
    by_level: dict[float, list[SweepPoint]] = {}
    for p in points:
        by_level.setdefault(p.level, []).append(p)
    levels = sorted(by_level)
    if len(levels) < 3:
        raise BadInput(f"a knee needs at least 3 levels, got {len(levels)}", where="sweep")

    def best(draw: Callable[[list[SweepPoint]], Sequence[SweepPoint]]) -> float:
        power = []
        for level in levels:
            chosen = draw(by_level[level])
            throughput = float(np.mean([p.throughput_per_s for p in chosen]))
            power.append(throughput / max(float(np.mean([p.latency_s for p in chosen])), 1e-12))
        return levels[int(np.argmax(power))]

    rng = np.random.default_rng(seed)
    knee = best(lambda runs: runs)
    drawn = [best(lambda runs: [runs[i] for i in rng.integers(0, len(runs), len(runs))]) for _ in range(_RESAMPLES)]
    low, high = np.percentile(drawn, [2.5, 97.5], method="inverted_cdf")
    means = [float(np.mean([p.throughput_per_s for p in by_level[level]])) for level in levels]
    top = max(means)
    saturation = next(level for level, x in zip(levels, means, strict=True) if x >= SATURATION_RATIO * top)
    return Knee(knee, float(low), float(high), saturation, top, knee in (levels[0], levels[-1]))
