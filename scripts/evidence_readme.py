"""The first page of published evidence: what was measured, on what, what it holds, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kernels.bounds import Bound
from scripts.evidence_results import GRADED
from scripts.evidence_state import Evidence

UNPACK = "cat evidence.tar.xz.* | tar xJ"
#: What the graded metrics are called for people.
_METRICS = {
    "output_tokens_per_s": "output tokens/s",
    "ttft_p50_s": "TTFT p50",
    "tpot_p50_s": "TPOT p50",
    "energy_j_per_output_token": "J/output token",
}
_SOURCES = {
    "data-sheet": "before: data sheet and shipped curves",
    "kernels": "before: this device's kernels",
    "calibrated": "after calibration",
}


def readme(evidence: Evidence, reports: list[str], pieces: list[str]) -> str:
    """README.md for ``reports`` (folder names) and ``pieces`` (files of the archive)."""
    folder = evidence.folder
    kernels = _read(evidence.kernels / "summary.json") if evidence.kernels else {}
    name = (kernels.get("device") or {}).get("name", "an unknown device")
    software = ", ".join(f"{k} {v}" for k, v in (kernels.get("software") or {}).items() if v is not None)
    lines = [f"# Evidence from {name}", ""]
    if evidence.plan.name == "rehearsal":
        lines += [
            "**A rehearsal on a CPU with a tiny model: it shows that the programme runs. No figure in it means anything.**",
            "",
        ]
    lines += [
        f"Started {evidence.state['started_utc']}; {software or 'software unknown'}.",
        "",
        "Weights are random (`weights: dummy`): the speed of a dense model does not depend on them. That does not hold for the "
        "routing of experts or the acceptance of speculative tokens, and nothing here measures those.",
        "",
        *_parts(evidence),
        *_reports(bool(evidence.kernels), reports),
        *_bounds(kernels),
        *_errors(_read(folder / "prediction-errors.json")),
        *_sampler(_read(folder / "sampler-cost.json")),
        "## Raw records",
        "",
        f"`archive/` ({', '.join(pieces)}); unpack with `{UNPACK}`, check with `sha256sum -c SHA256SUMS`.",
        "",
    ]
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _parts(evidence: Evidence) -> list[str]:
    lines = ["| Part | Status | GPU time | |", "|---|---|--:|---|"]
    for part in evidence.plan.parts:
        if part.name == "publish":  # it is what writes this
            continue
        entry = evidence.state["parts"].get(part.name, {})
        used = f"{entry.get('gpu_used_s', 0):.0f} s" if part.gpu_s else "–"
        lines.append(
            f"| {part.name} | {entry.get('status', 'missing')} | {used} | {entry.get('reason') or part.what} |"
        )
    return [*lines, ""]


def _reports(has_kernels: bool, reports: list[str]) -> list[str]:
    lines = ["## Reports", ""]
    if has_kernels:
        lines.append("- Kernels: [table](kernels/table.txt), [picture](kernels/kernels.png)")
    return [*lines, *(f"- [{name}]({name}/report.md)" for name in reports), ""]


def _bounds(kernels: dict[str, Any]) -> list[str]:
    """What the kernels must hold, and whether they do."""
    bounds = [Bound(**b) for b in kernels.get("bounds") or ()]
    if not bounds:
        return []
    lines = ["## What kernels must hold", "", "| Bound | Reached | Asked | Verdict | |", "|---|--:|--:|---|---|"]
    for b in bounds:
        value = "–" if b.value is None else f"{b.value:.1%}"
        limit = "–" if b.limit is None else f"{b.limit:.0%}"
        lines.append(f"| {b.name} | {value} | {limit} | {b.verdict} | {b.reason} |")
    return [*lines, ""]


def _errors(errors: dict[str, Any]) -> list[str]:
    """Median error of every prediction, before and after calibration, on the cells that calibration did not see."""
    if not errors:
        return []
    metrics = [m for m in GRADED if any(m in s["summary"] for s in errors["sources"].values())]
    lines = [
        "## How far predictions are off",
        "",
        "Median absolute error over the measured cells that calibration did not see (in brackets how many); each cell is in "
        "`prediction-errors.json`.",
        "",
        "| Predicted | " + " | ".join(_METRICS[m] for m in metrics) + " |",
        "|---|" + "--:|" * len(metrics),
    ]
    for source, graded in errors["sources"].items():
        row = [graded["summary"].get(m) for m in metrics]
        texts = [f"{e['median_absolute_error_ratio']:.1%} ({e['num_cells']})" if e else "–" for e in row]
        lines.append(f"| {_SOURCES.get(source, source)} | {' | '.join(texts)} |")
    return [*lines, ""]


def _sampler(cost: dict[str, Any]) -> list[str]:
    """What telemetry costs."""
    if not cost:
        return []
    ratio = cost["ratio"]
    span = "" if ratio["low"] is None else f" (95 % interval {ratio['low']:.4f} to {ratio['high']:.4f})"
    return [
        "## What telemetry costs",
        "",
        f"Output tokens/s with telemetry at 20 Hz over those without: {ratio['value']:.4f}{span}, "
        f"{len(cost['with_telemetry'])} runs against {len(cost['without_telemetry'])}: {cost['verdict']}; {cost['reason']}.",
        "",
    ]
