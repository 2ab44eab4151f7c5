"""A simulation's result as the records that every engine reports."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bench.records import RequestRecord, Schedule
from bench.sim.inputs import BY_LENGTH, BY_STOP, REJECTED, SimInputs, SimResult


def request_records(schedule: Schedule, inputs: SimInputs, result: SimResult) -> Iterator[RequestRecord]:
    """A record per request that was sent, in order of completion; what was cut off at the end comes last, aborted."""
    done = result.completion_order.tolist()
    seen = set(done)
    cut = [i for i in np.flatnonzero(~np.isnan(result.sent_s)).tolist() if i not in seen]
    for i in (*done, *cut):
        yield _record(schedule, inputs, result, i)


def _record(schedule: Schedule, inputs: SimInputs, r: SimResult, i: int) -> RequestRecord:
    request = schedule.requests[i]
    after = inputs.fleet.request_after_s
    ended = int(r.ended[i])
    first, last = _time(r.first_token_s[i]), _time(r.last_token_s[i])
    # a token that the engine put out just before the end was not yet with the client
    if ended not in (BY_LENGTH, BY_STOP) and first is not None and first + after > r.end_s:
        first = None
    tokens = int(r.num_output_tokens[i])
    done_s = r.end_s
    error, detail = None, None
    if ended == REJECTED:
        error, detail = "engine_error", f"the prompt's {inputs.prompt_tokens[i]:,} tokens reach max_model_len"
        done_s = float(r.queued_s[i]) + after
    elif ended in (BY_LENGTH, BY_STOP):
        assert last is not None
        done_s = last + after
    else:
        error, detail = "aborted", "the run's time was over"
    return RequestRecord(
        index=request.index,
        phase=request.phase,
        isl=int(inputs.prompt_tokens[i]),
        osl=tokens,
        due_s=_time(r.due_s[i]),
        sent_s=float(r.sent_s[i]),
        first_token_s=None if first is None else first + after,
        last_token_s=None if last is None or first is None else last + after,
        done_s=done_s,
        error=error,  # type: ignore[arg-type]
        error_detail=detail,
        finish_reason={BY_LENGTH: "length", BY_STOP: "stop"}.get(ended),
        requested_osl=int(inputs.max_tokens[i]),
        first_chunk_tokens=1 if first is not None else None,
        num_chunks=tokens,
        token_source="engine",
        queued_s=_time(r.queued_s[i]),
        scheduled_s=_time(r.scheduled_s[i]),
        engine_first_token_s=_time(r.first_token_s[i]),
        engine_last_token_s=last,
        num_cached_tokens=int(r.num_hit_tokens[i]),
        num_preemptions=int(r.num_preemptions[i]),
        session=request.session,
        turn=request.turn if request.session is not None else None,
        worker=int(r.replica[i]) if r.replica[i] >= 0 else None,
    )


def _time(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def chunk_columns(schedule: Schedule, inputs: SimInputs, result: SimResult) -> dict[str, np.ndarray]:
    """Every output token as a chunk of one, in order of arrival at the client: columns of ChunkRecord."""
    counts = np.minimum(result.num_output_tokens, np.diff(result.token_offsets))
    owner = np.repeat(np.arange(inputs.num_requests), counts)
    starts = np.repeat(result.token_offsets[:-1] - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
    t = result.token_s[np.arange(len(owner)) + starts] + inputs.fleet.request_after_s
    order = np.argsort(t, kind="stable")
    index = np.array([r.index for r in schedule.requests[: inputs.num_requests]], dtype=np.int64)
    ones = np.ones(len(order), dtype=np.int64)
    return {"index": index[owner[order]], "t_s": t[order], "tokens": ones, "num_events": ones}


def step_columns(inputs: SimInputs, result: SimResult) -> dict[str, np.ndarray]:
    """The steps of all replicas in order of their outputs: columns of EngineStep."""
    order = np.argsort(result.steps["end_s"], kind="stable")
    s = {name: column[order] for name, column in result.steps.items()}
    usable = np.array([r.config.num_blocks - 1 for r in inputs.fleet.replicas])
    previous = np.zeros(len(order))  # when the same replica's step before this one ended
    for replica in range(len(usable)):
        mine = np.flatnonzero(s["replica"] == replica)
        previous[mine[1:]] = s["end_s"][mine[:-1]]
    return {
        "step": np.arange(len(order)),
        "t_s": s["end_s"],
        "step_time_s": s["end_s"] - np.maximum(previous, s["scheduled_s"]),
        "num_running": s["num_running"],
        "num_waiting": s["num_waiting"],
        "kv_usage_ratio": 1.0 - s["num_free_blocks"] / usable[s["replica"]],
        "prefill_tokens": s["prefill_tokens"],
        "decode_tokens": s["decode_requests"],
        "prefill_requests": s["prefill_requests"],
        "decode_requests": s["decode_requests"],
        "context_tokens": s["prefill_context"] + s["decode_context_sum"] - s["decode_requests"],
        "num_preemptions": s["num_preemptions"],
        "cached_tokens": s["hit_tokens"],
    }
