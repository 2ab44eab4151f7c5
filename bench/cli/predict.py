"""`bench predict`: run an experiment on GPUs that are not at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.errors import EXIT_DONE, EXIT_SOME_FAILED

if TYPE_CHECKING:
    from bench.config.experiment import FleetSpec
    from bench.sim.interface import Interval
    from bench.store import RunReader

ROUTING = ("round-robin", "least-loaded", "prefix-aware")

#: metric of the summary -> (heading, metric of the interval, factor for printing)
_SHOWN = (
    ("output_tokens_per_s", "output tok/s", "output_tokens_per_s", 1.0),
    ("ttft_p50_s", "TTFT p50 ms", "ttft", 1e3),
    ("tpot_p50_s", "TPOT p50 ms", "tpot", 1e3),
    ("energy_j_per_output_token", "J/token", "energy", 1.0),
)


@click.command("predict")
@click.argument("experiment")
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    metavar="NAME,...",
    help="GPUs of the catalogue (`bench catalog`), comma-separated or repeated.",
)
@click.option(
    "--profile", type=click.Path(exists=True, dir_okay=False), help="A calibration written by `bench calibrate`."
)
@click.option("--kernels", type=click.Path(exists=True), help="A result of `bench kernels` from the predicted device.")
@click.option("--engines", type=click.IntRange(1), help="So many equal engines behind a router.")
@click.option("--routing", type=click.Choice(ROUTING), help="How the router spreads requests [least-loaded].")
@click.option("--prefill", type=click.IntRange(1), help="Disaggregated: so many engines do nothing but prompts ...")
@click.option("--decode", type=click.IntRange(1), help="... and so many do the rest.")
@click.option(
    "--kv-link", metavar="NAME", help="What the KV cache moves over: nvlink, pcie, ndr, 400gbe, ... or 40GB/s."
)
@click.option("--only", multiple=True, metavar="TEXT", help="Only cells whose id contains TEXT. May be repeated.")
@click.option("--repeats", type=click.IntRange(1), help="Simulated runs per cell (default: as in the experiment).")
@click.option("--results", type=click.Path(file_okay=False), help="Folder for results (default: results/).")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line instead of text.")
def command(
    experiment: str, gpus: tuple[str, ...], profile: str | None, kernels: str | None, engines: int | None,
    routing: str | None, prefill: int | None, decode: int | None, kv_link: str | None, only: tuple[str, ...],
    repeats: int | None, results: str | None, as_json: bool,
) -> int:  # fmt: skip
    """Simulate EXPERIMENT on other GPUs: vLLM's scheduler step by step over predicted step times.

    The runs are stored as `bench run` stores its own, marked as simulated, under <experiment>.predicted; lay them over
    measured ones with `bench report EXPERIMENT --with EXPERIMENT.predicted`. Several engines behind a router, or a prefill and a
    decode pool, are asked for with --engines, --routing, --prefill, --decode and --kv-link.
    """
    from bench.catalog.hardware import load_hardware
    from bench.config.loading import load
    from bench.errors import BadInput
    from bench.provenance import collect
    from bench.runner.models import load_archs
    from bench.runner.predict import predict, targets
    from bench.runner.results import RESULTS_VARIABLE, experiment_folder

    if results:
        os.environ[RESULTS_VARIABLE] = results
    loaded = load(experiment)
    names = [name.strip() for text in gpus for name in text.split(",") if name.strip()]
    own = Path(profile) if profile else None
    fleet = _fleet(engines, routing, prefill, decode, kv_link)
    wanted = targets(loaded, [load_hardware(name) for name in names], own, fleet)
    if only:
        wanted = [t for t in wanted if any(text in t.cell.cell_id for text in only)]
        if not wanted:
            raise BadInput(f"no cell id contains {' or '.join(only)}", where="--only")
    folder = experiment_folder(f"{loaded.experiment.name}.predicted")
    archs = load_archs([t.cell.spec.model for t in wanted])
    done = []
    for predicted in predict(
        loaded, wanted, folder, archs, collect(), kernels=Path(kernels) if kernels else None, repeats=repeats
    ):  # fmt: skip
        row = _row(predicted)
        done.append(row)
        if as_json:
            click.echo(json.dumps(row))
        else:
            _print_row(row, first=len(done) == 1)
    if not as_json:
        _print_sources(done, folder, experiment, loaded.experiment.name)
    if all(row["refused"] for row in done):
        return EXIT_SOME_FAILED
    return EXIT_DONE


def _fleet(
    engines: int | None, routing: str | None, prefill: int | None, decode: int | None, kv_link: str | None
) -> FleetSpec | None:
    """The fleet that the options ask for; None if they say nothing. Raises BadInput for one that cannot be."""
    from bench.config.experiment import FleetSpec
    from bench.sim.fleets import FleetShape

    given = {"engines": engines, "prefill": prefill, "decode": decode, "kv_link": kv_link}
    given = {name: value for name, value in given.items() if value is not None}
    if routing is not None:
        given["routing"] = routing.replace("-", "_")
    if not given:
        return None
    fleet = FleetSpec.model_validate(given)
    FleetShape(**fleet.model_dump())
    return fleet


def _row(predicted: Any) -> dict[str, Any]:
    from bench.analysis.summary import summarise_run
    from bench.sim.power import energy_per_token_interval
    from bench.sim.scheduler import PROVED_AGAINST_VLLM

    cell = predicted.target.cell
    row: dict[str, Any] = {
        "cell_id": cell.cell_id,
        "predicts": predicted.target.measured.cell_id,
        "gpu": predicted.target.hardware.name,
        "origin": "simulated",
        "refused": predicted.refused,
        "scheduler_proved_against_vllm": PROVED_AGAINST_VLLM,
    }
    if predicted.setup is None:
        return row
    summaries = [summarise_run(run) for run in predicted.runs]
    step_time = predicted.setup.step_time
    row |= {"step_time_source": step_time.source, "step_time_trust": step_time.trust, "num_runs": len(summaries)}
    row |= {"kv_source": predicted.setup.kv_source, "not_simulated": list(predicted.setup.ignored)}
    row |= {
        "num_requests": int(sum(s.counts.get("num_requests", 0) - s.counts.get("num_warmup", 0) for s in summaries))
    }
    row |= {"num_cut_off": sum(s.errors.get("aborted", 0) for s in summaries)}
    row |= {"fleet": cell.spec.engine.fleet.text or None, "num_gpus": predicted.setup.num_gpus}
    for key, _, metric, _ in _SHOWN:
        values = [s.values[key] for s in summaries if key in s.values]
        if not values:
            continue
        value = sum(values) / len(values)
        interval = step_time.interval("output_tokens_per_s" if metric == "energy" else metric)
        if metric == "output_tokens_per_s" and interval is not None:
            interval = _throughput_interval(predicted.runs, interval)
        if metric == "energy" and interval is not None:
            interval = energy_per_token_interval(predicted.target.hardware.name, interval)
        row[key] = {
            "value": value,
            "low": None if interval is None else value * interval.low_ratio,
            "high": None if interval is None else value * interval.high_ratio,
            "confidence": None if interval is None else interval.confidence,
        }
    return row


def _throughput_interval(runs: Sequence[RunReader], engine: Interval) -> Interval:
    """What the runs' manifests state, the widest of all runs: under arrivals it is not the engine's."""
    stated = [run.manifest["simulated"]["intervals"]["output_tokens_per_s"] for run in runs]
    return replace(engine, low_ratio=min(s[0] for s in stated), high_ratio=max(s[1] for s in stated))


def _print_row(row: dict[str, Any], first: bool) -> None:
    from bench.units import significant

    if first:
        click.echo("SIMULATED, nothing here was measured; in brackets the 90 % interval of the prediction")
        click.echo(f"{'cell':<46}" + "".join(f"{heading:>24}" for _, heading, _, _ in _SHOWN))
    if row["refused"]:
        click.echo(f"{row['cell_id']:<46}  refused: {row['refused']}")
        return
    cells = []
    for key, _, _, factor in _SHOWN:
        found = row.get(key)
        if found is None:
            cells.append("n/a")
        elif found["low"] is None:
            cells.append(significant(found["value"] * factor))
        else:
            low, high = (significant(found[end] * factor, 2) for end in ("low", "high"))
            cells.append(f"{significant(found['value'] * factor)} [{low}..{high}]")
    click.echo(f"{row['cell_id']:<46}" + "".join(f"{text:>24}" for text in cells))


def _print_sources(rows: list[dict[str, Any]], folder: Path, experiment: str, name: str) -> None:
    from bench.sim.scheduler import PROVED_AGAINST_VLLM

    click.echo(f"scheduler: proved step by step against vLLM {PROVED_AGAINST_VLLM}")
    for source in dict.fromkeys((r["gpu"], r["step_time_source"]) for r in rows if not r["refused"]):
        click.echo(f"step times of {source[0]}: {source[1]}")
    for fleet, gpus in dict.fromkeys((r["fleet"], r["num_gpus"]) for r in rows if r.get("fleet")):
        click.echo(f"fleet: {fleet} ({gpus} GPUs); rates are of the whole fleet")
    for row in rows:
        if row.get("num_cut_off"):
            click.echo(
                f"{row['cell_id']}: {row['num_cut_off']:,} of {row['num_requests']:,} requests were cut off at the run's end, as "
                "`bench run` would cut them off; latencies are those of the others"
            )
    ignored = sorted({name for r in rows for name in r.get("not_simulated", [])})
    if ignored:
        click.echo(f"engine arguments without effect on the simulation: {', '.join(ignored)}")
    if all(row["refused"] for row in rows):
        return
    click.echo(f"runs: {folder}")
    click.echo(f"lay them over measured runs: bench report {experiment} --with {name}.predicted")
