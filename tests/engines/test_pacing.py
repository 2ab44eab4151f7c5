"""Which request goes out when: batches, concurrency, due times, sessions and stop rules, on a virtual clock."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bench.engines.pacing import Pending, StopState, batches, limit_at, pace, split_phases
from bench.records import Request, RequestRecord, Schedule, StopRule
from tests.engines.sinks import some_requests


class Server:
    """Takes ``service_s`` (virtual) for a request; keeps what was in flight and when."""

    def __init__(self, clock: VirtualLoop, service_s: float = 1.0, fail: bool = False) -> None:
        self.clock, self.service_s, self.fail = clock, service_s, fail
        self.log: list[tuple[float, int]] = []
        self.records: list[RequestRecord] = []
        self.num_in_flight = self.most_in_flight = 0

    async def __call__(self, request: Request, due_s: float | None) -> RequestRecord:
        sent_s = self.clock.time()
        self.log.append((round(sent_s, 6), request.index))
        self.num_in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.num_in_flight)
        error: Any = "engine_error" if self.fail else None
        try:
            await asyncio.sleep(self.service_s)
        except asyncio.CancelledError:
            error = "aborted"
        self.num_in_flight -= 1
        done_s = self.clock.time()
        record = RequestRecord(
            request.index, request.phase, 1, request.osl, due_s, sent_s, done_s, done_s, done_s, error=error
        )
        self.records.append(record)
        return record


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._now = max(self._now, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def served(schedule: Schedule, service_s: float = 1.0, fail: bool = False) -> tuple[Server, StopState]:
    loop = VirtualLoop()
    try:
        server = Server(loop, service_s, fail)
        stop = loop.run_until_complete(pace(schedule, server, loop.time))
        assert server.num_in_flight == 0 and not asyncio.all_tasks(loop)
        return server, stop
    finally:
        loop.close()


def test_offline_batches_start_when_the_one_before_is_done() -> None:
    server, stop = served(Schedule("offline", some_requests(10, num_warmup=3), None, 3))
    assert [t for t, _ in server.log] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert stop.reason == "requests-used-up"
    assert all(r.due_s == r.sent_s for r in server.records if r.phase == "measured")


def test_offline_without_a_batch_size_sends_all_at_once() -> None:
    server, _ = served(Schedule("offline", some_requests(10), None, None))
    assert server.most_in_flight == 10


def test_a_closed_loop_keeps_its_concurrency_after_the_warm_up() -> None:
    server, _ = served(Schedule("closed_loop", some_requests(12, num_warmup=4), None, 4))
    assert [t for t, _ in server.log] == [0] * 4 + [1] * 4 + [2] * 4
    assert server.most_in_flight == 4 and [i for _, i in server.log] == list(range(12))


def test_concurrency_steps_are_followed() -> None:
    schedule = Schedule("closed_loop", some_requests(9), None, 3, in_flight_steps=((0.0, 1), (2.0, 3)))
    server, _ = served(schedule)
    assert [t for t, _ in server.log] == [0, 1, 2, 2, 2, 3, 3, 3, 4]
    assert [limit_at(schedule, t) for t in (0.0, 1.9, 2.0, 9.0)] == [1, 1, 3, 3]


def test_an_open_loop_sends_at_due_times_after_the_warm_up() -> None:
    requests = some_requests(5, num_warmup=1)
    server, _ = served(Schedule("open_loop", requests, np.array([0, 0.0, 0.25, 0.25, 3.0]), None))
    assert [t for t, _ in server.log] == [0, 1, 1.25, 1.25, 4.0]  # due times count from the end of the warm-up
    assert [r.due_s for r in server.records] == [None, 1.0, 1.25, 1.25, 4.0]


def test_a_capped_open_loop_waits_and_keeps_its_due_times() -> None:
    server, _ = served(Schedule("open_loop", some_requests(4), np.array([0.0, 0.1, 0.2, 0.3]), 1))
    assert [t for t, _ in server.log] == [0, 1, 2, 3] and server.most_in_flight == 1
    assert [r.due_s for r in server.records] == [0.0, 0.1, 0.2, 0.3]


def test_turns_of_a_session_wait_for_each_other_and_hold_up_nobody() -> None:
    plain = some_requests(5)
    requests = (
        replace(plain[0], session=0, turn=0),
        replace(plain[1], session=1, turn=0),
        replace(plain[2], session=0, turn=1, think_s=0.5),
        replace(plain[3], session=1, turn=1),
        plain[4],
    )
    server, _ = served(Schedule("closed_loop", requests, None, 3))
    assert sorted(server.log) == [(0, 0), (0, 1), (0, 4), (1, 3), (1.5, 2)]


def test_minima_stop_sending_and_let_the_rest_complete() -> None:
    rule = StopRule(min_duration_s=2.5, min_requests=4)
    server, stop = served(Schedule("closed_loop", some_requests(100), None, 2, rule))
    assert stop.reason == "minima-met" and len(server.records) == 6  # sent at 0, 1 and 2 s
    assert all(r.error is None for r in server.records)
    server, stop = served(Schedule("offline", some_requests(100), None, 2, rule))
    assert stop.reason == "minima-met" and len(server.records) == 6


def test_maxima_are_never_passed() -> None:
    server, stop = served(Schedule("closed_loop", some_requests(100), None, 4, StopRule(max_requests=10)))
    assert stop.reason == "max-requests" and len(server.records) == 10
    server, stop = served(Schedule("offline", some_requests(100), None, 4, StopRule(max_requests=10)))
    assert stop.reason == "max-requests" and len(server.records) == 10
    for kind in ("closed_loop", "offline"):
        server, stop = served(Schedule(kind, some_requests(100), None, 4, StopRule(max_duration_s=2.5)))  # type: ignore[arg-type]
        assert stop.reason == "max-duration" and len(server.records) == 12
        assert [r.error for r in server.records].count("aborted") == 4
        assert max(r.done_s or 0 for r in server.records) == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("rule", "reason", "most"),
    [(StopRule(max_errors=3), "max-errors", 6), (StopRule(max_error_ratio=0.5), "max-error-ratio", 12)],
)
def test_too_many_errors_end_a_run(rule: StopRule, reason: str, most: int) -> None:
    server, stop = served(Schedule("closed_loop", some_requests(100), None, 2, rule), fail=True)
    assert stop.reason == reason and len(server.records) <= most


def test_an_exception_of_the_engine_ends_the_run_and_cancels_the_rest() -> None:
    loop = VirtualLoop()
    server = Server(loop)

    async def broken(request: Request, due_s: float | None) -> RequestRecord:
        if request.index == 3:
            raise RuntimeError("engine core is dead")
        return await server(request, due_s)

    schedule = Schedule("closed_loop", some_requests(50), None, 2)
    with pytest.raises(RuntimeError, match="dead"):
        loop.run_until_complete(pace(schedule, broken, loop.time))
    assert not asyncio.all_tasks(loop)
    loop.close()


def test_small_parts() -> None:
    schedule = Schedule("offline", some_requests(5, num_warmup=2))
    assert split_phases(schedule) == ([0, 1], [2, 3, 4])
    assert list(batches([1, 2, 3], 2)) == [[1, 2], [3]] and list(batches([], None)) == []
    pending = Pending(schedule, [2, 3, 4], 0.0)
    assert len(pending) == 3 and pending.next_due_s() == -math.inf
    assert StopState(StopRule()).deadline_s == math.inf
