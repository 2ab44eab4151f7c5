"""Before vLLM is imported: its environment and its arguments; after it is up: what it is. Nothing here runs requests."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.engines import vllm_args, vllm_tap, vllm_versions
from bench.errors import BadInput
from bench.records import EngineInfo

if TYPE_CHECKING:
    from bench.engines.launch import EngineLaunch

#: Sampling as ``vllm bench throughput`` does it: temperature 1, whole vocabulary, no stop at the end-of-text token (so
#: max_tokens is exact and min_tokens, which costs a logits processor, is not needed).
SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "ignore_eos": True, "detokenize": False}

#: KV cache of the CPU build where nothing else is asked for, in GiB. vLLM's default is a share of the host's memory.
CPU_KV_CACHE_GIB = 1
_SHOWN_ENVIRONMENT = (
    "VLLM_",
    "TORCH_COMPILE_DISABLE",
    "CUDA_VISIBLE_DEVICES",
    "NCCL_",
    "OMP_",
    "HF_HUB_OFFLINE",
    "PYTORCH_CUDA_ALLOC_CONF",
)
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def prepare_environment(launch: EngineLaunch, step_folder: Path) -> None:
    """Set what vLLM reads from the environment. What the user set wins."""
    defaults = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if Path(launch.model).is_dir():
        defaults["HF_HUB_OFFLINE"] = "1"
    if "kv_cache_memory_bytes" not in launch.args:  # the variable would win over the argument
        defaults["VLLM_CPU_KVCACHE_SPACE"] = str(CPU_KV_CACHE_GIB)
    num_ranks = _ranks(launch.args)
    if num_ranks > 1:
        # "auto" binds one rank per NUMA node and refuses more ranks than nodes; with one rank it is left alone.
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = cpu_binding(num_ranks, sorted(os.sched_getaffinity(0)))
    if not has_cpp_compiler() and not os.path.exists("/dev/nvidiactl"):
        # parts of vLLM's CPU build go through torch.compile even with enforce_eager; without a compiler they must not
        defaults |= {"TORCH_COMPILE_DISABLE": "1", "TORCHDYNAMO_DISABLE": "1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ[vllm_tap.FOLDER_VARIABLE] = str(step_folder)
    os.environ[vllm_tap.CLASS_VARIABLE] = str(launch.args.get("scheduler_cls") or "")


def has_cpp_compiler() -> bool:
    """Whether torch.compile would find a C++ compiler: ``$CXX``, or one of the names that torch looks for."""
    named = os.environ.get("CXX")
    return any(shutil.which(name) for name in ([named] if named else ["g++", "c++", "clang++"]))


def _ranks(args: dict[str, Any]) -> int:
    return int(args.get("tensor_parallel_size") or 1) * int(args.get("pipeline_parallel_size") or 1)


def cpu_binding(num_ranks: int, cores: list[int]) -> str:
    """VLLM_CPU_OMP_THREADS_BIND for several ranks: an even share of the cores each, as "0,1|2,3".

    Like vLLM's own binding it leaves one core per rank to the scheduler and front end, where there are enough. With
    fewer cores than ranks, ranks share cores.
    """
    usable = len(cores) - num_ranks if len(cores) >= 3 * num_ranks else len(cores)
    each = max(1, usable // num_ranks)
    shares = [[cores[(k * each + i) % len(cores)] for i in range(each)] for k in range(num_ranks)]
    return "|".join(",".join(str(c) for c in share) for share in shares)


def engine_args(launch: EngineLaunch, asynchronous: bool) -> Any:
    """vLLM's EngineArgs from the experiment's ``engine.args``.

    Raises:
        BadInput: an argument that this vLLM does not have; names the nearest ones.
    """
    found = vllm_args.wrong_argument("vllm", launch.args)
    if found is not None:
        raise BadInput(f"engine.args.{found.name}: {found.what}", next_step=found.next_step)
    cls = vllm_versions.engine_args_class(asynchronous)
    values: dict[str, Any] = {
        "model": launch.model,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        **({"load_format": "dummy"} if launch.weights == "dummy" else {}),
        **launch.args,
        "scheduler_cls": vllm_tap.SCHEDULER_CLS,
    }
    try:
        return cls(**values)
    except (TypeError, ValueError) as e:
        raise BadInput(f"vLLM refuses engine.args: {' '.join(str(e).split())}", next_step="correct engine.args") from e


def describe(engine: Any, launch: EngineLaunch, version: str, front_end: str, steps_recorded: bool) -> EngineInfo:
    """What goes into the manifest of every run of this engine."""
    config = vllm_versions.vllm_config_of(engine)
    effective = vllm_versions.effective_args(config)
    parallel = config.parallel_config
    num_ranks = int(parallel.world_size) * int(parallel.data_parallel_size)
    uuids = gpu_uuids(num_ranks) if vllm_versions.is_cuda() else ()
    return EngineInfo(
        kind="vllm",
        version=version,
        effective_args=effective,
        num_gpus=0 if vllm_versions.is_cpu() else num_ranks,
        device_uuids=uuids,
        kv_capacity_tokens=vllm_versions.kv_capacity_tokens(config),
        num_kv_blocks=effective.get("num_gpu_blocks"),
        block_size=effective.get("block_size"),
        max_model_len=effective.get("max_model_len"),
        notes={
            "front_end": front_end,
            "weights": launch.weights,
            "sampling": SAMPLING,
            "steps_recorded": steps_recorded,
            "environment": shown_environment(os.environ),
        },
    )


def shown_environment(environment: Any) -> dict[str, str]:
    """The variables that change what vLLM does, secrets left out."""
    return {
        k: v
        for k, v in sorted(environment.items())
        if k.startswith(_SHOWN_ENVIRONMENT) and not any(s in k.upper() for s in _SECRET)
    }


def gpu_uuids(num_gpus: int) -> tuple[str, ...]:
    """UUIDs of the first ``num_gpus`` GPUs that CUDA sees, in CUDA's order, without creating a CUDA context."""
    import pynvml

    visible = [v.strip() for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v.strip()]
    try:
        pynvml.nvmlInit()
        try:
            count = pynvml.nvmlDeviceGetCount()
            # CUDA_DEVICE_ORDER=PCI_BUS_ID is NVML's order; vLLM sets it where GPUs differ
            chosen = visible or [str(i) for i in range(count)]
            return tuple(_uuid(entry) for entry in chosen[:num_gpus])
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return tuple(v for v in visible[:num_gpus] if v.startswith(("GPU-", "MIG-")))


def _uuid(entry: str) -> str:
    import pynvml

    if entry.startswith(("GPU-", "MIG-")):
        handle = pynvml.nvmlDeviceGetHandleByUUID(entry)  # a prefix is allowed in CUDA_VISIBLE_DEVICES, not here
    else:
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(entry))
    uuid = pynvml.nvmlDeviceGetUUID(handle)
    return uuid.decode() if isinstance(uuid, bytes) else str(uuid)
