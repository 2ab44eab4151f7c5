"""`bench validate`: check an experiment file, print its cells, say what cannot run here and how long the rest takes."""

from __future__ import annotations

import json
from typing import Any

import click

from bench.cli.console import console
from bench.errors import EXIT_DONE


@click.command("validate")
@click.argument("experiment")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
def command(experiment: str, as_json: bool) -> int:
    """Check EXPERIMENT (a file, or a name in configs/experiments/) and print its cells.

    Marks the cells that this machine cannot run, says why, and estimates the run time of the others.
    """
    from bench.config.loading import load
    from bench.runner.feasible import check_engine_args, check_telemetry, this_machine, why_not
    from bench.runner.local import estimate_s, missing_runs
    from bench.runner.models import load_archs
    from bench.runner.results import cell_state, experiment_folder
    from bench.runner.simulated import check_simulated

    loaded = load(experiment)
    machine = this_machine()
    check_telemetry(loaded, machine)
    check_engine_args(loaded)
    archs = load_archs([c.spec.model for c in loaded.cells])
    check_simulated(loaded, archs)
    folder = experiment_folder(loaded.experiment.name)
    rows: list[dict[str, Any]] = []
    states = []
    for cell in loaded.cells:
        reason = why_not(cell, machine, archs.get(cell.spec.model))
        state = cell_state(folder, cell)
        if reason is None:
            states.append(state)
        rows.append(
            {
                "cell_id": cell.cell_id,
                "axes": cell.axes_dict(),
                "runs_here": reason is None,
                "reason": reason,
                "complete": len(state.complete),
                "repeats": loaded.experiment.repeats,
            }
        )
    todo = missing_runs(states, loaded.experiment.repeats)
    about_s = estimate_s(todo, states, machine, archs, loaded.path.parent) if todo else 0.0
    if as_json:
        out = {
            "experiment": loaded.experiment.name,
            "cells": rows,
            "num_missing_runs": len(todo),
            "estimate_s": about_s,
        }
        click.echo(json.dumps(out, indent=1, default=str))
        return EXIT_DONE
    _print(loaded.experiment, rows, len(todo), about_s)
    return EXIT_DONE


def _print(experiment: Any, rows: list[dict[str, Any]], num_missing: int, about_s: float) -> None:
    from rich.table import Table
    from rich.text import Text

    from bench.units import counted, duration_text

    out = console()
    out.print(Text.assemble((experiment.name, "bold"), f": {experiment.why}"))
    reasons = {r: chr(ord("a") + i % 26) for i, r in enumerate(dict.fromkeys(r["reason"] for r in rows if r["reason"]))}
    axes = list(dict.fromkeys(a for r in rows for a in r["axes"]))
    table = Table("cell", *axes, "runs", "here")
    for r in rows:
        values = [_short(r["axes"].get(a, "")) for a in axes]
        here = Text("yes", style="green") if r["runs_here"] else Text(f"no ({reasons[r['reason']]})", style="yellow")
        table.add_row(r["cell_id"], *values, f"{r['complete']}/{r['repeats']}", here)
    out.print(table)
    for reason, letter in reasons.items():
        out.print(f"({letter}) {reason}", markup=False)
    skipped = sum(not r["runs_here"] for r in rows)
    text = f"{counted(len(rows), 'cell')}, {skipped} of them cannot run here; {counted(num_missing, 'run')} missing"
    out.print(text + (f", about {duration_text(about_s)} (a rough guess)" if num_missing else ""))


def _short(value: Any) -> str:
    if isinstance(value, dict) and "kind" in value:
        inner = [f"{k} {v}" for k, v in value.items() if k != "kind" and isinstance(v, (int, float, str))]
        return ", ".join([str(value["kind"]), *inner])
    return json.dumps(value, default=str) if isinstance(value, (dict, list)) else str(value)
