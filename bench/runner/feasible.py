"""Can this machine run this cell? If not, why."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.config.sweep import Cell
from bench.engines.vllm_args import wrong_argument
from bench.runner.schedules import longest_sequence_tokens
from bench.runner.simulated import why_not_simulated
from bench.runner.written import where_written
from bench.units import bytes_text

if TYPE_CHECKING:
    from bench.catalog.arch import ModelArch
    from bench.catalog.hardware import Hardware
    from bench.config.loading import LoadedExperiment

#: vLLM's CPU engine needs room for the KV cache and activations beside the weights.
HOST_MEMORY_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Machine:
    """What the checks need to know of this machine. ``gpu_memory_bytes`` is the smallest of the GPUs present."""

    num_gpus: int
    gpu_name: str | None
    gpu_memory_bytes: int | None
    num_cores: int
    host_memory_bytes: int
    has_vllm: bool
    hardware: Hardware | None = None  # the catalogue's entry for these GPUs

    @property
    def kind(self) -> str:
        return "gpu" if self.num_gpus else "cpu"


def this_machine() -> Machine:
    """Asks NVML and the operating system; never fails."""
    import importlib.util

    import psutil

    from bench.catalog.hardware import match_device
    from bench.telemetry.gpus import list_gpus, visible_devices

    visible = set(visible_devices())
    gpus = [g for g in list_gpus() if g.uuid in visible]
    memory = min((g.memory_bytes for g in gpus if g.memory_bytes), default=None)
    hardware = match_device(gpus[0].name, memory) if gpus and gpus[0].name else None
    return Machine(
        num_gpus=len(gpus),
        gpu_name=gpus[0].name if gpus else None,
        gpu_memory_bytes=memory,
        num_cores=len(os.sched_getaffinity(0)),
        host_memory_bytes=psutil.virtual_memory().total,
        has_vllm=importlib.util.find_spec("vllm") is not None,
        hardware=hardware,
    )


def check_telemetry(loaded: LoadedExperiment, machine: Machine) -> None:
    """Raises BadInput where the experiment asks for NVML and this machine has no GPU that NVML can read."""
    if loaded.experiment.telemetry.source == "nvml" and machine.num_gpus == 0:
        what = "no NVIDIA GPU can be read here"
        raise loaded.document.bad(what, ("telemetry", "source"), "write auto, host or none; `bench doctor` says more")


def check_engine_args(loaded: LoadedExperiment) -> None:
    """Raises BadInput, at its line, for an argument under ``engine.args`` or on an axis that vLLM would refuse at its start."""
    seen = set()
    for cell in loaded.cells:
        if cell.engine_key in seen:
            continue
        seen.add(cell.engine_key)
        found = wrong_argument(cell.spec.engine.kind, cell.spec.engine_args)
        if found is not None:
            where = where_written(loaded, cell, ("engine", "args", found.name))
            raise loaded.document.bad(found.what, where, found.next_step)


def why_not(cell: Cell, machine: Machine, arch: ModelArch | None) -> str | None:
    """The reason why ``machine`` cannot run ``cell``, or None.

    Args:
        arch: the model's ``bench.catalog.model.ModelArch``, None where it is not known (a hub id without a cache).
    """
    spec = cell.spec
    if spec.engine.kind in ("endpoint", "null"):
        return None
    if spec.engine.kind == "simulated":
        return why_not_simulated(spec, arch)
    if not machine.has_vllm:
        return "vLLM is not installed here (make setup)"
    need, have = spec.num_devices, machine.num_gpus if machine.num_gpus else machine.num_cores
    if need > have:
        return f"needs {need} {'GPUs' if machine.num_gpus else 'CPU ranks'}, this machine has {have} " + (
            "GPUs" if machine.num_gpus else "cores"
        )
    if arch is None:
        return _lengths(cell, None)
    tp, pp = spec.tensor_parallel_size, spec.pipeline_parallel_size
    return _lengths(cell, arch) or arch.parallel_problem(tp, pp) or _memory(cell, machine, arch)


def _lengths(cell: Cell, arch: ModelArch | None) -> str | None:
    longest = longest_sequence_tokens(cell.spec)
    limit = cell.spec.engine_args.get("max_model_len")
    if isinstance(limit, int) and not isinstance(limit, bool) and longest > limit:
        return f"ISL + OSL reaches {longest:,} tokens, max_model_len is {limit:,}"
    most = arch.max_position if arch is not None else None
    if limit is None and most and longest > most:
        return f"ISL + OSL reaches {longest:,} tokens, the model takes {most:,}"
    return None


def _memory(cell: Cell, machine: Machine, arch: ModelArch) -> str | None:
    args = cell.spec.engine_args
    tp, pp = cell.spec.tensor_parallel_size, cell.spec.pipeline_parallel_size
    if machine.num_gpus == 0:
        weights = arch.weight_bytes(args.get("quantization"), tp, pp) * tp * pp
        if weights > machine.host_memory_bytes * HOST_MEMORY_SHARE:
            return f"weights take {bytes_text(weights)}, this machine has {bytes_text(machine.host_memory_bytes)} of memory"
        return None
    if machine.hardware is None:
        return None
    from bench.catalog.memory import fit

    result = fit(
        arch,
        machine.hardware,
        tp=tp,
        pp=pp,
        quantization=args.get("quantization"),
        kv_cache_dtype=args.get("kv_cache_dtype"),
        gpu_memory_utilization=args.get("gpu_memory_utilization"),
    )
    if not result.fits:
        return result.reason or "weights do not fit"
    longest = longest_sequence_tokens(cell.spec)
    if result.kv_capacity_tokens < longest:
        return f"the KV cache holds {result.kv_capacity_tokens:,} tokens, one request reaches {longest:,}"
    return None
