"""Prediction intervals for a model that nothing was fitted on, from the models that were left out.

Errors of rows of one model share a cause (a kernel, a release, a recipe that is not recorded), so that rows are not
independent and the spread *between* models matters more than that of rows. The interval is therefore the 5 % and 95 %
quantile of measured / predicted over a mixture in which every left-out group (a model of one source and device) weighs the
same, however many rows it has. Its coverage is graded by leaving each group out in turn.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bench.errors import BadInput
from bench.sim.efficiency import EFFICIENCY_FOLDER

LEFT_OUT_FILE = EFFICIENCY_FOLDER / "left_out.csv"
TAIL = 0.05


def between_groups(groups: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """(low, high) ratio measured / predicted: quantiles of the mixture of ``groups`` (logarithms), each weighing the same."""
    values = np.concatenate([np.asarray(v, dtype=float) for v in groups.values()])
    weights = np.concatenate([np.full(len(v), 1.0 / len(v)) for v in groups.values()])
    order = np.argsort(values)
    below = (np.cumsum(weights[order]) - weights[order] / 2) / weights.sum()
    low, high = np.interp([TAIL, 1 - TAIL], below, values[order])
    return math.exp(low), math.exp(high)


def left_out_coverage(groups: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """For each group the share of its rows inside the interval that all other groups give."""
    found = {}
    for name, values in groups.items():
        low, high = between_groups({k: v for k, v in groups.items() if k != name})
        ratios = np.exp(np.asarray(values, dtype=float))
        found[name] = float(np.mean((ratios >= low) & (ratios <= high)))
    return found


def read_left_out(path: Path = LEFT_OUT_FILE) -> dict[str, dict[str, float]]:
    """Row id -> metric -> log of measured / predicted by overheads fitted without that row's model
    (``scripts/fit_overheads.py --leave-out``). Raises BadInput where the file cannot be used."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(line for line in file if not line.startswith("#"))
            return {r["id"]: {"tpot": float(r["tpot"]), "ttft": float(r["ttft"])} for r in rows}
    except (OSError, KeyError, ValueError) as e:
        raise BadInput(f"not left-out errors: {e}", where=str(path), next_step="restore the file") from e
