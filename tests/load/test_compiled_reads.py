"""The compiled path against the event loop's: the same records, the same classes for every fault, stamps as exact."""

from __future__ import annotations

import select
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.load.compiled_memory import Memory, load_kernels
from bench.load.mock import Delay, Fault, read_truth
from bench.load.mock_config import FAULT_KINDS
from bench.load.schedule import closed_loop, open_loop
from bench.load.self_test import errors_against_truth
from bench.load.wire import Walk, walk_chunks
from tests.load.conftest import make_requests, run
from tests.load.test_faults import EXPECTED
from tests.load.test_wire import chunked, payloads

PATHS = ("compiled", "event_loop")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the compiled path needs Linux")


@pytest.fixture(scope="module")
def kernels() -> Any:
    return load_kernels()[0]


@settings(max_examples=400, deadline=None)
@given(payloads, st.binary(max_size=12), st.integers(0, 200), st.sampled_from(["keep", "replace", "insert"]), st.data())
def test_walk_is_that_of_the_event_loop(
    kernels: Any, parts: list[bytes], junk: bytes, where: int, how: str, data: Any
) -> None:
    body = chunked(parts)
    where %= len(body)
    if how != "keep":
        body = body[:where] + junk + body[where + (len(junk) if how == "replace" else 0) :]
    body = body[: data.draw(st.integers(0, len(body)))]
    at, state = walk_chunks(body, 0)
    found = kernels.walk(np.frombuffer(body or b"\0", dtype=np.uint8), 0, len(body))
    assert (found[0], Walk(found[1])) == (at, state)


def test_every_fault_is_the_same_record_on_both_paths(serve_mock: Callable[..., Any]) -> None:
    """Request k meets fault k: of the faults that come every 1, 2, 3, ... requests the rarest wins."""
    kinds = [k for k in FAULT_KINDS if k not in ("refuse", "no_accept")]
    faults = tuple(Fault(k, every=n, retry_after_s=0.1) for n, k in reversed(list(enumerate(kinds, 1))))
    seen = {}
    with serve_mock(faults=faults) as url:
        for path in PATHS:
            result = run(url, closed_loop(make_requests(len(kinds)), 8), options={"receive_path": path})
            result.close()
            assert result.honesty.receive_path == path.replace("_", " ")
            records = sorted(result.records, key=lambda r: r.index)
            seen[path] = [
                (r.index, r.error, r.osl, r.http_status, r.token_source, r.finish_reason, r.retry_after_s)
                for r in records
            ]
            details = [r.error_detail or "" for r in records]
            assert all(EXPECTED[kinds[r.index]][1] in d for r, d in zip(records, details, strict=True))
    assert seen["compiled"] == seen["event_loop"]
    assert [row[1] for row in seen["compiled"]] == [EXPECTED[k][0] for k in kinds]


@pytest.mark.parametrize("path", PATHS)
def test_stamps_are_those_of_the_kernel(path: str, serve_mock: Callable[..., Any], tmp_path: Path) -> None:
    log = tmp_path / "truth"
    with serve_mock(log_path=str(log), itl=Delay(0.01)) as url:
        result = run(url, closed_loop(make_requests(40, 20), 20), options={"receive_path": path})
    ttft, itl, _ = errors_against_truth(result, read_truth(log))
    tokens = sum(int(b["tokens"].sum()) for b in result.chunk_blocks())
    result.close()
    assert [(r.error, r.osl) for r in result.records] == [(None, 20)] * 40 and tokens == 800
    assert result.honesty.stamps == "kernel"
    assert (result.honesty.compiled_ratio == 1.0) == (path == "compiled")
    # The sending side's clock is read before the system call: the median leaves out what was preempted between.
    assert np.median(np.abs(ttft)) < 0.002 and np.median(np.abs(itl)) < 0.001


@pytest.mark.parametrize("processes", [1, 2])
def test_open_loop_with_a_cap_and_retry_after(processes: int, serve_mock: Callable[..., Any]) -> None:
    """Timers, the shared semaphore, held slots and unusual answers while compiled code is the loop."""
    options = {"receive_path": "compiled", "num_processes": processes}
    with serve_mock(faults=(Fault("http_429", every=4, retry_after_s=0.05), Fault("until_close", every=3))) as url:
        capped = run(url, open_loop(make_requests(60), 300.0, max_in_flight=4, arrivals="constant"), options=options)
        closed = run(url, closed_loop(make_requests(60), 6), options=options)
    for result in (capped, closed):
        result.close()
        assert {r.index: r.error for r in result.records} == {i: "http_429" if i % 4 == 3 else None for i in range(60)}


def test_unix_sockets_are_stamped_in_user_space(serve_mock: Callable[..., Any], tmp_path: Path) -> None:
    with serve_mock(uds=str(tmp_path / "s")) as url:
        result = run(url, options={"receive_path": "compiled"})
    result.close()
    assert result.honesty.stamps == "user" and result.honesty.compiled_ratio == 1.0
    for r in result.records:
        assert r.error is None and 0.005 < r.first_token_s - r.sent_s < 2  # type: ignore[operator]


def test_other_systems_keep_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(RuntimeError, match="Linux"):
        load_kernels()


def test_bursts_larger_than_the_buffers(serve_mock: Callable[..., Any]) -> None:
    """A server as fast as it can be: full reads, edges that come only once, parts written out, ends in any position."""
    with serve_mock(ttft=Delay(0.0), itl=Delay(0.0)) as url:
        result = run(url, closed_loop(make_requests(36, 1500), 12), options={"receive_path": "compiled"})
    tokens = sum(int(b["tokens"].sum()) for b in result.chunk_blocks())
    result.close()
    assert {(r.error, r.osl) for r in result.records} == {(None, 1500)}
    assert tokens == 36 * 1500 and result.honesty.compiled_ratio == 1.0


HEAD = b"HTTP/1.1 200 OK\r\ndate: %b\r\nserver: x\r\ntransfer-encoding: chunked\r\n\r\n"
DATES = (b"Mon, 01 Jan 2024 00:00:00 GMT", b"Tue, 02 Jan 2024 23:59:59 GMT")


class OneConnection:
    """A connection that waits for an answer, and a known head; ``read`` is what compiled code says of bytes that come."""

    def __init__(self, kernels: Any) -> None:
        self.kernels, self.memory, self.poll = kernels, Memory(kernels, 1), select.epoll()
        self.ours, self.server = socket.socketpair()
        self.ours.setblocking(False)
        fd = self.ours.fileno()
        self.memory.know_descriptor(fd, 0)
        self.row = self.memory.table[0]
        self.row[kernels.FD], self.row[kernels.MODE] = fd, kernels.HEAD
        self.poll.register(fd, select.EPOLLIN | select.EPOLLET)
        known = HEAD % DATES[0]
        self.memory.known[: len(known)] = np.frombuffer(known, dtype=np.uint8)
        at = known.index(DATES[0])
        self.memory.varies[at : at + len(DATES[0])] = 1
        self.memory.scratch[kernels.KNOWN_BYTES] = len(known)

    def read(self, data: bytes) -> int | None:
        """The reason for which Python is needed, None for none."""
        self.server.sendall(data)
        found = self.kernels.receive(self.poll.fileno(), 0, *self.memory.arguments)
        return int(self.memory.out[0, 1]) if found else None

    def __enter__(self) -> OneConnection:
        return self

    def __exit__(self, *_: object) -> None:
        for thing in (self.poll, self.ours, self.server):
            thing.close()


def test_a_known_head_needs_no_python(kernels: Any) -> None:
    for rest in (b"", b"5\r\nhello\r\n"):
        with OneConnection(kernels) as c:
            assert c.read(HEAD % DATES[1] + rest) is None
            assert c.row[kernels.MODE] == kernels.BODY
            assert c.row[kernels.BODY_AT] == c.row[kernels.WALK_AT] == len(HEAD % DATES[1])
    with OneConnection(kernels) as c:
        assert c.read(HEAD % DATES[1] + b"5\r\nhello\r\n0\r\n\r\n") == kernels.LOOK


@pytest.mark.parametrize(
    "head",
    [
        (HEAD % DATES[1]).replace(b"server: x", b"server: y"),
        (HEAD % DATES[1]).replace(b"200 OK", b"201 OK"),
        (HEAD % DATES[1]).replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"),
        HEAD % b"Mon, 01 Jan 2024 00:00:00\r\nAB",  # as long as a date, and a header of its own
        HEAD % DATES[1][:-1],
        (HEAD % DATES[1])[:-3],
    ],
)
def test_another_head_is_python_s(kernels: Any, head: bytes) -> None:
    with OneConnection(kernels) as c:
        assert c.read(head) == kernels.AT_HEAD
        assert c.row[kernels.MODE] == kernels.HEAD


def test_heads_that_change_between_answers(serve_mock: Callable[..., Any]) -> None:
    """Answers whose head is known by sight and others take turns on one connection; records cannot tell which was which."""
    faults = (Fault("http_500", every=3), Fault("until_close", every=5))
    with serve_mock(faults=faults) as url:
        seen = {}
        for path in PATHS:
            result = run(url, closed_loop(make_requests(60), 4), options={"receive_path": path})
            result.close()
            seen[path] = sorted((r.index, r.error, r.osl, r.http_status) for r in result.records)
    assert seen["compiled"] == seen["event_loop"]


def test_where_no_folder_can_be_written_the_path_is_compiled_each_time(kernels: Any) -> None:
    """numba refuses to cache a function that has no file beside which, or in whose name, it could: as on a read-only disk."""
    names: dict[str, Any] = {}
    exec("def double(x):\n    return 2 * x\n", names)
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(names["double"])
    assert kernels._compiled(names["double"])(21) == 42
