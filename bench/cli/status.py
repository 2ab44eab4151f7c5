"""`bench status`: what is complete, missing and failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from bench.cli.console import console
from bench.errors import EXIT_DONE


@click.command("status")
@click.argument("experiment", required=False)
@click.option("--results", type=click.Path(file_okay=False), help="Folder of results (default: results/).")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
def command(experiment: str | None, results: str | None, as_json: bool) -> int:
    """What is complete, missing and failed of EXPERIMENT (a file or a name); without one, of all results."""
    root = Path(results or "results") / "runs" if results else _runs_root()
    if experiment is None:
        rows = [_summary(folder) for folder in sorted(root.glob("*")) if (folder / "plan.json").is_file()]
        rows += [_summary_without_plan(folder) for folder in sorted(root.glob("*")) if _has_no_plan(folder)]
        if as_json:
            click.echo(json.dumps(rows, indent=1))
        elif not rows:
            click.echo(f"no results in {root}; start with `bench run EXPERIMENT`")
        else:
            _print_experiments(rows)
        return EXIT_DONE
    if _has_no_plan(root / experiment):
        cells = _cells_without_plan(root / experiment)
    else:
        cells = _cells(experiment, root)
    if as_json:
        click.echo(json.dumps(cells, indent=1))
    else:
        _print_cells(cells)
    return EXIT_DONE


def _runs_root() -> Path:
    from bench.runner.results import runs_root

    return runs_root()


def _has_no_plan(folder: Path) -> bool:
    """Results that `bench run` did not make: imported or predicted ones. There is nothing to continue."""
    from bench.store import list_cells

    return folder.is_dir() and not (folder / "plan.json").is_file() and bool(list_cells(folder))


def _cells_without_plan(folder: Path) -> list[dict[str, Any]]:
    from bench.store import list_cells, list_runs

    rows = []
    for path in list_cells(folder):
        runs = list_runs(path)
        done = [r for r in runs if r.status == "complete"]
        note = f"{runs[0].origin}: nothing to continue; `bench report {folder.name}`" if runs else None
        rows.append(
            {
                "cell_id": path.name,
                "complete": len(done),
                "repeats": len(done),
                "missing": 0,
                "failed": sum(r.status == "failed" for r in runs),
                "interrupted": sum(r.status == "interrupted" for r in runs),
                "running": sum(r.status == "running" for r in runs),
                "skipped": None,
                "reason": note,
            }
        )
    return rows


def _summary_without_plan(folder: Path) -> dict[str, Any]:
    rows = _cells_without_plan(folder)
    complete = sum(r["complete"] for r in rows)
    return {
        "experiment": folder.name,
        "cells": len(rows),
        "complete": complete,
        "total": complete,
        "failed": sum(r["failed"] for r in rows),
        "running": sum(r["running"] for r in rows),
        "skipped_cells": 0,
    }


def _cells(experiment: str, root: Path) -> list[dict[str, Any]]:
    """One row per cell: from the experiment file where there is one, else from the plan beside the results."""
    from bench.config.loading import load
    from bench.runner.results import PLAN, cell_state, read_plan, stale_cells

    if (root / experiment / PLAN).is_file():
        name, cells, repeats, skipped = read_plan(root / experiment)
    else:
        loaded = load(experiment)
        name, cells, repeats = loaded.experiment.name, list(loaded.cells), loaded.experiment.repeats
        plan = root / name / PLAN
        skipped = read_plan(root / name)[3] if plan.is_file() else {}
    rows = []
    for cell in cells:
        state = cell_state(root / name, cell)
        latest = state.failed[-1] if state.failed else None
        rows.append(
            {
                "cell_id": cell.cell_id,
                "complete": len(state.complete),
                "repeats": repeats,
                "missing": 0 if cell.cell_id in skipped else state.num_missing(repeats),
                "failed": len(state.failed),
                "interrupted": len(state.interrupted),
                "running": len(state.running),
                "skipped": skipped.get(cell.cell_id),
                "reason": (latest.manifest.get("error") or {}).get("reason") if latest else None,
            }
        )
    rows += [
        {"cell_id": name, "stale": True, "reason": "belongs to an earlier configuration; kept, not counted"}
        for name in stale_cells(root / name, tuple(cells))
    ]
    return rows


def _summary(folder: Path) -> dict[str, Any]:
    """One experiment's row; where its plan cannot be read the row says so, and the other experiments still show."""
    from bench.errors import StoreError
    from bench.runner.results import cell_state, read_plan

    try:
        name, cells, repeats, skipped = read_plan(folder)
    except StoreError as e:
        return {"experiment": folder.name, "error": str(e)}
    states = [cell_state(folder, c) for c in cells if c.cell_id not in skipped]
    return {
        "experiment": name,
        "cells": len(states),
        "complete": sum(min(len(s.complete), repeats) for s in states),
        "total": len(states) * repeats,
        "failed": sum(len(s.failed) for s in states),
        "running": sum(len(s.running) for s in states),
        "skipped_cells": len(skipped),
    }


def _print_experiments(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table("experiment", "cells", "runs complete", "failed", "running now", "cells skipped")
    for r in rows:
        if "error" in r:
            continue
        done = f"{r['complete']}/{r['total']}"
        table.add_row(
            r["experiment"], str(r["cells"]), done, str(r["failed"]), str(r["running"]), str(r["skipped_cells"])
        )
    if table.row_count:
        console().print(table)
    for r in rows:
        if "error" in r:
            click.echo(f"{r['experiment']}: {r['error']}", err=True)


def _print_cells(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table("cell", "complete", "missing", "failed", "interrupted", "note")
    for r in rows:
        if r.get("stale"):
            table.add_row(r["cell_id"], "", "", "", "", r["reason"])
            continue
        note = f"cannot run here: {r['skipped']}" if r["skipped"] else (r["reason"] or "")
        if r["running"]:
            note = f"{r['running']} running now. {note}"
        done = f"{r['complete']}/{r['repeats']}"
        table.add_row(r["cell_id"], done, str(r["missing"]), str(r["failed"]), str(r["interrupted"]), str(note)[:160])
    console().print(table)
    missing = sum(r.get("missing", 0) for r in rows)
    if missing:
        click.echo(f"{missing} runs missing: `bench run` with the experiment file continues with them")
