"""How far a prediction may be off, by its own word: the intervals in the manifests of simulated runs, carried by their estimates.

Repeats of a simulation differ in the requests that are drawn and in nothing else, so an interval over repeats says nothing of
how far the simulator is off. Throughput, TTFT and TPOT of simulated cells therefore carry the interval that the prediction was
made with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from bench.analysis.run_facts import RunFacts
from bench.analysis.summary import Summary
from bench.records import Estimate

#: In an estimate's ``method``: its interval is that of a prediction, not over repeats.
OF_PREDICTION = "interval of the prediction itself"
_NONE_STATED = "simulated; no interval is stated, and repeats of a simulation give none"
#: Metrics in proportion to the output rate: of one cell, as many requests and prompt tokens go with each output token.
_RATES = frozenset(
    ["output_tokens_per_s", "input_tokens_per_s", "total_tokens_per_s", "output_tokens_per_s_per_gpu",
     "total_tokens_per_s_per_gpu", "requests_per_s"]
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stated:
    """The interval that a prediction was made with: ratios truth / prediction."""

    low_ratio: float
    high_ratio: float
    confidence: float
    basis: str

    @property
    def inverse(self) -> Stated:
        """The same for 1 / the quantity."""
        return replace(self, low_ratio=1 / self.high_ratio, high_ratio=1 / self.low_ratio)


def simulated_facts(facts: RunFacts) -> dict[str, Any]:
    """What the manifest of a simulated run keeps of the prediction's sources; empty for others."""
    found = facts.manifest.get("simulated")
    return found if isinstance(found, dict) else {}


def stated_of(s: Summary) -> dict[str, Stated]:
    """``output_tokens_per_s``, ``ttft``, ``tpot``, ``power`` -> interval, as the manifest of the cell's first run has them."""
    found = simulated_facts(s.facts).get("intervals")
    out = {}
    for metric, entry in found.items() if isinstance(found, dict) else ():
        try:
            low, high, confidence, basis = entry
            out[str(metric)] = Stated(float(low), float(high), float(confidence), str(basis))
        except (TypeError, ValueError):
            continue
    return out


def with_stated(s: Summary) -> Summary:
    """A simulated cell whose throughput, TTFT, TPOT and power carry the prediction's own intervals; any other as it is.

    E2E and ITL, and all of these where none is stated, have no interval: that over repeats would be falsely narrow.
    """
    if s.origin != "simulated":
        return s
    stated = stated_of(s)
    return replace(s, estimates={key: _carried(key, e, stated) for key, e in s.estimates.items()})


def _carried(key: str, e: Estimate, stated: dict[str, Stated]) -> Estimate:
    metric, inverse = _stated_metric(key)
    if metric is None:
        return e if e.low is None else replace(e, method=f"{e.method}: repeats of a simulation, nothing of its error")
    interval = stated.get(metric)
    if interval is None:
        return replace(e, low=None, high=None, method=_NONE_STATED)
    interval = interval.inverse if inverse else interval
    low, high = e.value * interval.low_ratio, e.value * interval.high_ratio
    basis = f" ({interval.basis})" if interval.basis else ""
    # requests that are drawn anew may move a short run by more than the simulator is off
    return replace(
        e,
        low=low if e.low is None else min(low, e.low),
        high=high if e.high is None else max(high, e.high),
        confidence=interval.confidence,
        method=f"{OF_PREDICTION}{basis}",
    )


def _stated_metric(key: str) -> tuple[str | None, bool]:
    """(whose interval holds for a metric of the summary, whether for its inverse); None: for none of them."""
    if key in _RATES:
        return "output_tokens_per_s", False
    if key == "power_w":
        return "power", False
    if key == "output_tokens_per_s_per_user":
        return "tpot", True
    stem = key.rsplit("_", 2)[0].removesuffix("_service")
    # nothing is stated of E2E and ITL, which are latencies all the same
    return (stem, False) if stem in ("ttft", "tpot", "e2e", "itl") and key.endswith("_s") else (None, False)


def is_of_prediction(e: Estimate | None) -> bool:
    """Whether the interval is one that a prediction was made with."""
    return e is not None and e.low is not None and OF_PREDICTION in e.method


def prediction_line(estimates: Iterable[Estimate | None], what: str) -> str:
    """A sentence on what the intervals of simulated numbers are; "" where none is of a prediction."""
    found = sorted({e.confidence for e in estimates if e is not None and is_of_prediction(e)})
    if not found:
        return ""
    shares = " and ".join(f"{c:.0%}" for c in found)
    return f"{what} of simulated throughput: the {shares} interval of the prediction itself, not one over repeats"
