"""A run in virtual time: client, router and engines as a discrete-event simulation. The readable reference.

Engine. vLLM's engine core runs one loop (``EngineCore.run_busy_loop``): take in what has arrived; schedule a batch and
hand it to the device while fewer than ``max_concurrent_batches`` are in flight; else wait for the oldest batch and take in
its output. Host work of a step (``host_s``) happens before the batch is handed over; the device works batches off in order.
With two batches in flight the period is therefore max(gpu_s, host_s), with one their sum. An arrival waits for the loop
to come round, up to two steps. When a call of ``schedule`` finds nothing to run although requests exist, vLLM sleeps
1 ms. Pipeline stages share ``gpu_s`` evenly and overlap.

Disaggregated fleets. A request is prefilled by one pool (its token there is not passed on, as with vLLM's proxy), its KV cache
moves, and a replica of the decode pool computes the last prompt token again and gives the first token that the client sees.

Front end. The API server is one event loop on one core. Requests sent at one moment are worked on in turns, so that all of
them get to the engine when the last is done; those sent later wait for them.

Client. Groups (warm-up, offline batches) run one after the other. Within a group a request goes out when it is due, the
turn before it is done and thought over, and a slot is free; requests that were never due by a clock go first, in order.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bench.errors import BadInput
from bench.sim import inputs as inp
from bench.sim.inputs import STEP_COLUMNS, SimInputs, SimResult
from bench.sim.router import Router
from bench.sim.scheduler import Scheduler, SchedulerConfig
from bench.sim.step_plan import SimRequest, StepPlan

StepTime = Callable[..., tuple[float, float]]
IDLE_SLEEP_S = 1e-3
#: More preemptions than this (and ten per running request) without one token: requests evict each other for ever.
MOST_FRUITLESS_PREEMPTIONS = 1_000
READY, ARRIVE, DONE, LIMIT = range(4)


@dataclass(slots=True)
class Batch:
    plan: StepPlan
    end_s: float


@dataclass(frozen=True, slots=True)
class Output:
    """What one batch brought: requests with a new token, and those of them that are finished."""

    got_token: list[SimRequest]
    finished: list[SimRequest]


@dataclass(frozen=True, slots=True)
class Notes:
    """What engines note per request; arrays of the whole simulation."""

    scheduled_s: np.ndarray
    hit_tokens: np.ndarray
    preemptions: np.ndarray


class Engine:
    """One replica: the scheduler, the device and the host on one clock. ``next_s`` is when it acts next (inf: idle)."""

    def __init__(
        self, number: int, config: SchedulerConfig, coefficients: np.ndarray, step_time: StepTime, notes: Notes
    ) -> None:
        self.number = number
        self._notes = notes
        self.scheduler = Scheduler(config)
        self.next_s = math.inf
        self.steps: list[tuple[float, ...]] = []
        self._coefficients = coefficients
        self._step_time = step_time
        self._depth = config.max_concurrent_batches
        self._stage_free_s = [0.0] * config.pipeline_parallel_size
        self._inbox: list[SimRequest] = []
        self._queue: deque[Batch] = deque()
        self._waits_for_output = False
        self._executed = False
        self._fruitless_preemptions = 0
        self._most_fruitless = MOST_FRUITLESS_PREEMPTIONS + 10 * config.max_running

    def deliver(self, t: float, request: SimRequest) -> None:
        self._inbox.append(request)
        if math.isinf(self.next_s):
            self.next_s = t

    def act(self) -> Output | None:
        """Do what is due at ``next_s`` and set the next time."""
        if self._waits_for_output:
            return self._take_output()
        for request in self._inbox:
            self.scheduler.add(request)
        self._inbox.clear()
        t = self.next_s
        self._executed = False
        if self.scheduler.has_requests():
            t = self._dispatch(t)
            if len(self._queue) < self._depth and (self._executed or self.scheduler.has_requests()):
                self.next_s = t if self._executed else t + IDLE_SLEEP_S
                return None
        elif not self._queue:
            self.next_s = math.inf
            return None
        self._waits_for_output = True
        self.next_s = max(t, self._queue[0].end_s)
        return None

    def _dispatch(self, t: float) -> float:
        """Schedule a batch at ``t``; the time at which it was handed to the device."""
        plan = self.scheduler.schedule()
        for request in plan.preempted:
            self._notes.preemptions[request.index] += 1
        self._fruitless_preemptions += len(plan.preempted)
        if self._fruitless_preemptions > self._most_fruitless:
            raise no_progress()
        for entry in plan.scheduled:
            i = entry.request.index
            if math.isnan(self._notes.scheduled_s[i]):
                self._notes.scheduled_s[i] = t
                self._notes.hit_tokens[i] = entry.request.num_hit_tokens
        if not plan.scheduled:
            self._queue.append(Batch(plan, t))
            return t
        self._executed = True
        load = plan.load()
        gpu_s, host_s = self._step_time(self._coefficients, *load)
        handed_over = end = t + host_s
        stages = len(self._stage_free_s)
        for stage in range(stages):
            end = max(end, self._stage_free_s[stage]) + gpu_s / stages
            self._stage_free_s[stage] = end
        self._queue.append(Batch(plan, end))
        self.steps.append(
            (
                self.number, t, end, gpu_s, host_s, *load, plan.num_waiting, plan.num_free_blocks, len(plan.preempted),
                plan.hit_tokens,
            )
        )  # fmt: skip
        return handed_over

    def _take_output(self) -> Output:
        batch = self._queue.popleft()
        output = Output(*self.scheduler.update(batch.plan))
        if output.got_token:
            self._fruitless_preemptions = 0
        self._waits_for_output = False
        if not self._executed and self.scheduler.has_requests():
            self.next_s += IDLE_SLEEP_S
        return output


def no_progress() -> BadInput:
    """The error of a workload on which vLLM itself would run for ever."""
    return BadInput(
        "requests preempt each other for ever and none gets a token",
        where="engine.args",
        next_step="leave scheduler_reserve_full_isl on, or give more KV cache or a smaller max_num_seqs; vLLM would hang too",
    )


class Simulation:
    """Runs :class:`SimInputs` to the end."""

    def __init__(self, inputs: SimInputs, step_time: StepTime) -> None:
        self.inputs = inputs
        fleet = inputs.fleet
        n = inputs.num_requests
        self._notes = Notes(np.full(n, np.nan), np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64))
        self.engines = [
            Engine(i, r.config, r.coefficients, step_time, self._notes) for i, r in enumerate(fleet.replicas)
        ]
        roles = [r.role for r in fleet.replicas]
        self._disaggregated = "prefill" in roles
        self._entry = Router(fleet.routing, [i for i, role in enumerate(roles) if role != "decode"])
        self._decode = Router(fleet.routing, [i for i, role in enumerate(roles) if role == "decode"])
        self._events: list[tuple[float, int, int, int]] = []
        self._sequence = 0
        self._ready: deque[int] = deque()
        self._fresh: deque[int] = deque()  # requests of a closed loop that wait for nothing but a slot
        self._in_flight = 0
        self._front_end_free_s = 0.0
        self._group = -1
        self._left_in_group = 0
        self._begin_s = math.inf  # start of the timed group
        self._deadline_s = math.inf
        self._num_done = 0  # since then
        self._stopped = False
        self._due_s = np.full(n, np.nan)
        self._sent_s = np.full(n, np.nan)
        self._queued_s = np.full(n, np.nan)
        self._first_s = np.full(n, np.nan)
        self._last_s = np.full(n, np.nan)
        self._ended = np.zeros(n, dtype=np.int64)
        self._outputs = np.zeros(n, dtype=np.int64)
        self._replica = np.full(n, -1, dtype=np.int64)
        self._prefilled = np.zeros(n, dtype=bool)
        self._link_free_s = [0.0] * len(fleet.replicas)
        self._completed: list[int] = []
        self._token_offsets = np.zeros(n + 1, dtype=np.int64)
        np.cumsum(inputs.max_tokens, out=self._token_offsets[1:])
        self._token_s = np.full(self._token_offsets[-1] if inputs.record_tokens else 0, np.nan)

    def run(self) -> SimResult:
        now = 0.0
        self._start_group(0.0)
        while not (self._stopped and self._in_flight == 0):
            engine = min(self.engines, key=lambda e: e.next_s)
            event_s = self._events[0][0] if self._events else math.inf
            upcoming = min(event_s, engine.next_s)
            if math.isinf(upcoming) or upcoming > self._deadline_s:
                break
            now = upcoming
            if event_s <= engine.next_s:
                _, _, kind, index = heapq.heappop(self._events)
                self._handle(now, kind, index)
            elif (output := engine.act()) is not None:
                self._account(now, engine, output)
        return self._result(min(now, self._deadline_s))

    # -- client ---------------------------------------------------------------------------------------------------

    def _push(self, t: float, kind: int, index: int) -> None:
        heapq.heappush(self._events, (t, self._sequence, kind, index))
        self._sequence += 1

    def _start_group(self, t: float) -> None:
        """Release the next group that has members, if there is one."""
        x = self.inputs
        while self._left_in_group == 0 and self._group + 1 < x.num_groups and not self._over(t):
            self._group += 1
            members = np.flatnonzero(x.group == self._group)
            self._left_in_group = len(members)
            if self._group == x.timed_group:
                self._begin_s = t
                self._deadline_s = t + x.max_duration_s
                for since in x.limit_t_s[1:]:
                    self._push(t + float(since), LIMIT, 0)
            for i in members.tolist():
                if not math.isnan(x.due_s[i]):
                    self._due_s[i] = t + x.due_s[i]
                    if not x.follows[i]:
                        self._push(t + float(x.due_s[i]), READY, i)
                elif not x.follows[i]:
                    self._fresh.append(i)
        self._send(t)

    def _over(self, t: float) -> bool:
        """Whether the stop rule lets nothing more out."""
        x = self.inputs
        if (x.min_duration_s > 0 or x.min_requests > 0) and self._group >= x.timed_group:
            self._stopped |= t - self._begin_s >= x.min_duration_s and self._num_done >= x.min_requests
        return self._stopped

    def _limit(self, t: float) -> int:
        if self._group < self.inputs.timed_group:
            return inp.NO_LIMIT
        limit = int(self.inputs.limit[0])
        for since, value in zip(self.inputs.limit_t_s[1:], self.inputs.limit[1:], strict=True):
            if self._begin_s + float(since) <= t:
                limit = int(value)
        return limit

    def _send(self, t: float) -> None:
        if self._over(t):
            return
        fleet = self.inputs.fleet
        count = min(self._limit(t) - self._in_flight, len(self._ready) + len(self._fresh))
        if count > 0:
            self._front_end_free_s = max(self._front_end_free_s, t) + count * fleet.front_end_s
        arrival_s = self._front_end_free_s + (fleet.request_before_s - fleet.front_end_s)
        for _ in range(count):
            i = self._fresh.popleft() if self._fresh else self._ready.popleft()
            self._in_flight += 1
            self._sent_s[i] = t
            self._push(arrival_s, ARRIVE, i)

    def _handle(self, t: float, kind: int, i: int) -> None:
        if kind == READY:
            self._ready.append(i)
            self._send(t)
        elif kind == ARRIVE:
            self._arrive(t, i)
        elif kind == DONE:
            self._done(t, i)
        else:
            self._send(t)

    def _done(self, t: float, i: int) -> None:
        x = self.inputs
        self._in_flight -= 1
        self._left_in_group -= 1
        self._num_done += self._group >= x.timed_group
        following = int(x.next_turn[i])
        if following >= 0:
            ready = t + float(x.think_s[following])
            if not math.isnan(self._due_s[following]):
                ready = max(ready, float(self._due_s[following]))
            self._push(ready, READY, following)
        if self._left_in_group == 0:
            self._start_group(t)
        else:
            self._send(t)

    # -- router and engines ---------------------------------------------------------------------------------------

    def _arrive(self, t: float, i: int) -> None:
        x = self.inputs
        if math.isnan(self._queued_s[i]):
            self._queued_s[i] = t
        router = self._decode if self._prefilled[i] else self._entry
        blocks = x.block_numbers[x.block_offsets[i] : x.block_offsets[i + 1]].tolist()
        config = x.fleet.replicas[router.members[0]].config
        if x.prompt_tokens[i] >= config.max_model_len:
            self._ended[i] = inp.REJECTED
            self._completed.append(i)
            self._push(t + x.fleet.request_after_s, DONE, i)
            return
        chosen = router.pick(blocks[: int(x.prompt_tokens[i]) // config.block_size])
        prefill_only = self._disaggregated and not self._prefilled[i]
        request = SimRequest(
            i,
            int(x.prompt_tokens[i]),
            1 if prefill_only else int(x.max_tokens[i]),
            t,
            int(x.priority[i]),
            int(x.stop_after[i]) if x.stop_after[i] >= 0 and not prefill_only else None,
            blocks,
            int(x.prompt_tokens[i]) - 1 if self._prefilled[i] else 0,
        )
        self.engines[chosen].deliver(t, request)

    def _account(self, t: float, engine: Engine, output: Output) -> None:
        prefills = self._disaggregated and self.inputs.fleet.replicas[engine.number].role == "prefill"
        if not prefills:
            for request in output.got_token:
                i = request.index
                if self._outputs[i] == 0:
                    self._first_s[i] = t
                    self._replica[i] = engine.number
                if self.inputs.record_tokens:
                    self._token_s[self._token_offsets[i] + self._outputs[i]] = t
                self._outputs[i] += 1
                self._last_s[i] = t
        for request in output.finished:
            self._finished(t, engine, request, prefills)

    def _finished(self, t: float, engine: Engine, request: SimRequest, prefills: bool) -> None:
        i, fleet = request.index, self.inputs.fleet
        (self._entry if engine.number in self._entry.outstanding else self._decode).done(engine.number)
        if prefills:
            # a prefill replica's caches leave one after the other over its link
            begin = max(t + fleet.transfer_latency_s, self._link_free_s[engine.number])
            self._link_free_s[engine.number] = begin + fleet.transfer_s_per_token * request.num_prompt_tokens
            self._prefilled[i] = True
            self._push(self._link_free_s[engine.number], ARRIVE, i)
            return
        stopped = request.stop_after is not None and request.num_output_tokens >= request.stop_after
        self._ended[i] = inp.BY_STOP if stopped else inp.BY_LENGTH
        self._completed.append(i)
        self._push(t + fleet.request_after_s, DONE, i)

    def _result(self, end_s: float) -> SimResult:
        rows = [row for engine in self.engines for row in engine.steps]
        table = np.array(rows, dtype=np.float64).reshape(-1, len(STEP_COLUMNS))
        steps = {
            name: table[:, k] if is_float else table[:, k].astype(np.int64)
            for k, (name, is_float) in enumerate(STEP_COLUMNS)
        }
        return SimResult(
            self._sent_s, self._due_s, self._queued_s, self._notes.scheduled_s, self._first_s, self._last_s, self._ended,
            self._outputs, self._notes.hit_tokens, self._notes.preemptions, self._replica,
            np.array(self._completed, dtype=np.int64), steps, self._token_offsets, self._token_s, end_s,
        )  # fmt: skip


def simulate(inputs: SimInputs, step_time: StepTime) -> SimResult:
    """Run ``inputs`` with the plain Python loop."""
    return Simulation(inputs, step_time).run()
