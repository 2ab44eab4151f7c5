"""Runs the cells of an experiment on GPUs that are not at hand: simulated runs in the layout of measured ones."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.catalog.arch import ModelArch
from bench.catalog.hardware import Hardware, load_hardware
from bench.config.experiment import CellSpec, EndpointEngine, Experiment, FleetSpec, TraceLoad, mean_length_tokens
from bench.config.experiment import SimulatedEngine as SimulatedSpec
from bench.config.load import load_level
from bench.config.loading import LoadedExperiment, model_digest
from bench.config.sweep import Cell, make_cell
from bench.engines.simulated import SimulatedEngine
from bench.errors import BadInput, BenchError
from bench.records import Schedule
from bench.runner.marks import mark_by_sent
from bench.runner.one_run import RunContext, base_manifest
from bench.runner.results import read_plan, write_resolved
from bench.runner.schedules import build_schedule
from bench.sim.fleets import FleetShape
from bench.sim.profile import load_profile
from bench.sim.setup import EngineSetup, engine_setup
from bench.sim.user_kernels import read_kernel_result
from bench.store import RunReader, RunWriter, list_runs, run_folder_name
from bench.workload.synthetic import repeat_seed

#: A run with a minimum duration takes as many requests as fit into it. So many, and so many for each in flight, are tried first,
#: then four times as many, ...
FIRST_POOL, FIRST_ROUNDS = 200, 4


@dataclass(frozen=True, slots=True)
class Target:
    """One cell on one GPU. ``measured`` is the cell of the experiment that this predicts."""

    cell: Cell
    measured: Cell
    hardware: Hardware


@dataclass(frozen=True, slots=True)
class Predicted:
    """What became of a target: its runs, or why there are none."""

    target: Target
    setup: EngineSetup | None
    runs: tuple[RunReader, ...]
    refused: str | None
    wall_s: float


def targets(
    loaded: LoadedExperiment, gpus: Sequence[Hardware], profile: Path | None, fleet: FleetSpec | None = None
) -> list[Target]:
    """Every cell on every GPU, served by ``fleet`` (None: what a simulated experiment says, else one engine).

    Raises BadInput for cells whose engine's arguments are not known (an endpoint).
    """
    out: dict[str, Target] = {}
    for measured in loaded.cells:
        engine = measured.spec.engine
        if isinstance(engine, EndpointEngine):
            raise BadInput(
                "what runs behind an endpoint is not known, so it cannot be predicted",
                where=f"{loaded.path}: engine",
                next_step="write the engine as kind: vllm or vllm_server with its args",
            )
        for hardware in gpus or [_own_gpu(loaded, measured)]:
            own = engine.fleet if isinstance(engine, SimulatedSpec) else FleetSpec()
            kind = SimulatedSpec(
                kind="simulated", gpu=hardware.name, args=measured.spec.engine_args,
                profile=str(profile) if profile else _own_profile(engine, hardware), fleet=fleet or own,
            )  # fmt: skip
            spec = measured.spec.model_copy(update={"engine": kind})
            axes = {**measured.axes_dict(), "gpu": hardware.name}
            if fleet is not None:
                axes |= {f"engine.fleet.{k}": v for k, v in fleet.model_dump(exclude_defaults=True).items()}
            cell = make_cell(axes, spec, model_digest(spec.model))
            out.setdefault(cell.cell_id, Target(cell, measured, hardware))
    return list(out.values())


def _own_profile(engine: Any, hardware: Hardware) -> str | None:
    """The profile that a simulated experiment names, on the GPU that it names; it says nothing about another."""
    if not isinstance(engine, SimulatedSpec) or engine.profile is None:
        return None
    return engine.profile if load_hardware(engine.gpu).name == hardware.name else None


def _own_gpu(loaded: LoadedExperiment, cell: Cell) -> Hardware:
    gpu = getattr(cell.spec.engine, "gpu", None)
    if gpu is None:
        raise BadInput("name the GPUs to predict", where="--gpu", next_step="e.g. --gpu H100-SXM,A100-80-SXM")
    return load_hardware(gpu)


def setup_of(target: Target, arch: ModelArch, kernels: Path | None) -> EngineSetup:
    """The engine that would serve the target's cell, calibrated by the profile that the cell names."""
    spec, served = target.cell.spec, target.measured.spec
    assert isinstance(spec.engine, SimulatedSpec)
    shape = FleetShape(**spec.engine.fleet.model_dump())
    typical = mean_length_tokens(spec.workload.isl) + mean_length_tokens(spec.workload.osl)
    return engine_setup(
        arch,
        target.hardware,
        spec.engine_args,
        usage="llm" if spec.load.kind == "offline" and served.engine.kind != "vllm_server" else "server",
        profile=Path(spec.engine.profile) if spec.engine.profile else None,
        kernels=kernels,
        typical_tokens=max(2, int(typical)),
        over_http=served.engine.kind == "vllm_server" or shape.num_engines > 1,
        shape=shape,
    )


def predict(
    loaded: LoadedExperiment,
    wanted: Sequence[Target],
    folder: Path,
    archs: dict[str, Any],
    provenance: dict[str, Any],
    *,
    kernels: Path | None = None,
    repeats: int | None = None,
) -> Iterator[Predicted]:
    """Simulate every target and store its runs under ``folder``; earlier predictions of the same cell are replaced.

    Earlier ones of other GPUs or fleets stay beside them, as long as the experiment still has what they predict and they rest
    on the same profile (the same fit, not only the same file name). A cell that vLLM could not run (it does not fit, a refused
    argument) is reported with its reason, not raised.
    """
    name = f"{loaded.experiment.name}.predicted"[:80]
    experiment = loaded.experiment.model_copy(update={"name": name})
    refused: dict[str, str] = {}
    _check_profiles(wanted, archs)
    if kernels is not None:
        read_kernel_result(kernels)  # what is no kernel result at all is no matter of single cells
    for target in wanted:
        begin = time.monotonic()
        arch = archs.get(target.cell.spec.model)
        if arch is None:
            raise BadInput(
                f"the architecture of {target.cell.spec.model} is not known here",
                where="model",
                next_step="use a catalogue name (`bench catalog`) or a folder with its config.json",
            )
        try:
            setup = setup_of(target, arch, kernels)
        except BenchError as e:
            refused[target.cell.cell_id] = str(e)
            yield Predicted(target, None, (), str(e), time.monotonic() - begin)
            continue
        runs = _simulate_cell(experiment, target, setup, folder, loaded.path.parent, provenance, repeats)
        yield Predicted(target, setup, runs, None, time.monotonic() - begin)
    write_resolved(folder, experiment, (*_earlier(folder, loaded, wanted), *(t.cell for t in wanted)), refused)


def _check_profiles(wanted: Sequence[Target], archs: dict[str, Any]) -> None:
    """Raises BadInput for a profile that cannot be read, or that is of another model or device than all that ask for it."""
    for path in dict.fromkeys(p for t in wanted if (p := _profile_of(t.cell)) is not None):
        profile = load_profile(Path(path))
        asked = [t for t in wanted if _profile_of(t.cell) == path]
        known = [(archs.get(t.cell.spec.model), t.hardware.name) for t in asked]
        if not any(a is not None and profile.is_of(a) and gpu == profile.layout.hardware for a, gpu in known):
            others = ", ".join(dict.fromkeys(f"{t.cell.spec.model} on {t.hardware.name}" for t in asked))
            raise BadInput(
                f"the profile was calibrated on {profile.layout.model} on {profile.layout.hardware}, not {others}",
                where=path,
                next_step="calibrate on runs of that engine, or predict without the profile",
            )


def _earlier(folder: Path, loaded: LoadedExperiment, wanted: Sequence[Target]) -> list[Cell]:
    """Cells predicted by earlier calls that still belong beside ``wanted``."""
    try:
        _, cells, _, _ = read_plan(folder)
    except BenchError:
        return []
    new, current = {t.cell.cell_id for t in wanted}, {c.cell_id for c in loaded.cells}
    fits = {path: _fit_of(path) for path in {_profile_of(t.cell) for t in wanted}}
    kept = []
    for cell in cells:
        path = _profile_of(cell)
        if cell.cell_id in new or path not in fits:
            continue
        runs = [r for r in list_runs(folder / cell.cell_id) if r.manifest.get("predicts", {}).get("cell_id") in current]
        used = [(r.manifest.get("simulated") or {}).get("profile") or {} for r in runs]
        if runs and all(u.get("sha256") in (None, fits[path]) for u in used):  # older versions kept no fingerprint
            kept.append(cell)
    return kept


def _profile_of(cell: Cell) -> str | None:
    return cell.spec.engine.profile if isinstance(cell.spec.engine, SimulatedSpec) else None


def _fit_of(path: str | None) -> str | None:
    """The fingerprint of the profile at ``path``; None for none, and for one that cannot be read."""
    try:
        return load_profile(Path(path)).fingerprint() if path else None
    except BenchError:
        return None


def _simulate_cell(
    experiment: Experiment,
    target: Target,
    setup: EngineSetup,
    folder: Path,
    base: Path,
    provenance: dict[str, Any],
    repeats: int | None,
) -> tuple[RunReader, ...]:
    cell_folder = folder / target.cell.cell_id
    if cell_folder.exists():
        if any(run.origin != "simulated" for run in list_runs(cell_folder)):
            raise BadInput("holds runs that are not simulated", where=str(cell_folder), next_step="give --results DIR")
        shutil.rmtree(cell_folder)
    engine = SimulatedEngine(setup)
    for number in range(1, (repeats or experiment.repeats) + 1):
        context = RunContext(
            experiment, target.cell, number, number, cell_folder, engine.info(), provenance, {},
            setup.model.vocab_size, base, False,
        )  # fmt: skip
        _simulate_run(context, engine, target.measured.cell_id)
    return tuple(list_runs(cell_folder))


def _simulate_run(context: RunContext, engine: SimulatedEngine, measured_cell_id: str) -> None:
    spec = context.cell.spec
    seed = repeat_seed(spec.seed, context.run_number)
    base = context.base if isinstance(spec.load, TraceLoad) else None
    pool = max(FIRST_POOL, round(FIRST_ROUNDS * load_level(spec.load)[1]))
    while True:
        schedule, more = _schedule(spec, seed, context.vocab_size, base, pool)
        manifest = {
            **base_manifest(context),
            "t0_utc": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
            "predicts": {"cell_id": measured_cell_id},
        }
        writer = RunWriter(context.cell_folder / run_folder_name(context.run_number), manifest)
        begin = time.monotonic()
        records = list(engine.run(schedule, writer, 0.0))
        if more and _ran_dry(schedule, records):
            shutil.rmtree(writer.folder)
            pool *= 4
            continue
        for record in mark_by_sent(records, schedule.kind, spec.warmup):
            writer.append_request(record)
        writer.finish(
            "complete",
            duration_s=time.monotonic() - begin,
            ended_s=writer.manifest["simulated"]["virtual_duration_s"],
            schedule={
                "kind": schedule.kind,
                "digest": schedule.digest(),
                "num_requests": len(schedule.requests),
                "max_in_flight": schedule.max_in_flight,
            },
        )
        return


def _schedule(spec: CellSpec, seed: int, vocab_size: int, base: Path | None, pool: int) -> tuple[Schedule, bool]:
    """The schedule of the run with at most ``pool`` counted requests where only its duration ends it; could it be longer?"""
    stop = spec.stop
    if spec.load.kind in ("offline", "closed_loop") and stop.min_duration_s > 0 and pool < (stop.max_requests or 10**9):
        limited = stop.model_copy(update={"max_requests": max(pool, stop.min_requests, 1)})
        schedule = build_schedule(
            spec.model_copy(update={"stop": limited}), seed=seed, vocab_size=vocab_size, base=base
        )
        own = replace(schedule.stop, max_requests=stop.max_requests)
        return replace(schedule, stop=own), True
    return build_schedule(spec, seed=seed, vocab_size=vocab_size, base=base), False


def _ran_dry(schedule: Schedule, records: Sequence[Any]) -> bool:
    """Whether all requests were used up before the stop rule ended the run."""
    return len(records) >= len(schedule.requests)
