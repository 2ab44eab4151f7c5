"""Reading an experiment file: every complaint names the file, the line, the field and what to write instead."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bench.catalog.prices import load_prices
from bench.catalog.slo import load_slo
from bench.catalog.yaml_source import (
    Document,
    catalogue_files,
    load_yaml,
    looks_like_path,
    normalised,
    unknown_name,
    validate,
)
from bench.config.conflicts import conflict
from bench.config.experiment import CellSpec, Experiment, TraceLoad
from bench.config.sweep import CELL_FIELDS, Cell, apply_axes, axis_path, make_cell, sweep_points
from bench.errors import BadInput, BenchError

MAX_CELLS = 10_000


@dataclass(frozen=True, slots=True)
class LoadedExperiment:
    """An experiment with its cells, and the document it came from (for messages with lines)."""

    experiment: Experiment
    cells: tuple[Cell, ...]
    document: Document
    path: Path


def experiment_path(name_or_path: str) -> Path:
    """The file of an experiment given by path, or by its stem in ``configs/experiments/``.

    Raises:
        UnknownName: neither a file nor a shipped experiment.
    """
    if looks_like_path(name_or_path):
        return Path(name_or_path)
    known = catalogue_files("experiments")
    if name_or_path in known:
        return known[name_or_path]
    raise unknown_name("experiment", name_or_path, known)


def load_experiment(name_or_path: str | Path) -> Experiment:
    """The experiment in a file. Raises BadInput for the first thing wrong with it, sweep included."""
    return load(name_or_path).experiment


def load(name_or_path: str | Path) -> LoadedExperiment:
    """Read, validate and expand an experiment file.

    Raises:
        BadInput: one line with file, line, field, what is wrong and what to do.
    """
    path = experiment_path(str(name_or_path))
    document = load_yaml(path)
    if not isinstance(document.data, dict):
        raise document.bad("expected an experiment (keys and values)", (), "start from one in configs/experiments/")
    points = _raw_points(document)
    experiment = _validated(document, points[0])
    _check_references(document, experiment)
    cells = _expanded(document, experiment, points)
    return LoadedExperiment(experiment, tuple(cells), document, path)


def _raw_points(document: Document) -> list[dict[str, Any]]:
    """The sweep's points from the raw document, checked for shape so that the rest can rely on it."""
    sweep = document.data.get("sweep")
    if sweep is None:
        return [{}]
    if not isinstance(sweep, dict):
        raise document.bad("expected grid: and/or points:", ("sweep",))
    grid, points = sweep.get("grid") or {}, sweep.get("points") or []
    if not isinstance(grid, dict):
        raise document.bad("expected axis names with lists of values", ("sweep", "grid"))
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise document.bad(
                "expected a list of values", ("sweep", "grid", name), f"write [{values}]" if values else None
            )
    if not isinstance(points, list) or not all(isinstance(p, dict) and p for p in points):
        raise document.bad("expected a list of points, each with axis names and values", ("sweep", "points"))
    size = len(points)
    product = 1
    for values in grid.values():
        product *= len(values)
    size += product if grid else 0
    if size > MAX_CELLS:
        raise document.bad(f"{size:,} cells are more than {MAX_CELLS:,}", ("sweep",), "sweep fewer values")
    return sweep_points(grid, points) or [{}]


def _validated(document: Document, first_point: dict[str, Any]) -> Experiment:
    """The whole file as an Experiment. Swept fields may be left out of the fixed part: the first point fills them."""
    raw = dict(document.data)
    missing = {n: v for n, v in first_point.items() if not _has(raw, axis_path(str(n)))}
    try:
        filled = {**raw, **apply_axes(_cell_part(raw), missing)} if missing else raw
    except (ValueError, TypeError) as e:
        raise document.bad(str(e), ("sweep",)) from None
    shadow = Document(document.name, filled, document.lines)
    try:
        return validate(shadow, Experiment)
    except BadInput as e:
        raise _at_axis(document, e, missing) from None


def _cell_part(raw: dict[str, Any]) -> dict[str, Any]:
    return {k: raw[k] for k in CELL_FIELDS if k in raw}


def _has(data: Any, path: tuple[str, ...]) -> bool:
    for part in path:
        if not isinstance(data, dict) or part not in data:
            return False
        data = data[part]
    return True


def _at_axis(document: Document, error: BadInput, axes: dict[str, Any]) -> BadInput:
    """Point an error about a value that came from the sweep at the sweep's line."""
    field = (error.where or "").rsplit(": ", 1)[-1]
    for name in axes:
        if field == ".".join(axis_path(name)):
            in_grid = name in (document.data["sweep"].get("grid") or {})
            location = ("sweep", "grid", name) if in_grid else ("sweep", "points")
            return document.bad(error.what, location, error.next_step)
    return error


def _check_references(document: Document, experiment: Experiment) -> None:
    """Prices and SLO are needed only once there is a report: a wrong name is said now all the same."""
    try:
        if experiment.slo is not None:
            load_slo(experiment.slo)
    except BadInput as e:
        raise document.bad(e.what, ("slo",), e.next_step) from None
    named = experiment.prices
    if named is None:
        return
    try:
        if looks_like_path(named) or named in catalogue_files("prices"):
            load_prices(named)
        else:
            book = load_prices()
            if not any(normalised(p.provider).startswith(normalised(named)) for p in book.gpu_hours):
                book.gpu_price(named)
    except BadInput as e:
        raise document.bad(e.what, ("prices",), e.next_step) from None


def _expanded(document: Document, experiment: Experiment, points: list[dict[str, Any]]) -> list[Cell]:
    fixed = experiment.model_dump(mode="python", include=set(CELL_FIELDS), exclude_unset=True)
    digests: dict[str, str] = {}
    cells: dict[str, Cell] = {}
    num_grid = len(points) - len(experiment.sweep.points)
    for number, axes in enumerate(points):
        at: tuple[Any, ...] = ("sweep", "grid") if number < num_grid else ("sweep", "points", number - num_grid)
        try:
            spec = CellSpec.model_validate(apply_axes(fixed, axes))
        except ValidationError as e:
            raise _sweep_error(document, e, axes, at) from None
        except (ValueError, TypeError) as e:
            raise document.bad(str(e), at) from None
        if (found := conflict(spec)) is not None:
            swept = next((n for n in axes if ".".join(found.field).startswith(".".join(axis_path(str(n))))), None)
            raise document.bad(found.what, found.field if swept is None else (*at, swept), found.next_step)
        if spec.model not in digests:
            digests[spec.model] = model_digest(spec.model)
        digest = digests[spec.model]
        if isinstance(spec.load, TraceLoad):
            digest += _trace_digest(document, spec.load)
        cell = make_cell(axes, spec, digest)
        cells.setdefault(cell.cell_id, cell)
    return list(cells.values())


def _sweep_error(document: Document, error: ValidationError, axes: dict[str, Any], at: tuple[Any, ...]) -> BadInput:
    first = error.errors(include_url=False)[0]
    loc = [str(p) for p in first["loc"]]
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    for name, value in axes.items():
        path = axis_path(name)
        if path[0] == loc[0] and (path[-1] in loc or len(path) == 1 or path[-1] == "shape"):
            where = (*at, name)
            values = (document.data.get("sweep", {}).get("grid") or {}).get(name)
            if at == ("sweep", "grid") and isinstance(values, list) and value in values:
                where = (*where, values.index(value))
            got = "" if "got" in message else f", got {value!r}"
            return document.bad(f"{message}{got}", where)
    return document.bad(f"{'.'.join(loc)}: {message}", at)


def trace_path(path: str, base: Path | None) -> Path:
    """A trace's file: as written where that exists, else beside the experiment file."""
    given = Path(path).expanduser()
    return given if given.is_absolute() or given.exists() or base is None else base / given


def _trace_digest(document: Document, load: TraceLoad) -> str:
    """sha256 (hex) of the trace: it enters the cell's id, so that runs of a changed trace are never mixed in."""
    path = trace_path(load.path, Path(document.name).parent)
    try:
        with open(path, "rb") as f:
            digest = hashlib.sha256()
            while block := f.read(1 << 20):
                digest.update(block)
    except OSError as e:
        what = f"cannot read the trace {path}: {(e.strerror or str(e)).lower()}"
        raise document.bad(
            what, ("load", "path"), "relative paths count from here, then from the experiment file"
        ) from None
    return digest.hexdigest()


def model_digest(model: str) -> str:
    """sha256 (hex) of the architecture of a catalogue model or a local config.json; "" for a hub id not at hand.

    It enters the cell's id, so that a changed architecture file is never mixed with results of the old one.
    """
    path = Path(model)
    if (path / "config.json").is_file():
        return hashlib.sha256((path / "config.json").read_bytes()).hexdigest()
    try:
        from bench.catalog.model import load_model

        arch = load_model(model)
    except (BenchError, ImportError):
        return ""
    return hashlib.sha256(json.dumps(arch.config, sort_keys=True, default=str).encode()).hexdigest()
