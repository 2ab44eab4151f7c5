"""One schedule served by a vLLM engine in this process: requests submitted, outputs taken in, every request a record."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.engines import vllm_setup, vllm_versions
from bench.engines.base import RecordSink
from bench.engines.pacing import StopState, batches, in_slices, pace, split_phases
from bench.errors import BadInput
from bench.records import ErrorClass, Request, RequestRecord, Schedule

if TYPE_CHECKING:
    from bench.engines.vllm_inprocess import VllmEngine

_POLL_S = 0.1


@dataclass(slots=True)
class _Flight:
    """A request that was sent and is not done."""

    request: Request
    due_s: float | None
    sent_s: float
    internal_id: str = ""
    first_s: float | None = None
    last_s: float | None = None
    first_chunk_tokens: int | None = None
    num_chunks: int = 0
    tokens: int = 0


class VllmRun:
    """One schedule on one engine."""

    def __init__(self, owner: VllmEngine, schedule: Schedule, sink: RecordSink, t0: float) -> None:
        self._owner, self._schedule, self._sink, self._t0 = owner, schedule, sink, t0
        self._engine = owner._engine
        self._steps = owner._steps
        event = getattr(sink, "cancelled", None)
        self._cancelled: Callable[[], bool] = event.is_set if event is not None else (lambda: False)
        delta = schedule.kind != "offline"
        self._kind = vllm_versions.output_kind(delta)
        self._params: dict[int, Any] = {}
        self._prompts: dict[int, Any] = {}  # position -> prompt as vLLM takes it
        self._chunks: tuple[list[int], list[float], list[int]] = ([], [], [])
        self._reason = ""
        self._counted = self._counted_prompt = self._num_aborted = 0

    def _now(self) -> float:
        return time.monotonic() - self._t0

    def _sampling(self, osl: int) -> Any:
        """vLLM copies the parameters of every request, so requests of one length share an object."""
        if osl not in self._params:
            self._params[osl] = vllm_versions.sampling_params(
                max_tokens=osl, output_kind=self._kind, **vllm_setup.SAMPLING
            )
        return self._params[osl]

    def _make_ready(self, positions: list[int]) -> None:
        for i in positions:
            if i not in self._prompts:
                self._prompts[i] = _prompt(self._schedule.requests[i])

    def _id(self, request: Request) -> str:
        return f"{self._owner._run_number}-{request.index}"

    def check(self) -> None:
        """Raises BadInput when a request has no token ids or is longer than the engine's context."""
        limit = self._owner.info().max_model_len
        for r in self._schedule.requests:
            if r.prompt_token_ids is None:
                raise BadInput("the vLLM engine takes prompts as token ids", next_step="use a token-id workload")
            length = len(r.prompt_token_ids) + r.osl
            if limit is not None and length > limit:
                raise BadInput(
                    f"request {r.index} needs {length} tokens of context, but max_model_len is {limit}",
                    next_step="raise engine.args.max_model_len or shorten isl and osl",
                )

    # --- offline through LLM -------------------------------------------------------------------------------------

    def offline(self) -> Iterator[RequestRecord]:
        schedule = self._schedule
        warm, rest = split_phases(schedule)
        stop = StopState(schedule.stop)
        unlimited = StopState(type(schedule.stop)())
        for batch, upcoming in _with_next(batches(warm, schedule.max_in_flight)):
            yield from self._batch(batch, upcoming or rest[: len(batch)], unlimited)
        stop.begin(self._now())
        for batch, upcoming in _with_next(batches(rest, schedule.max_in_flight)):
            if self._cancelled():
                stop.reason = "cancelled"
                break
            if stop.over(self._now()):
                break
            room = stop.room()
            batch = batch if room is None else batch[:room]
            stop.num_sent += len(batch)
            yield from self._batch(batch, upcoming, stop)
            if self._now() >= stop.deadline_s and stop.over(self._now()):
                break
        self._reason = stop.reason

    def _batch(self, positions: list[int], upcoming: list[int], stop: StopState) -> Iterator[RequestRecord]:
        """One batch, submitted whole, served to its end or to the run's deadline.

        The prompts of the ``upcoming`` batch are made ready while this one is being served.
        """
        engine = self._engine.llm_engine
        flights: dict[str, _Flight] = {}
        self._make_ready(positions)
        prompts, self._prompts = self._prompts, {}
        due_s = self._now()
        for i in positions:
            request = self._schedule.requests[i]
            flight = _Flight(request, due_s, self._now())
            name = self._id(request)
            try:
                flight.internal_id = engine.add_request(name, prompts[i], self._sampling(request.osl))
            except ValueError as e:  # vLLM's validation
                record = self._failed(flight, "engine_error", str(e))
                stop.done(record)
                yield record
                continue
            flights[name] = flight
        self._make_ready(upcoming)
        try:
            yield from self._step_until_done(flights, stop)
        except GeneratorExit:  # broken off between two records: vLLM must not serve the rest into the next run
            engine.abort_request([f.internal_id for f in flights.values()], internal=True)
            raise
        if flights:
            yield from self._abort_batch(list(flights.values()), stop)

    def _step_until_done(self, flights: dict[str, _Flight], stop: StopState) -> Iterator[RequestRecord]:
        """Step the engine until no request of ``flights`` is left, or the deadline or a cancellation comes."""
        engine = self._engine.llm_engine
        next_poll = self._now() + _POLL_S
        while flights and engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished and (flight := flights.pop(output.request_id, None)) is not None:
                    flight.tokens = len(output.outputs[0].token_ids)
                    record = self._completed(flight, output)
                    stop.done(record)
                    yield record
            if (now := self._now()) >= next_poll:
                next_poll = now + _POLL_S
                self._steps.read(self._sink)
                if self._cancelled():
                    return
            if now >= stop.deadline_s:
                return

    def _abort_batch(self, flights: list[_Flight], stop: StopState) -> Iterator[RequestRecord]:
        for flight in flights:
            flight.tokens = vllm_versions.tokens_generated_so_far(self._engine, flight.internal_id) or 0
        self._engine.llm_engine.abort_request([f.internal_id for f in flights], internal=True)
        for flight in flights:
            record = self._failed(flight, "aborted", None)
            stop.done(record)
            yield record

    # --- everything through AsyncLLM -----------------------------------------------------------------------------

    def asynchronous(self) -> Iterator[RequestRecord]:
        loop = self._owner._loop
        assert loop is not None
        records: list[RequestRecord] = []

        async def serve_one(request: Request, due_s: float | None) -> RequestRecord:
            record = await self._stream(request, due_s)
            records.append(record)
            return record

        async def work() -> StopState:
            heartbeat = getattr(self._sink, "heartbeat", lambda: None)
            stop = await pace(self._schedule, serve_one, self._now, heartbeat)
            self._reason = stop.reason
            return stop

        yield from in_slices(loop, work(), records, self._cancelled, self._between)

    async def _stream(self, request: Request, due_s: float | None) -> RequestRecord:
        prompt = _prompt(request)
        flight = _Flight(request, due_s, self._now())
        indices, times, counts = self._chunks
        streaming = self._schedule.kind != "offline"
        stream = self._engine.generate(prompt, self._sampling(request.osl), self._id(request))
        output: Any = None
        try:
            async for output in stream:
                t = self._now()
                tokens = len(output.outputs[0].token_ids)
                if not tokens:
                    continue
                flight.tokens += tokens
                flight.last_s = t
                flight.num_chunks += 1
                if flight.first_s is None:
                    flight.first_s, flight.first_chunk_tokens = t, tokens
                if streaming:
                    indices.append(request.index)
                    times.append(t)
                    counts.append(tokens)
        except asyncio.CancelledError:
            return self._failed(flight, "aborted", None)
        except Exception as e:
            if vllm_versions.is_dead(e):
                raise
            return self._failed(flight, "engine_error", f"{type(e).__name__}: {e}")
        if not streaming:  # the only output is the last one: when the first token came only the engine knows
            flight.first_s = flight.last_s = flight.first_chunk_tokens = None
            flight.num_chunks = 0
        return self._completed(flight, output)

    def _between(self) -> None:
        self._steps.read(self._sink)
        indices, times, counts = self._chunks
        if indices:
            self._sink.append_chunk_columns(
                index=np.array(indices, dtype=np.int64),
                t_s=np.array(times),
                tokens=np.array(counts, dtype=np.int64),
                num_events=np.ones(len(indices), dtype=np.int64),
            )
            for column in self._chunks:
                column.clear()

    # --- records -------------------------------------------------------------------------------------------------

    def _completed(self, flight: _Flight, output: Any) -> RequestRecord:
        done_s = self._now()
        request = flight.request
        stats = output.metrics
        first_s = self._engine_time(stats, "first_token_ts")
        last_s = self._engine_time(stats, "last_token_ts")
        self._counted += flight.tokens
        self._counted_prompt += len(output.prompt_token_ids or ())
        reason = output.outputs[0].finish_reason
        wrong = flight.tokens != request.osl
        return RequestRecord(
            index=request.index,
            phase=request.phase,
            isl=len(output.prompt_token_ids or ()),
            osl=flight.tokens,
            due_s=flight.due_s,
            sent_s=flight.sent_s,
            first_token_s=flight.first_s if flight.first_s is not None else first_s,
            last_token_s=flight.last_s if flight.last_s is not None else last_s,
            done_s=done_s,
            error="wrong_token_count" if wrong else None,
            error_detail=f"asked for {request.osl} tokens, got {flight.tokens} ({reason})" if wrong else None,
            finish_reason=reason,
            requested_osl=request.osl,
            first_chunk_tokens=flight.first_chunk_tokens if flight.num_chunks else 1,
            num_chunks=flight.num_chunks or None,
            token_source="engine",
            queued_s=self._engine_time(stats, "queued_ts"),
            scheduled_s=self._engine_time(stats, "scheduled_ts"),
            engine_first_token_s=first_s,
            engine_last_token_s=last_s,
            num_cached_tokens=output.num_cached_tokens,
            num_preemptions=getattr(stats, "num_preemptions", None),
            session=request.session,
            turn=request.turn if request.session is not None else None,
        )

    def _engine_time(self, stats: Any, name: str) -> float | None:
        """One of vLLM's monotonic time stamps on the run's clock; vLLM writes 0 for "did not happen"."""
        value = getattr(stats, name, 0.0)
        return value - self._t0 if value else None

    def _failed(self, flight: _Flight, error: ErrorClass, detail: str | None) -> RequestRecord:
        request = flight.request
        self._counted += flight.tokens
        self._num_aborted += 1
        return RequestRecord(
            index=request.index,
            phase=request.phase,
            isl=request.isl,
            osl=flight.tokens,
            due_s=flight.due_s,
            sent_s=flight.sent_s,
            first_token_s=flight.first_s,
            last_token_s=flight.last_s,
            done_s=self._now(),
            error=error,
            error_detail=detail,
            requested_osl=request.osl,
            first_chunk_tokens=flight.first_chunk_tokens,
            num_chunks=flight.num_chunks or None,
            token_source="engine",
            session=request.session,
            turn=request.turn if request.session is not None else None,
        )

    def conclude(self) -> None:
        """What is left of steps and chunks, and whether the tokens add up."""
        self._between()
        tally = self._owner._tally
        check: dict[str, Any] = {
            "output_tokens_counted": self._counted,
            "prompt_tokens_counted": self._counted_prompt,
            "num_cut_off": self._num_aborted,
        }
        if tally.active:
            check["output_tokens_vllm"] = tally.output_tokens
            check["prompt_tokens_vllm"] = tally.prompt_tokens
            # vLLM also counts what it made for requests that were cut off and that never reached us
            equal = tally.output_tokens == self._counted and tally.prompt_tokens == self._counted_prompt
            check["equal"] = equal if not self._num_aborted else None
        if self._steps.total is not None:
            check["step_tokens"] = self._steps.total
        self._sink.update_manifest(stop_reason=self._reason, token_check=check)


def _prompt(request: Request) -> Any:
    ids = request.prompt_token_ids
    return vllm_versions.tokens_prompt([] if ids is None else ids.tolist())


def _with_next(items: Iterator[list[int]]) -> Iterator[tuple[list[int], list[int]]]:
    """Each item with the one after it; the last one with an empty list."""
    previous: list[int] | None = None
    for item in items:
        if previous is not None:
            yield previous, item
        previous = item
    if previous is not None:
        yield previous, []
