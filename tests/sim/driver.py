"""One loop that drives our scheduler and vLLM's alike, and writes every step down.

:func:`drive` is vLLM's ``EngineCore.step_with_batch_queue`` (and ``step`` for a queue of one) without the device: a batch is
scheduled while the queue has room, else the oldest one's output is taken in. A step's trace has everything that is compared:
who runs and how many tokens each (in order), who was preempted (in order), the running list and the waiting queue (in order),
the free blocks by number and in the order in which they will be taken (so every block that a request holds is the same one),
and who got a token and who finished.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

from bench.sim.scheduler import Scheduler
from tests.sim.cases import Case

MAX_CALLS = 4_000


class Driven(Protocol):
    """A scheduler under the driver."""

    depth: int

    def add(self, index: int) -> None: ...
    def has_requests(self) -> bool: ...
    def schedule(self) -> tuple[Any, list[Any]]:
        """(plan, trace row)"""
        ...

    def update(self, plan: Any) -> list[Any]: ...


def drive(case: Case, driven: Driven) -> Iterator[list[Any]]:
    """Serve the case to its end; the trace of every call of ``schedule`` (five entries) and of every output (three).

    It is handed out row by row: two schedulers are compared in step, so one that went astray stops at its first difference
    instead of filling the memory.
    """
    arrivals = sorted(range(len(case.requests)), key=lambda i: (case.requests[i].arrival_step, i))
    queue: deque[Any] = deque()
    calls = next_arrival = 0
    while calls < MAX_CALLS:
        while next_arrival < len(arrivals) and case.requests[arrivals[next_arrival]].arrival_step <= calls:
            driven.add(arrivals[next_arrival])
            next_arrival += 1
        executed = False
        if driven.has_requests():
            plan, row = driven.schedule()
            yield row
            calls += 1
            executed = bool(row[0])
            queue.append(plan)
            if len(queue) < driven.depth and (executed or driven.has_requests()):
                continue
        if queue:
            yield driven.update(queue.popleft())
        elif next_arrival < len(arrivals):
            calls = case.requests[arrivals[next_arrival]].arrival_step
        else:
            break


class Ours:
    """Our scheduler under the driver, or another one of its kind."""

    def __init__(self, case: Case, scheduler: Any = None) -> None:
        self._requests = case.sim_requests()
        self.scheduler = scheduler or Scheduler(case.config)
        self.depth = case.config.max_concurrent_batches

    def add(self, index: int) -> None:
        self.scheduler.add(self._requests[index])

    def has_requests(self) -> bool:
        return bool(self.scheduler.has_requests())

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
