"""Our event loop against vLLM's own engine loop: the real ``EngineCore`` step functions, scheduler and all, on a device that
exists in virtual time only. The time of every token of every request must agree."""

from __future__ import annotations

import importlib.util
import os
import queue
from collections import deque
from typing import Any

import numpy as np
import pytest

from bench.records import Request, Schedule
from bench.sim.inputs import Fleet, Replica, prepare
from bench.sim.interface import StepLoad
from bench.sim.loop import IDLE_SLEEP_S, simulate
from tests.sim.cases import Case, seeded_case

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

NUM_CASES = int(os.environ.get("TOKENYIELD_DIFF_CASES", "180"))


def step_time_s(coef: Any, *load: Any) -> tuple[float, float]:
    """A device for which every part of the load counts."""
    w = StepLoad(*load)
    gpu = 5e-3 + 1e-5 * w.prefill_tokens + 1e-8 * w.prefill_pairs + 2e-6 * (w.decode_context_sum + w.prefill_context)
    return gpu + 1e-5 * w.decode_requests, 2e-3 + 4e-4 * w.num_running


class VirtualDevice:
    """The executor that ``EngineCore`` calls: host time passes when it is called, device time when a result is awaited."""

    def __init__(self, theirs: Any, stages: int) -> None:
        self.theirs = theirs
        self.clock = 0.0
        self.stage_free_s = [0.0] * stages
        self.plan: Any = None
        self.rows: list[list[int]] = []

    def execute_model(self, output: Any, non_block: bool = True) -> Any:
        if not output.num_scheduled_tokens:
            return Result(self, self.clock, self.theirs.output_of(self.plan))
        load = self._load()
        gpu_s, host_s = step_time_s(None, *load)
        self.clock += host_s
        end = self.clock
        for k in range(len(self.stage_free_s)):
            end = max(end, self.stage_free_s[k]) + gpu_s / len(self.stage_free_s)
            self.stage_free_s[k] = end
        self.end_s = end
        return Result(self, end, None)

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        plan = self.plan
        if not non_block:
            return self.theirs.output_of(plan)
        # tokens are drawn when the result is awaited: only then is it known how many came before
        return Result(self, self.end_s, lambda: self.theirs.output_of(plan))

    def _load(self) -> StepLoad:
        prefills = [row for row in self.rows if not (row[3] and row[1] == 1)]
        contexts = [row[2] + 1 for row in self.rows if row[3] and row[1] == 1]
        pairs = 0.0
        for _, n, c, _ in prefills:
            pairs += n * c + n * (n + 1) / 2
        return StepLoad(
            len(prefills), sum(r[1] for r in prefills), pairs, sum(r[2] for r in prefills),
            len(contexts), sum(contexts), max(contexts, default=0), len(self.theirs.scheduler.running),
        )  # fmt: skip


class Result:
    def __init__(self, device: VirtualDevice, ready_s: float, value: Any) -> None:
        self.device, self.ready_s, self.value = device, ready_s, value

    def result(self) -> Any:
        self.device.clock = max(self.device.clock, self.ready_s)
        return self.value() if callable(self.value) else self.value


class NotedScheduler:
    """The real scheduler, with each plan noted for the device."""

    def __init__(self, theirs: Any, device: VirtualDevice) -> None:
        self._theirs, self._device = theirs, device

    def schedule(self, throttle_prefills: bool = False) -> Any:
        plan, row = self._theirs.schedule()
        self._device.plan, self._device.rows = plan, row[0]
        return plan[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs.scheduler, name)


def vllm_token_times(case: Case, due_s: np.ndarray) -> dict[int, list[float]]:
    """Serve the case by the real engine core; engine time of every token."""
    from vllm.v1.engine.core import EngineCore

    from tests.sim.vllm_driver import Theirs

    theirs = Theirs(case)
    device = VirtualDevice(theirs, case.config.pipeline_parallel_size)
    core: Any = object.__new__(EngineCore)
    core.scheduler, core.model_executor = NotedScheduler(theirs, device), device
    core.vllm_config, core.log_stats, core._weight_version = theirs.vllm.base, False, None
    core.is_mm_encoder_only = core.is_pooling_model = core.check_for_draft_tokens = False
    core.aborts_queue = queue.Queue()
    core.batch_queue_size = theirs.depth
    core.batch_queue = deque(maxlen=theirs.depth) if theirs.depth > 1 else None
    step = core.step_with_batch_queue if theirs.depth > 1 else core.step
    times: dict[int, list[float]] = {i: [] for i in range(len(case.requests))}
    arrived = 0
    while True:
        # EngineCoreProc.run_busy_loop: wait for work, drain the input queue, step, yield when nothing ran
        if not core.scheduler.has_requests() and not core.batch_queue:
            if arrived == len(due_s):
                return times
            device.clock = max(device.clock, float(due_s[arrived]))
        while arrived < len(due_s) and due_s[arrived] <= device.clock:
            theirs.add(arrived)
            arrived += 1
        outputs, executed = step()
        for client in (outputs or {}).values():
            for out in client.outputs:
                times[int(out.request_id)] += [device.clock] * len(out.new_token_ids)
        if not executed and core.scheduler.has_requests():
            device.clock += IDLE_SLEEP_S


def our_token_times(case: Case, due_s: np.ndarray) -> dict[int, list[float]]:
    requests = tuple(
        Request(i, r.max_tokens, prompt_token_ids=r.token_ids(i), priority=r.priority)
        for i, r in enumerate(case.requests)
    )
    inputs = prepare(Schedule("open_loop", requests, due_s), Fleet((Replica(case.config, np.zeros(1)),)))
    inputs.stop_after[:] = [-1 if r.stop_after is None else r.stop_after for r in case.requests]
    r = simulate(inputs, step_time_s)
    starts = r.token_offsets[:-1]
    return {i: r.token_s[start : start + r.num_output_tokens[i]].tolist() for i, start in enumerate(starts)}


def test_every_token_comes_when_vllms_engine_core_brings_it() -> None:
    several_in_flight = 0
    for seed in range(NUM_CASES):
        case = seeded_case(50_000 + seed)
        rng = np.random.default_rng(seed)
        due_s = np.cumsum(rng.exponential(rng.choice([0.0, 0.01, 0.05]), len(case.requests)))
        # the case's arrivals and priorities are by time here
        expected = vllm_token_times(_by_time(case, due_s), due_s)
        assert our_token_times(_by_time(case, due_s), due_s) == expected, f"seed {seed}"
        several_in_flight += case.config.max_concurrent_batches > 1
    assert several_in_flight > NUM_CASES // 3


def _by_time(case: Case, due_s: np.ndarray) -> Case:
    from dataclasses import replace

    return replace(
        case, requests=tuple(replace(r, arrival_step=float(t)) for r, t in zip(case.requests, due_s, strict=True))
    )
