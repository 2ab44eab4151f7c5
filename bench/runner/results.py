"""The folder of an experiment: what is there, what counts, what is missing. One `bench run` at a time works in it."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bench.config.experiment import CellSpec, Experiment
from bench.config.sweep import Cell
from bench.errors import BadInput, StoreError
from bench.store import RunReader, list_runs, write_json_atomically

RESULTS_VARIABLE = "TOKENYIELD_RESULTS"
RESOLVED = "experiment.resolved.yaml"
PLAN = "plan.json"


def runs_root() -> Path:
    """Where runs go: ``$TOKENYIELD_RESULTS/runs`` or ``results/runs`` below the current folder."""
    return Path(os.environ.get(RESULTS_VARIABLE, "results")) / "runs"


def experiment_folder(name: str, root: Path | None = None) -> Path:
    return (root or runs_root()) / name


@dataclass(frozen=True, slots=True)
class CellState:
    """What is on disk for one cell."""

    cell: Cell
    complete: tuple[RunReader, ...]
    failed: tuple[RunReader, ...]
    interrupted: tuple[RunReader, ...]
    running: tuple[RunReader, ...]

    @property
    def next_run_number(self) -> int:
        """One above the highest number used so far, whatever became of that run: seeds are never used twice."""
        numbers = [run_number(r) for r in (*self.complete, *self.failed, *self.interrupted, *self.running)]
        return max(numbers, default=0) + 1

    def num_missing(self, repeats: int) -> int:
        return max(0, repeats - len(self.complete))


def run_number(run: RunReader) -> int:
    found = re.match(r"run-(\d+)-", run.folder.name)
    return int(found[1]) if found else 0


def cell_state(folder: Path, cell: Cell) -> CellState:
    """The runs of ``cell`` in the experiment's ``folder``, sorted by what became of them."""
    by_status: dict[str, list[RunReader]] = {"complete": [], "failed": [], "interrupted": [], "running": []}
    for run in list_runs(folder / cell.cell_id):
        if run.manifest.get("cell_id") == cell.cell_id:
            by_status[run.status].append(run)
    return CellState(cell, *(tuple(by_status[s]) for s in ("complete", "failed", "interrupted", "running")))


def stale_cells(folder: Path, cells: tuple[Cell, ...]) -> list[str]:
    """Names of cell folders that belong to no cell of the present configuration: left alone, never mixed in."""
    known = {c.cell_id for c in cells}
    if not folder.is_dir():
        return []
    return sorted(
        p.name for p in folder.iterdir() if p.is_dir() and p.name not in known and any(p.glob("run-*/manifest.json"))
    )


def write_resolved(folder: Path, experiment: Experiment, cells: tuple[Cell, ...], skipped: dict[str, str]) -> None:
    """Write the experiment as it was understood, and its cells, so that the results can be read without the source.

    ``skipped``: cell_id -> why this machine cannot run it.
    """
    from ruamel.yaml import YAML

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StoreError(f"cannot write results here: {e.strerror}", where=str(folder),
            next_step=f"choose another folder with --results DIR or {RESULTS_VARIABLE}") from e  # fmt: skip
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    tmp = folder / f".{RESOLVED}.tmp"
    with open(tmp, "w", encoding="utf-8") as f:
        f.write("# Written by `bench run`: the experiment as it was understood, defaults filled in.\n")
        yaml.dump(experiment.model_dump(mode="json"), f)
    os.replace(tmp, folder / RESOLVED)
    plan = {
        "schema_version": 1,
        "experiment": experiment.model_dump(mode="json"),
        "cells": [{"cell_id": c.cell_id, "axes": c.axes_dict(), "spec": c.spec.model_dump(mode="json")} for c in cells],
        "skipped": skipped,
    }
    write_json_atomically(folder / PLAN, plan)


def read_plan(folder: Path) -> tuple[str, list[Cell], int, dict[str, str]]:
    """(name, cells, repeats, skipped) as :func:`write_resolved` wrote them.

    Raises:
        StoreError: there is no plan, or it cannot be read.
    """
    path = folder / PLAN
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        cells = [
            Cell(c["cell_id"], tuple(c["axes"].items()), CellSpec.model_validate(c["spec"])) for c in plan["cells"]
        ]
        return plan["experiment"]["name"], cells, int(plan["experiment"]["repeats"]), dict(plan["skipped"])
    except FileNotFoundError:
        raise StoreError("no experiment results here: plan.json is missing", where=str(folder)) from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise StoreError(
            f"cannot be read: {e}", where=str(path), next_step="run `bench run` again to rewrite it"
        ) from e


def comparable_cells(folder: Path, spec: CellSpec) -> list[Cell]:
    """Cells of earlier calls in ``folder`` that differ from ``spec`` in load, length or seed alone: one report shows
    them together. Those of another server, model or workload are no part of it. Oldest first, as their runs tell them."""
    fixed = ("model", "weights", "engine", "workload")
    found: dict[str, tuple[str, Cell]] = {}
    for path in sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else ():
        for run in list_runs(path)[:1]:
            about = run.manifest
            try:
                cell = Cell(path.name, tuple(about["axes"].items()), CellSpec.model_validate(about["cell"]))
            except (KeyError, ValueError, AttributeError):
                continue  # an older version's, or damaged: left out, as what does not compare is
            if all(getattr(cell.spec, name) == getattr(spec, name) for name in fixed):
                found[path.name] = (str(about.get("created_utc")), cell)
    return [cell for _, cell in sorted(found.values(), key=lambda f: f[0])]


def check_same_machine(states: list[CellState], fingerprint: dict[str, Any], folder: Path) -> None:
    """Refuse to add runs to those of another machine or engine version.

    Raises:
        BadInput: names the first key that differs, and both values.
    """
    for state in states:
        for run in state.complete:
            theirs = run.manifest.get("fingerprint", {})
            for key, ours in fingerprint.items():
                if key in theirs and theirs[key] != ours:
                    raise BadInput(
                        f"its runs were measured with {key} = {theirs[key]!r}, here it is {ours!r}",
                        where=str(folder),
                        next_step="move that folder away, or give this run another place with --results DIR",
                    )


@contextmanager
def only_one(folder: Path) -> Iterator[IO[str]]:
    """Hold the experiment's lock. Raises BadInput when another `bench run` has it, or the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+", encoding="utf-8")
    except OSError as e:
        raise BadInput(
            f"results cannot be written here: {e.strerror}",
            where=str(folder),
            next_step="make the folder writable, or give another place with --results DIR",
        ) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise BadInput(
                f"another `bench run` (process {owner}) is running this experiment",
                where=str(folder),
                next_step="wait for it, or stop it",
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield lock
    finally:
        lock.close()
