"""What the evidence programme reads from its own results: rates to choose loads by, runs to learn from, comparisons."""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

#: What a prediction is graded on: the names of bench.analysis.metrics.
GRADED = ("output_tokens_per_s", "ttft_p50_s", "tpot_p50_s", "energy_j_per_output_token")


def hardware_of(kernels: Path) -> str | None:
    """The catalogue's name of the device whose kernels were measured in ``kernels``."""
    try:
        summary = json.loads((kernels / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    nominal = summary["peaks"]["nominal"] or {}
    return nominal.get("hardware") or ("cpu" if summary["device"]["kind"] == "cpu" else None)


def is_complete(summary: Path) -> bool:
    """Whether a summary of ``bench kernels`` is of a run that was not interrupted."""
    return _read(summary).get("status") == "complete"


def experiments(results: Path) -> list[str]:
    """Names of the experiments that have at least one complete run."""
    folders = sorted((results / "runs").glob("*"))
    return [f.name for f in folders if f.is_dir() and complete_runs(results, f.name)]


def complete_runs(results: Path, experiment: str) -> list[Path]:
    """Folders of the complete runs of one experiment."""
    manifests = sorted((results / "runs" / experiment).glob("*/run-*/manifest.json"))
    return [m.parent for m in manifests if _read(m).get("status") == "complete"]


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def values_of(run: Path) -> dict[str, float]:
    """The numbers of one run by metric, computed from its records where no summary lies there."""
    from bench.analysis.summary import summary_of
    from bench.store import RunReader

    return dict(summary_of(RunReader.open(run), store=False).values)


def highest_rate(results: Path, experiment: str) -> float | None:
    """The highest completed requests/s of any cell of ``experiment`` (median over its runs); None without a run."""
    by_cell: dict[str, list[float]] = defaultdict(list)
    for run in complete_runs(results, experiment):
        rate = values_of(run).get("requests_per_s")
        if rate:
            by_cell[run.parent.name].append(rate)
    return max((statistics.median(rates) for rates in by_cell.values()), default=None)


def open_loop_yaml(closed: str, rate_per_s: float, shares: tuple[float, ...]) -> str:
    """The text of the closed-loop experiment as an open loop at ``shares`` of ``rate_per_s`` (Poisson arrivals).

    Rates are rounded to three digits, so that the file says exactly what was asked for. Raises ValueError when the text
    does not hold what has to be replaced.
    """
    rates = [float(f"{rate_per_s * share:.3g}") for share in shares]
    shown = " and ".join(f"{100 * share:.0f} %" for share in shares)
    why = f"What do users of a server see at Poisson arrivals of {shown} of the highest rate measured, {rate_per_s:.3g} requests/s?"
    replacements = (
        (r"(?m)^#.*\n", ""),
        (r"(?m)^name: (.*)serve$", r"name: \1open"),
        (r"(?ms)^why:.*?(?=^model:)", f"why: >-\n  {why}\n"),
        (r"(?ms)^load:\n.*?(?=^\w)", f"load:\n  kind: open_loop\n  rate_per_s: {rates[0]:g}\n  arrivals: poisson\n"),
        (r"(?ms)^sweep:\n.*", "sweep:\n  grid:\n    rate_per_s: [" + ", ".join(f"{r:g}" for r in rates) + "]\n"),
    )
    text = closed
    for pattern, new in replacements:
        text, count = re.subn(pattern, new, text)
        if not count:
            raise ValueError(f"the closed-loop experiment has no {pattern!r}")
    return f"# Written by scripts/gpu_evidence.py from the closed loop's result.\n{text}"


def runs_to_learn_from(results: Path, experiment: str, wanted: dict[str, str]) -> list[Path]:
    """Complete runs whose axes have the ``wanted`` values (as text)."""
    return [run for run in complete_runs(results, experiment) if is_learned(_read(run / "manifest.json"), wanted)]


def is_learned(manifest: dict[str, Any], wanted: dict[str, str]) -> bool:
    """Whether a run's axes have the ``wanted`` values."""
    axes = {str(k): str(v) for k, v in dict(manifest.get("axes") or {}).items()}
    return all(axes.get(name) == value for name, value in wanted.items())


def sampler_cost(results: Path, on: str, off: str) -> dict[str, Any]:
    """output tokens/s with telemetry / without, with its interval and verdict (needs three runs a side for one)."""
    from bench.analysis.compare import TimedValue, compare

    def side(experiment: str) -> list[TimedValue]:
        out = []
        for run in complete_runs(results, experiment):
            started = datetime.fromisoformat(str(_read(run / "manifest.json")["t0_utc"]).replace("Z", "+00:00"))
            out.append(TimedValue(started.timestamp(), values_of(run)["output_tokens_per_s"]))
        return out

    a, b = side(on), side(off)
    result = compare("output_tokens_per_s", a, b)
    return {
        "question": "does sampling at 20 Hz change the throughput?",
        "with_telemetry": [v.value for v in a],
        "without_telemetry": [v.value for v in b],
        "ratio": asdict(result.ratio),
        "verdict": result.verdict,
        "reason": result.reason,
    }


def prediction_errors(results: Path, predicted: Path, experiment: str, learned: dict[str, str]) -> list[dict[str, Any]]:
    """One row a cell: measured and predicted medians of every graded metric, and whether calibration saw the cell.

    A simulated run names the cell that it predicts.
    """
    simulated: dict[str, list[Path]] = defaultdict(list)
    for run in complete_runs(predicted, f"{experiment}.predicted"):
        simulated[str(_read(run / "manifest.json").get("predicts", {}).get("cell_id"))].append(run)
    real: dict[str, list[Path]] = defaultdict(list)
    for run in complete_runs(results, experiment):
        real[run.parent.name].append(run)
    rows = []
    for cell_id in sorted(set(real) & set(simulated)):
        measured, guess = _medians(real[cell_id]), _medians(simulated[cell_id])
        metrics = {
            name: {
                "measured": measured[name],
                "predicted": guess[name],
                "error_ratio": guess[name] / measured[name] - 1,
            }
            for name in GRADED
            if measured.get(name) and guess.get(name)
        }
        seen = is_learned(_read(real[cell_id][0] / "manifest.json"), learned)
        rows.append({"experiment": experiment, "cell_id": cell_id, "learned_from": seen, "metrics": metrics})
    return rows


def _medians(runs: list[Path]) -> dict[str, float]:
    collected: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        for name, value in values_of(run).items():
            collected[name].append(value)
    return {name: statistics.median(v) for name, v in collected.items()}


def error_summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float | int]]:
    """Median absolute error of every metric over the cells that calibration did not see."""
    out: dict[str, dict[str, float | int]] = {}
    for name in GRADED:
        errors = [
            abs(r["metrics"][name]["error_ratio"]) for r in rows if not r["learned_from"] and name in r["metrics"]
        ]
        if errors:
            out[name] = {"median_absolute_error_ratio": statistics.median(errors), "num_cells": len(errors)}
    return out
