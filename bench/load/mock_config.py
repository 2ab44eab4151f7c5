"""What the mock server is asked to do: timing, capacity and faults, as plain values that go through JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from bench.errors import BadInput

FaultKind = Literal[
    "refuse",  # accepted, then reset before a byte is read
    "no_accept",  # the listen queue is full: connecting never ends (whole server)
    "http_400",
    "http_401",
    "http_404",
    "http_429",  # with Retry-After
    "http_500",
    "http_503",
    "redirect",  # 307: not followed, a wrong URL must not be hidden
    "reset_first",  # reset after the request, before a byte of the response
    "reset_mid",  # reset after `at_chunk` chunks
    "close_mid",  # orderly close after `at_chunk` chunks, without the end of the body
    "stall_first",  # the head, then nothing
    "stall_mid",  # nothing more after `at_chunk` chunks
    "malformed_http",  # no HTTP at all
    "malformed_chunk",  # a chunk size that is no number
    "malformed_sse",  # an event that is not JSON
    "truncated",  # the body ends properly but without finish_reason and [DONE]
    "no_done",  # all tokens and the usage, but no [DONE]
    "wrong_usage",  # usage counts fewer tokens than were streamed
    "wrong_osl",  # fewer tokens than asked for
    "no_usage",  # no usage at all (not an error: tokens are counted from the chunks)
    "server_error",  # an error object inside the stream
    "garbage_after",  # bytes after the end of the response
    # not faults but HTTP that a fast path may trip over; the answers are right
    "dribble",  # every write in pieces of 1 to 7 bytes
    "trailers",
    "chunk_extension",
    "until_close",  # no length: the body ends with the connection
    "content_length",  # the stream with a Content-Length in place of chunks
    "early_hints",  # an interim 103 response first
    "upper_case",  # header names and chunk sizes in upper case
    "crlf_events",  # SSE lines end with CRLF
    "split_events",  # one event over two chunks
]
FAULT_KINDS: tuple[str, ...] = get_args(FaultKind)


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault and which requests it hits: a share ``ratio`` at random (seeded), or every ``every``-th request."""

    kind: FaultKind
    ratio: float = 1.0
    every: int | None = None
    at_chunk: int = 3
    retry_after_s: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Fault:
        """``KIND[:ratio=0.1][:every=5][:at_chunk=3][:retry_after_s=2]``."""
        kind, *options = text.split(":")
        if kind not in FAULT_KINDS:
            raise BadInput(f'unknown fault "{kind}"', next_step=f"write one of {', '.join(FAULT_KINDS)}")
        values: dict[str, Any] = {}
        for option in options:
            name, _, value = option.partition("=")
            if name not in ("ratio", "every", "at_chunk", "retry_after_s"):
                raise BadInput(f'unknown option "{option}" of fault "{kind}"', next_step="see bench mock --help")
            try:
                values[name] = int(value) if name in ("every", "at_chunk") else float(value)
            except ValueError:
                raise BadInput(f'"{option}" of fault "{kind}": expected a number') from None
        return cls(kind, **values)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Delay:
    """A time in seconds: fixed, or drawn from an exponential, normal or lognormal distribution of that mean."""

    mean_s: float
    kind: Literal["fixed", "exponential", "normal", "lognormal"] = "fixed"
    sd_s: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Delay:
        """Milliseconds: ``20``, ``exponential(20)``, ``normal(20,3)``, ``lognormal(20,10)``."""
        name, _, rest = text.replace(" ", "").partition("(")
        try:
            if not rest:
                return cls(_checked_ms(name))
            numbers = [_checked_ms(n) for n in rest.rstrip(")").split(",")]
            if name == "exponential" and len(numbers) == 1:
                return cls(numbers[0], "exponential")
            if name in ("normal", "lognormal") and len(numbers) == 2:
                return cls(numbers[0], name, numbers[1])  # type: ignore[arg-type]
        except ValueError:
            pass
        raise BadInput(
            f'cannot read the time "{text}"',
            next_step="write milliseconds: 20, exponential(20), normal(20,3) or lognormal(20,10)",
        )

    def sample_ns(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """``n`` whole nanoseconds >= 0."""
        if self.kind == "fixed" or self.mean_s == 0:
            return np.full(n, round(self.mean_s * 1e9), dtype=np.int64)
        if self.kind == "exponential":
            values = rng.exponential(self.mean_s, n)
        elif self.kind == "normal":
            values = rng.normal(self.mean_s, self.sd_s, n)
        else:
            s2 = math.log1p((self.sd_s / self.mean_s) ** 2)
            values = rng.lognormal(math.log(self.mean_s) - s2 / 2, math.sqrt(s2), n)
        return np.maximum(np.rint(values * 1e9), 0).astype(np.int64)


def _checked_ms(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise ValueError(text)
    return value / 1e3


@dataclass(frozen=True, slots=True)
class MockConfig:
    """A mock server. Times are exact to the machine's scheduling; the ground-truth log has what really happened.

    Args:
        port: 0 takes a free one. uds: a Unix socket's path in place of host and port.
        ttft, itl: from the request's arrival (or its start, when it had to queue) to the first token, and between chunks.
        itl_per_running_s: added to every inter-token time for each request that is running: a server that slows
            down with its load, whose highest good concurrency is known.
        max_running: requests beyond wait in a queue (first come, first served).
        in_step: all streams write at the same instants, as one engine step does.
        tokens_per_chunk: tokens in every event.
        head_early: the response's head goes out when the request starts, as vLLM does, else with the first token.
        log_path: where the ground truth goes (one file per process: ``.0``, ``.1``, ... are appended).
    """

    host: str = "127.0.0.1"
    port: int = 0
    uds: str | None = None
    ttft: Delay = field(default_factory=lambda: Delay(0.05))
    itl: Delay = field(default_factory=lambda: Delay(0.02))
    itl_per_running_s: float = 0.0
    max_running: int | None = None
    in_step: bool = False
    tokens_per_chunk: int = 1
    head_early: bool = True
    model: str = "mock"
    vocab_size: int = 4096
    seed: int = 0
    faults: tuple[Fault, ...] = ()
    log_path: str | None = None
    processes: int = 1
    tls_cert: str | None = None
    tls_key: str | None = None
    api_key_env: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> MockConfig:
        data = json.loads(text)
        data["ttft"], data["itl"] = Delay(**data["ttft"]), Delay(**data["itl"])
        data["faults"] = tuple(Fault(**f) for f in data["faults"])
        return cls(**data)
