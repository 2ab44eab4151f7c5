"""The summary of an imported run without records: the other tool's own numbers, where their definition is ours.

`bench import` has mapped them by definition and written the reason for each that could not be; nothing is computed here.
"""

from __future__ import annotations

from typing import Any

from bench.analysis.metrics import METRICS
from bench.analysis.run_facts import RunFacts
from bench.analysis.steady_state import Window
from bench.analysis.summary import RunSummary

REASON = "the other tool's own window; only its summary was in the file"


def has_imported_metrics(facts: RunFacts) -> bool:
    """Whether this is an imported run whose numbers stand in its manifest."""
    return facts.origin == "imported" and isinstance(facts.manifest.get("imported_metrics"), dict)


def imported_absent(facts: RunFacts) -> dict[str, str]:
    """Why a metric could not be mapped, in the words of the reader of the foreign file."""
    raw = facts.manifest.get("imported_absent")
    return {str(k): str(v) for k, v in raw.items()} if facts.origin == "imported" and isinstance(raw, dict) else {}


def imported_summary(facts: RunFacts) -> RunSummary:
    """The run's summary without warnings. The window has no length where the file does not tell it."""
    stored: dict[str, Any] = facts.manifest["imported_metrics"]
    values = {k: float(v) for k, v in stored.items() if k in METRICS and isinstance(v, (int, float))}
    absent = {k: v for k, v in imported_absent(facts).items() if k not in values}
    if not facts.devices_known:
        absent |= dict.fromkeys(("output_tokens_per_s_per_gpu", "total_tokens_per_s_per_gpu"), facts.why_no_devices)
    about = facts.manifest.get("imported_counts")
    about = about if isinstance(about, dict) else {}
    good, bad = about.get("num_completed"), about.get("num_failed")
    counts = {"num_requests": float((good or 0) + (bad or 0)), "num_warmup": 0.0, "num_counted": float((good or 0) + (bad or 0)),
              "num_counted_ok": float(good or 0)}  # fmt: skip
    errors = about.get("errors")
    return RunSummary(
        experiment=facts.experiment,
        cell_id=facts.cell_id,
        run=facts.run,
        repeat=facts.repeat,
        origin=facts.origin,
        started_utc=facts.created_utc,
        window=Window(0.0, values.get("window_s", 0.0), "imported", False, REASON),
        values=values,
        absent=absent,
        counts=counts,
        errors={str(k): int(v) for k, v in errors.items()} if isinstance(errors, dict) else {},
    )
