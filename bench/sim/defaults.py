"""What vLLM chooses where the user says nothing: batch limits by device and use, and CUDA-graph capture sizes.

From ``vllm/engine/arg_utils.py`` (``get_batch_defaults``) and ``vllm/config/vllm.py`` (``_set_cudagraph_sizes``) of the
release that the scheduler is proved against. Two defaults moved in earlier releases and matter to who compares:
``gpu_memory_utilization`` was 0.90 before 0.22, and asynchronous scheduling was off before 0.14.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any, Literal

from bench.catalog.hardware import Hardware
from bench.catalog.memory import engine_defaults
from bench.errors import BadInput
from bench.sim.scheduler import SchedulerConfig

Usage = Literal["llm", "server"]
MAX_GRAPH_TOKENS, MAX_GRAPH_TOKENS_BLACKWELL = 512, 1024

#: Engine arguments that decide what the scheduler does and that the simulation follows.
SCHEDULER_ARGS = frozenset(
    [
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_model_len",
        "block_size",
        "enable_prefix_caching",
        "enable_chunked_prefill",
        "async_scheduling",
        "scheduling_policy",
        "long_prefill_token_threshold",
        "long_prefill_token_threshold_adaptive",
        "scheduler_reserve_full_isl",
        "watermark",
        "max_num_scheduled_tokens",
        "max_num_active_seqs",
        "pipeline_parallel_size",
        "performance_mode",
        "num_gpu_blocks_override",
    ]
)
#: Arguments that change the schedule in ways that are not simulated: refused rather than ignored.
REFUSED_ARGS = frozenset(["speculative_config", "kv_transfer_config", "prefill_schedule_interval"])


def batch_limits(
    args: Mapping[str, Any], hardware: Hardware, usage: Usage, max_model_len: int, world_size: int = 1
) -> tuple[int, int]:
    """(max_num_batched_tokens, max_num_seqs) of an engine with these arguments on this device.

    ``usage`` is "llm" for ``vllm.LLM`` and "server" for the API server: vLLM's defaults differ. The CPU backend scales its
    own with ``world_size``.
    """
    if hardware.kind == "cpu":
        tokens, seqs = (4096, 256) if usage == "llm" else (2048, 128)
        tokens, seqs = tokens * world_size, seqs * world_size
    else:
        tokens, seqs = engine_defaults(hardware, usage)
    factor = 2 if args.get("performance_mode") == "throughput" else 1
    own_tokens, own_seqs = args.get("max_num_batched_tokens"), args.get("max_num_seqs")
    tokens = int(own_tokens) if own_tokens else tokens * factor
    seqs = int(own_seqs) if own_seqs else seqs * factor
    if not own_tokens:
        if args.get("enable_chunked_prefill") is False:
            tokens = max(tokens, max_model_len)
        tokens = min(tokens, seqs * max_model_len)
    if not own_seqs:
        seqs = min(seqs, tokens)
    return tokens, seqs


def scheduler_config(
    args: Mapping[str, Any], hardware: Hardware, usage: Usage, max_model_len: int, num_blocks: int, block_size: int
) -> SchedulerConfig:
    """The scheduler of an engine with vLLM's arguments ``args``; everything not given takes vLLM's default.

    Raises:
        BadInput: an argument that vLLM would refuse, or that is not simulated.
    """
    refused = sorted(name for name in REFUSED_ARGS if args.get(name))
    if refused:
        raise BadInput(
            f"{refused[0]} changes the schedule and is not simulated", where="engine.args", next_step="leave it out"
        )
    pp = int(args.get("pipeline_parallel_size") or 1)
    world = pp * int(args.get("tensor_parallel_size") or 1)
    tokens, seqs = batch_limits(args, hardware, usage, max_model_len, world)
    v2_runner = hardware.kind != "cpu"  # needs Triton
    asynchronous = args.get("async_scheduling")
    if asynchronous is None:
        asynchronous = v2_runner  # the CPU backend turns it off
    policy = args.get("scheduling_policy", "fcfs")
    if policy not in ("fcfs", "priority"):
        raise BadInput(f'expected "fcfs" or "priority", got {policy!r}', where="engine.args.scheduling_policy")
    return SchedulerConfig(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        block_size=block_size,
        enable_prefix_caching=args.get("enable_prefix_caching", True) is not False,
        enable_chunked_prefill=args.get("enable_chunked_prefill", True) is not False,
        async_scheduling=bool(asynchronous) and v2_runner,
        policy=policy,
        long_prefill_token_threshold=int(args.get("long_prefill_token_threshold") or 0),
        long_prefill_token_threshold_adaptive=bool(args.get("long_prefill_token_threshold_adaptive")),
        scheduler_reserve_full_isl=args.get("scheduler_reserve_full_isl", True) is not False,
        watermark=float(args.get("watermark") or 0.0),
        max_num_scheduled_tokens=args.get("max_num_scheduled_tokens"),
        max_num_active_seqs=args.get("max_num_active_seqs"),
        pipeline_parallel_size=pp,
        use_v2_model_runner=v2_runner,
    )


def capture_sizes(max_num_seqs: int, max_num_batched_tokens: int, blackwell: bool = False) -> list[int]:
    """Batch sizes (tokens) for which vLLM captures CUDA graphs: 1, 2, 4, by 8 below 256, then by 16."""
    limit = min(2 * max_num_seqs, MAX_GRAPH_TOKENS_BLACKWELL if blackwell else MAX_GRAPH_TOKENS, max_num_batched_tokens)
    sizes = [n for n in (1, 2, 4) if n <= limit]
    sizes += range(8, min(limit + 1, 256), 8)
    sizes += range(256, limit + 1, 16)
    if max_num_batched_tokens <= limit and max_num_batched_tokens not in sizes:
        sizes.append(max_num_batched_tokens)
    return sizes


def padded_batch(num_tokens: int, sizes: list[int]) -> int:
    """The captured size that a batch is padded to; the batch itself beyond the largest (no graph)."""
    index = bisect_left(sizes, num_tokens)
    return sizes[index] if index < len(sizes) else num_tokens
