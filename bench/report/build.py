"""From an experiment's results to a Report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench import __version__
from bench.analysis.checks import SEVERITIES, worst
from bench.analysis.efficiency import hardware_of
from bench.analysis.flat import flatten
from bench.analysis.metrics import METRICS, definitions
from bench.analysis.stats import BOOTSTRAP_FROM_RUNS, PERCENTILE_METHOD
from bench.analysis.summary import Summary, Yardsticks
from bench.catalog.slo import Slo, load_slo
from bench.decide.cost import DEFAULT_OUTPUT_PRICE_RATIO, Price, TokenCost, token_cost
from bench.decide.device_price import device_price
from bench.records import Estimate, Warning_
from bench.report import answers as words
from bench.report import figures, tables
from bench.report.collect import Collected, collect, measured_ceilings, planned_experiment, side_by_side
from bench.report.layout import Layout, Placed, lay_out
from bench.report.model import Chart, Doubt, Failure, Report, Table
from bench.report.prediction import intervals_text, prediction_table, stated_intervals
from bench.report.roofline_chart import rooflines
from bench.report.timeline import timeline


@dataclass(frozen=True, slots=True)
class Options:
    """What the user says beside the experiment: each wins over the experiment's own."""

    gpu_price_usd_per_hour: float | None = None
    utilisation: float | None = None
    slo: str | None = None


def build(
    folder: Path, options: Options | None = None, beside: Sequence[Path] = ()
) -> tuple[Report, Collected, Layout]:
    """Read the results in ``folder``, and in the folders ``beside`` it to compare with, and make the report.

    Raises:
        BadInput: no cell has a complete run, or an option cannot be used.
    """
    options = options or Options()
    slo = slo_of(folder, options)
    data = collect(folder, Yardsticks(slo, measured_ceilings(folder)))
    if beside:
        data = side_by_side(data, [collect(f, Yardsticks(slo, measured_ceilings(f))) for f in beside])
    layout = lay_out(data.summaries)
    utilisation = options.utilisation or (data.experiment.utilisation if data.experiment is not None else 0.5)
    full, stated, price, price_doubts, no_price = _costs(data, options, utilisation)
    charts, missing = _charts(data, layout, full, stated, no_price)
    report = Report(
        title=data.name,
        why=data.experiment.why.strip() if data.experiment is not None else "",
        created_utc=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        state=_state(data),
        origin_label=figures.origin_label(data.summaries),
        answers=tuple(words.answers(layout, full, stated, slo.required_ratio if slo else None))
        if layout.placed
        else (),
        keep_in_mind=(),
        charts=tuple(charts),
        tables=tuple(_tables(layout, full, stated, slo)) if layout.placed else (),
        doubts=tuple(_doubts(data.summaries, price_doubts)),
        failures=grouped(data.failures),
        definitions=definitions(),
        statements=tuple(_statements(data, price, no_price, utilisation, slo)),
        provenance=_provenance(data.summaries),
        configuration=data.resolved_text,
        version=__version__,
        missing_charts=tuple(missing),
        derived=_derived(layout, full, stated),
        setup=setup_line(data.summaries),
        intervals=intervals_text(data.summaries),
    )
    return _with_reminders(report, data), data, layout


def slo_of(folder: Path, options: Options) -> Slo | None:
    """The SLO that goodput is counted against: the option's, else the experiment's."""
    experiment = planned_experiment(folder)
    text = options.slo or (experiment.slo if experiment is not None else None)
    return load_slo(text) if text else None


def _costs(
    data: Collected, options: Options, utilisation: float
) -> tuple[dict[str, TokenCost], dict[str, TokenCost], Price | None, list[Warning_], str]:
    full: dict[str, TokenCost] = {}
    stated: dict[str, TokenCost] = {}
    shown: Price | None = None
    doubts: dict[str, Warning_] = {}
    why = "no cell has a complete run"
    for s in data.summaries:
        price, found, why_not = device_price(data.experiment, s.facts, options.gpu_price_usd_per_hour)
        doubts |= {w.message: w for w in found}
        if price is None:
            why = why_not
            continue
        output, total = s.estimates.get("output_tokens_per_s"), s.estimates.get("total_tokens_per_s")
        if output is None or total is None or not output.value > 0:
            why = "nothing was produced"
            continue
        shown = shown or price
        prompt = max(0.0, total.value - output.value)
        full[s.key] = token_cost(price, s.num_devices, output, total, prompt)
        stated[s.key] = token_cost(price, s.num_devices, output, total, prompt, utilisation=utilisation)
    return full, stated, shown, list(doubts.values()), "" if full else why


def _charts(
    data: Collected, layout: Layout, full: dict[str, TokenCost], stated: dict[str, TokenCost], no_price: str
) -> tuple[list[Chart], list[tuple[str, str]]]:
    if not layout.placed:
        return [], [("all charts", "no cell has a complete run")]
    wanted = (
        ("Throughput", figures.throughput(layout), "no tokens were produced"),
        ("Latency", figures.latency(layout), "no latency was recorded"),
        ("Throughput against speed for each user", figures.interactivity(layout), "TPOT is undefined here"),
        ("Cost per million output tokens", figures.cost(layout, full, stated), no_price),
        (
            "Tensor-parallel scaling",
            figures.tp_scaling(layout),
            "only one tensor_parallel_size has results at the same load",
        ),
        ("Utilisation, memory and power over time", timeline(data, layout), "no telemetry was recorded"),
        *rooflines(data.folder, [s for s in data.summaries if s.source == data.summaries[0].source]),
    )
    return [c for _, c, _ in wanted if c is not None], [(t, why) for t, c, why in wanted if c is None]


def _tables(layout: Layout, full: dict[str, TokenCost], stated: dict[str, TokenCost], slo: Slo | None) -> list[Table]:
    scaling = _scaling(layout)

    def lookup(p: Placed, key: str) -> Estimate | None:
        if key == "tp_scaling_ratio":
            return scaling.get(p.summary.key)
        return p.summary.estimates.get(key)

    goal = f"SLO: {slo.text}." if slo is not None else ""
    found = [
        tables.metric_table("throughput", "Throughput", layout, tables.THROUGHPUT, lookup, goal),
        tables.metric_table("latency", "Latency", layout, tables.LATENCY, lookup),
        prediction_table(layout),
        tables.cost_table(layout, full, stated, DEFAULT_OUTPUT_PRICE_RATIO),
        tables.metric_table("devices", "Devices and energy", layout, tables.DEVICES, lookup),
        tables.metric_table("engine", "Engine and workload", layout, tables.ENGINE, lookup),
        tables.runs_table(layout),
    ]
    return [t for t in found if t is not None]


def _scaling(layout: Layout) -> dict[str, Estimate]:
    out = {}
    for panel in layout.panels:
        cells = [p for p in layout.placed if p.panel == panel and "output_tokens_per_s" in p.summary.estimates]
        if not cells:
            continue
        smallest = min(p.summary.facts.tensor_parallel_size for p in cells)
        for p in cells:
            e = figures.scaling_of(p, cells, smallest)
            if e is not None:
                out[p.summary.key] = e
    return out


def _derived(
    layout: Layout, full: dict[str, TokenCost], stated: dict[str, TokenCost]
) -> dict[str, dict[str, Estimate]]:
    """What the report computes beyond the summaries, for cells.csv: costs at full and stated use, TP scaling."""
    out: dict[str, dict[str, Estimate]] = {}
    for key, cost in full.items():
        out.setdefault(key, {}).update(cost.estimates)
    for key, cost in stated.items():
        if cost.utilisation < 1:
            named = {f"{name}_at_{cost.utilisation:g}_utilisation": e for name, e in cost.estimates.items()}
            out.setdefault(key, {}).update(named)
    for key, e in _scaling(layout).items():
        out.setdefault(key, {})["tp_scaling_ratio"] = e
    return out


def _state(data: Collected) -> str:
    more = data.num_runs_planned is not None and data.num_runs_complete > data.num_runs_planned  # run again on purpose
    planned = "" if data.num_runs_planned is None or more else f" of {data.num_runs_planned}"
    text = f"{data.num_runs_complete}{planned} runs complete, {len(data.summaries)} of {len(data.cells)} cells have results"
    if data.num_runs_planned is not None and data.num_runs_complete < data.num_runs_planned:
        text += "; `bench run` continues where it stopped"
    if data.stale:
        one = len(data.stale) == 1
        text += f"; {len(data.stale)} cell{'' if one else 's'} of an earlier configuration {'is' if one else 'are'} left out"
    return text


def _doubts(summaries: Sequence[Summary], more: Sequence[Warning_]) -> list[Doubt]:
    """Warnings of all cells, one entry a code (with the message of its worst cell), the serious ones first."""
    by_code: dict[str, list[Warning_]] = {}
    for s in summaries:
        for w in s.warnings:
            by_code.setdefault(w.code, []).append(w)
    for w in more:
        by_code.setdefault(w.code, []).append(w)
    found = [Doubt(worst(same), tuple(dict.fromkeys(w.scope for w in same if w.scope))) for same in by_code.values()]
    return sorted(found, key=lambda d: (SEVERITIES.index(d.warning.severity), d.warning.code))


def _with_reminders(report: Report, data: Collected) -> Report:
    from dataclasses import replace

    lines = []
    if report.origin_label:
        lines.append(f"These numbers are {report.origin_label}.")
    lines += stated_intervals(data.summaries)
    if len({s.origin for s in data.summaries}) > 1:
        lines.append(
            "The answers above consider measured cells alone wherever there are any; charts show both, by name."
        )
    if data.summaries and all(s.origin == "measured" and not s.facts.on_gpu for s in data.summaries):
        lines.append("Measured on a CPU: good for the method and for comparing settings, not for what a GPU would do.")
    for d in report.doubts:
        if d.warning.code in ("simulated", "imported"):
            continue
        if d.warning.severity != "note" or d.warning.code == "dummy-weights":
            lines.append(
                f"{_sentence(d.warning.message)} ({_cells(d, len(data.summaries))}). {_sentence(d.warning.remedy)}."
            )
    bad = [f for f in report.failures if f.what != "skipped"]
    if bad:
        lines.append(f"{len({c for f in bad for c in f.cells})} cells are incomplete or failed: see the list below.")
    return replace(report, keep_in_mind=tuple(lines))


def grouped(failures: Sequence[Failure]) -> tuple[Failure, ...]:
    """Failures of one kind, reason and log put together, in the order in which they first come up."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for f in failures:
        found.setdefault((f.what, f.reason, f.log_tail), []).extend(f.cells)
    return tuple(Failure(tuple(cells), what, reason, log) for (what, reason, log), cells in found.items())


def _cells(doubt: Doubt, num_cells: int) -> str:
    n = len(doubt.cells)
    if n == 0:
        return "all cells"
    return "all cells" if n == num_cells else f"{n} of {num_cells} cells"


def _sentence(text: str) -> str:
    return (text[:1].upper() + text[1:]).rstrip(".")


def _statements(
    data: Collected, price: Price | None, no_price: str, utilisation: float, slo: Slo | None
) -> list[tuple[str, str]]:
    out = [
        ("Intervals", f"95 % intervals over repeats (the replicate is a run, never a request): Student's t below {BOOTSTRAP_FROM_RUNS} runs, bootstrap (BCa) from there on. No run is dropped as an outlier."),
        ("Percentiles", f"Over the requests of one run, by {PERCENTILE_METHOD}; the estimate is their mean over runs. A percentile that a run's sample does not allow is n/a (p99 needs 100 requests)."),
        ("Counted window", _windows(data.summaries)),
        ("Token counts", f"As counted by: {', '.join(sorted({t for s in data.summaries for r in s.runs for t in r.token_sources})) or 'not recorded'}."),
    ]  # fmt: skip
    if any(s.origin == "simulated" for s in data.summaries):
        out.append(("Intervals of simulated cells", "Throughput, TTFT, TPOT and costs carry the interval that the prediction states of itself (see its basis in cells.csv), at least as wide as that over repeats; none where it states none."))  # fmt: skip
    if price is not None:
        dated = f", {price.as_of}" if price.as_of else ""
        text = f"{price.usd_per_hour:g} USD per device-hour: {price.source}{dated}."
        if price.low_usd_per_hour is not None:
            text += f" Offers range from {price.low_usd_per_hour:g} to {price.high_usd_per_hour:g} USD."
        out.append(("Price", text + f" Also stated at {utilisation:.0%} utilisation."))
    else:
        out.append(("Price", _sentence(no_price) + "."))
    if slo is not None:
        out.append(("SLO", f"{slo.text}{f' ({slo.name}: {slo.source})' if slo.name else ''}"))
    peaks = {p for s in data.summaries for r in s.runs for p in r.peaks.items()}
    out += [(f"Peak for {METRICS[k].title}", text) for k, text in sorted(peaks)]
    return out


def setup_line(summaries: Sequence[Summary]) -> str:
    """What was measured on what: "llama-3.1-8b (random weights), vllm 0.32.0, NVIDIA H100 80GB HBM3"."""
    models, engines, devices = dict[str, None](), dict[str, None](), dict[str, None]()
    for s in summaries:
        f = s.facts
        if f.spec is not None:
            models[f.spec.model + (" (random weights)" if f.spec.weights == "dummy" else "")] = None
        elif f.manifest.get("model"):
            models[str(f.manifest["model"])] = None
        engines[f"{f.engine.get('kind') or ''} {f.engine.get('version') or ''}".strip()] = None
        hardware = hardware_of(f)
        found = f.fingerprint_devices
        if f.origin == "simulated" and hardware is not None:
            devices[hardware.name] = None
        elif f.origin == "imported":
            devices[str(f.axes.get("gpu") or "device unknown")] = None
        elif f.on_gpu and found:
            devices[found[0]] = None
        else:
            cores = f.cpu.get("num_usable") or f.cpu.get("num_cores")
            devices[str(f.cpu.get("model") or "CPU") + (f", {cores} cores" if cores else "")] = None
    return ", ".join(" and ".join(p for p in part if p) for part in (models, engines, devices) if any(part))


def _windows(summaries: Sequence[Summary]) -> str:
    reasons: dict[str, int] = {}
    for s in summaries:
        for r in s.runs:
            if r.window is not None:
                text = f"{r.window.kind}: {r.window.reason}"
                reasons[text] = reasons.get(text, 0) + 1
    return "; ".join(f"{text} ({n} runs)" for text, n in reasons.items()) or "no run was counted"


def _provenance(summaries: Sequence[Summary]) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """Section -> (name, value): of the first cell; cells whose machine differs cannot be in one experiment."""
    if not summaries:
        return ()
    facts = summaries[0].facts
    sections: dict[str, Any] = {
        "engine": {k: v for k, v in facts.engine.items() if k not in ("pids", "effective_args")}
    }
    sections["engine arguments (of the first cell)"] = facts.effective_args
    sections |= facts.provenance
    sections["telemetry"] = {k: v for k, v in facts.telemetry.items() if k != "devices"}
    out = []
    for name, value in sections.items():
        rows = tuple(flatten(value if isinstance(value, (dict, list)) else {name: value}))
        if rows:
            out.append((name.replace("_", " "), rows))
    return tuple(out)
