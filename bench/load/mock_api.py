"""The mock's side of the OpenAI API: what a request asks for, which fault it meets, and what GET requests are told."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.load.mock_config import Fault, MockConfig
from bench.load.mock_response import Ask, json_response

_REQUEST_ID = re.compile(rb"\r\nx-request-id:[ \t]*([^\r]+)\r\n", re.I)


def read_ask(head: bytes, body: dict[str, Any], chat: bool, serial: Iterator[int], model: str) -> Ask:
    """The request as far as the mock cares. KeyError, TypeError or ValueError: not one of the OpenAI API."""
    options = body.get("stream_options") or {}
    if chat:
        osl = body.get("max_completion_tokens") or body.get("max_tokens") or 16
        isl = sum(len(str(m["content"]).split()) + 3 for m in body["messages"])
    else:
        osl, prompt = body.get("max_tokens") or 16, body["prompt"]
        isl = len(prompt) if isinstance(prompt, list) else max(1, len(prompt.split()))
    request_id = _number_of(_REQUEST_ID.search(head), serial)
    return Ask(
        request_id,
        chat,
        bool(body.get("stream")),
        int(osl),
        isl,
        bool(options.get("include_usage")),
        bool(options.get("continuous_usage_stats")),
        str(body.get("model", model)),
    )


def fault_of(ask: Ask, config: MockConfig) -> Fault | None:
    """Drawn from the request's own stream, so that the same requests fail whatever their order."""
    rng = None
    for k, fault in enumerate(config.faults):
        if fault.kind in ("refuse", "no_accept"):
            continue
        if fault.every is not None:
            if ask.request_id % fault.every == fault.every - 1:
                return fault
            continue
        if fault.ratio >= 1:
            return fault
        rng = np.random.default_rng((config.seed, ask.request_id, k))
        if rng.random() < fault.ratio:
            return fault
    return None


def answer_get(path: str, model: str, figures: dict[str, float]) -> bytes:
    """Models, version, health and metrics (``figures``: name without ``vllm:`` -> value)."""
    if path.endswith("/models"):
        entry = {"id": model, "object": "model", "owned_by": "mock", "max_model_len": 1 << 20}
        return json_response("200 OK", {"object": "list", "data": [entry]})
    if path == "/version":
        return json_response("200 OK", {"version": "mock"})
    if path == "/metrics":
        text = metrics_text(model, figures).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {len(text)}\r\n\r\n"
        return head.encode() + text
    if path == "/health":
        return b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    return json_response("404 Not Found", {"error": {"message": f"no {path}"}})


def metrics_text(model: str, figures: dict[str, float]) -> str:
    """As vLLM's /metrics says it."""
    label = f'{{engine="0",model_name="{model}"}}'
    return "".join(f"vllm:{name}{label} {value}\n" for name, value in figures.items())


def _number_of(match: re.Match[bytes] | None, serial: Iterator[int]) -> int:
    """The request's number in the log: its X-Request-Id when that is a number, a hash of it when not (other clients'
    ids), its place in the order of arrival when there is none. The first token's text is ``#number``."""
    if match is None:
        return next(serial)
    return int(match[1]) if match[1].isdigit() else hashed_id(match[1].strip())


def hashed_id(request_id: bytes) -> int:
    """A number below 2**62 for a request id that is none."""
    return int.from_bytes(hashlib.blake2b(request_id, digest_size=8).digest(), "little") >> 2
