"""The real ``vllm.v1`` scheduler on the bench: no model, no device, every step written down (see ``driver.py``)."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.sim.scheduler import SchedulerConfig
from tests.sim.cases import Case

MODEL_DIR = Path(__file__).parent / "tiny_model"  # a config.json and nothing else
STOP_TOKEN = 7


class Vllm:
    """What is needed of vLLM, imported once; its config is built once and edited per case."""

    def __init__(self) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm.config import CacheConfig, DeviceConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import init_none_hash
        from vllm.v1.structured_output import StructuredOutputManager

        init_none_hash(sha256)
        model = ModelConfig(
            model=str(MODEL_DIR), dtype="bfloat16", seed=0, skip_tokenizer_init=True, max_model_len=4096
        )
        self.base: Any = VllmConfig(
            model_config=model,
            scheduler_config=SchedulerConfig(
                max_num_seqs=8, max_num_batched_tokens=512, max_model_len=4096, is_encoder_decoder=False
            ),
            cache_config=CacheConfig(block_size=16, gpu_memory_utilization=0.9, enable_prefix_caching=True),
            parallel_config=ParallelConfig(),
            device_config=DeviceConfig("cpu"),
        )
        self.structured = StructuredOutputManager(self.base)

    def scheduler(self, c: SchedulerConfig) -> Any:
        """The scheduler that an engine with these settings would have."""
        import torch
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        self._configure(c)
        spec = FullAttentionSpec(block_size=c.block_size, num_kv_heads=1, head_size=8, dtype=torch.bfloat16)
        kv = KVCacheConfig(
            num_blocks=c.num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        )
        scheduler = _recorded(c.async_scheduling)(
            vllm_config=self.base,
            kv_cache_config=kv,
            block_size=c.block_size,
            log_stats=False,
            structured_output_manager=self.structured,
        )
        scheduler.preempted_order = []
        # Which runner a platform has is no property of the scheduler: on a GPU with Triton it is V2.
        scheduler.use_v2_model_runner = c.use_v2_model_runner
        return scheduler

    def max_concurrent_batches(self, c: SchedulerConfig) -> int:
        """vLLM's own rule, with the runner that the case asks for."""
        from vllm.config import VllmConfig

        view = SimpleNamespace(
            parallel_config=SimpleNamespace(pipeline_parallel_size=c.pipeline_parallel_size),
            scheduler_config=SimpleNamespace(async_scheduling=c.async_scheduling),
            use_v2_model_runner=c.use_v2_model_runner,
        )
        return int(VllmConfig.max_concurrent_batches.fget(view))

    def _configure(self, c: SchedulerConfig) -> None:
        from vllm.config import SchedulerConfig as VllmSchedulerConfig

        self.base.scheduler_config = VllmSchedulerConfig(
            max_num_seqs=c.max_num_seqs,
            max_num_batched_tokens=c.max_num_batched_tokens,
            max_num_scheduled_tokens=c.max_num_scheduled_tokens,
            max_num_active_seqs=c.max_num_active_seqs,
            max_model_len=c.max_model_len,
            is_encoder_decoder=False,
            enable_chunked_prefill=c.enable_chunked_prefill,
            async_scheduling=c.async_scheduling,
            policy=c.policy,
            long_prefill_token_threshold=c.long_prefill_token_threshold,
            long_prefill_token_threshold_adaptive=c.long_prefill_token_threshold_adaptive,
            scheduler_reserve_full_isl=c.scheduler_reserve_full_isl,
            watermark=c.watermark,
        )
        self.base.model_config.max_model_len = c.max_model_len
        self.base.cache_config.enable_prefix_caching = c.enable_prefix_caching
        self.base.cache_config.block_size = c.block_size
        self.base.cache_config.num_gpu_blocks = c.num_blocks
        self.base.parallel_config.pipeline_parallel_size = c.pipeline_parallel_size

    def request(self, case: Case, index: int) -> Any:
        """Request ``index`` of the case as vLLM's engine would make it."""
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher
        from vllm.v1.request import Request

        r = case.requests[index]
        stop = [STOP_TOKEN] if r.stop_after is not None else None
        return Request(
            request_id=f"{index:06d}",
            prompt_token_ids=r.token_ids(index).tolist(),
            sampling_params=SamplingParams(max_tokens=r.max_tokens, ignore_eos=True, stop_token_ids=stop),
            pooling_params=None,
            arrival_time=float(r.arrival_step),
            priority=r.priority,
            block_hasher=get_request_block_hasher(case.config.block_size, sha256)
            if case.config.enable_prefix_caching
            else None,
        )


@lru_cache(maxsize=1)
def vllm() -> Vllm:
    return Vllm()


@lru_cache
def _recorded(asynchronous: bool) -> Any:
    """The real scheduler's class; only the order of preemptions is noted on the side."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    parent: Any = AsyncScheduler if asynchronous else Scheduler

    class Recorded(parent):  # type: ignore[misc]
        def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
            self.preempted_order.append(request)
            super()._preempt_request(request, *args, **kwargs)

    return Recorded


class Theirs:
    """vLLM's scheduler under the driver."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.vllm = vllm()
        self.scheduler = self.vllm.scheduler(case.config)
        self.depth = self.vllm.max_concurrent_batches(case.config)
        self.requests = {r.request_id: r for r in (self.vllm.request(case, i) for i in range(len(case.requests)))}

    def add(self, index: int) -> None:
        self.scheduler.add_request(self.requests[f"{index:06d}"])

    def has_requests(self) -> bool:
        return bool(self.scheduler.has_requests())

    def schedule(self) -> tuple[Any, list[Any]]:
        s = self.scheduler
        s.preempted_order.clear()
        plan = s.schedule()
        rows, emits = [], {}
        for request_id, n in plan.num_scheduled_tokens.items():
            request = s.requests[request_id]
            emits[request_id] = not request.is_prefill_chunk
            rows.append([int(request_id), n, request.num_computed_tokens - n, int(emits[request_id])])
        trace = [
            rows,
            [int(r.request_id) for r in s.preempted_order],
            [int(r.request_id) for r in s.running],
            [int(r.request_id) for r in s.waiting],
            self._free_list(),
        ]
        return (plan, emits), trace

    def update(self, plan: Any) -> list[Any]:
        outputs = self.scheduler.update_from_output(plan[0], self.output_of(plan))
        per_request = [o for client in outputs.values() for o in client.outputs]
        return [
            [int(o.request_id) for o in per_request if o.new_token_ids],
            [int(o.request_id) for o in per_request if o.finish_reason is not None],
            self._free_list(),
        ]

    def output_of(self, plan: Any) -> Any:
        """What a model runner would return for the plan: a token of its own for every request that has one due."""
        from vllm.v1.outputs import ModelRunnerOutput

        output, emits = plan
        ids = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={r: i for i, r in enumerate(ids)},
            sampled_token_ids=[[self._next_token(request_id)] if emits[request_id] else [] for request_id in ids],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )

    def _free_list(self) -> list[int]:
        pool = self.scheduler.kv_cache_manager.block_pool
        return [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]

    def _next_token(self, request_id: str) -> int:
        """A token that no other request ever says, or the stop token when the case says so."""
        request, wanted = self.requests[request_id], self.case.requests[int(request_id)].stop_after
        return STOP_TOKEN if wanted == request.num_output_tokens + 1 else 5_000_000 + int(request_id)
