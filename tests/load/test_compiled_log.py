"""What compiled code does without Python: it logs answers that end as they should, and sends a closed loop's next requests."""

from __future__ import annotations

import select
import socket
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.load import spill
from bench.load.compiled_memory import LOG_BYTES, Memory, load_kernels
from bench.load.control import Control
from bench.load.mock import Delay, Fault
from bench.load.schedule import closed_loop
from bench.load.share import Share
from bench.load.spill import SpillWriter, read_spill
from bench.load.wire import SSE_END
from bench.records import StopRule
from tests.load.conftest import make_requests, run

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the compiled path needs Linux")

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
COMMON, RESTS = b"POST / HTTP/1.1\r\n", (b"zero", b"the first", b"2nd")


class Bench:
    """Two connections of compiled code to sockets of ours; connection 0 waits for the answer to item 0."""

    def __init__(self, kernels: Any) -> None:
        self.k, self.memory, self.poll = kernels, Memory(kernels, 2), select.epoll()
        self.pairs = [socket.socketpair() for _ in range(2)]
        for slot, (ours, _) in enumerate(self.pairs):
            ours.setblocking(False)
            self.memory.know_descriptor(ours.fileno(), slot)
            row = self.memory.table[slot]
            row[kernels.FD], row[kernels.MODE], row[kernels.ITEM], row[kernels.STORE] = (
                ours.fileno(),
                kernels.IDLE,
                -1,
                3,
            )
            self.poll.register(ours, select.EPOLLIN | select.EPOLLET)
        zeros = np.zeros(3, dtype=np.int64)
        at = np.cumsum([0, *map(len, RESTS)])
        share = Share(np.array([7, 8, 9]), zeros, zeros, zeros, zeros == 0, zeros != 0, at)
        self.words = np.zeros(16, dtype=np.int64)
        self.memory.give_requests(share, COMMON, memoryview(b"".join(RESTS)), self.words)
        self.memory.give_queue(np.arange(3))
        self.state = self.memory.scratch
        self.state[kernels.END], self.state[kernels.TURNS], self.state[kernels.IN_FLIGHT] = 3, 1, 1
        self.memory.known[: len(HEAD)] = np.frombuffer(HEAD, dtype=np.uint8)
        self.state[kernels.KNOWN_BYTES] = len(HEAD)

    def send(self, *slots: int) -> list[list[int]]:
        self.memory.to_send[: len(slots)] = slots
        found = self.k.send_many(self.memory.table, self.memory.to_send, len(slots), *self.memory.send_arguments)
        return self.memory.out[:found].tolist()  # type: ignore[no-any-return]

    def answer(self, slot: int, *reads: bytes) -> list[list[int]]:
        """What Python is told of an answer that comes in these reads."""
        told = []
        for data in reads:
            self.pairs[slot][1].sendall(data)
            found = self.k.receive(self.poll.fileno(), 0, *self.memory.arguments)
            told += self.memory.out[:found].tolist()
        return told

    def close(self) -> None:
        self.poll.close()
        for pair in self.pairs:
            for end in pair:
                end.close()


@pytest.fixture(scope="module")
def kernels() -> Any:
    return load_kernels()[0]


@pytest.fixture
def served(kernels: Any) -> Iterator[Bench]:
    it = Bench(kernels)
    yield it
    it.close()


def test_its_constants_are_those_of_the_rest(kernels: Any) -> None:
    assert kernels._NUM_DONE == Control.NUM_DONE and kernels._FINAL == spill.FINAL
    assert spill._HEAD.size == kernels.ENTRY_BYTES


def test_the_log_is_what_python_would_write(served: Bench, tmp_path: Path) -> None:
    k, m = served.k, served.memory
    assert served.send(0) == []
    assert served.pairs[0][1].recv(100) == COMMON + RESTS[0]
    row = m.table[0]
    row[k.DUE_NS], row[k.CONNECT_NS] = 11, 22
    sent = int(row[k.SENT_NS])
    assert served.answer(0, HEAD, b"5\r\nhello\r\n", SSE_END) == []
    assert served.pairs[0][1].recv(100) == COMMON + RESTS[1]  # the next one, without Python
    assert (row[k.MODE], row[k.ITEM], row[k.USED], row[k.DUE_NS]) == (k.HEAD, 1, 0, 0) and row[k.SENT_NS] >= sent
    used = int(served.state[k.LOG_USED])
    written = SpillWriter(tmp_path / "log")
    written.take(m.log_bytes[:used])
    written.close()
    (ours,) = read_spill(tmp_path / "log")
    stamps, ends = m.stamps[0, :6].tobytes(), array("I", m.ends[0, :3].tolist())
    python = SpillWriter(tmp_path / "python")
    python.final(7, 11, sent, 22, ours.end_ns, None, "", 1, stamps, ends, HEAD + b"5\r\nhello\r\n" + SSE_END)
    python.close()
    assert (tmp_path / "log").read_bytes() == (tmp_path / "python").read_bytes()
    assert ours.position == 7 and ours.kernel_stamps and ours.end_ns > sent
    assert served.words[Control.NUM_DONE] == 1
    assert served.state[k.NUM_LOGGED] == 1 and served.state[k.READS_LOGGED] == 3
    assert m.lags[0] == ours.end_ns - 1_000_000_000 * m.stamps[0, 4] - m.stamps[0, 5]


def test_python_hears_when_all_is_over(served: Bench) -> None:
    k = served.k
    served.state[k.NEXT], served.state[k.IN_FLIGHT] = 1, 2
    assert served.send(0, 1) == [] and served.state[k.NEXT] == 3
    whole = HEAD + SSE_END
    assert served.answer(0, whole) == []  # it rests
    assert served.state[k.NUM_RESTED] == 1 and served.memory.rested[:2].tolist() == [0, 1]
    assert served.memory.table[0, k.MODE] == k.IDLE and served.memory.table[0, k.ITEM] == -1
    assert [row[1] for row in served.answer(1, whole)] == [k.ALL_OVER]
    assert served.answer(0, b"x") == [[0, k.UNASKED, 2]]


def test_where_loops_are_not_plain_python_sends(served: Bench) -> None:
    k = served.k
    served.send(0)
    served.state[k.TURNS] = 0
    assert served.answer(0, HEAD + SSE_END) == [[0, k.OVER, 0]]
    assert served.state[k.NEXT] == 1 and served.state[k.NUM_RESTED] == 0 and served.state[k.LOG_USED] > 0


def test_what_is_left_to_python(served: Bench) -> None:
    k, whole = served.k, HEAD + SSE_END
    served.send(0)
    served.memory.table[0, k.STORE] = 0  # sent a second time, or a head that is not plain
    assert served.answer(0, whole)[0][:2] == [0, k.COMPLETE]
    served.state[k.NEXT] = 0
    served.send(1)
    served.state[k.LOG_USED] = LOG_BYTES - 100  # no room
    assert served.answer(1, whole)[0][:2] == [1, k.COMPLETE]
    assert served.words[Control.NUM_DONE] == 0


def test_a_full_log_is_written(served: Bench, tmp_path: Path) -> None:
    k, state = served.k, served.state
    path = tmp_path / "log"
    file = path.open("wb", buffering=0)
    state[k.LOG_FD], state[k.LOG_USED] = file.fileno(), LOG_BYTES - 100
    served.send(0)
    assert served.answer(0, HEAD + SSE_END) == []
    assert path.stat().st_size == LOG_BYTES - 100 and 0 < state[k.LOG_USED] < 500
    file.close()
    with open("/dev/full", "wb", buffering=0) as full:
        state[k.LOG_FD], state[k.LOG_USED] = full.fileno(), LOG_BYTES - 100
        ((slot, reason, _),) = served.answer(0, HEAD + SSE_END)
    assert (slot, reason) == (0, k.COMPLETE) and state[k.LOG_FD] == -1 and state[k.LOG_USED] == LOG_BYTES - 100


def test_requests_that_do_not_go_out_whole(served: Bench) -> None:
    k = served.k
    ours = served.pairs[0][0]
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    while True:
        try:
            ours.send(b"x" * 4096)
        except BlockingIOError:
            break
    ((slot, reason, num),) = served.send(0)
    assert (slot, reason) == (0, k.SHORT) and num == -11  # EAGAIN
    served.pairs[1][1].close()
    ((slot, reason, num),) = served.send(1)
    assert (slot, reason) == (1, k.SHORT) and num == -32  # EPIPE, and no signal


@pytest.mark.parametrize("path", ["compiled", "event_loop"])
def test_a_closed_loop_of_large_requests(path: str, serve_mock: Callable[..., Any]) -> None:
    """More than a socket's buffer takes at once, so that the rest of each request is Python's."""
    with serve_mock() as url:
        result = run(url, closed_loop(make_requests(12, 8, isl=600_000), 3), options={"receive_path": path})
    result.close()
    assert [(r.error, r.osl) for r in result.records] == [(None, 8)] * 12
    assert result.honesty.receive_path == path.replace("_", " ")


@pytest.mark.parametrize("every", [2, 3, 7])
def test_faults_between_logged_answers(every: int, serve_mock: Callable[..., Any]) -> None:
    """Connections that are lost, and answers that Python has to read, among those that compiled code logs."""
    faults = (
        Fault("reset_mid", every=every),
        Fault("http_500", every=every + 3),
        Fault("until_close", every=every + 4),
    )
    seen = {}
    with serve_mock(faults=faults) as url:
        for path in ("compiled", "event_loop"):
            result = run(url, closed_loop(make_requests(120, 8), 6), options={"receive_path": path})
            result.close()
            seen[path] = sorted((r.index, r.error, r.osl, r.http_status) for r in result.records)
    assert seen["compiled"] == seen["event_loop"] and len(seen["compiled"]) == 120


def test_a_closed_loop_stops_in_the_middle(serve_mock: Callable[..., Any]) -> None:
    """The end by a rule finds connections whose requests Python has not heard of."""
    rule = StopRule(max_duration_s=0.6)
    with serve_mock(itl=Delay(0.01)) as url:
        result = run(url, closed_loop(make_requests(5000), 16, stop=rule), options={"receive_path": "compiled"})
    result.close()
    aborted = [r for r in result.records if r.error == "aborted"]
    assert 0 < len(aborted) <= 16 and {r.error for r in result.records} == {None, "aborted"}
    assert len({r.index for r in result.records}) == len(result.records) < 500
