"""`bench run`: measure what is missing of an experiment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from bench.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_SOME_FAILED


@click.command("run")
@click.argument("experiment", required=False)
@click.option("--results", type=click.Path(file_okay=False), help="Folder for results (default: results/).")
@click.option(
    "--only",
    multiple=True,
    metavar="TEXT",
    help="Only cells whose name contains TEXT, or whose id it is. May be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line instead of text.")
@click.option("--plain", is_flag=True, help="Plain lines even on a terminal.")
@click.option("--report/--no-report", default=True, help="Write the report at the end.")
def command(
    experiment: str | None, results: str | None, only: tuple[str, ...], as_json: bool, plain: bool, report: bool
) -> int:
    """Run EXPERIMENT (a file, or a name in configs/experiments/); without one, the default that fits this machine.

    Complete runs are never repeated: run the same command again to continue after an interruption.
    """
    from bench.config.loading import load
    from bench.errors import BadInput
    from bench.runner.feasible import this_machine
    from bench.runner.local import LocalRunner
    from bench.runner.models import load_archs
    from bench.runner.progress import display_for
    from bench.runner.results import RESULTS_VARIABLE, experiment_folder

    if experiment is None:
        from bench.cli.doctor import recommended_experiment

        experiment = recommended_experiment()
    if results:
        os.environ[RESULTS_VARIABLE] = results
    loaded = load(experiment)
    archs = load_archs([c.spec.model for c in loaded.cells])
    selected = None
    if only:
        selected = {c.cell_id for c in loaded.cells if any(_names(text, c.cell_id) for text in only)}
        if not selected:
            raise BadInput(
                f"no cell id contains {' or '.join(only)}",
                where="--only",
                next_step=f"`bench validate {experiment}` lists the cells",
            )
    display = display_for("json" if as_json else "plain" if plain else "auto")
    folder = experiment_folder(loaded.experiment.name)
    runner = LocalRunner(loaded, folder, display, this_machine(), archs, _provenance())
    try:
        outcome = runner.run(selected)
    finally:
        display.close()
    if outcome.interrupted:
        again = f"bench run {experiment}" + (f" --results {results}" if results else "")
        if not as_json:
            click.echo(f"interrupted: every finished run is kept; continue with `{again}`", err=True)
        return EXIT_INTERRUPTED
    if report:
        try:
            _report(folder, as_json)
        except KeyboardInterrupt:
            where = f" --results {results}" if results else ""
            again = f"bench report {loaded.experiment.name}{where}"
            click.echo(f"interrupted: every run is kept; write the report with `{again}`", err=True)
            return EXIT_INTERRUPTED
    return EXIT_SOME_FAILED if outcome.num_failed or outcome.num_missing else EXIT_DONE


def _names(text: str, cell_id: str) -> bool:
    """Whether ``--only text`` means this cell: "c1" must not find the hash of another one."""
    name, _, digest = cell_id.rpartition("-")
    return text in name or text in (digest, cell_id)


def _provenance() -> dict[str, Any]:
    from bench.provenance import collect

    return collect()


def _report(folder: Path, as_json: bool) -> None:
    from bench.report.write import write_report

    paths = write_report(folder)
    if not as_json:
        click.echo(f"report: {paths.html}")
