"""Random scheduler workloads and configurations, drawn from any source of integers (a seed, or hypothesis)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bench.records import Request
from bench.sim.prefixes import block_numbers
from bench.sim.scheduler import SchedulerConfig
from bench.sim.step_plan import SimRequest

DrawInt = Callable[[int, int], int]  # (low, high) inclusive -> int


@dataclass(frozen=True)
class CaseRequest:
    """One request of a case. ``arrival_step`` counts calls of ``schedule``; ``group``/``shared`` say which leading tokens
    are common with others of the same group."""

    num_prompt_tokens: int
    max_tokens: int
    arrival_step: int
    priority: int = 0
    stop_after: int | None = None
    group: int = 0
    shared: int = 0

    def token_ids(self, index: int) -> np.ndarray:
        own = 10_000 + index * 1_000 + np.arange(self.num_prompt_tokens) % 997
        common = self.group * 1_000 + np.arange(self.num_prompt_tokens) % 991
        return np.where(np.arange(self.num_prompt_tokens) < self.shared, common, own).astype(np.int32)


@dataclass(frozen=True)
class Case:
    config: SchedulerConfig
    requests: tuple[CaseRequest, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"config": asdict(self.config), "requests": [asdict(r) for r in self.requests]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Case:
        return cls(SchedulerConfig(**data["config"]), tuple(CaseRequest(**r) for r in data["requests"]))

    def sim_requests(self) -> list[SimRequest]:
        """The case's requests for our scheduler. Arrival = index order within a step, as the driver adds them."""
        records = [
            Request(index=i, osl=r.max_tokens, prompt_token_ids=r.token_ids(i)) for i, r in enumerate(self.requests)
        ]
        prompt = np.array([r.num_prompt_tokens for r in self.requests], dtype=np.int64)
        output = np.array([r.max_tokens for r in self.requests], dtype=np.int64)
        offsets, numbers, _ = block_numbers(records, prompt, output, self.config.block_size)
        return [
            SimRequest(
                i, r.num_prompt_tokens, r.max_tokens, float(r.arrival_step), r.priority, r.stop_after,
                numbers[offsets[i] : offsets[i + 1]].tolist(),
            )
            for i, r in enumerate(self.requests)
        ]  # fmt: skip


def draw_case(draw: DrawInt, **fixed: Any) -> Case:
    """A small case; sizes are chosen so that budgets, limits and the block pool bind often.

    ``fixed`` are fields of the configuration that are not left to chance. ``mutants.py`` lists rules that the cases tell.
    """
    config = replace(draw_config(draw), **fixed)
    longest = config.max_model_len
    crowded = draw(0, 1)
    num_requests = draw(1, min(24, 6 + 3 * config.max_num_seqs))  # few where they would only queue
    num_groups = draw(1, 3)
    share = draw(0, 2)  # 0: nothing shared, 1: some, 2: much
    length = draw(0, 2)  # 0: anything, 1: short, 2: near the model's limit, so that one request may fill the pool
    most_tokens = (12, 48)[draw(0, 1)]
    step = 0
    requests = []
    for _ in range(num_requests):
        step += 0 if crowded else draw(0, 6)
        limit = max(1, min(longest - 1, (120, 40, longest)[length]))
        prompt = draw(max(1, limit * 3 // 4), limit) if length == 2 else draw(1, limit)
        shared = 0 if share == 0 else draw(0, prompt) if share == 1 else prompt - draw(0, min(prompt, 3))
        max_tokens = draw(1, most_tokens)
        stop = draw(1, max_tokens) if draw(0, 4) == 0 else None
        requests.append(CaseRequest(prompt, max_tokens, step, draw(0, 2), stop, draw(0, num_groups - 1), shared))
    return Case(config, tuple(requests))


def draw_config(draw: DrawInt) -> SchedulerConfig:
    block_size = (4, 8, 16)[draw(0, 2)]
    max_model_len = draw(24, 160)
    chunked = draw(0, 5) > 0
    budget = draw(8, (40, 200)[draw(0, 1)]) if chunked else max_model_len + draw(0, 100)
    max_num_seqs = min(budget, draw(1, 20))
    needed = -(-max_model_len // block_size) + 1  # vLLM refuses to start with less
    spare = (2, needed, 3 * needed)[draw(0, 2)]
    pp = (1, 1, 1, 2, 3)[draw(0, 4)]
    return SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len,
        num_blocks=needed + draw(0, spare),
        block_size=block_size,
        enable_prefix_caching=bool(draw(0, 1)),
        enable_chunked_prefill=chunked,
        async_scheduling=draw(0, 2) > 0,
        policy="priority" if draw(0, 2) == 0 else "fcfs",
        long_prefill_token_threshold=draw(1, min(40, max_model_len)) if draw(0, 2) == 0 else 0,
        long_prefill_token_threshold_adaptive=bool(draw(0, 1)),
        scheduler_reserve_full_isl=draw(0, 2) > 0,
        watermark=draw(1, 40) / 100 if draw(0, 2) == 0 else 0.0,
        max_num_scheduled_tokens=draw(max_num_seqs, budget) if chunked and draw(0, 4) == 0 else None,
        max_num_active_seqs=draw(1, max_num_seqs) if draw(0, 5) == 0 else None,
        pipeline_parallel_size=pp,
        use_v2_model_runner=bool(draw(0, 1)),
    )


def seeded_case(seed: int, **fixed: Any) -> Case:
    rng = np.random.default_rng(seed)
    return draw_case(lambda low, high: int(rng.integers(low, high + 1)), **fixed)


def real_cases() -> dict[str, Case]:
    """Cases of ordinary size: vLLM's defaults, ample and scarce KV, staggered arrivals, equal prompts."""

    def config(**fields: Any) -> SchedulerConfig:
        base: dict[str, Any] = {
            "max_num_seqs": 256, "max_num_batched_tokens": 8192, "max_model_len": 16384, "num_blocks": 20000,
            "enable_prefix_caching": False, "async_scheduling": False,
        }  # fmt: skip
        return SchedulerConfig(**{**base, **fields})

    def burst(n: int, isl: int, osl: int, every: int = 0, **fields: Any) -> tuple[CaseRequest, ...]:
        return tuple(CaseRequest(isl, osl, every * i, **fields) for i in range(n))

    return {
        "burst of 64, 1000 in 100 out": Case(config(), burst(64, 1000, 100)),
        "the same, budget 2048": Case(config(max_num_batched_tokens=2048), burst(64, 1000, 100)),
        "the same, asynchronous": Case(config(async_scheduling=True), burst(64, 1000, 100)),
        "scarce KV, preemption": Case(config(num_blocks=3000), burst(64, 1000, 600)),
        "scarce KV, asynchronous, prefix caching": Case(
            config(num_blocks=1500, async_scheduling=True, enable_prefix_caching=True), burst(32, 1000, 400, shared=500)
        ),
        "max_num_seqs 8": Case(config(max_num_seqs=8), burst(20, 500, 50)),
        "staggered, budget 2048": Case(config(max_num_batched_tokens=2048), burst(20, 3000, 40, every=3)),
        "equal prompts, prefix caching": Case(
            config(enable_prefix_caching=True), burst(16, 1000, 30, every=5, shared=1000)
        ),
        "2000-token prompts wait for room": Case(
            config(num_blocks=200, max_num_batched_tokens=512), burst(3, 2000, 10)
        ),
    }
