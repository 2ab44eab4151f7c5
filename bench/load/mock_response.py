"""The mock's answers, encoded before they are due: a list of writes, and what happens after the last one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from bench.load.mock_config import Fault

AfterLast = Literal["keep", "close", "reset", "stall"]
JSON_HEAD = "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n{extra}\r\n"
SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
_STATUS = {
    "http_400": "400 Bad Request",
    "http_401": "401 Unauthorized",
    "http_404": "404 Not Found",
    "http_429": "429 Too Many Requests",
    "http_500": "500 Internal Server Error",
    "http_503": "503 Service Unavailable",
    "redirect": "307 Temporary Redirect",
}


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request wants, as far as the mock cares."""

    request_id: int
    chat: bool
    stream: bool
    osl: int
    isl: int
    include_usage: bool
    continuous_usage: bool
    model: str


@dataclass(slots=True)
class Plan:
    """``writes[0]`` is the head, ``writes[1]`` carries the first token, and so on. ``delayed`` False: everything at once
    (errors)."""

    writes: list[bytes]
    after: AfterLast = "keep"
    delayed: bool = True


def json_response(status: str, body: dict[str, Any], extra: str = "") -> bytes:
    data = json.dumps(body).encode()
    return JSON_HEAD.format(status=status, length=len(data), extra=extra).encode() + data


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def _event(body: str) -> bytes:
    return b"data: " + body.encode() + b"\n\n"


class Encoder:
    """Builds the events of streams."""

    def __init__(self, tokens_per_chunk: int) -> None:
        self.tokens_per_chunk = tokens_per_chunk

    def events(self, ask: Ask, num_tokens: int, usage_tokens: int | None) -> list[bytes]:
        """SSE payloads: one per chunk of tokens; the last has the finish reason, the usage and [DONE] behind it."""
        kind = "chat.completion.chunk" if ask.chat else "text_completion"
        model = json.dumps(ask.model)
        common = f'"id":"cmpl-{ask.request_id}","object":"{kind}","created":1,"model":{model}'
        prefix = f'{{{common},"choices":[{{"index":0,'

        def usage_of(tokens: int) -> str:
            total = ask.isl + tokens
            return f'{{"prompt_tokens":{ask.isl},"completion_tokens":{tokens},"total_tokens":{total}}}'

        def token_event(text: str, so_far: int) -> bytes:
            content = f'"delta":{{"content":"{text}"}}' if ask.chat else f'"text":"{text}"'
            usage = f',"usage":{usage_of(so_far)}' if ask.continuous_usage else ""
            return _event(f'{prefix}{content},"logprobs":null,"finish_reason":null}}]{usage}}}')

        per = self.tokens_per_chunk
        counts = [*range(per, num_tokens, per), num_tokens]
        out = [token_event(f"#{ask.request_id} ", counts[0])]
        if ask.chat:
            role = '"delta":{"role":"assistant","content":""}'
            out[0] = _event(f'{prefix}{role},"logprobs":null,"finish_reason":null}}]}}') + out[0]
        if ask.continuous_usage:
            out += [token_event(" tok", c) for c in counts[1:]]
        else:
            out += [token_event(" tok", 0)] * (len(counts) - 1)
        empty = '"delta":{}' if ask.chat else '"text":""'
        tail = _event(f'{prefix}{empty},"logprobs":null,"finish_reason":"length"}}]}}')
        if ask.include_usage and usage_tokens is not None:
            tail += _event(f'{{{common},"choices":[],"usage":{usage_of(usage_tokens)}}}')
        out[-1] += tail + b"data: [DONE]\n\n"
        return out


def stream_plan(ask: Ask, fault: Fault | None, encoder: Encoder) -> Plan:
    """The writes of a streamed answer, changed by ``fault``."""
    kind = None if fault is None else fault.kind
    osl = max(1, ask.osl - 2) if kind == "wrong_osl" and ask.osl > 1 else ask.osl
    usage: int | None = osl
    if kind == "wrong_usage":
        usage = max(0, osl - 3)
    elif kind == "no_usage":
        usage = None
    payloads = encoder.events(ask, osl, usage)
    head, end = SSE_HEAD, END
    if fault is None or kind in ("wrong_osl", "wrong_usage", "no_usage"):
        writes = [head, *map(chunk, payloads)]
        writes[-1] += end
        return Plan(writes)
    cut = min(fault.at_chunk, len(payloads) - 1)
    if kind in ("truncated", "no_done"):
        mark = b"data: [DONE]" if kind == "no_done" else b'"finish_reason":"length"'
        last = payloads[-1]
        if kind == "no_done":
            payloads[-1] = last[: last.index(mark)]
        else:
            before = last[: last.index(mark)]
            payloads[-1] = before[: before.rindex(b"data: ")] or b": cut\n\n"
        writes = [head, *map(chunk, payloads)]
        writes[-1] += end
        return Plan(writes)
    if kind in ("reset_mid", "close_mid", "stall_mid"):
        after: dict[str, AfterLast] = {"reset_mid": "reset", "close_mid": "close", "stall_mid": "stall"}
        return Plan([head, *map(chunk, payloads[:cut])], after[kind])
    return _rewritten(kind, payloads, cut)


def _rewritten(kind: str | None, payloads: list[bytes], cut: int) -> Plan:
    """Plans whose head or framing differs."""
    head, end = SSE_HEAD, END
    if kind == "stall_first":
        return Plan([head], "stall")
    if kind == "reset_first":
        return Plan([], "reset")
    if kind == "malformed_http":
        return Plan([b"220 mail.example ESMTP ready\r\n"], "keep", delayed=False)
    if kind == "malformed_sse":
        payloads[cut] = b'data: {"choices": [{"text": oops}]}\n\n' + (
            payloads[cut] if cut == len(payloads) - 1 else b""
        )
    elif kind == "server_error":
        payloads = payloads[:cut]
        payloads.append(
            b'data: {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}}\n\n'
            b"data: [DONE]\n\n"
        )
    elif kind == "crlf_events":
        payloads = [p.replace(b"\n", b"\r\n") for p in payloads]
    writes = [head, *map(chunk, payloads)]
    if kind == "malformed_chunk":
        writes[1 + cut] = b"zz\r\n" + payloads[cut] + b"\r\n"
    elif kind == "chunk_extension":
        writes[1:] = [b"%x;name=value\r\n%b\r\n" % (len(p), p) for p in payloads]
    elif kind == "upper_case":
        head = b"HTTP/1.1 200 OK\r\nCONTENT-TYPE: text/event-stream\r\nTRANSFER-ENCODING: Chunked\r\n\r\n"
        writes = [head, *(b"%X\r\n%b\r\n" % (len(p), p) for p in payloads)]
    elif kind == "split_events":
        writes[1:] = [chunk(p[: len(p) // 2]) + chunk(p[len(p) // 2 :]) for p in payloads]
    elif kind == "early_hints":
        writes[0] = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n" + head
    elif kind == "until_close":
        return Plan(
            [b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n", *payloads], "close"
        )
    elif kind == "content_length":
        total = sum(map(len, payloads))
        return Plan(
            [b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % total, *payloads]
        )
    if kind == "trailers":
        end = b"0\r\nX-Checksum: 12\r\nX-Other: a\r\n\r\n"
    elif kind == "garbage_after":
        end = END + b"garbage"
    writes[-1] += end
    if kind == "dribble":
        writes[1:] = [piece for w in writes[1:] for piece in _pieces(w)]
    return Plan(writes)


def _pieces(data: bytes) -> list[bytes]:
    out, i, size = [], 0, 1
    while i < len(data):
        out.append(data[i : i + size])
        i, size = i + size, size % 7 + 1
    return out


def error_plan(fault: Fault) -> Plan:
    """An answer with an error status."""
    status = _STATUS[fault.kind]
    code = int(status[:3])
    extra = f"Retry-After: {fault.retry_after_s:g}\r\n" if fault.kind == "http_429" else ""
    if fault.kind == "redirect":
        extra = "Location: https://elsewhere.example/v1/completions\r\n"
    body = {"error": {"message": f"mock fault {fault.kind}", "type": "mock", "code": code}}
    return Plan([json_response(status, body, extra)], delayed=False)


def whole_plan(ask: Ask) -> Plan:
    """The answer to a request without ``stream``."""
    text = f"#{ask.request_id} " + " tok" * (ask.osl - 1)
    choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
    if ask.chat:
        choice["message"] = {"role": "assistant", "content": text}
    else:
        choice["text"] = text
    body = {
        "id": f"cmpl-{ask.request_id}",
        "object": "chat.completion" if ask.chat else "text_completion",
        "created": 1,
        "model": ask.model,
        "choices": [choice],
        "usage": {"prompt_tokens": ask.isl, "completion_tokens": ask.osl, "total_tokens": ask.isl + ask.osl},
    }
    return Plan([b"", json_response("200 OK", body)])
