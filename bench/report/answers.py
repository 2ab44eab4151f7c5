"""The summary in words: which configuration is best for throughput, for latency and for cost, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.analysis.compare import MIN_RUNS, judge
from bench.analysis.predicted import is_of_prediction
from bench.analysis.stats import ratio_estimate
from bench.decide.cost import TokenCost
from bench.records import Estimate
from bench.report.layout import Layout, Placed, cell_label
from bench.report.model import Answer
from bench.units import duration_text, significant, usd_text

MAX_WORKLOADS = 4


def interval_text(e: Estimate, text: Callable[[float], str]) -> str:
    """'95 % interval 1.2 – 1.4 over 3 runs' ('90 % interval of the prediction itself ...'), or why there is none."""
    of, over = "", f"over {e.num_runs} runs"
    if is_of_prediction(e):
        of, over = " of the prediction itself", ""
    elif e.low is None and e.method.startswith("simulated"):
        return "No interval is stated by the prediction"
    if e.low is not None and e.high is None:  # a cost whose rate may be as low as 0
        return f"{e.confidence:.0%} interval{of} from {text(e.low)} upwards, without an upper end, {over}".removesuffix(
            ", "
        )
    if e.low is None or e.high is None:
        return f"{e.num_runs} run: no interval" if e.num_runs == 1 else "no interval"
    return f"{e.confidence:.0%} interval{of} {text(e.low)} – {text(e.high)} {over}".rstrip()


def answers(
    layout: Layout, full: dict[str, TokenCost], stated: dict[str, TokenCost], required_ratio: float | None
) -> list[Answer]:
    """Answers for each workload of the sweep (at most four; the tables hold the rest)."""
    out = []
    for panel in layout.panels[:MAX_WORKLOADS]:
        cells = [p for p in layout.answering if p.panel == panel]
        found = [_throughput(cells, panel), _latency(cells, panel), _cost(cells, panel, full, stated)]
        if required_ratio is not None:
            found.append(_under_slo(cells, panel, required_ratio))
        out += [a for a in found if a is not None]
    return out


def _per_run(p: Placed, key: str) -> list[float]:
    return [r.values[key] for r in p.summary.runs if r.values.get(key, 0) > 0]


def rival_text(best: Placed, cells: Sequence[Placed], key: str, higher_is_better: bool) -> str:
    """How the best compares with the runner-up: a ratio with its interval, or that they cannot be told apart."""
    others = [p for p in cells if p is not best and key in p.summary.estimates and _per_run(p, key)]
    if not others or not _per_run(best, key):
        return ""
    second = (max if higher_is_better else min)(others, key=lambda p: p.summary.estimates[key].value)
    ratio = ratio_estimate(_per_run(best, key), _per_run(second, key))
    verdict, _ = judge(ratio, min(len(best.summary.runs), len(second.summary.runs)), higher_is_better)
    name = cell_label(second, panel=False)
    word = "ahead of" if higher_is_better else "below"
    if "simulated" in (best.summary.origin, second.summary.origin):  # repeats of a simulation say nothing of its error
        return f"{abs(ratio.value - 1):.0%} {word} the runner-up, {name}; how sure that order is, repeats of a simulation do not say."
    if verdict == "faster" and ratio.low is not None and ratio.high is not None:
        ends = sorted(abs(1 - v) for v in (ratio.low, ratio.high))
        return f"{abs(ratio.value - 1):.0%} {word} the runner-up, {name} ({ends[0]:.0%} – {ends[1]:.0%})."
    if verdict == "no difference":
        return f"No difference from {name} (within 1 %)."
    if min(len(best.summary.runs), len(second.summary.runs)) < MIN_RUNS:
        return f"Too few runs to tell it from {name} (ratio {_ratio(ratio)}; {MIN_RUNS} a side are needed)."
    return f"Not told apart from {name} by these runs (ratio {_ratio(ratio)})."


def _ratio(e: Estimate) -> str:
    if e.low is None or e.high is None:
        return f"{e.value:.3f}"
    return f"{e.value:.3f}, {e.low:.3f} – {e.high:.3f}"


def _best(cells: Sequence[Placed], key: str, lowest: bool = False) -> Placed | None:
    known = [p for p in cells if key in p.summary.estimates]
    if not known:
        return None
    return (min if lowest else max)(known, key=lambda p: p.summary.estimates[key].value)


def _throughput(cells: Sequence[Placed], panel: str) -> Answer | None:
    best = _best(cells, "output_tokens_per_s")
    if best is None:
        return None
    e = best.summary.estimates
    rate = e["output_tokens_per_s"]
    parts = [interval_text(rate, significant) + "."]
    if "total_tokens_per_s" in e:
        parts.append(f"{significant(e['total_tokens_per_s'].value)} tokens/s with the prompts.")
    parts.append(rival_text(best, cells, "output_tokens_per_s", True))
    caveat = ""
    if "tpot_p50_s" in e and "ttft_p50_s" in e:
        caveat = f"Each user then waits {duration_text(e['ttft_p50_s'].value)} for the first token and {duration_text(e['tpot_p50_s'].value)} for each further one (medians)."
    if best is max(cells, key=lambda p: p.x) and len({p.x for p in cells}) > 1:
        caveat += " It is the largest load of the sweep: a larger one may give more."
    return Answer(
        "Highest throughput",
        cell_label(best, False),
        f"{significant(rate.value)} output tokens/s",
        _join(parts),
        caveat.strip(),
        panel,
    )


def _latency(cells: Sequence[Placed], panel: str) -> Answer | None:
    best = _best(cells, "e2e_p50_s", lowest=True)
    if best is None:
        return None
    e = best.summary.estimates
    parts = []
    if "ttft_p50_s" in e:
        parts.append(f"First token after {duration_text(e['ttft_p50_s'].value)}")
    if "tpot_p50_s" in e:
        parts.append(f"then {duration_text(e['tpot_p50_s'].value)} a token (medians)")
    text = ", ".join(parts) + "." if parts else ""
    whole = f"{interval_text(e['e2e_p50_s'], duration_text)}."
    caveat = ""
    if "output_tokens_per_s" in e:
        caveat = f"It gives {significant(e['output_tokens_per_s'].value)} output tokens/s in all."
    return Answer(
        "Lowest latency", cell_label(best, False), f"{duration_text(e['e2e_p50_s'].value)} for a whole answer (E2E p50)",
        _join([whole, text, rival_text(best, cells, "e2e_p50_s", False)]), caveat, panel,
    )  # fmt: skip


def _cost(
    cells: Sequence[Placed], panel: str, full: dict[str, TokenCost], stated: dict[str, TokenCost]
) -> Answer | None:
    key = "cost_usd_per_million_output_tokens"
    priced = [p for p in cells if p.summary.key in full]
    if not priced:
        return None
    best = min(priced, key=lambda p: full[p.summary.key].estimates[key].value)
    cost = full[best.summary.key]
    e = cost.estimates
    price = cost.price
    parts = [
        f"{interval_text(e[key], usd_text)}.",
        f"{usd_text(e['cost_usd_per_million_blended_tokens'].value)} per million of all tokens.",
    ]
    share = stated.get(best.summary.key)
    if share is not None and share.utilisation < 1:
        parts.append(f"At {share.utilisation:.0%} utilisation: {usd_text(share.estimates[key].value)}.")
    caveat = f"At {usd_text(price.usd_per_hour)} per device-hour ({price.source}), {cost.num_devices} device{'s' if cost.num_devices > 1 else ''}, full use."
    if price.low_usd_per_hour is not None and price.high_usd_per_hour is not None and price.usd_per_hour > 0:
        low, high = (e[key].value * v / price.usd_per_hour for v in (price.low_usd_per_hour, price.high_usd_per_hour))
        caveat += f" Offers range from {usd_text(price.low_usd_per_hour)} to {usd_text(price.high_usd_per_hour)}: {usd_text(low)} to {usd_text(high)} per million."
    figure = f"{usd_text(e[key].value)} per million output tokens"
    return Answer("Lowest cost", cell_label(best, False), figure, _join(parts), caveat, panel)


def _under_slo(cells: Sequence[Placed], panel: str, required_ratio: float) -> Answer | None:
    judged = [p for p in cells if "slo_met_ratio" in p.summary.estimates]
    if not judged:
        return None
    meeting = [p for p in judged if p.summary.estimates["slo_met_ratio"].value >= required_ratio]
    best = _best(meeting, "output_tokens_per_s")
    if best is None:
        near = max(judged, key=lambda p: p.summary.estimates["slo_met_ratio"].value)
        share = near.summary.estimates["slo_met_ratio"].value
        text = f"None meets it for {required_ratio:.0%} of requests; nearest is {cell_label(near, False)} with {share:.1%}."
        return Answer("Highest throughput within the SLO", "none", "not met", text, workload=panel)
    e = best.summary.estimates
    met = e["slo_met_ratio"]
    text = f"{met.value:.1%} of requests meet it ({interval_text(met, lambda v: f'{v:.1%}')})."
    caveat = ""
    if met.low is not None and met.low < required_ratio:
        caveat = f"The interval reaches below the {required_ratio:.0%} asked for: unresolved, more repeats would tell."
    return Answer(
        "Highest throughput within the SLO",
        cell_label(best, False),
        f"{significant(e['output_tokens_per_s'].value)} output tokens/s",
        text,
        caveat,
        panel,
    )


def _join(parts: Sequence[str]) -> str:
    return " ".join(p for p in parts if p)
