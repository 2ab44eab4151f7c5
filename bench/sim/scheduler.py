"""vLLM's v1 scheduler, decision by decision, over counters instead of tensors and tokens.

This is the readable reference. It reproduces ``Scheduler`` and ``AsyncScheduler`` of the vLLM version named by
:data:`PROVED_AGAINST_VLLM` for decoder-only models with one group of full-attention KV cache and without speculative
decoding; ``tests/sim`` drives both side by side and compares every step. :mod:`bench.sim.compiled` holds the same rules
over flat arrays for speed.

The rules, in the order in which :meth:`Scheduler.schedule` applies them:

1. There are no prefill and decode phases: every request catches up to the tokens it knows.
2. Running requests come first, in order, while token budget is left. Each gets what it lacks, at most the long-prefill
   threshold (only when more than one request exists), the budget, and the model's length minus one.
3. If its blocks do not fit, the last running request (fcfs) or the one of lowest priority and latest arrival (priority)
   is preempted, until they fit or it preempted itself, which ends the loop over running requests.
4. A preempted request loses its blocks and computed tokens, keeps its generated tokens, and goes to the front of the
   waiting queue. Output still in flight is delivered, but the request is not resumed before it has come.
5. Waiting requests are admitted only if nothing was preempted in this step, in queue order, while budget and
   ``max_num_seqs`` allow; the first one that does not fit ends the scan. Cached prefix blocks are skipped over.
6. Computed tokens advance when scheduled, not when done; a step that reaches the last known token yields a new one.
   Asynchronous scheduling counts the tokens in flight as placeholders and stops at a known ``max_tokens``.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bench.errors import BadInput
from bench.sim.kv_cache import KVCache
from bench.sim.step_plan import FINISHED, PREEMPTED, RUNNING, Scheduled, SimRequest, StepPlan

#: The vLLM release for which the differential tests pass. A test compares it with the installed vLLM.
PROVED_AGAINST_VLLM = "0.32.0"

Policy = Literal["fcfs", "priority"]


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """vLLM's own knobs that the scheduler reads, under vLLM's names. ``num_blocks`` includes the null block."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_blocks: int
    block_size: int = 16
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    async_scheduling: bool = True
    policy: Policy = "fcfs"
    long_prefill_token_threshold: int = 0
    long_prefill_token_threshold_adaptive: bool = False
    scheduler_reserve_full_isl: bool = True
    watermark: float = 0.0
    max_num_scheduled_tokens: int | None = None
    max_num_active_seqs: int | None = None
    pipeline_parallel_size: int = 1
    use_v2_model_runner: bool = True

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise BadInput(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is below max_num_seqs ({self.max_num_seqs})",
                next_step="raise the former or lower the latter; vLLM refuses to start",
            )
        if not self.enable_chunked_prefill and self.token_budget < self.max_model_len:
            raise BadInput(
                f"a step's token budget ({self.token_budget}) is below max_model_len ({self.max_model_len})",
                next_step="enable chunked prefill or raise it; a longer prompt could never be scheduled",
            )
        if min(self.max_num_seqs, self.max_model_len, self.block_size) < 1 or self.num_blocks < 2:
            raise BadInput("max_num_seqs, max_model_len and block_size must be > 0, and num_blocks > 1")
        if not 0.0 <= self.watermark < 1.0:
            raise BadInput(f"watermark: expected a share in [0, 1), got {self.watermark}")

    @property
    def token_budget(self) -> int:
        return self.max_num_scheduled_tokens or self.max_num_batched_tokens

    @property
    def max_running(self) -> int:
        return self.max_num_active_seqs or self.max_num_seqs

    @property
    def max_concurrent_batches(self) -> int:
        """Batches in flight (``VllmConfig.max_concurrent_batches``)."""
        pp = self.pipeline_parallel_size
        if self.async_scheduling and self.use_v2_model_runner:
            return pp + 1
        return 2 if self.async_scheduling and pp <= 1 else pp


class WaitingQueue:
    """Waiting requests: first come first served with preempted ones in front, or by (priority, arrival)."""

    def __init__(self, policy: Policy) -> None:
        self._by_priority = policy == "priority"
        self._queue: deque[SimRequest] = deque()
        self._heap: list[tuple[tuple[int, float, int], SimRequest]] = []

    def add(self, request: SimRequest) -> None:
        if self._by_priority:
            heapq.heappush(self._heap, (request.order, request))
        else:
            self._queue.append(request)

    def put_back(self, request: SimRequest) -> None:
        """A preempted or skipped request: in front, or where its priority puts it."""
        if self._by_priority:
            self.add(request)
        else:
            self._queue.appendleft(request)

    def peek(self) -> SimRequest:
        return self._heap[0][1] if self._by_priority else self._queue[0]

    def pop(self) -> SimRequest:
        return heapq.heappop(self._heap)[1] if self._by_priority else self._queue.popleft()

    def remove(self, request: SimRequest) -> None:
        if self._by_priority:
            self._heap = [entry for entry in self._heap if entry[1] is not request]
            heapq.heapify(self._heap)
        else:
            self._queue.remove(request)

    def __len__(self) -> int:
        return len(self._heap) + len(self._queue)

    def __iter__(self) -> Iterator[SimRequest]:
        return iter([r for _, r in sorted(self._heap)] if self._by_priority else list(self._queue))


class Scheduler:
    """``schedule`` decides a step and assumes it done; ``update`` takes in its outputs, in the same order."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.kv = KVCache(
            config.num_blocks, config.block_size, config.max_model_len, config.enable_prefix_caching, config.watermark
        )
        self.running: list[SimRequest] = []
        self.waiting = WaitingQueue(config.policy)
        self._step = 0
        self._unreported_finishes = False  # vLLM schedules once more to tell the workers of finished requests

    def add(self, request: SimRequest) -> None:
        self.waiting.add(request)

    def has_unfinished(self) -> bool:
        return bool(self.running) or len(self.waiting) > 0

    def has_requests(self) -> bool:
        """Whether vLLM's engine loop would call ``schedule``."""
        return self.has_unfinished() or self._unreported_finishes

    def schedule(self) -> StepPlan:
        """Decide the next step (rules 1-6 above) and advance the counters as if it were done."""
        self._step += 1
        step = _Step(self._long_prefill_cap(), self.config.token_budget, self.config.max_num_batched_tokens)
        self._schedule_running(step)
        hit_tokens = 0 if step.preempted else self._schedule_waiting(step)
        scheduled = tuple(self._advance(request, n) for request, n in step.chunks.items())
        self._unreported_finishes = False
        return StepPlan(
            scheduled, tuple(step.preempted), len(self.running), len(self.waiting), self.kv.num_free, hit_tokens
        )

    def update(self, plan: StepPlan) -> tuple[list[SimRequest], list[SimRequest]]:
        """Take in a step's outputs. Returns the requests that got a token, and those of them that are finished by it."""
        got_token, finished = [], []
        for entry in plan.scheduled:
            request = entry.request
            stale = request.num_stale_tokens > 0
            request.num_in_flight_tokens -= entry.num_tokens
            if stale:
                request.num_stale_tokens -= entry.num_tokens
            if request.status == FINISHED or not entry.emits:
                continue
            got_token.append(request)
            request.num_tokens += 1
            if self.config.async_scheduling:
                if not stale:
                    request.num_output_placeholders -= 1
                if request.status == RUNNING:
                    self.kv.register(request, request.num_computed_tokens - request.num_output_placeholders)
            if self._is_done(request):
                self._finish(request)
                finished.append(request)
        return got_token, finished

    def abort(self, request: SimRequest) -> None:
        """Finish a request from outside (client gone, time limit)."""
        if request.status != FINISHED:
            self._finish(request)

    # -- rules ---------------------------------------------------------------------------------------------------

    def _long_prefill_cap(self) -> int:
        """Most tokens one request may get in this step; 0 for no cap."""
        cap = self.config.long_prefill_token_threshold
        num_requests = len(self.running) + len(self.waiting)
        if cap <= 0 or num_requests <= 1:
            return 0
        if self.config.long_prefill_token_threshold_adaptive:
            cap = max(cap, self.config.max_num_batched_tokens // num_requests)
        return cap

    def _schedule_running(self, step: _Step) -> None:
        position = 0
        while position < len(self.running) and step.room > 0:
            request = self.running[position]
            num_new = self._running_chunk(request, step)
            if num_new <= 0:
                position += 1
                continue
            while not self.kv.grow(request, num_new):
                victim, index = self._pick_victim()
                del self.running[index]
                if index < position:
                    position -= 1
                step.take_back(victim)
                self._preempt(victim)
                step.preempted.append(victim)
                if victim is request:
                    return
            step.give(request, num_new)
            position += 1

    def _running_chunk(self, request: SimRequest, step: _Step) -> int:
        placeholders = request.num_output_placeholders
        ends_in_flight = (
            request.num_computed_tokens + 2 - placeholders >= request.num_prompt_tokens + request.max_tokens
        )
        if placeholders > 0 and ends_in_flight:
            return 0  # its last token is being computed already
        if self._step < request.next_decode_eligible_step:
            return 0
        num_new = request.num_tokens + placeholders - request.num_computed_tokens
        return min(
            step.capped(num_new), step.room, self.config.max_model_len - request.num_computed_tokens - 1
        )  # the last position is left for the sampled token

    def _pick_victim(self) -> tuple[SimRequest, int]:
        if self.config.policy == "priority":
            index = max(range(len(self.running)), key=lambda i: (self.running[i].priority, self.running[i].arrival))
        else:
            index = len(self.running) - 1
        return self.running[index], index

    def _preempt(self, request: SimRequest) -> None:
        self.kv.free(request)
        request.status = PREEMPTED
        request.num_computed_tokens = 0
        request.num_stale_tokens = request.num_in_flight_tokens
        request.num_output_placeholders = 0
        request.num_preemptions += 1
        self.waiting.put_back(request)

    def _schedule_waiting(self, step: _Step) -> int:
        """Admit from the queue; returns the prefix-cache tokens of the admitted."""
        skipped: list[SimRequest] = []
        hit_tokens = 0
        while step.room > 0 and len(self.waiting) > 0 and len(self.running) < self.config.max_running:
            request = self.waiting.peek()
            if request.num_stale_tokens > 0:
                skipped.append(self.waiting.pop())
                continue
            hit = self.kv.find_hit(request)
            num_computed = len(hit) * self.config.block_size
            if request.received_tokens > num_computed and request.num_preemptions == 0:
                num_computed = request.received_tokens
            num_new = step.capped(request.num_tokens - num_computed)
            if not self.config.enable_chunked_prefill and num_new > step.room:
                break
            num_new = min(num_new, step.room)
            reserve = self.config.scheduler_reserve_full_isl
            if not self.kv.admit(request, num_computed, num_new, hit, reserve, others=bool(self.running)):
                break
            self.waiting.pop()
            self.running.append(request)
            request.status = RUNNING
            request.num_computed_tokens = num_computed
            if request.num_hit_tokens < 0:
                request.num_hit_tokens = num_computed
            hit_tokens += num_computed
            step.give(request, num_new)
        for request in reversed(skipped):
            self.waiting.put_back(request)
        return hit_tokens

    def _advance(self, request: SimRequest, num_new: int) -> Scheduled:
        context = request.num_computed_tokens
        request.num_computed_tokens += num_new
        request.num_in_flight_tokens += num_new
        emits = request.num_computed_tokens >= request.num_tokens + request.num_output_placeholders
        if emits and self.config.async_scheduling:
            request.num_output_placeholders += 1
            if self.config.use_v2_model_runner:
                request.next_decode_eligible_step = self._step + self.config.pipeline_parallel_size
        return Scheduled(request, num_new, context, emits)

    def _is_done(self, request: SimRequest) -> bool:
        outputs = request.num_output_tokens
        if request.stop_after is not None and outputs >= request.stop_after:
            return True
        return outputs >= request.max_tokens or request.num_tokens >= self.config.max_model_len

    def _finish(self, request: SimRequest) -> None:
        self.kv.free(request)
        if request.status == RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        request.status = FINISHED
        self._unreported_finishes = True


class _Step:
    """Budgets and chunks of the step that is being decided."""

    def __init__(self, cap: int, token_budget: int, input_budget: int) -> None:
        self.cap = cap
        self.room = min(token_budget, input_budget)
        self.chunks: dict[SimRequest, int] = {}
        self.preempted: list[SimRequest] = []

    def capped(self, num_new: int) -> int:
        return self.cap if 0 < self.cap < num_new else num_new

    def give(self, request: SimRequest, num_new: int) -> None:
        self.chunks[request] = num_new
        self.room -= num_new

    def take_back(self, request: SimRequest) -> None:
        """A victim that was scheduled earlier in this step returns its tokens (priority policy)."""
        self.room += self.chunks.pop(request, 0)
