"""Write docs/metrics.md from the table of metrics in bench/analysis/metrics.py. A test fails when the page is out of date."""

from __future__ import annotations

from pathlib import Path

from bench.analysis.metrics import PERCENTILES, MetricDef, definitions
from bench.analysis.stats import BOOTSTRAP_FROM_RUNS, PERCENTILE_METHOD

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
_GROUPS = {
    "throughput": "Throughput",
    "latency": "Latency",
    "slo": "Service-level objective",
    "cost": "Cost",
    "energy": "Energy",
    "efficiency": "Efficiency",
    "device": "Devices",
    "engine": "Engine",
    "workload": "Workload",
    "client": "Client",
    "window": "Window",
}
_HEAD = f"""# What every number means

Every report prints the definitions that it used; this page is the same table, written by
`python scripts/write_metric_definitions.py` from `bench/analysis/metrics.py`.

**The replicate is a run, never a request.** A figure of a cell is the mean over its runs, and its interval is at 95 %:
Student's t below {BOOTSTRAP_FROM_RUNS} runs, bootstrap (bias-corrected and accelerated) from there on; one run alone has no
interval. Outliers are named and never dropped. Throughput, TTFT and TPOT of simulated cells carry the 90 % interval
that the prediction states of itself: repeats of a simulation say nothing of its error.

**Percentiles** are taken over the requests of one run by {PERCENTILE_METHOD}. A percentile needs at least one request expected
beyond it (10 for p90, 20 for p95, 100 for p99), in every run of the cell; otherwise it is n/a.

**The counted window.** Warm-up is recorded and never counted. Offline batches count whole, from the first submission to the
last token, filling and draining included. A closed loop counts from the moment its concurrency is in flight until the last
request is sent. An open loop or a trace counts from the moment when the requests in flight first reach the level at which they
settle (their median over the second half of the arrivals) until the last request is sent. A request that found no connection counts
as sent when it was due, as an error. Tokens count when they arrive; latencies
count for requests that were due in the window, even if they end after it. Where this leaves too little the whole run is counted
and marked as not steady; on a GPU a window below 30 s draws a warning.

**Verdicts.** A against B is the ratio of geometric means, with an interval on the log scale; runs that alternate in time are compared
in pairs. The verdict is *faster* or *slower* when the interval lies on one side of 1, *no difference* when it lies within ±1 %,
*undecided* otherwise or with fewer than 3 runs a side.

**The same words elsewhere.** `vllm bench serve` and InferenceX print this TPOT; AIPerf calls it ITL; GuideLLM's TPOT includes the
first token; llmperf's inter-token latency includes TTFT.
"""


def page() -> str:
    """The whole page as Markdown."""
    out = [_HEAD]
    for group, title in _GROUPS.items():
        rows = [d for d in definitions() if d.group == group]
        out += [f"## {title}", "", "| Metric | Key | Unit | Better | Definition |", "|---|---|---|---|---|"]
        out += [f"| {d.title} | {_keys(d)} | {d.unit or '1'} | {d.better} | {d.formula} |" for d in rows]
        out.append("")
    return "\n".join(out)


def _keys(d: MetricDef) -> str:
    if d in definitions()[:6]:
        names = ", ".join(f"p{q}" for q in PERCENTILES)
        return f"`{d.key}_<{names}, mean>_s`"
    return f"`{d.key}`"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
