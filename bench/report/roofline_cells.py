"""Where the cells of an experiment lie on the roofline: FLOP/s and bytes/s that their steps needed by arithmetic."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from bench.analysis.efficiency import step_work
from bench.analysis.run_facts import RunFacts, run_facts
from bench.analysis.steps import step_columns
from bench.analysis.summary import summary_of
from bench.catalog.model import load_model
from bench.errors import BadInput
from bench.report.roofline_picture import CellPoint
from bench.store import STEPS, list_runs


def cell_points(folder: Path) -> tuple[list[CellPoint], list[str]]:
    """(points, reasons for runs left out) of every complete run with engine steps under an experiment's folder.

    A point is the mean over a cell's runs; its interval spans the runs. Raises BadInput where there is no run at all.
    """
    if not folder.is_dir():
        raise BadInput("no such folder", where=str(folder), next_step="give results/runs/<experiment>")
    rates: dict[str, list[tuple[float, float]]] = defaultdict(list)
    facts_of: dict[str, RunFacts] = {}
    left_out: list[str] = []
    found = 0
    for cell in sorted(p for p in folder.iterdir() if p.is_dir()):
        for run in list_runs(cell):
            found += 1
            facts = run_facts(run)
            table = run.table(STEPS)
            summary = summary_of(run, store=False)
            if facts.spec is None or table is None or not table.num_rows or summary.window is None:
                left_out.append(f"{cell.name}/{run.folder.name}: no engine steps in a counted window")
                continue
            flops, size = step_work(facts, load_model(facts.spec.model), step_columns(table), summary.window)
            if flops <= 0 or size <= 0:
                left_out.append(f"{cell.name}/{run.folder.name}: no step in the counted window")
                continue
            length = summary.window.length_s
            rates[cell.name].append((flops / length, size / length))
            facts_of[cell.name] = facts
    if not found:
        raise BadInput("holds no runs", where=str(folder), next_step="give results/runs/<experiment>")
    points = []
    for name, values in rates.items():
        array = np.array(values)
        spread = (float(array[:, 0].min()), float(array[:, 0].max())) if len(values) > 1 else None
        label, origin = _label(facts_of[name]), facts_of[name].origin
        points.append(CellPoint(label, float(array[:, 0].mean()), float(array[:, 1].mean()), origin, spread))
    return points, left_out


def _label(facts: RunFacts) -> str:
    """``TP 2, 32 in flight``: the layout and the load's level."""
    level = facts.level
    parts = [f"TP {facts.tensor_parallel_size}"]
    if level is not None:
        parts.append(f"{level[0].replace('_', ' ')} {level[1]:g}")
    return ", ".join(parts)
