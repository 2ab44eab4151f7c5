"""Everything on disk that a report of one experiment is made from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bench.analysis.predicted import with_stated
from bench.analysis.run_facts import run_facts
from bench.analysis.summary import Summary, Yardsticks, summarise_cell
from bench.catalog.yaml_source import looks_like_path
from bench.config.experiment import CellSpec, Experiment
from bench.errors import BadInput, BenchError
from bench.report.model import Failure
from bench.roofline import Ceilings, load_kernel_ceilings
from bench.runner.results import PLAN, RESOLVED, experiment_folder, runs_root
from bench.store import RunReader, list_cells, list_runs

LOG_TAIL_LINES = 12


@dataclass(frozen=True, slots=True)
class PlannedCell:
    """A cell of the configuration, whether it has results or not."""

    cell_id: str
    axes: dict[str, Any]
    spec: CellSpec | None
    skipped: str | None = None


@dataclass(frozen=True, slots=True)
class Collected:
    """An experiment's results: what is complete, and what is not, with the reason."""

    name: str
    folder: Path
    experiment: Experiment | None
    cells: tuple[PlannedCell, ...]
    summaries: tuple[Summary, ...]
    failures: tuple[Failure, ...]
    num_runs_complete: int
    num_runs_planned: int | None
    stale: tuple[str, ...] = ()
    resolved_text: str = ""
    runs: dict[str, tuple[RunReader, ...]] = field(default_factory=dict, repr=False)  # complete ones by Summary.key


def find_folder(name_or_path: str, results: Path | None = None) -> Path:
    """The results folder of an experiment given by name, by its results folder, or by its file.

    Raises:
        BadInput: there are no results of it.
    """
    root = results or runs_root()
    path = Path(name_or_path)
    if path.is_dir():
        if (path / PLAN).is_file() or list_cells(path):
            return path
        raise BadInput("no results in this folder", where=str(path), next_step="`bench run` writes them")
    folder = experiment_folder(name_or_path, root)
    if not looks_like_path(name_or_path) and folder.is_dir():
        return folder
    if looks_like_path(name_or_path) or _is_shipped(name_or_path):
        from bench.config.loading import load_experiment

        folder = experiment_folder(load_experiment(name_or_path).name, root)
        if folder.is_dir():
            return folder
        raise BadInput("this experiment has no results yet", where=str(folder), next_step=f"`bench run {name_or_path}`")
    known = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    hint = f"there are {', '.join(known[:8])}" if known else "there are none yet: `bench run` makes some"
    raise BadInput(f"no results of an experiment {name_or_path!r}", where=str(root), next_step=hint)


def _is_shipped(name: str) -> bool:
    from bench.catalog.yaml_source import catalogue_files

    return name in catalogue_files("experiments")


def collect(folder: Path, against: Yardsticks | None = None) -> Collected:
    """Read an experiment's results. Cells that cannot be summarised become failures, never an end of the report."""
    plan = _plan(folder)
    experiment = _experiment(plan)
    cells = _planned_cells(plan, folder)
    known = {c.cell_id for c in cells}
    stale = tuple(p.name for p in list_cells(folder) if p.name not in known)
    repeats = experiment.repeats if experiment is not None else None
    summaries: list[Summary] = []
    failures: list[Failure] = []
    by_cell: dict[str, tuple[RunReader, ...]] = {}
    for cell in cells:
        runs = list_runs(folder / cell.cell_id)
        complete = tuple(r for r in runs if r.status == "complete")
        by_cell[f"{folder}/{cell.cell_id}"] = complete
        failures += _failures_of(cell, runs, len(complete), repeats)
        if complete:
            try:
                summaries.append(replace(with_stated(summarise_cell(complete, against)), source=str(folder)))
            except BenchError as e:
                failures.append(Failure((cell.cell_id,), "refused", str(e)))
    runnable = [c for c in cells if c.skipped is None]
    return Collected(
        name=experiment.name if experiment is not None else folder.name,
        folder=folder,
        experiment=experiment,
        cells=tuple(cells),
        summaries=tuple(summaries),
        failures=tuple(failures),
        num_runs_complete=sum(len(r) for r in by_cell.values()),
        num_runs_planned=None if repeats is None else repeats * len(runnable),
        stale=stale,
        resolved_text=_text(folder / RESOLVED),
        runs=by_cell,
    )


def measured_ceilings(folder: Path) -> Ceilings | None:
    """The newest result of `bench kernels` for the CPU that this experiment ran on, or None.

    Looked for in ``results/kernels/`` beside ``results/runs/``; the CPU's model name must be the same.
    """
    cpus = {str(run_facts(r).cpu.get("model")) for c in list_cells(folder) for r in list_runs(c)[:1]}
    found = []
    for path in (folder.resolve().parent.parent / "kernels").glob("*/*/summary.json"):
        try:
            device = json.loads(path.read_text(encoding="utf-8")).get("device") or {}
        except (OSError, ValueError, AttributeError):
            continue
        if device.get("kind") == "cpu" and str(device.get("name")) in cpus:
            found.append(path)
    for path in sorted(found, key=lambda p: p.parent.name, reverse=True):
        try:
            return load_kernel_ceilings(path)
        except BenchError:
            continue
    return None


def planned_experiment(folder: Path) -> Experiment | None:
    """The experiment as it was run, from its plan; None for results without one."""
    return _experiment(_plan(folder))


def side_by_side(first: Collected, others: list[Collected]) -> Collected:
    """Results of several experiments as one: cells and failures of all, name, question and configuration of the first."""
    every = [first, *others]
    planned = [c.num_runs_planned for c in every]
    return replace(
        first,
        name=" and ".join(dict.fromkeys(c.name for c in every)),
        cells=tuple(cell for c in every for cell in c.cells),
        summaries=tuple(s for c in every for s in c.summaries),
        failures=tuple(f for c in every for f in c.failures),
        num_runs_complete=sum(c.num_runs_complete for c in every),
        num_runs_planned=None if any(p is None for p in planned) else sum(p for p in planned if p is not None),
        stale=tuple(s for c in every for s in c.stale),
    )


def _plan(folder: Path) -> dict[str, Any]:
    try:
        data = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise BadInput(
            f"cannot be read: {e}", where=str(folder / PLAN), next_step="`bench run` writes it anew"
        ) from None
    return data if isinstance(data, dict) else {}


def _experiment(plan: dict[str, Any]) -> Experiment | None:
    try:
        return Experiment.model_validate(plan["experiment"]) if "experiment" in plan else None
    except ValidationError:
        return None


def _planned_cells(plan: dict[str, Any], folder: Path) -> list[PlannedCell]:
    """The plan's cells in sweep order; without a plan, every cell folder there is."""
    cells, skipped = plan.get("cells"), plan.get("skipped")
    if not cells:
        return [PlannedCell(p.name, {}, None) for p in list_cells(folder)]
    why = skipped if isinstance(skipped, dict) else {}
    if not isinstance(cells, list) or not all(isinstance(c, dict) and isinstance(c.get("cell_id"), str) for c in cells):
        raise BadInput(
            "its cells cannot be understood", where=str(folder / PLAN), next_step="`bench run` writes it anew"
        )
    out = []
    for c in cells:
        axes, reason = c.get("axes"), why.get(c["cell_id"])
        known = dict(axes) if isinstance(axes, dict) else {}
        out.append(PlannedCell(c["cell_id"], known, _spec(c.get("spec")), None if reason is None else str(reason)))
    return out


def _spec(raw: Any) -> CellSpec | None:
    try:
        return CellSpec.model_validate(raw)
    except ValidationError:
        return None


def _failures_of(cell: PlannedCell, runs: list[RunReader], num_complete: int, repeats: int | None) -> list[Failure]:
    if cell.skipped is not None and not num_complete:
        return [Failure((cell.cell_id,), "skipped", cell.skipped)]
    out = []
    for run in runs:
        if run.status == "failed":
            error = run.manifest.get("error") or {}
            reason = str(error.get("reason") if isinstance(error, dict) else error) or "no reason was recorded"
            tail = str(error.get("log_tail") or "") if isinstance(error, dict) else ""
            out.append(Failure((cell.cell_id,), f"failed ({run.folder.name})", reason, _last_lines(tail)))
        elif run.status in ("running", "interrupted"):
            text = "still being written" if run.status == "running" else "ended before it was complete"
            out.append(Failure((cell.cell_id,), f"{run.status} ({run.folder.name})", text))
    if repeats is not None and num_complete < repeats:
        text = f"{num_complete} of {repeats} runs are complete; `bench run` continues"
        out.append(Failure((cell.cell_id,), "missing", text))
    return out


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-LOG_TAIL_LINES:])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
