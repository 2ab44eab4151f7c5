"""``bench report EXPERIMENT``: the report of an experiment, as Markdown, one HTML file and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from bench.report.write import ReportFiles


@click.command("report")
@click.argument("experiment")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to write to  [default: report/ in the results folder]",
)
@click.option(
    "--results", type=click.Path(path_type=Path, file_okay=False), help="Folder of results  [default: results/]"
)
@click.option(
    "--gpu-price",
    type=click.FloatRange(min=0),
    metavar="USD",
    help="Price of one device-hour; wins over the experiment's.",
)
@click.option(
    "--utilisation",
    type=click.FloatRange(min=0, max=1, min_open=True),
    help="Share of full use at which costs are also stated.",
)
@click.option("--slo", help='A name in configs/slo/ or a text such as "ttft p99 <= 500 ms".')
@click.option(
    "--with",
    "beside",
    multiple=True,
    metavar="OTHER",
    help="Lay another experiment's results beside it (a prediction, another machine). May be repeated.",
)
@click.option("--open", "open_it", is_flag=True, help="Open the HTML file afterwards.")
@click.option("--json", "as_json", is_flag=True, help="Print the answers and the paths as JSON.")
def command(
    experiment: str,
    out: Path | None,
    results: Path | None,
    gpu_price: float | None,
    utilisation: float | None,
    slo: str | None,
    beside: tuple[str, ...],
    open_it: bool,
    as_json: bool,
) -> None:
    """Write the report of EXPERIMENT: a name, its results folder, or its file.

    Works on an unfinished experiment too, and says what is missing. A new report never needs a new run.
    """
    from bench.report.build import Options
    from bench.report.collect import find_folder
    from bench.report.write import machine_form, write_report

    root = None if results is None else results / "runs"
    folder = find_folder(experiment, root)
    others = [find_folder(name, root) for name in beside]
    files = write_report(folder, Options(gpu_price, utilisation, slo), out, others)
    if as_json:
        click.echo(json.dumps({**machine_form(files.report), "paths": files.paths()}, indent=1))
    else:
        _print(files)
    if open_it:
        click.launch(str(files.html))


def _print(files: ReportFiles) -> None:
    report = files.report
    if report.origin_label:
        click.secho(report.origin_label.upper(), bold=True)
    click.echo(report.state + ".")
    from bench.units import counted

    workload = ""
    for a in report.answers:
        if a.workload != workload:
            workload = a.workload
            click.secho(workload, bold=True)
        click.echo(f"{a.question}: {a.headline}, {a.figure}. {a.sentence}")
    for d in report.doubts:
        if d.warning.severity != "note":
            click.echo(f"{d.warning.severity}: {d.warning.message} ({counted(len(d.cells), 'cell')})", err=True)
    for f in report.failures:
        cells = f.cells[0] if len(f.cells) == 1 else counted(len(f.cells), "cell")
        click.echo(f"{cells}: {f.what}: {' '.join(f.reason.split())[:200]}", err=True)
    click.echo(f"report: {files.html}")
