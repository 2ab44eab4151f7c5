"""What a simulated engine of an experiment rests on: its GPU, its profile, its arguments, looked at before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.catalog.hardware import Hardware, load_hardware
from bench.config.experiment import CellSpec, SimulatedEngine
from bench.errors import BadInput, BenchError
from bench.runner.written import where_written
from bench.sim.fleets import FleetShape
from bench.sim.profile import Layout, load_profile
from bench.sim.setup import engine_setup

if TYPE_CHECKING:
    from bench.catalog.arch import ModelArch
    from bench.config.loading import LoadedExperiment
    from bench.config.sweep import Cell


def check_simulated(loaded: LoadedExperiment, archs: dict[str, Any]) -> None:
    """Raises BadInput, at its line, for a simulated engine's GPU that is not known and for a profile that cannot be used.

    A profile that cannot be read, is none, or is of another model, GPU or layout cannot be used.
    """
    seen = set()
    for cell in loaded.cells:
        engine = cell.spec.engine
        if not isinstance(engine, SimulatedEngine) or cell.engine_key in seen:
            continue
        seen.add(cell.engine_key)
        try:
            hardware = load_hardware(engine.gpu)
        except BenchError as e:
            raise _at(loaded, cell, "gpu", e) from None
        if engine.profile is not None:
            try:
                _check_profile(Path(engine.profile), cell.spec, archs.get(cell.spec.model), hardware)
            except BenchError as e:
                raise _at(loaded, cell, "profile", e) from None


def _at(loaded: LoadedExperiment, cell: Cell, field: str, e: BenchError) -> BadInput:
    """``e`` at the line of the experiment that says this ``field`` of the engine."""
    what = f"{e.where}: {e.what}" if e.where else e.what
    return loaded.document.bad(what, where_written(loaded, cell, ("engine", field)), e.next_step)


def _check_profile(path: Path, spec: CellSpec, arch: ModelArch | None, hardware: Hardware) -> None:
    """Raises BadInput for a file that is no profile, and for the profile of another engine than ``spec``'s."""
    profile, args = load_profile(path), spec.engine_args
    known = arch is not None and profile.is_of(arch)
    asked = Layout(
        model=profile.layout.model if known else spec.model,
        hardware=hardware.name,
        tensor_parallel_size=spec.tensor_parallel_size,
        pipeline_parallel_size=spec.pipeline_parallel_size,
        enable_expert_parallel=bool(args.get("enable_expert_parallel") or False),
        quantization=args.get("quantization"),
        kv_cache_dtype=args.get("kv_cache_dtype"),
    )
    profile.check_layout(asked)


def why_not_simulated(spec: CellSpec, arch: ModelArch | None) -> str | None:
    """Why this cell's engine cannot be simulated (it does not fit, vLLM would refuse an argument); None where it can.

    To be asked after :func:`check_simulated`.
    """
    engine = spec.engine
    assert isinstance(engine, SimulatedEngine)
    if arch is None:
        return (
            f"the architecture of {spec.model} is not known here; use a catalogue name or a folder with its config.json"
        )
    try:
        engine_setup(
            arch,
            load_hardware(engine.gpu),
            spec.engine_args,
            usage="llm" if spec.load.kind == "offline" else "server",
            profile=Path(engine.profile) if engine.profile else None,
            shape=FleetShape(**engine.fleet.model_dump()),
        )
    except BenchError as e:
        return str(e)
    return None
