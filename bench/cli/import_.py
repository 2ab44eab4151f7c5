"""``bench import FILE...``: result files of other tools become ordinary results, labelled as imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from bench.interop.imported import ForeignRun
    from bench.interop.write import Hints, Written

#: The names of bench.interop.formats.FORMATS; written out so that --help imports none of them (a test compares).
FORMAT_NAMES = ("auto", "vllm-bench", "guidellm", "aiperf", "inference-perf", "genai-bench", "ml-energy", "inferencex")


@click.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option("--format", "format_name", type=click.Choice(FORMAT_NAMES), default="auto", show_default=True,
              help="What wrote the files; auto tells by their content.")  # fmt: skip
@click.option("--name", metavar="EXPERIMENT", help="Name of the results  [default: from the file's name]")
@click.option("--gpu", metavar="NAME", help="The GPU that served, as `bench catalog hardware` names it: H100-SXM.")
@click.option(
    "--gpus", "num_gpus", type=click.IntRange(0), metavar="N", help="How many GPUs the engine held; 0 on a CPU."
)
@click.option("--tp", type=click.IntRange(1), metavar="N", help="Its tensor parallelism.")
@click.option("--model", metavar="NAME", help="The model, where the file does not say or says a path.")
@click.option("--engine", metavar="NAME", help="The engine that served: vllm, sglang, ...")
@click.option("--engine-version", metavar="VERSION", help="Its version.")
@click.option(
    "--batch-size", type=click.IntRange(1), metavar="N", help="For files that leave it out (vllm bench latency)."
)
@click.option(
    "--results", type=click.Path(path_type=Path, file_okay=False), help="Folder of results  [default: results/]"
)
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def command(
    files: tuple[Path, ...],
    format_name: str,
    name: str | None,
    gpu: str | None,
    num_gpus: int | None,
    tp: int | None,
    model: str | None,
    engine: str | None,
    engine_version: str | None,
    batch_size: int | None,
    results: Path | None,
    as_json: bool,
) -> None:
    """Import result FILEs of vllm bench, GuideLLM, AIPerf, inference-perf, genai-bench, ML.ENERGY and InferenceX.

    Numbers are mapped by definition and labelled IMPORTED everywhere. What no file says (GPU, engine version) stays unknown
    unless you say it here. Files of one import become one experiment; importing a file again changes nothing.
    """
    from bench.catalog.hardware import load_hardware
    from bench.errors import BadInput
    from bench.interop.write import Hints, experiment_name, write_runs

    if name is not None and experiment_name(name) != name:
        raise BadInput(f"{name!r} cannot name results", where="--name", next_step=f"write {experiment_name(name)}")
    if num_gpus is not None and tp is not None and 0 < num_gpus < tp:
        raise BadInput(f"{tp} ranks do not fit on {num_gpus} GPUs", where="--tp", next_step="give --gpus the total")
    hints = Hints(
        gpu=load_hardware(gpu) if gpu else None, num_gpus=num_gpus, tensor_parallel_size=tp, model=model, engine=engine,
        engine_version=engine_version, batch_size=batch_size,
    )  # fmt: skip
    found = _read(files, format_name)
    chosen = name or _default_name(files, found)
    written = write_runs(chosen, found, hints, None if results is None else results / "runs")
    if as_json:
        click.echo(json.dumps(_machine(chosen, written, hints), indent=1, default=str))
    else:
        _print(chosen, written, results)


def _read(files: tuple[Path, ...], format_name: str) -> list[tuple[Path, ForeignRun]]:
    """Every run of every file, read before anything is written; a file read as a companion of another counts once."""
    from bench.interop.formats import read_runs
    from bench.interop.reading import read_file

    found: list[tuple[Path, ForeignRun]] = []
    taken: set[Path] = set()
    for path in dict.fromkeys(files):
        if path.resolve() in taken:
            continue
        for run in read_runs(read_file(path), format_name):
            found.append((path, run))
            taken |= {p.resolve() for p in run.companions}
    return found


def _default_name(files: tuple[Path, ...], found: list[tuple[Path, ForeignRun]]) -> str:
    from bench.interop.write import experiment_name

    if len({p for p, _ in found}) == 1:
        return experiment_name(files[0].stem)
    parents = {p.resolve().parent.name for p in files}
    return experiment_name(parents.pop() if len(parents) == 1 else found[0][1].format)


def _machine(name: str, written: list[Written], hints: Hints) -> dict[str, Any]:
    return {
        "experiment": name,
        "origin": "imported",
        "runs": [
            {
                "file": str(w.source),
                "part": w.run.part,
                "format": w.run.format,
                "tool": w.run.tool,
                "tool_version": w.run.tool_version,
                "cell_id": w.cell_id,
                "folder": str(w.folder),
                "already_imported": w.already,
                "num_records": len(w.run.records),
                "recounted": [{"key": c.key, "theirs": c.theirs, "ours": c.ours, "agrees": c.agrees} for c in w.checks],
                "notes": list(w.run.notes),
                "unknown": list(w.unknown),
            }
            for w in written
        ],
    }


def _print(name: str, written: list[Written], results: Path | None) -> None:
    from bench.units import counted

    new = [w for w in written if not w.already]
    cells = len({w.cell_id for w in written})
    click.secho("IMPORTED, NOT MEASURED HERE", bold=True)
    click.echo(
        f"{counted(len(new), 'run')} of {counted(cells, 'cell')} written"
        + (f", {len(written) - len(new)} were there before" if len(new) < len(written) else "")
    )
    for w in written:
        place = f"{w.source}{' ' + w.run.part if w.run.part else ''}"
        click.echo(f"  {place} ({w.run.tool}{' ' + w.run.tool_version if w.run.tool_version else ''}) -> {w.folder}")
        click.echo(f"    {_content(w)}")
        for c in w.disagreeing:
            click.secho(f"    {c.key}: the tool says {c.theirs:.6g}, its records give {c.ours:.6g}", fg="yellow")
    for note in dict.fromkeys(n for w in written for n in w.run.notes):
        click.echo(f"note: {note}")
    unknown = list(dict.fromkeys(u for w in written for u in w.unknown))
    if unknown:
        click.echo(f"in no file and not given, so unknown: {', '.join(unknown)}")
    where = "" if results is None else f" --results {results}"
    click.echo(f"next: bench report {name}{where}")


def _content(w: Written) -> str:
    if not w.run.records:
        return "its summary alone: no per-request records in the file"
    failed = sum(r.error is not None for r in w.run.records)
    text = f"{len(w.run.records)} requests, {failed} failed"
    if not w.checks:
        return text + "; the file has no summary to check them against"
    agreeing = [c for c in w.checks if c.agrees]
    worst = max((c.difference_ratio for c in agreeing), default=0.0)
    return f"{text}; {len(agreeing)} of {len(w.checks)} of the tool's own numbers come out again, within {worst:.2g} of each"
