"""Predictions beside measurements: the error of each, whether its stated interval held, and what its profile was fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.analysis.efficiency import hardware_of
from bench.analysis.metrics import METRICS
from bench.analysis.predicted import Stated, simulated_facts, stated_of
from bench.analysis.summary import Summary
from bench.config.experiment import SimulatedEngine
from bench.errors import BenchError
from bench.records import Estimate
from bench.report.layout import Layout, Placed
from bench.report.model import Column, Field, Table
from bench.report.tables import PRINTED, axis_columns, estimate_field, number

#: Metrics compared, and which of a prediction's intervals holds for each; None: none is stated.
_COMPARED: tuple[tuple[str, str | None], ...] = (
    ("output_tokens_per_s", "output_tokens_per_s"), ("ttft_p50_s", "ttft"), ("tpot_p50_s", "tpot"), ("e2e_p50_s", None),
)  # fmt: skip


#: Metrics that a prediction states intervals for, in words.
_STATED = (("output_tokens_per_s", "tokens/s"), ("ttft", "TTFT"), ("tpot", "TPOT"), ("power", "power"))


@dataclass(frozen=True, slots=True)
class _Pair:
    """A prediction and the measurement of the same cell. ``fitted``: in words, whether its profile has seen this cell."""

    guess: Placed
    truth: Placed
    fitted: str

    def stated(self, metric: str | None) -> Stated | None:
        return None if metric is None else stated_of(self.guess.summary).get(metric)

    def inside(self, key: str, metric: str | None) -> bool | None:
        """Whether the measured value lies in the interval; None where one of the two is not known."""
        ours, theirs = (p.summary.estimates.get(key) for p in (self.guess, self.truth))
        stated = self.stated(metric)
        if ours is None or theirs is None or stated is None:
            return None
        return ours.value * stated.low_ratio <= theirs.value <= ours.value * stated.high_ratio


def prediction_table(layout: Layout) -> Table | None:
    """Simulated cells beside measured ones of the same device, layout, load and workload; None where there is no such pair."""
    pairs = _pairs(layout)
    if not pairs:
        return None
    head, fields = axis_columns(layout)
    by_profile = any(pair.fitted for pair in pairs)
    columns = [*head, Column("Profile fitted on this cell", numeric=False)] if by_profile else list(head)
    shown = [(k, m if any(pair.stated(m) for pair in pairs) else None) for k, m in _COMPARED]
    confidence = f"{100 * _confidence(pairs):.0f} %"
    for key, metric in shown:
        title, unit, _ = PRINTED[key]
        columns += [Column(f"{title}, {word}", unit, True, METRICS[key].formula) for word in ("measured", "simulated")]
        columns.append(Column(f"{title}, error", "%"))
        columns += [Column(f"{title}, in {confidence} interval", numeric=False)] if metric else []
    rows = []
    for pair in pairs:
        row = fields(pair.guess) + ([Field(pair.fitted, pair.fitted)] if by_profile else [])
        for key, metric in shown:
            row += _compared(pair, key, metric)
        rows.append(tuple(row))
    return Table("prediction", "Prediction against measurement", tuple(columns), tuple(rows), _note(pairs, shown))


def _compared(pair: _Pair, key: str, metric: str | None) -> list[Field]:
    """Measured, simulated (with its own interval), error, and where there is one whether the interval held."""
    ours, theirs = (p.summary.estimates.get(key) for p in (pair.guess, pair.truth))
    _, unit, factor = PRINTED[key]
    out = [estimate_field(theirs, unit, factor), _guess_field(ours, pair.stated(metric), unit, factor)]
    if ours is None or theirs is None or theirs.value == 0:
        out.append(Field("n/a", float("-inf"), "one side has no value"))
    else:
        error = 100 * (ours.value / theirs.value - 1)
        out.append(Field(f"{error:+.1f}", error))
    if metric is not None:
        inside = pair.inside(key, metric)
        why = "no interval was stated, or one side has no value"
        out.append(Field("n/a", "", why) if inside is None else Field("inside" if inside else "OUTSIDE", str(inside)))
    return out


def _guess_field(e: Estimate | None, stated: Stated | None, unit: str, factor: float) -> Field:
    if e is None or stated is None:
        return estimate_field(e, unit, factor)
    low, high = (number(e.value * ratio * factor, unit) for ratio in (stated.low_ratio, stated.high_ratio))
    return Field(number(e.value * factor, unit), e.value * factor, f"{low} – {high}")


# --- which belongs to which -----------------------------------------------------------------------------------------


def _pairs(layout: Layout) -> list[_Pair]:
    """By the cell that the prediction's manifest names, else by model, load, workload and TP. Never across devices."""
    by_id: dict[str, list[Placed]] = {}
    by_task: dict[tuple[Any, ...], list[Placed]] = {}
    for p in layout.placed:
        if p.summary.origin == "measured":
            by_id.setdefault(p.summary.cell_id, []).append(p)
            by_task.setdefault(_task(p), []).append(p)
    out = []
    for p in layout.placed:
        fleet = p.summary.facts.fleet
        if p.summary.origin != "simulated" or (fleet is not None and fleet.text):
            continue  # a fleet is not what one engine measured
        predicts = p.summary.facts.manifest.get("predicts")
        named = str(predicts.get("cell_id")) if isinstance(predicts, dict) else ""
        found = by_id.get(named) or by_task.get(_task(p), [])
        out += [_Pair(p, truth, _fitted(p.summary, truth.summary)) for truth in found if _same_device(p, truth)]
    return out


def _task(p: Placed) -> tuple[Any, ...]:
    """What was asked of the engine, without the engine; the place in the report where no spec is known."""
    spec = p.summary.facts.spec
    if spec is None:
        return p.summary.facts.tensor_parallel_size, p.x, p.panel
    dumps = (part.model_dump_json() for part in (spec.load, spec.workload))
    return spec.model, spec.tensor_parallel_size, spec.pipeline_parallel_size, *dumps


def _same_device(a: Placed, b: Placed) -> bool:
    """Not known to be different devices: one that the catalogue does not have is taken for the predicted one."""
    one, other = hardware_of(a.summary.facts), hardware_of(b.summary.facts)
    return one is None or other is None or one.name == other.name


# --- what the prediction rests on -----------------------------------------------------------------------------------


def stated_intervals(summaries: Sequence[Summary]) -> list[str]:
    """How far the simulated cells may be off by what they say themselves, a sentence for each set of intervals.

    Throughput, TTFT, TPOT, power and costs carry them (``bench.analysis.predicted``); everything else has its repeats alone.
    """
    cells: dict[tuple[Any, ...], tuple[set[str], dict[str, list[Stated]]]] = {}
    for s in summaries:
        stated = stated_of(s) if s.origin == "simulated" else {}
        # those of the engine tell sets apart; of tokens/s (by arrivals) and power (by load) cells of one set have their own
        key = tuple(stated.get(metric) for metric in ("ttft", "tpot"))
        names, found = cells.setdefault(key, (set(), {}))
        hardware = hardware_of(s.facts)
        for metric, words in _STATED:
            if metric in stated:
                names.add(s.cell_id if hardware is None else hardware.name)
                found.setdefault(words, []).append(stated[metric])
    out = []
    for names, found in cells.values():
        if not found:
            continue
        ends = "; ".join(_widest(words, intervals) for words, intervals in found.items())
        confidence = next(iter(found.values()))[0].confidence
        out.append(
            f"How far a simulated value of {', '.join(sorted(names))} may be off ({100 * confidence:.0f} % intervals of the "
            f"prediction itself): {ends}. Its rates, these latencies, its power and its costs carry them; intervals of its other metrics and "
            "of comparisons between cells are over repeats, which a simulation repeats exactly but for the requests that are "
            "drawn: they say nothing of how far it is off."
        )
    return out


def _widest(words: str, intervals: Sequence[Stated]) -> str:
    """The ends of the intervals of one metric over the cells of a set, in words."""
    low, high = min(i.low_ratio for i in intervals), max(i.high_ratio for i in intervals)
    own = " (the widest; each cell has its own)" if len({(i.low_ratio, i.high_ratio) for i in intervals}) > 1 else ""
    return f"{words} {low:.2f} to {high:.2f} of the value{own}"


def intervals_text(summaries: Sequence[Summary]) -> str:
    """What the bands, whiskers and small print of a report are, in words."""
    repeats = "95 % intervals over repeats"
    shares = sorted(
        {f"{100 * i.confidence:.0f} %" for s in summaries if s.origin == "simulated" for i in stated_of(s).values()}
    )
    if not shares:
        return repeats
    own = f"{' and '.join(shares)} intervals of the prediction itself for throughput, TTFT, TPOT, power and costs"
    return f"{repeats}; of simulated cells {own}"


def _fitted(guess: Summary, truth: Summary) -> str:
    """ "yes", "no" or "part of its runs": whether the profile was fitted on the measured runs; "" without a profile."""
    engine = guess.facts.spec.engine if guess.facts.spec is not None else None
    named = engine.profile if isinstance(engine, SimulatedEngine) else None
    used = _runs_of_manifest(guess)
    if used is None and not named:
        return ""
    if used is None and named:
        used = _runs_of_file(Path(named), guess)
    if used is None:
        return "not known"
    own = [f"{truth.experiment}/{truth.cell_id}/{r.run}" in used for r in truth.runs]
    return "yes" if all(own) else "part of its runs" if any(own) else "no"


def _runs_of_manifest(guess: Summary) -> frozenset[str] | None:
    """The runs that the profile was fitted on, as the prediction itself kept them; None where it used none or is older."""
    kept = simulated_facts(guess.facts).get("profile")
    runs = kept.get("runs") if isinstance(kept, dict) else None
    return frozenset(str(run) for run in runs) if isinstance(runs, list) else None


def _runs_of_file(path: Path, guess: Summary) -> frozenset[str] | None:
    """The same for a prediction whose manifest does not keep them: from the profile's file, if that is still the same one.

    Such a manifest names the file and what it said of itself: a file written after the prediction, or with another text, is
    another profile. None where there is no file, or another one.
    """
    from bench.sim.profile import load_profile

    try:
        profile = load_profile(path)
    except BenchError:
        return None
    same = profile.source == simulated_facts(guess.facts).get("step_time_source")
    return frozenset(profile.runs) if same and profile.created_utc[:19] <= guess.facts.created_utc[:19] else None


def _confidence(pairs: Sequence[_Pair]) -> float:
    return next((s.confidence for p in pairs for s in stated_of(p.guess.summary).values()), 0.9)


def _note(pairs: Sequence[_Pair], shown: Sequence[tuple[str, str | None]]) -> str:
    text = "Error: simulated / measured - 1. A measured interval wider than the error does not confirm or refute it."
    if any(metric for _, metric in shown):
        text += f" Small print under a simulated value: the {100 * _confidence(pairs):.0f} % interval that the prediction states."
    parts = {
        "All cells": pairs,
        "Cells whose runs the profile was fitted on": [p for p in pairs if p.fitted in ("yes", "part of its runs")],
        "Cells that the profile never saw": [p for p in pairs if p.fitted == "no"],
    }
    if not any(p.fitted for p in pairs):
        parts = {"All cells": pairs}
    for name, some in parts.items():
        counts = [c for key, metric in shown if metric is not None and (c := _count(some, key, metric))]
        if counts:
            text += f" {name} ({len(some)}), measured value inside the stated interval: {', '.join(counts)}."
    sources = dict.fromkeys(
        str(s) for p in pairs if (s := simulated_facts(p.guess.summary.facts).get("step_time_source"))
    )
    bases = dict.fromkeys(s.basis for p in pairs for s in stated_of(p.guess.summary).values() if s.basis)
    text += f" Step times: {'; '.join(sources)}." if sources else ""
    text += f" Intervals from: {'; '.join(bases)}." if bases else ""
    if any(p.fitted in ("yes", "part of its runs") for p in pairs):
        text += " A cell that the profile was fitted on shows how well the fit holds, not how well it predicts."
    if any(p.fitted == "not known" for p in pairs):
        text += (
            " Which runs the profile was fitted on is not known: the predicted runs do not say (older versions kept only its "
            "path), and its file is not there, or has been written anew since."
        )
    return text


def _count(pairs: Sequence[_Pair], key: str, metric: str) -> str:
    known = [i for p in pairs if (i := p.inside(key, metric)) is not None]
    return f"{PRINTED[key][0]} {sum(known)} of {len(known)}" if known else ""
