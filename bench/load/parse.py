"""From raw responses to records, after the window: HTTP by httptools, then SSE, JSON, tokens and faults.

An event's time is the stamp of the read that completed it. Tokens are counted from ``usage``: per chunk where the server
sends it with every chunk, else one for each event with text, if that agrees with the final ``usage``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from bench.load.clocks import ClockOffsets
from bench.load.spill import Outcome
from bench.load.wire import ParsedResponse, parse_pieces
from bench.records import ErrorClass, Phase, RequestRecord

_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_SPACE = re.compile(r"\s+")
_DETAIL_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Asked:
    """What the record needs of a request besides the response."""

    index: int
    phase: Phase
    isl: int | None
    osl: int
    session: int | None = None
    turn: int | None = None


@dataclass(slots=True)
class Answer:
    """What a response said, before times are attached."""

    error: ErrorClass | None = None
    detail: str | None = None
    event_reads: list[int] = field(default_factory=list)  # the read that completed each event with tokens
    event_tokens: list[int] = field(default_factory=list)
    exact: bool = False  # event_tokens are the server's own counts
    num_text_events: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    done_mark: bool = False

    def fail(self, error: ErrorClass, detail: str) -> None:
        """The first problem stands."""
        if self.error is None:
            self.error, self.detail = error, _short(detail)


@dataclass(frozen=True, slots=True)
class Parsed:
    """A record and its chunks: times (s), tokens and events of each read that brought tokens."""

    record: RequestRecord
    chunk_t_s: np.ndarray
    chunk_tokens: np.ndarray
    chunk_events: np.ndarray
    num_reads: int
    num_events: int
    isl_differs: bool


def _short(text: str) -> str:
    return _SPACE.sub(" ", text).strip()[:_DETAIL_CHARACTERS]


def events_of(body: Iterable[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """(read that completed it, raw event) of an SSE body given as (read number, bytes); an unfinished last event is
    given, too, if it has any bytes but white space."""
    pieces = list(body)
    whole = b"".join(p for _, p in pieces)
    ends = np.cumsum([len(p) for _, p in pieces]) if pieces else np.zeros(0, dtype=np.int64)
    starts, stops = [], []
    at = 0
    if b"\r" in whole:
        for m in _EVENT_END.finditer(whole):
            starts.append(at)
            stops.append(m.end())
            at = m.end()
    else:
        while (k := whole.find(b"\n\n", at)) >= 0:
            starts.append(at)
            stops.append(k + 2)
            at = k + 2
    if whole[at:].strip():
        starts.append(at)
        stops.append(len(whole))
    which = np.searchsorted(ends, stops, side="left").tolist()
    reads = [pieces[k][0] for k in which]
    return [(r, whole[a:b]) for r, a, b in zip(reads, starts, stops, strict=True)]


def _data(event: bytes) -> bytes | None:
    """The event's data field; None for comments and empty events."""
    if event.startswith(b"data: ") and event.find(b"\n") >= len(event) - 2:
        return event[6:].rstrip(b"\n")
    lines = [line for line in event.splitlines() if line.startswith(b"data:")]
    if not lines:
        return None
    return b"\n".join(line[6:] if line[5:6] == b" " else line[5:] for line in lines)


def read_stream(parsed: ParsedResponse) -> Answer:
    """The tokens, counts and problems of an SSE answer."""
    answer = Answer()
    counted = 0
    for read, event in events_of(parsed.body):
        data = _data(event)
        if data is None:
            continue
        if data.strip() == b"[DONE]":
            answer.done_mark = True
            continue
        try:
            message = json.loads(data)
        except ValueError:
            answer.fail("malformed_sse", f"an event is not JSON: {data[:80]!r}")
            continue
        if not isinstance(message, dict):
            answer.fail("malformed_sse", f"an event is not an object: {data[:80]!r}")
            continue
        if message.get("error"):
            answer.fail("server_error", _error_text(message))
            continue
        try:
            counted = _take_message(answer, message, read, counted)
        except (TypeError, AttributeError, KeyError, ValueError):
            answer.fail("malformed_sse", f"an event has another form than the OpenAI API's: {data[:80]!r}")
    return answer


def _take_message(answer: Answer, message: dict[str, Any], read: int, counted: int) -> int:
    """Add one event; returns the tokens that the server has counted so far."""
    usage = message.get("usage")
    choices = message.get("choices") or []
    text = False
    for choice in choices:
        text = text or _has_text(choice)
        if choice.get("finish_reason"):
            answer.finish_reason = str(choice["finish_reason"])
    tokens = 1 if text else 0
    if usage:
        _take_usage(answer, usage)
        total = answer.completion_tokens
        if choices and total is not None:
            answer.exact = True
            tokens, counted = total - counted, total
    answer.num_text_events += text
    if tokens > 0:
        answer.event_reads.append(read)
        answer.event_tokens.append(tokens)
    return counted


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta")
    if delta is None:
        return bool(choice.get("text"))
    return any(delta.get(k) for k in ("content", "reasoning_content", "reasoning", "tool_calls", "refusal"))


def _take_usage(answer: Answer, usage: dict[str, Any]) -> None:
    if usage.get("prompt_tokens") is not None:
        answer.prompt_tokens = int(usage["prompt_tokens"])
    if usage.get("completion_tokens") is not None:
        answer.completion_tokens = int(usage["completion_tokens"])
    details = usage.get("prompt_tokens_details") or {}
    if details.get("cached_tokens") is not None:
        answer.cached_tokens = int(details["cached_tokens"])


def _error_text(message: Any) -> str:
    error = message.get("error", message) if isinstance(message, dict) else message
    if isinstance(error, dict):
        error = error.get("message") or json.dumps(error)
    return str(error)


def read_answer(outcome: Outcome, parsed: ParsedResponse) -> Answer:
    """Classify a response: status, form, completeness."""
    status = parsed.status
    body = b"".join(p for _, p in parsed.body)
    if status >= 300 or (status and status != 200):
        answer = Answer()
        kind: ErrorClass = "http_429" if status == 429 else "http_5xx" if status >= 500 else "http_4xx"
        try:
            text = _error_text(json.loads(body))
        except ValueError:
            text = body[:_DETAIL_CHARACTERS].decode("utf-8", "replace")
        answer.fail(kind, f"{status} {text}")
        return answer
    if "json" in parsed.headers.get("content-type", ""):
        return _read_whole(body)
    answer = read_stream(parsed)
    if outcome.error is None and not answer.done_mark:
        answer.fail("truncated", "the stream ended without [DONE]")
    return answer


def _read_whole(body: bytes) -> Answer:
    """An answer that was not streamed: tokens without times of their own."""
    answer = Answer()
    try:
        message = json.loads(body)
        if message.get("error"):
            answer.fail("server_error", _error_text(message))
        _take_usage(answer, message.get("usage") or {})
        answer.finish_reason = str(message["choices"][0]["finish_reason"])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        answer.fail("malformed_sse", f"the answer has another form than the OpenAI API's: {body[:80]!r}")
    return answer


def check_tokens(answer: Answer, asked: Asked, *, exact_osl: bool) -> None:
    """Compare what was streamed, what ``usage`` says and what was asked for."""
    usage, streamed = answer.completion_tokens, sum(answer.event_tokens)
    if usage is None:
        if exact_osl and answer.exact is False and streamed > asked.osl:
            answer.fail("wrong_token_count", f"{streamed} chunks with text, {asked.osl} tokens asked for")
        return
    if answer.exact and streamed != usage:
        answer.fail("wrong_token_count", f"the chunks' counts add up to {streamed} tokens, usage says {usage}")
    elif answer.num_text_events > usage:
        answer.fail("wrong_token_count", f"{answer.num_text_events} chunks with text, usage says {usage} tokens")
    elif exact_osl and usage != asked.osl:
        answer.fail("wrong_token_count", f"usage says {usage} tokens, {asked.osl} were asked for")
    elif usage > asked.osl:
        answer.fail("wrong_token_count", f"usage says {usage} tokens, at most {asked.osl} were asked for")


def spread_tokens(answer: Answer) -> None:
    """Where chunks carry no count of their own and there are fewer chunks than tokens (several tokens a chunk), spread
    the known total evenly over them. A total that equals the number of chunks needs nothing."""
    total, n = answer.completion_tokens, len(answer.event_tokens)
    if answer.exact or total is None or n == 0 or total <= n:
        return
    edges = np.rint(np.arange(n + 1) * (total / n)).astype(np.int64)
    answer.event_tokens = np.diff(edges).tolist()


TokenSource = Literal["engine", "usage", "chunks", "tokenizer", "schedule"]


def parse_outcome(
    outcome: Outcome,
    asked: Asked,
    offsets: ClockOffsets,
    t0_ns: int,
    *,
    exact_osl: bool,
    worker: int,
    secret: str | None = None,
) -> Parsed:
    """The record of one request. ``secret`` (an API key) is cut out of error texts, should a server echo it."""
    stamps = outcome.stamps_realtime
    times = offsets.to_monotonic_ns(stamps[:, 0] * 1_000_000_000 + stamps[:, 1])
    times_s = (times - t0_ns) / 1e9
    answer, parsed = Answer(), None
    if len(outcome.data):
        parsed = parse_pieces(outcome.pieces())
        if outcome.error is None and parsed.error is not None:
            answer.fail("malformed_http", parsed.error)
        elif outcome.error is None and not (parsed.done or outcome.until_close):
            answer.fail("malformed_http", "the end of the response was not where it seemed to be")
        first = answer.error, answer.detail
        answer = read_answer(outcome, parsed) if parsed.headers_done else answer
        if first[0] is not None:
            answer.error, answer.detail = first
    if outcome.error is not None and not (answer.error or "").startswith("http_"):
        answer.error, answer.detail = outcome.error, _short(outcome.detail)  # type: ignore[assignment]
    if answer.error is None:
        check_tokens(answer, asked, exact_osl=exact_osl)
    known = answer.exact or answer.completion_tokens in (None, len(answer.event_tokens))
    spread_tokens(answer)
    reads = np.asarray(answer.event_reads, dtype=np.int64)
    used, start, events = np.unique(reads, return_index=True, return_counts=True)
    tokens = np.add.reduceat(np.asarray(answer.event_tokens), start) if len(start) else np.zeros(0, dtype=np.int64)
    record = _record(outcome, asked, answer, parsed, times_s, used, tokens, t0_ns, known, worker)
    if secret and record.error_detail and secret in record.error_detail:
        from dataclasses import replace

        record = replace(record, error_detail=record.error_detail.replace(secret, "[key]"))
    differs = asked.isl is not None and answer.prompt_tokens not in (None, asked.isl)
    return Parsed(record, times_s[used], tokens, events, len(times), len(reads), differs)


def _record(
    outcome: Outcome,
    asked: Asked,
    answer: Answer,
    parsed: ParsedResponse | None,
    times_s: np.ndarray,
    used: np.ndarray,
    tokens: np.ndarray,
    t0_ns: int,
    known: bool,
    worker: int,
) -> RequestRecord:
    def seconds(t_ns: int) -> float | None:
        return (t_ns - t0_ns) / 1e9 if t_ns else None

    source: TokenSource = "usage" if answer.completion_tokens is not None else "chunks"
    osl = answer.completion_tokens
    if osl is None or answer.error is not None:
        osl = int(tokens.sum()) if len(tokens) else (osl or 0)
    last = float(times_s[-1]) if len(times_s) else seconds(outcome.end_ns)
    return RequestRecord(
        index=asked.index,
        phase=asked.phase,
        isl=answer.prompt_tokens if answer.prompt_tokens is not None else asked.isl,
        osl=osl,
        due_s=seconds(outcome.due_ns),
        sent_s=seconds(outcome.sent_ns),
        first_token_s=float(times_s[used[0]]) if len(used) else None,
        last_token_s=float(times_s[used[-1]]) if len(used) else None,
        done_s=last if outcome.error is None else seconds(outcome.end_ns),
        error=answer.error,
        error_detail=answer.detail,
        finish_reason=answer.finish_reason,
        requested_osl=asked.osl,
        first_chunk_tokens=int(tokens[0]) if len(tokens) and known else None,
        num_chunks=len(used),
        token_source=source,
        num_cached_tokens=answer.cached_tokens,
        connect_s=outcome.connect_ns / 1e9 if outcome.sent_ns or outcome.error else None,
        http_status=parsed.status if parsed is not None and parsed.status else None,
        retry_after_s=_retry_after(parsed),
        session=asked.session,
        turn=asked.turn,
        worker=worker,
    )


def _retry_after(parsed: ParsedResponse | None) -> float | None:
    """Seconds of a Retry-After header; its date form is taken relative to the answer's own Date."""
    value = None if parsed is None else parsed.headers.get("retry-after")
    if parsed is None or value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    from email.utils import parsedate_to_datetime

    try:
        wait = parsedate_to_datetime(value) - parsedate_to_datetime(parsed.headers["date"])
    except (KeyError, ValueError, TypeError):
        return None
    return max(0.0, wait.total_seconds())
