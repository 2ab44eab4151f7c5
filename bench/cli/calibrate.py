"""``bench calibrate RUN...``: fit the step-time model to recorded runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from bench.sim.profile import Profile
    from bench.store import RunReader


#: Said after each calibration: its interval is that of engines in process.
NOT_COVERED = (
    "Engine steps are recorded in process: what an HTTP server adds was not seen. Predictions of engine.kind vllm_server take a "
    "measured 1 ms a request for it, and an interval as wide as that of an engine that was never fitted, at least."
)


@click.command("calibrate")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--name", help="Name of the profile. Default: the experiment's name.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("results/profiles"), show_default=True, help="Folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print the profile as JSON.")
def command(runs: tuple[Path, ...], name: str | None, out: Path, as_json: bool) -> None:
    """Fit the step-time model to the engine steps of RUNS and write a profile for `bench predict`.

    RUNS are run folders, or folders of cells or experiments with runs below them; only complete measured ones count.
    They must be of one engine: the same model, device, layout, data_parallel_size and, on a CPU, cores.
    The error printed is cross-validated: every cell is predicted by a fit that never saw it.
    """
    from bench.sim.calibrate import calibrate
    from bench.sim.profile import save_profile

    found = find_runs(runs)
    chosen = name or str(found[0].manifest.get("experiment") or "profile")
    profile = calibrate(found, chosen)
    path = save_profile(profile, out)
    if as_json:
        click.echo(path.read_text(encoding="utf-8").rstrip())
        return
    _print(profile)
    click.echo(NOT_COVERED)
    click.echo(f"\nwrote {path}")


def find_runs(paths: tuple[Path, ...]) -> list[RunReader]:
    """Complete runs at or below ``paths``. Raises BadInput when there is none."""
    from bench.errors import BadInput
    from bench.store import MANIFEST, RunReader

    found = []
    for path in paths:
        if not path.exists():
            raise BadInput("no such folder", where=str(path), next_step="name a run, a cell or an experiment's folder")
        for manifest in [path / MANIFEST] if (path / MANIFEST).is_file() else sorted(path.rglob(MANIFEST)):
            run = RunReader.open(manifest.parent)
            if run.status == "complete":
                found.append(run)
    if not found:
        raise BadInput("no complete runs here", where=str(paths[0]), next_step="run `bench run` first")
    for run in found:
        kind = str(((run.manifest.get("cell") or {}).get("engine") or {}).get("kind"))
        if kind == "endpoint" and run.manifest.get("origin") == "measured":
            raise BadInput(
                "a run of a server that was not started here holds no engine steps to fit",
                where=str(run.folder),
                next_step="calibrate on `bench run` with engine.kind vllm",
            )
    return found


#: Below these a coefficient is a zero that the fit stopped at: a thousandth of the uncalibrated model, a nanosecond a step,
#: a tenth of a nanosecond for each request or prompt token of a step.
_LEAST_SCALE, _LEAST_S, _LEAST_EACH_S = 1e-3, 1e-9, 1e-10


def coefficient_text(value: float, least: float, factor: float, unit: str) -> str:
    """A fitted coefficient for people; one on its lower bound is said to be none ("x 5e-322" is no finding)."""
    return f"{value * factor:.3g}{unit}" if value >= least else f"0{unit} (no effect seen in these runs)"


def _print(profile: Profile) -> None:
    p, errors = profile.parameters, profile.errors
    layout = profile.layout
    ranks = int(profile.extra.get("data_parallel_size") or 1)
    click.echo(
        f"{profile.num_steps:,} steps of {len(profile.runs)} runs: {layout.model} on {layout.hardware}, "
        f"TP {layout.tensor_parallel_size}"
        + (f", {ranks} data-parallel engines that share the host" if ranks > 1 else "")
    )
    rows = (
        ("projections, MLP, norms, all-reduce", "linear_scale", _LEAST_SCALE, 1.0, ""),
        ("decode attention", "decode_attention_scale", _LEAST_SCALE, 1.0, ""),
        ("prefill attention", "prefill_attention_scale", _LEAST_SCALE, 1.0, ""),
        ("fixed per step", "fixed_s", _LEAST_S, 1e3, " ms"),
        ("more in a step with prompts", "prefill_fixed_s", _LEAST_S, 1e3, " ms"),
        ("per request in a step", "per_request_s", _LEAST_EACH_S, 1e6, " µs"),
        ("per prompt token", "per_prefill_token_s", _LEAST_EACH_S, 1e6, " µs"),
    )
    click.echo("  (x: of the uncalibrated model)")
    for title, name, least, factor, unit in rows:
        times = "x " if name.endswith("_scale") else ""
        click.echo(f"  {title:<37} {times}{coefficient_text(p[name], least, factor, unit)}")
    if any(p[name] < least for _, name, least, _, _ in rows if name.endswith("_scale")):
        click.echo(
            "  A scale of 0: the other terms explain these runs alone. Do not predict batches, prompts or contexts beyond those "
            "recorded with this profile."
        )
    click.echo(f"cross-validated ({errors['method']}):")
    click.echo(
        f"  single steps    median {errors['step_median_ape']:.1%}, 90th percentile {errors['step_p90_ape']:.1%}"
    )
    click.echo(f"  time of a cell  mean {errors['cell_time_mean_ape']:.1%}")
    for cell, error in errors["cells"].items():
        click.echo(f"    {error:+7.1%}  {cell}")
    interval = profile.intervals()["tpot"]
    click.echo(
        f"90 % interval of a predicted TPOT: {interval.low_ratio:.2f} to {interval.high_ratio:.2f} of it ({interval.basis})"
    )
