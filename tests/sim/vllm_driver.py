"""The real ``vllm.v1`` scheduler on the bench: no model, no device, every step written down.

Both schedulers are driven by one loop, :func:`drive`, which is vLLM's ``EngineCore.step_with_batch_queue`` (and ``step``
for a queue of one) without the device: a batch is scheduled while the queue has room, else the oldest one's output is
taken in. A step's trace has everything that is compared: who runs and how many tokens each (in order), who was preempted (in
order), the running list and the waiting queue (in order), the free blocks by number and in the order in which they will be
taken (so every block that a request holds is the same one), and who got a token and who finished.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from bench.sim.scheduler import Scheduler
from tests.sim.cases import Case

MODEL_DIR = Path(__file__).parent / "tiny_model"  # a config.json and nothing else
STOP_TOKEN = 7
MAX_CALLS = 4_000


class Driven(Protocol):
    """A scheduler under the driver."""

    depth: int

    def add(self, index: int) -> None: ...
    def has_requests(self) -> bool: ...
    def has_unfinished(self) -> bool: ...
    def schedule(self) -> tuple[Any, list[Any]]:
        """(plan, trace row)"""
        ...

    def update(self, plan: Any) -> list[Any]: ...


def drive(case: Case, driven: Driven) -> list[Any]:
    """Serve the case to its end; the trace of every call of ``schedule`` and of every output."""
    arrivals = sorted(range(len(case.requests)), key=lambda i: (case.requests[i].arrival_step, i))
    queue: deque[Any] = deque()
    trace: list[Any] = []
    calls = next_arrival = 0
    while calls < MAX_CALLS:
        while next_arrival < len(arrivals) and case.requests[arrivals[next_arrival]].arrival_step <= calls:
            driven.add(arrivals[next_arrival])
            next_arrival += 1
        executed = False
        if driven.has_requests():
            plan, row = driven.schedule()
            trace.append(row)
            calls += 1
            executed = bool(row[0])
            queue.append(plan)
            if len(queue) < driven.depth and (executed or driven.has_requests()):
                continue
        if queue:
            trace.append(driven.update(queue.popleft()))
        elif next_arrival < len(arrivals):
            calls = case.requests[arrivals[next_arrival]].arrival_step
        else:
            break
    return trace


class Ours:
    """Our scheduler under the driver."""

    def __init__(self, case: Case) -> None:
        self._requests = case.sim_requests()
        self.scheduler = Scheduler(case.config)
        self.depth = case.config.max_concurrent_batches

    def add(self, index: int) -> None:
        self.scheduler.add(self._requests[index])

    def has_requests(self) -> bool:
        return self.scheduler.has_requests()

    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished()

    def schedule(self) -> tuple[Any, list[Any]]:
        plan = self.scheduler.schedule()
        return plan, [
            [[s.request.index, s.num_tokens, s.num_context, int(s.emits)] for s in plan.scheduled],
            [r.index for r in plan.preempted],
            _indices(self.scheduler.running),
            _indices(self.scheduler.waiting),
            self.scheduler.kv.pool.free_list(),
        ]

    def update(self, plan: Any) -> list[Any]:
        got_token, finished = self.scheduler.update(plan)
        return [_indices(got_token), _indices(finished), self.scheduler.kv.pool.free_list()]


def _indices(requests: Any) -> list[int]:
    return [r.index for r in requests]


@lru_cache(maxsize=1)
def _vllm() -> Any:
    """What is needed of vLLM, imported once; its config is built once and edited per case."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch
    from vllm.config import CacheConfig, DeviceConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler as SyncScheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    init_none_hash(sha256)

    @dataclass
    class Vllm:
        base: Any
        structured: Any
        request_class: Any = Request
        sampling: Any = SamplingParams
        output: Any = ModelRunnerOutput

        def scheduler(self, case: Case) -> Any:
            c = case.config
            sc = SchedulerConfig(
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
            self.base.scheduler_config = sc
            self.base.model_config.max_model_len = c.max_model_len
            self.base.cache_config.enable_prefix_caching = c.enable_prefix_caching
            self.base.cache_config.block_size = c.block_size
            self.base.cache_config.num_gpu_blocks = c.num_blocks
            self.base.parallel_config.pipeline_parallel_size = c.pipeline_parallel_size
            spec = FullAttentionSpec(block_size=c.block_size, num_kv_heads=1, head_size=8, dtype=torch.bfloat16)
            kv = KVCacheConfig(
                num_blocks=c.num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
            )
            parent = AsyncScheduler if c.async_scheduling else SyncScheduler

            class Recorded(parent):  # type: ignore[valid-type, misc]
                """The real scheduler; only the order of preemptions is noted on the side."""

                def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
                    self.preempted_order.append(request)
                    super()._preempt_request(request, *args, **kwargs)

            scheduler = Recorded(
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

        def hasher(self, block_size: int) -> Any:
            return get_request_block_hasher(block_size, sha256)

    model = ModelConfig(model=str(MODEL_DIR), dtype="bfloat16", seed=0, skip_tokenizer_init=True, max_model_len=4096)
    cache = CacheConfig(block_size=16, gpu_memory_utilization=0.9, enable_prefix_caching=True)
    first = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=512, max_model_len=4096, is_encoder_decoder=False)
    base = VllmConfig(
        model_config=model,
        scheduler_config=first,
        cache_config=cache,
        parallel_config=ParallelConfig(),
        device_config=DeviceConfig("cpu"),
    )
    return Vllm(base, StructuredOutputManager(base))


class Theirs:
    """vLLM's scheduler under the driver."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.vllm = _vllm()
        self.scheduler = self.vllm.scheduler(case)
        self.depth = case.config.max_concurrent_batches
        self.requests: dict[str, Any] = {}
        hasher = self.vllm.hasher(case.config.block_size) if case.config.enable_prefix_caching else None
        for i, r in enumerate(case.requests):
            stop = [STOP_TOKEN] if r.stop_after is not None else None
            request = self.vllm.request_class(
                request_id=f"{i:06d}",
                prompt_token_ids=r.token_ids(i).tolist(),
                sampling_params=self.vllm.sampling(max_tokens=r.max_tokens, ignore_eos=True, stop_token_ids=stop),
                pooling_params=None,
                arrival_time=float(r.arrival_step),
                priority=r.priority,
                block_hasher=hasher,
            )
            self.requests[request.request_id] = request

    def add(self, index: int) -> None:
        self.scheduler.add_request(self.requests[f"{index:06d}"])

    def has_requests(self) -> bool:
        return self.scheduler.has_requests()

    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished_requests()

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
        output, emits = plan
        ids = list(output.num_scheduled_tokens)
        return self.vllm.output(
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
