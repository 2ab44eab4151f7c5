"""From an experiment to its cells: one cell per point of the sweep."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from typing import Any

from bench.config.experiment import CellSpec, Experiment, load_level, parse_shape

CELL_FIELDS = tuple(CellSpec.model_fields)

#: Short names for axes that everybody sweeps; any dotted path works.
AXIS_ALIASES = {
    "tensor_parallel_size": "engine.args.tensor_parallel_size",
    "pipeline_parallel_size": "engine.args.pipeline_parallel_size",
    "max_num_seqs": "engine.args.max_num_seqs",
    "max_num_batched_tokens": "engine.args.max_num_batched_tokens",
    "quantization": "engine.args.quantization",
    "dtype": "engine.args.dtype",
    "kv_cache_dtype": "engine.args.kv_cache_dtype",
    "batch_size": "load.batch_size",
    "concurrency": "load.concurrency",
    "rate_per_s": "load.rate_per_s",
    "isl": "workload.isl",
    "osl": "workload.osl",
    "shape": "workload.shape",
    "gpu": "engine.gpu",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the sweep. ``cell_id`` = slug of the axes + 8 hex of the canonical JSON of ``spec``."""

    cell_id: str
    axes: tuple[tuple[str, Any], ...]  # axis name as written -> value, in the order of the sweep
    spec: CellSpec

    def axes_dict(self) -> dict[str, Any]:
        return dict(self.axes)

    @property
    def engine_key(self) -> str:
        """Cells with equal keys share one engine start: same model, weights and engine arguments."""
        part = self.spec.model_dump(mode="json", include={"model", "weights", "engine"})
        return json.dumps(part, sort_keys=True)


def canonical_json(spec: CellSpec) -> str:
    """The text whose hash names a cell: sorted keys, no defaults left out but of fields that came later.

    A field that a new version adds must not rename the cells that do not use it, or their runs would be measured again.
    """
    data = spec.model_dump(mode="json")
    for name in ("ramp_up_s", "cool_down_s"):
        if not data["warmup"][name]:
            del data["warmup"][name]
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def axis_path(name: str) -> tuple[str, ...]:
    """'batch_size' -> ('load', 'batch_size'); 'engine.args.x' -> ('engine', 'args', 'x')."""
    return tuple(AXIS_ALIASES.get(name, name).split("."))


def set_in(data: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy of ``data`` with ``value`` at ``path``. Raises KeyError when a parent is no mapping."""
    head, *rest = path
    out = dict(data)
    if not rest:
        out[head] = value
        return out
    child = out.get(head)
    if child is None:
        child = {}
    if not isinstance(child, dict):
        raise KeyError(head)
    out[head] = set_in(child, tuple(rest), value)
    return out


def apply_axes(base: dict[str, Any], axes: dict[str, Any]) -> dict[str, Any]:
    """``base`` (the raw fixed part) with each axis value set; a swept isl, osl or shape replaces the fixed one.

    Raises:
        ValueError: an axis path does not exist in an experiment, or leads into something that is no mapping.
    """
    out = base
    for name, value in axes.items():
        path = axis_path(name)
        if path[0] not in CELL_FIELDS:
            known = ", ".join(sorted(AXIS_ALIASES))
            raise ValueError(f"axis {name!r} is not a path in an experiment; known short names: {known}")
        if path == ("workload", "shape"):
            kept = {k: v for k, v in dict(out.get("workload", {})).items() if k not in ("isl", "osl")}
            out = {**out, "workload": {**kept, "shape": value}}
            continue
        workload = out.get("workload")
        if path[0] == "workload" and path[-1] in ("isl", "osl") and isinstance(workload, dict) and "shape" in workload:
            # the shape is short for isl and osl: write it out, so that one of them can be swept
            isl, osl = parse_shape(workload["shape"])
            rest = {k: v for k, v in workload.items() if k != "shape"}
            out = {**out, "workload": {"isl": isl, "osl": osl, **rest}}
        try:
            out = set_in(out, path, value)
        except KeyError as e:
            raise ValueError(f"axis {name!r}: {e.args[0]} is not a mapping here") from None
    return out


def sweep_points(grid: dict[str, list[Any]], points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every point of the sweep in order: the grid's product (first axis slowest), then the explicit points."""
    out: list[dict[str, Any]] = []
    if grid or not points:
        names = list(grid)
        out += [dict(zip(names, values, strict=True)) for values in itertools.product(*grid.values())]
    return out + [dict(p) for p in points]


def slug(axes: dict[str, Any], spec: CellSpec) -> str:
    """A short readable name: 'tp2-bs8-128x64'."""
    short = {"tensor_parallel_size": "tp", "batch_size": "bs", "concurrency": "c", "rate_per_s": "rps", "gpu": ""}
    parts = [f"tp{spec.tensor_parallel_size}"]
    level_name, level = load_level(spec.load)
    parts.append(f"{short.get(level_name, level_name)}{level:g}")
    for name, value in axes.items():
        tail = axis_path(name)[-1]
        if tail in ("tensor_parallel_size", level_name) or axis_path(name) == ("load",):
            continue  # stands at the front already
        if isinstance(value, dict) and "kind" in value:
            parts.append(re.sub(r"[^a-z0-9]+", "-", str(value["kind"]).lower()))
            continue
        text = re.sub(r"[^a-z0-9.]+", "x", str(value).lower()).strip("x")
        parts.append(f"{short.get(tail, tail)}{text}"[:24])
    return re.sub(r"-+", "-", "-".join(p for p in parts if p))[:70]


def make_cell(axes: dict[str, Any], spec: CellSpec, model_digest: str = "") -> Cell:
    """The cell of ``spec``; ``model_digest`` (of the architecture file) enters its id, so a changed model is a new cell."""
    digest = hashlib.sha256((canonical_json(spec) + model_digest).encode()).hexdigest()[:8]
    return Cell(cell_id=f"{slug(axes, spec)}-{digest}", axes=tuple(axes.items()), spec=spec)


def expand(experiment: Experiment, model_digests: dict[str, str] | None = None) -> list[Cell]:
    """Every cell of the experiment, in sweep order; a point written twice gives one cell.

    Args:
        model_digests: model name -> digest of its architecture (see ``loading.model_digests``).

    Raises:
        ValueError: an axis does not fit (``loading.load_experiment`` reports these with their line).
    """
    fixed = experiment.model_dump(mode="python", include=set(CELL_FIELDS), exclude_unset=True)
    cells: dict[str, Cell] = {}
    for axes in sweep_points(experiment.sweep.grid, experiment.sweep.points):
        spec = CellSpec.model_validate(apply_axes(fixed, axes))
        cell = make_cell(axes, spec, (model_digests or {}).get(spec.model, ""))
        cells.setdefault(cell.cell_id, cell)
    return list(cells.values())
