"""Where the cells of an experiment lie on the roofline: FLOP/s and bytes/s that their steps needed by arithmetic."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from bench.analysis.efficiency import hardware_of, step_work
from bench.analysis.run_facts import RunFacts, run_facts
from bench.analysis.steps import step_columns
from bench.analysis.summary import summary_of
from bench.catalog.model import load_model
from bench.errors import BadInput
from bench.report.layout import differences, level_text
from bench.report.roofline_picture import CellPoint
from bench.store import STEPS, list_runs


def cell_points(
    folder: Path, *, cells: Collection[str] | None = None, gpu: str | None = None
) -> tuple[list[CellPoint], list[str]]:
    """(points, reasons for runs left out) of every complete run with engine steps under an experiment's folder.

    A point is the mean over a cell's runs; its interval spans the runs. Raises BadInput where there is no run at all.

    Args:
        cells: ids of the cells that are looked at (None: all).
        gpu: catalogue name of the GPU whose ceilings they are held against: cells known to be of another one are left out.
    """
    if not folder.is_dir():
        raise BadInput("no such folder", where=str(folder), next_step="give results/runs/<experiment>")
    rates: dict[str, list[tuple[float, float]]] = defaultdict(list)
    facts_of: dict[str, RunFacts] = {}
    left_out: list[str] = []
    found = 0
    for cell in sorted(p for p in folder.iterdir() if p.is_dir() and (cells is None or p.name in cells)):
        for run in list_runs(cell):
            found += 1
            facts = run_facts(run)
            device = hardware_of(facts)
            if gpu is not None and device is not None and device.name != gpu:
                left_out.append(f"{cell.name}/{run.folder.name}: of {device.name}, not of {gpu}")
                continue
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
    drawn = [facts_of[name] for name in rates]
    for values, facts, axes in zip(rates.values(), drawn, differences(drawn), strict=True):
        array = np.array(values)
        spread = (float(array[:, 0].min()), float(array[:, 0].max())) if len(values) > 1 else None
        flops_per_s, bytes_per_s = (float(v) for v in array.mean(axis=0))
        label, short = _label(facts, axes), _short(facts, axes, drawn)
        points.append(CellPoint(label, flops_per_s, bytes_per_s, facts.origin, spread, short))
    return points, left_out


def _label(facts: RunFacts, axes: Sequence[str]) -> str:
    """``TP 2, batch size 32, ISL 384``: the layout, the load's level, and whatever else tells the cell from the others."""
    level = facts.level
    parts = [f"TP {facts.tensor_parallel_size}"]
    if level is not None:
        parts.append(f"{level[0].replace('_', ' ')} {level[1]:g}")
    return ", ".join([*parts, *axes])


def _short(facts: RunFacts, axes: Sequence[str], cells: Sequence[RunFacts]) -> str:
    """``batch 32, ISL 384``: the label without what all cells share, for inside a picture."""
    parts = [f"TP {facts.tensor_parallel_size}"] if len({c.tensor_parallel_size for c in cells}) > 1 else []
    if facts.level is not None and len({c.level for c in cells}) > 1:
        parts.append(level_text(facts.level))
    return ", ".join([*parts, *(text.removeprefix("ISL/OSL ") for text in axes)])
