"""The engine that answers at once: measures the harness itself, and fails on demand for the runner's own tests.

With ``time_per_token_s`` every request takes that long for each of its output tokens, all requests in parallel.
``args: {num_gpus: n}`` makes it claim the first n visible GPUs (and leave them idle), so that everything that happens
around an engine on a GPU host can be tried without one.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from typing_extensions import Self

from bench.engines.base import RecordSink
from bench.engines.launch import EngineLaunch
from bench.engines.pacing import StopState, in_slices, pace
from bench.errors import EngineUnavailable
from bench.records import EngineInfo, ErrorClass, Request, RequestRecord, Schedule
from bench.telemetry.gpus import visible_devices

#: "crash", "hang" and "oom" happen when this many measured requests were answered.
_FAIL_AFTER = 3


def build(launch: EngineLaunch) -> NullEngine:
    return NullEngine(launch)


class NullEngine:
    """See the module's first lines. ``fail``: none, start, crash, hang, oom, or request (every second one fails)."""

    def __init__(self, launch: EngineLaunch) -> None:
        spec = launch.spec
        self.time_per_token_s = float(spec.get("time_per_token_s", 0.0))
        self.fail = str(spec.get("fail", "none"))
        self.args: dict[str, Any] = dict(launch.args)
        self._loop = asyncio.new_event_loop()
        self._num_answered = 0

    def __enter__(self) -> Self:
        if self.fail == "start":
            raise EngineUnavailable("the null engine was asked to fail at its start", next_step="write `fail: none`")
        print(f"null engine: started, fail={self.fail}", flush=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.close()

    def info(self) -> EngineInfo:
        effective = {**self.args, "time_per_token_s": self.time_per_token_s, "fail": self.fail}
        devices = visible_devices()[: int(self.args.get("num_gpus", 0))]
        return EngineInfo(
            kind="null", version="1", effective_args=effective, num_gpus=len(devices), device_uuids=tuple(devices)
        )

    def run(self, schedule: Schedule, sink: RecordSink, t0_monotonic_s: float) -> Iterator[RequestRecord]:
        print(f"null engine: serving {len(schedule.requests)} requests, {schedule.kind}", flush=True)
        self._num_answered = 0
        records: list[RequestRecord] = []
        cancelled = getattr(sink, "cancelled", None)

        def now() -> float:
            return time.monotonic() - t0_monotonic_s

        async def work() -> StopState:
            return await pace(
                schedule,
                lambda request, due_s: self._answer(request, due_s, now, records),
                now,
                getattr(sink, "heartbeat", lambda: None),
            )

        task_records = in_slices(self._loop, self._noting(work(), sink), records, _is_set(cancelled))
        yield from task_records

    async def _noting(self, work: Any, sink: RecordSink) -> StopState:
        stop: StopState = await work
        sink.update_manifest(stop_reason=stop.reason)
        return stop

    async def _answer(
        self, request: Request, due_s: float | None, now: Callable[[], float], records: list[RequestRecord]
    ) -> RequestRecord:
        sent_s = now()
        first_s: float | None = None
        error: ErrorClass | None = None
        try:
            if self.time_per_token_s > 0:
                await asyncio.sleep(self.time_per_token_s)
                first_s = now()
                await asyncio.sleep(self.time_per_token_s * (request.osl - 1))
            else:
                await asyncio.sleep(0)
                first_s = now()
        except asyncio.CancelledError:
            error = "aborted"
        failed = self.fail == "request" and request.phase == "measured" and self._num_answered % 2 == 0
        if failed and error is None:
            error = "engine_error"
        done_s = now()
        record = RequestRecord(
            index=request.index,
            phase=request.phase,
            isl=request.isl,
            osl=None if error else request.osl,
            due_s=due_s,
            sent_s=sent_s,
            first_token_s=first_s if error is None else None,
            last_token_s=done_s if error is None else None,
            done_s=done_s,
            error=error,
            error_detail="failed as asked" if error == "engine_error" else None,
            finish_reason=None if error else "length",
            requested_osl=request.osl,
            first_chunk_tokens=None if error else 1,
            token_source="engine",
            session=request.session,
            turn=request.turn if request.session is not None else None,
        )
        records.append(record)
        self._num_answered += request.phase == "measured"
        if self._num_answered >= _FAIL_AFTER:
            self._fail_now()
        return record

    def _fail_now(self) -> None:
        if self.fail == "crash":
            os.abort()
        if self.fail == "oom":
            raise MemoryError("the null engine was asked to run out of memory")
        if self.fail == "hang":
            time.sleep(1e6)


def _is_set(event: Any) -> Callable[[], bool]:
    return (lambda: False) if event is None else event.is_set
