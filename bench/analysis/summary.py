"""From the records of a run to its numbers, and from the runs of a cell to estimates.

``summarise_run`` is a pure function of the files of a run (and of the SLO that goodput is counted against);
``summary.json`` beside them is its stored result, used again as long as the files it was made from are the same.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.analysis import metrics as m
from bench.analysis.columns import RequestColumns
from bench.analysis.devices import device_window
from bench.analysis.request_metrics import chunk_metrics, counts, request_metrics
from bench.analysis.run_facts import RunFacts, checked_metadata, run_facts
from bench.analysis.stats import estimate
from bench.analysis.steady_state import Window, find_window
from bench.analysis.steps import step_columns, step_metrics
from bench.errors import BadInput, StoreError
from bench.records import Estimate, Warning_
from bench.store import DATA_FILES, STEPS, SUMMARY, RunReader, write_json_atomically

if TYPE_CHECKING:
    from bench.catalog.slo import Slo
    from bench.roofline import Ceilings

#: Raised whenever a formula changes, so that stored summaries are made anew.
ANALYSIS_VERSION = 5
_MAY_BE_NEGATIVE = frozenset({"energy_net_j_per_output_token"})
#: Shares of a whole; MFU, MBU and TP scaling are not: above 1 they would be a finding (or a mistake) to be seen.
_SHARES = frozenset(
    k for k in m.METRICS if k.endswith("_ratio") and k not in ("mfu_ratio", "mbu_ratio", "tp_scaling_ratio")
)


@dataclass(frozen=True, slots=True)
class Yardsticks:
    """What a run is measured against from outside its files: an SLO for goodput, measured ceilings for MFU on a CPU."""

    slo: Slo | None = None
    ceilings: Ceilings | None = None

    def __repr__(self) -> str:  # part of the digest that stored summaries are checked by
        c = self.ceilings
        of = None if c is None else (c.name, sorted(c.flops.items()), c.memory_bytes_per_s, c.source)
        return f"Yardsticks({self.slo!r}, {of!r})"


@dataclass(frozen=True, slots=True)
class RunSummary:
    """The numbers of one run. ``values`` by key of METRICS; ``absent`` says why a metric has no value.

    ``counts`` are plain sums that the checks use (requests, errors, tokens of the whole run and of the window).
    """

    experiment: str
    cell_id: str
    run: str
    repeat: int
    origin: str
    started_utc: str
    window: Window | None
    values: dict[str, float]
    absent: dict[str, str] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)  # class -> number of requests
    peaks: dict[str, str] = field(default_factory=dict)  # what mfu and mbu were divided by, with source
    token_sources: tuple[str, ...] = ()  # who counted the tokens: engine, usage, chunks, tokenizer, schedule
    warnings: tuple[Warning_, ...] = ()

    @property
    def started_s(self) -> float:
        """Unix seconds of the run's start, 0 when unknown."""
        try:
            return datetime.fromisoformat(self.started_utc).timestamp()
        except ValueError:
            return 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunSummary:
        """Inverse of :meth:`to_dict` after JSON. Raises KeyError or TypeError for another form."""
        d = dict(data)
        d["window"] = Window(**d["window"]) if d["window"] else None
        d["token_sources"] = tuple(d["token_sources"])
        d["warnings"] = tuple(Warning_(**w) for w in d["warnings"])
        return cls(**d)


@dataclass(frozen=True, slots=True)
class Summary:
    """A cell: estimates over its runs. Made by :func:`summarise_cell` only, which refuses runs that do not match."""

    experiment: str
    cell_id: str
    origin: str
    facts: RunFacts  # of the first run: spec, engine, provenance are the same in all
    runs: tuple[RunSummary, ...]
    estimates: dict[str, Estimate]
    absent: dict[str, str]
    warnings: tuple[Warning_, ...] = ()
    source: str = ""  # the results folder, where several are laid side by side

    @property
    def key(self) -> str:
        """Tells cells apart across results folders: the same cell measured on two machines has one cell_id."""
        return f"{self.source}/{self.cell_id}"

    def value(self, key: str) -> float | None:
        found = self.estimates.get(key)
        return None if found is None else found.value

    @property
    def num_devices(self) -> int:
        return self.facts.num_devices


def summarise_run(run: RunReader, against: Yardsticks | None = None) -> RunSummary:
    """The numbers of one run from its raw records alone."""
    from bench.analysis.checks import run_warnings
    from bench.analysis.efficiency import efficiency
    from bench.analysis.imported import has_imported_metrics, imported_absent, imported_summary

    against = against or Yardsticks()
    facts = run_facts(run)
    everything = RequestColumns.of(run.requests())
    run.problems.extend(changed_files(run))
    if not len(everything) and has_imported_metrics(facts):
        summary = imported_summary(facts)
        return _with_warnings(summary, run_warnings(facts, summary, tuple(run.problems)))
    if facts.schedule_kind == "offline":
        everything = _due_when_sent(everything)
    located = everything
    if facts.origin == "imported":
        # other tools do not say when a failed request ended: it would count as in flight for ever
        located = everything.where(everything.ok | ~np.isnan(everything.done_s))
    window = find_window(located, facts.schedule_kind, facts.target_in_flight) if len(located) else None
    if window is None or window.length_s <= 0:
        empty = _empty(facts, everything)
        return _with_warnings(empty, run_warnings(facts, empty, tuple(run.problems)))
    table = run.table(STEPS)
    steps = step_columns(table) if table is not None and table.num_rows else None
    values, absent = request_metrics(everything, window, facts, against.slo)
    chunk_metrics(run, everything, window, values, absent)
    if steps is not None:
        values |= step_metrics(steps, window)
    counted = counts(everything, window, steps)
    devices = device_window(run, facts, window, counted["window_output_tokens"], counted["window_input_tokens"])
    values |= devices.values
    absent |= devices.absent
    counted |= devices.counts
    if facts.kv_capacity_tokens:
        counted["kv_capacity_tokens"] = float(facts.kv_capacity_tokens)
    model = efficiency(facts, steps, window, against.ceilings)
    values |= model.values
    absent |= model.absent
    absent |= {k: why for k, why in imported_absent(facts).items() if k not in values}
    result = RunSummary(
        experiment=facts.experiment,
        cell_id=facts.cell_id,
        run=facts.run,
        repeat=facts.repeat,
        origin=facts.origin,
        started_utc=facts.created_utc,
        window=window,
        values={k: float(v) for k, v in values.items()},
        absent=absent,
        counts=counted,
        errors=_errors(everything),
        peaks=model.peaks,
        # a failed request has no tokens to count, whatever its record says of their source
        token_sources=tuple(sorted({str(x) for x in everything.token_source[everything.ok] if x})),
    )
    # A simulated device has no sensors: doubts about counters and clocks would be doubts about nothing.
    doubts = devices.warnings if facts.origin != "simulated" else ()
    return _with_warnings(result, (*run_warnings(facts, result, tuple(run.problems)), *doubts))


def _due_when_sent(c: RequestColumns) -> RequestColumns:
    """A batch is due when it is submitted; the schedule's zeros are not moments."""
    return RequestColumns(**{n: c.sent_s if n == "due_s" else getattr(c, n) for n in RequestColumns.__slots__})


def changed_files(run: RunReader) -> list[str]:
    """Data files that are not as long as when the run ended (`bench show` compares their digests too)."""
    out = []
    recorded = run.manifest.get("files")
    for name, about in recorded.items() if isinstance(recorded, dict) else ():
        size = about.get("bytes") if isinstance(about, dict) else None
        path = run.folder / str(name)
        now = path.stat().st_size if path.is_file() else 0
        if name in DATA_FILES and isinstance(size, int) and size != now:
            out.append(f"{name}: {now:,} bytes, {size:,} when the run ended")
    return out


def _with_warnings(summary: RunSummary, warnings: tuple[Warning_, ...]) -> RunSummary:
    return replace(summary, warnings=warnings)


def _empty(facts: RunFacts, c: RequestColumns) -> RunSummary:
    return RunSummary(
        facts.experiment, facts.cell_id, facts.run, facts.repeat, facts.origin, facts.created_utc,
        None, {}, {"*": "no measured request"}, {"num_requests": float(len(c))}, _errors(c),
    )  # fmt: skip


def _errors(c: RequestColumns) -> dict[str, int]:
    names, numbers = np.unique(c.error[c.error != ""].astype(str), return_counts=True)
    return {str(n): int(k) for n, k in zip(names, numbers, strict=True)}


# --- stored summaries --------------------------------------------------------------------------------------------


def _made_from(run: RunReader, against: Yardsticks) -> str:
    """A digest of what a summary depends on: manifest (with the files' digests), sizes of the files now, SLO, formulas."""
    sizes = {n: (run.folder / n).stat().st_size for n in DATA_FILES if (run.folder / n).is_file()}
    basis = json.dumps([ANALYSIS_VERSION, run.manifest, sizes, repr(against)], sort_keys=True, default=str)
    return hashlib.sha256(basis.encode()).hexdigest()


def stored_summary(run: RunReader, against: Yardsticks | None = None) -> RunSummary | None:
    """The summary in summary.json, or None where it is absent, unreadable or made from something else."""
    try:
        data = json.loads((run.folder / SUMMARY).read_text(encoding="utf-8"))
        if data["made_from"] != _made_from(run, against or Yardsticks()):
            return None
        return RunSummary.from_dict(data["summary"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def summary_of(run: RunReader, against: Yardsticks | None = None, *, store: bool = True) -> RunSummary:
    """The stored summary of a finished run where it is still valid; else a new one, which is then stored."""
    final = run.status in ("complete", "failed")
    found = stored_summary(run, against) if final else None
    if found is not None:
        return found
    summary = summarise_run(run, against)
    if store and final:
        data = {
            "schema_version": 1,
            "made_from": _made_from(run, against or Yardsticks()),
            "summary": summary.to_dict(),
        }
        try:
            write_json_atomically(run.folder / SUMMARY, data)
        except (StoreError, OSError):  # a read-only results folder is no reason to refuse a report
            return summary
    return summary


# --- cells -------------------------------------------------------------------------------------------------------


def summarise_cell(runs: Sequence[RunReader], against: Yardsticks | None = None) -> Summary:
    """Estimates over the complete runs of one cell.

    Raises:
        BadInput: no complete run, or runs whose checked metadata differ (the key and both values are named).
    """
    from bench.analysis.checks import cell_warnings

    complete = [r for r in runs if r.status == "complete"]
    if not complete:
        raise BadInput(
            "no complete run", where=str(runs[0].folder.parent) if runs else None, next_step="`bench run` it"
        )
    facts = [run_facts(r) for r in complete]
    refuse_unlike(facts)
    summaries = tuple(sorted((summary_of(r, against) for r in complete), key=lambda s: (s.started_utc, s.run)))
    estimates, absent = combine(summaries)
    warnings = cell_warnings(facts[0], summaries, estimates)
    return Summary(
        facts[0].experiment, facts[0].cell_id, facts[0].origin, facts[0], summaries, estimates, absent, warnings
    )


def refuse_unlike(facts: Sequence[RunFacts]) -> None:
    """Raises BadInput that names the first key of the checked metadata in which two runs differ, and both values."""
    first = checked_metadata(facts[0])
    for other in facts[1:]:
        theirs = checked_metadata(other)
        for key in sorted({*first, *theirs}):
            a, b = first.get(key), theirs.get(key)
            if a != b:
                raise BadInput(
                    f"runs that differ in {key} cannot be put together: {facts[0].run} has {a!r}, {other.run} has {b!r}",
                    where=facts[0].cell_id,
                    next_step="move one of the two run folders away",
                )


def combine(summaries: Sequence[RunSummary]) -> tuple[dict[str, Estimate], dict[str, str]]:
    """(estimates by metric, why the others are absent).

    A metric that some runs lack is estimated from those that have it; a percentile only if every run allows it.
    """
    estimates: dict[str, Estimate] = {}
    absent: dict[str, str] = {}
    for summary in summaries:
        absent |= summary.absent
    for key, definition in m.METRICS.items():
        values = [s.values[key] for s in summaries if key in s.values]
        if values and _is_percentile(key) and len(values) < len(summaries):
            # from part of the runs it would not fit beside the others: a p99 of long runs below the p95 of all
            absent.setdefault(key, f"only {len(values)} of {len(summaries)} runs allow it")
        elif values:
            whole = 1.0 if key in _SHARES else None
            estimates[key] = estimate(values, definition.unit, nonnegative=key not in _MAY_BE_NEGATIVE, at_most=whole)
            absent.pop(key, None)
    return estimates, absent


def _is_percentile(key: str) -> bool:
    return re.search(r"_p\d+_s$", key) is not None
