"""When an in-process engine submits which request: phases, batches, concurrency, due times, sessions and stop rules.

Pure decisions are apart from waiting: :class:`StopState` and :class:`Pending` are plain values that take the time as an
argument; :func:`pace` waits, on an asyncio loop.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.records import Request, RequestRecord, Schedule, StopRule

#: The share of failed requests is looked at once so many have completed.
_MIN_FOR_ERROR_RATIO = 10
_SLICE_S = 0.1

#: Serves one request that was due at the given moment (seconds since the run's start; None = due when sent).
ServeOne = Callable[[Request, float | None], Coroutine[Any, Any, RequestRecord]]


class StopState:
    """When to stop submitting, and when to break off. Warm-up does not count, neither its time nor its requests.

    Without any minimum a run goes on until the requests are used up. With minima it stops submitting once all of them
    are met; what is in flight then still completes. At a maximum duration what is in flight is broken off.
    """

    def __init__(self, rule: StopRule) -> None:
        self.rule = rule
        self.begin_s = 0.0
        self.num_sent = self.num_done = self.num_errors = 0
        self.reason = "requests-used-up"

    def begin(self, now_s: float) -> None:
        self.begin_s = now_s

    def sent(self) -> None:
        self.num_sent += 1

    def done(self, record: RequestRecord) -> None:
        self.num_done += 1
        if record.error is not None and record.error != "aborted":
            self.num_errors += 1

    @property
    def deadline_s(self) -> float:
        """When everything is broken off."""
        limit = self.rule.max_duration_s
        return math.inf if limit is None else self.begin_s + limit

    def room(self) -> int | None:
        """How many more requests may be sent; None = any number."""
        limit = self.rule.max_requests
        return None if limit is None else max(0, limit - self.num_sent)

    def over(self, now_s: float) -> bool:
        """True when nothing more may be sent; ``reason`` says why."""
        rule = self.rule
        if now_s >= self.deadline_s:
            self.reason = "max-duration"
        elif rule.max_errors is not None and self.num_errors > rule.max_errors:
            self.reason = "max-errors"
        elif (
            rule.max_error_ratio is not None
            and self.num_done >= _MIN_FOR_ERROR_RATIO
            and self.num_errors > rule.max_error_ratio * self.num_done
        ):
            self.reason = "max-error-ratio"
        elif self.room() == 0:
            self.reason = "max-requests"
        elif self._minima_met(now_s):
            self.reason = "minima-met"
        else:
            return False
        return True

    def _minima_met(self, now_s: float) -> bool:
        rule = self.rule
        if rule.min_duration_s <= 0 and rule.min_requests <= 0:
            return False
        return now_s - self.begin_s >= rule.min_duration_s and self.num_done >= rule.min_requests


def split_phases(schedule: Schedule) -> tuple[list[int], list[int]]:
    """(positions of the warm-up requests, positions of all others), each in the schedule's order."""
    warm: list[int] = []
    rest: list[int] = []
    for i, r in enumerate(schedule.requests):
        (warm if r.phase == "warmup" else rest).append(i)
    return warm, rest


def batches(positions: Sequence[int], size: int | None) -> Iterator[list[int]]:
    """Consecutive batches of ``size``; the last one holds what is left. None: one batch of all."""
    step = len(positions) if size is None else size
    for i in range(0, len(positions), max(step, 1)):
        yield list(positions[i : i + step])


def limit_at(schedule: Schedule, since_s: float) -> float:
    """How many requests may be in flight ``since_s`` after the measured part began."""
    if schedule.in_flight_steps is not None:
        limit = schedule.in_flight_steps[0][1]
        for t_s, value in schedule.in_flight_steps:
            if t_s <= since_s:
                limit = value
        return limit
    return math.inf if schedule.max_in_flight is None else schedule.max_in_flight


@dataclass(slots=True)
class _Session:
    busy: bool = False
    free_at_s: float = -math.inf
    turns: deque[int] | None = None


class Pending:
    """Requests that were not sent yet, of the part after the warm-up.

    A later turn of a session becomes due at its own due time or a think time after the turn before was done, whichever
    is later; it never holds up other requests.
    """

    def __init__(self, schedule: Schedule, positions: Sequence[int], begin_s: float) -> None:
        self._schedule, self._begin_s = schedule, begin_s
        self._ready: list[tuple[float, int]] = []  # heap of (due, position); -inf = whenever a slot is free
        self._sessions: dict[int, _Session] = {}
        for i in positions:
            session = schedule.requests[i].session
            if session is None:
                self._ready.append((self._due(i), i))
                continue
            state = self._sessions.setdefault(session, _Session())
            if state.turns is None:
                state.turns = deque()
                self._ready.append((self._due(i), i))
            else:
                state.turns.append(i)
        heapq.heapify(self._ready)
        self.num_blocked = sum(len(s.turns or ()) for s in self._sessions.values())

    def _due(self, position: int) -> float:
        due = self._schedule.due_s
        return -math.inf if due is None else self._begin_s + float(due[position])

    def __len__(self) -> int:
        return len(self._ready) + self.num_blocked

    def next_due_s(self) -> float:
        """When the next request may go out; infinity while all that are left wait for a turn in flight."""
        return self._ready[0][0] if self._ready else math.inf

    def take(self, now_s: float) -> tuple[Request, float | None] | None:
        """The next request that is due, with its due time (None: due now because a slot is free)."""
        if not self._ready or self._ready[0][0] > now_s:
            return None
        due_s, position = heapq.heappop(self._ready)
        return self._schedule.requests[position], None if due_s == -math.inf else due_s

    def finished(self, request: Request, now_s: float) -> None:
        """A turn is done: the session's next one becomes due."""
        if request.session is None:
            return
        turns = self._sessions[request.session].turns
        if turns:
            position = turns.popleft()
            self.num_blocked -= 1
            think_s = self._schedule.requests[position].think_s
            heapq.heappush(self._ready, (max(self._due(position), now_s + think_s), position))


async def pace(
    schedule: Schedule, serve_one: ServeOne, now: Callable[[], float], idle: Callable[[], None] = lambda: None
) -> StopState:
    """Serve the whole schedule: the warm-up to its end, then the rest by its kind and stop rule.

    Args:
        serve_one: serves a request and returns its record; must turn its own failures, cancellation included, into
            records.
        now: seconds since the run's start.
        idle: called now and then while nothing is in flight because nothing is due.
    """
    stop = StopState(schedule.stop)
    warm, rest = split_phases(schedule)
    for batch in batches(warm, schedule.max_in_flight):
        await asyncio.gather(*(serve_one(schedule.requests[i], None) for i in batch))
    stop.begin(now())
    if schedule.kind == "offline":
        await _offline(schedule, rest, stop, serve_one, now)
    else:
        await _by_slots_and_due_times(schedule, rest, stop, serve_one, now, idle)
    return stop


async def _offline(
    schedule: Schedule, rest: Sequence[int], stop: StopState, serve_one: ServeOne, now: Callable[[], float]
) -> None:
    for batch in batches(rest, schedule.max_in_flight):
        if stop.over(now()):
            return
        room = stop.room()
        due_s = now()
        tasks = {
            asyncio.create_task(serve_one(schedule.requests[i], due_s))
            for i in (batch if room is None else batch[:room])
        }
        stop.num_sent += len(tasks)
        await _finish(tasks, stop, now)
        if now() >= stop.deadline_s:
            stop.over(now())
            return


async def _finish(tasks: set[asyncio.Task[RequestRecord]], stop: StopState, now: Callable[[], float]) -> None:
    """Wait for ``tasks``; at the deadline cancel them. Their records count either way."""
    try:
        if tasks:
            left_s = stop.deadline_s - now()
            timeout = None if left_s == math.inf else max(0.0, left_s)
            _, late = await asyncio.wait(tasks, timeout=timeout)
            for task in late:
                task.cancel()
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    for record in await asyncio.gather(*tasks):
        stop.done(record)


async def _by_slots_and_due_times(
    schedule: Schedule,
    rest: Sequence[int],
    stop: StopState,
    serve_one: ServeOne,
    now: Callable[[], float],
    idle: Callable[[], None],
) -> None:
    """Closed loop, open loop and trace: whatever is due goes out while there is a free slot."""
    pending = Pending(schedule, rest, stop.begin_s)
    in_flight: set[asyncio.Task[RequestRecord]] = set()
    wake = asyncio.Event()
    failures: list[BaseException] = []

    async def one(request: Request, due_s: float | None) -> RequestRecord:
        record = await serve_one(request, due_s)
        stop.done(record)
        pending.finished(request, now())
        return record

    def ended(task: asyncio.Task[Any]) -> None:
        in_flight.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            failures.append(error)
        wake.set()

    try:
        while len(pending) and not failures and not stop.over(t := now()):
            limit = limit_at(schedule, t - stop.begin_s)
            while len(in_flight) < limit and stop.room() != 0 and (item := pending.take(t)) is not None:
                stop.sent()
                task = asyncio.create_task(one(*item))
                in_flight.add(task)
                task.add_done_callback(ended)
            if stop.over(now()):
                break
            wake.clear()
            if not in_flight:
                idle()
            until = min(stop.deadline_s, _next_event_s(schedule, pending, stop, len(in_flight) < limit, t), t + 1.0)
            await _wait(wake, until - now())
        # no more is sent; what is in flight completes, up to the deadline
        while in_flight and not failures and now() < stop.deadline_s:
            wake.clear()
            await _wait(wake, min(stop.deadline_s - now(), 1.0))
        if now() >= stop.deadline_s:
            stop.over(now())
    finally:
        tasks = list(in_flight)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if failures:
        raise failures[0]


def _next_event_s(schedule: Schedule, pending: Pending, stop: StopState, free_slot: bool, now_s: float) -> float:
    """When something may change without a request being done: a due time, or a step of the concurrency."""
    times = [pending.next_due_s()] if free_slot else []
    times += [stop.begin_s + t for t, _ in schedule.in_flight_steps or ()]
    if stop.rule.min_duration_s > 0:
        times.append(stop.begin_s + stop.rule.min_duration_s)
    return min((t for t in times if t > now_s), default=math.inf)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    if timeout_s <= 0:
        await asyncio.sleep(0)
        return
    # not asyncio.wait_for: before Python 3.12 it swallows a cancellation that comes together with the event
    waiter = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({waiter}, timeout=None if math.isinf(timeout_s) else timeout_s)
    finally:
        waiter.cancel()


def in_slices(
    loop: asyncio.AbstractEventLoop,
    work: Awaitable[StopState],
    records: list[RequestRecord],
    cancelled: Callable[[], bool],
    between: Callable[[], None] = lambda: None,
) -> Iterator[RequestRecord]:
    """Run ``work`` on ``loop``, pausing every 0.1 s (for microseconds) to hand over the ``records`` it appended.

    ``between`` is called at every pause. Broken off when ``cancelled`` or when the iterator is closed; raises what ``work`` raised.
    """
    task = asyncio.ensure_future(work, loop=loop)
    try:
        while not task.done():
            loop.run_until_complete(asyncio.wait({task}, timeout=_SLICE_S))
            if cancelled() and not task.done():
                break
            between()
            taken, records[:] = list(records), []
            yield from taken
    finally:
        if not task.done():
            task.cancel()
            loop.run_until_complete(asyncio.wait({task}, timeout=10))
    yield from records
    records.clear()
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
