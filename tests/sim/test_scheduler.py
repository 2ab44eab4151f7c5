"""Rules of the scheduler one by one, as a reader would check them; the proof against vLLM is in its own file."""

from __future__ import annotations

from typing import Any

import pytest

from bench.errors import BadInput
from bench.sim.scheduler import Scheduler, SchedulerConfig
from bench.sim.step_plan import SimRequest, StepPlan


def config(**fields: Any) -> SchedulerConfig:
    base: dict[str, Any] = {
        "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 128, "num_blocks": 101, "block_size": 4,
        "enable_prefix_caching": False, "async_scheduling": False,
    }  # fmt: skip
    return SchedulerConfig(**{**base, **fields})


def tokens(plan: StepPlan) -> dict[int, int]:
    return {s.request.index: s.num_tokens for s in plan.scheduled}


def test_prompts_share_the_budget_and_the_last_one_is_cut() -> None:
    s = Scheduler(config())
    for i in range(4):
        s.add(SimRequest(i, 25, 4))
    assert tokens(s.schedule()) == {0: 25, 1: 25, 2: 14}


def test_running_requests_come_before_waiting_ones() -> None:
    s = Scheduler(config())
    s.add(SimRequest(0, 60, 4))
    s.update(s.schedule())
    s.add(SimRequest(1, 100, 4))
    assert tokens(s.schedule()) == {0: 1, 1: 63}


def test_the_last_running_request_is_preempted_and_goes_to_the_front() -> None:
    s = Scheduler(config(num_blocks=33, scheduler_reserve_full_isl=False))  # 32 usable blocks of 4
    for i in range(3):
        s.add(SimRequest(i, 40, 40))
    preempted = None
    for _ in range(30):
        plan = s.schedule()
        s.update(plan)
        if plan.preempted:
            preempted = plan
            break
    assert preempted is not None
    assert [r.index for r in preempted.preempted] == [2]
    assert s.waiting.peek().index == 2 and s.waiting.peek().num_computed_tokens == 0
    assert s.waiting.peek().num_output_tokens > 0  # generated tokens are kept


def test_equal_prompts_admitted_in_one_step_share_their_blocks() -> None:
    s = Scheduler(config(enable_prefix_caching=True, max_num_batched_tokens=100))
    for i in range(3):
        s.add(SimRequest(i, 30, 4, block_hashes=[*range(7), 100 + i]))
    assert tokens(s.schedule()) == {0: 30, 1: 2, 2: 2}


def test_an_exact_repeat_computes_one_block_again() -> None:
    s = Scheduler(config(enable_prefix_caching=True))
    for i in range(2):
        s.add(SimRequest(i, 32, 4, block_hashes=list(range(9))))
    assert tokens(s.schedule()) == {0: 32, 1: 4}


def test_a_known_last_token_is_not_scheduled_again_while_it_is_in_flight() -> None:
    s = Scheduler(config(async_scheduling=True))
    s.add(SimRequest(0, 10, 1))
    first = s.schedule()
    assert tokens(first) == {0: 10}
    assert tokens(s.schedule()) == {}
    _, finished = s.update(first)
    assert [r.index for r in finished] == [0] and not s.has_unfinished() and s.has_requests()


def test_received_tokens_need_no_prefill() -> None:
    s = Scheduler(config())
    s.add(SimRequest(0, 40, 4, received_tokens=39))
    plan = s.schedule()
    assert tokens(plan) == {0: 1} and plan.num_free_blocks == 100 - 10


def test_configurations_that_vllm_refuses_are_refused() -> None:
    with pytest.raises(BadInput, match="max_num_batched_tokens"):
        config(max_num_seqs=65)
    with pytest.raises(BadInput, match="chunked prefill"):
        config(enable_chunked_prefill=False)
    with pytest.raises(BadInput, match="watermark"):
        config(watermark=1.0)
