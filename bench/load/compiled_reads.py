"""The compiled hot path: plain connections whose answers are read, stamped and appended without entering Python.

While requests are served, :class:`CompiledReads` is the loop: it waits on its own epoll set, in which the event loop's own
set is one more descriptor, and gives the event loop a turn when that has something to do (connections that open, TLS,
answers that the fast path does not understand). An answer that is anything but ``200 chunked`` text leaves for the event
loop's path with the bytes that have come so far, and its connection comes back when the answer is over.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import re
import select
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.load.compiled_memory import KNOWN_BYTES, MOST_BYTES, SLOT_BYTES, SLOT_READS, TOUCHED_BYTES, Memory
from bench.load.share import Limits
from bench.load.wire import HEAD_LIMIT_BYTES, SSE_END, Framing, Head, read_head

if TYPE_CHECKING:
    import asyncio

    from bench.load.client import Client
    from bench.load.connection import Connection

#: What may differ from head to head of one server.
_DATE = re.compile(rb"\r\ndate:([^\r\n]*)\r\n", re.IGNORECASE)
#: Events that Python handles (some 30 us each) before compiled code reads again, so that a crowd of heads and ends does
#: not let the chunks of other answers merge.
_PER_TURN = 4
#: Connections that this path takes; further ones stay with the event loop.
MOST_CONNECTIONS = 4096


class CompiledReads:
    """Connections of one client on the compiled path, and the loop that serves them while requests run."""

    def __init__(self, client: Client, kernels: Any, num_connections: int) -> None:
        self.client, self.kernels = client, kernels
        self.memory = Memory(kernels, min(MOST_CONNECTIONS, max(64, num_connections)))
        self.table = self.memory.table
        num = len(self.table)
        self.conns: list[Connection | None] = [None] * num
        self.free = list(range(num - 1, -1, -1))
        self.poll = select.epoll()
        self.active = self.turn_due = False
        self.pending: deque[tuple[Connection | None, int, int, int]] = deque()
        self.soon: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self.held: list[tuple[int, int, Callable[[], None]]] = []
        self.serial = itertools.count()
        self.callbacks: dict[int, Callable[[], None]] = {}
        self.num_responses = 0
        self.known_head: Head | None = None

    # Connections

    def adopt(self, conn: Connection) -> bool:
        """Take a connection without a response; False when there is no room."""
        if not self.free:
            return False
        slot = self.free.pop()
        fd = conn.sock.fileno()
        self.memory.know_descriptor(fd, slot)
        self.table[slot] = 0
        self.table[slot, self.kernels.FD] = fd
        self.table[slot, self.kernels.MODE] = self.kernels.IDLE
        self.conns[slot], conn.slot = conn, slot
        self.memory.data[slot, :TOUCHED_BYTES:4096] = 0
        self.poll.register(fd, self._mask)
        return True

    _mask = select.EPOLLIN | getattr(select, "EPOLLRDHUP", 0x2000) | select.EPOLLET if hasattr(select, "EPOLLET") else 0

    @property
    def num_taken(self) -> int:
        """Connections that this path serves now."""
        return len(self.conns) - len(self.free)

    def begin(self, slot: int, sent_ns: int) -> None:
        """A request goes out on the slot's connection."""
        k = self.kernels
        row = self.table[slot]
        row[k.USED :] = 0
        row[k.MODE], row[k.SENT_NS], row[k.LAST_NS] = k.HEAD, sent_ns, sent_ns

    def end(self, slot: int) -> None:
        """The response is over; the connection is kept."""
        k = self.kernels
        row = self.table[slot]
        row[k.USED] = row[k.NUM_READS] = 0
        row[k.MODE] = k.IDLE

    def release(self, conn: Connection) -> None:
        """Let go of a connection. What its answer has brought so far moves to the connection's own buffers."""
        self._take_known(conn, conn.slot)
        slot, conn.slot = conn.slot, -1
        self.pull(conn, slot)
        with contextlib.suppress(OSError, ValueError):
            self.poll.unregister(conn.sock)
        self.memory.slots[self.table[slot, self.kernels.FD]] = -1
        self.table[slot, self.kernels.MODE] = self.kernels.FREE
        self.conns[slot] = None
        self.free.append(slot)

    def raw(self, slot: int) -> tuple[memoryview, memoryview, memoryview]:
        """(stamps as bytes, ends, bytes) of what the slot holds: views, good until the next read."""
        used, num = self.table[slot, 1:3].tolist()
        m, at = self.memory, slot * SLOT_READS
        return (
            m.stamp_bytes[16 * at : 16 * (at + num)],
            m.end_words[at : at + num],
            m.data_bytes[slot * SLOT_BYTES : slot * SLOT_BYTES + used],
        )

    def num_reads(self, slot: int) -> int:
        return int(self.table[slot, self.kernels.NUM_READS])

    def pull(self, conn: Connection, slot: int) -> None:
        """Move the slot's content to the connection's own buffers."""
        stamps, ends, data = self.raw(slot)
        if len(data):
            conn.buf += data
            conn.stamps += stamps
            conn.ends.extend(ends)
            if conn.framing == Framing.CHUNKED:
                conn.walk_at, conn.tail = int(self.table[slot, self.kernels.WALK_AT]), b"\r\n\r\n"
        self.table[slot, self.kernels.USED] = self.table[slot, self.kernels.NUM_READS] = 0

    def demote(self, conn: Connection) -> None:
        """This answer goes on on the event loop's path."""
        self.release(conn)
        conn.watch()

    # Events

    def handle(self, conn: Connection, slot: int, reason: int, error: int) -> None:
        """What compiled code leaves to Python, for one connection. More may have come since: what holds is the slot's
        state now."""
        k = self.kernels
        self._take_known(conn, slot)
        why = reason & ~k.MORE
        if why <= k.FULL:
            self._received(conn, slot, why)
        elif why == k.ENDED:
            conn.ended()
        elif why == k.LOST:
            conn.lost("reset", os.strerror(error))
        elif why == k.UNASKED:
            if conn.item < 0:
                self.client.unsolicited(conn)
            else:
                conn.lost("malformed_http", "bytes came before the request was sent")
        else:
            which = {k.TIMEOUT: "total", k.NO_FIRST_BYTE: "first", k.STALL: "stall"}[why]
            conn.over_limit(which, self.client.limits)
        if reason & k.MORE and conn.slot == slot:
            self.poll.modify(conn.sock, self._mask)  # edge-triggered: tell again of what is left

    def _received(self, conn: Connection, slot: int, why: int) -> None:
        """Bytes of the answer: its head, perhaps its end, or more than the buffer should hold."""
        k = self.kernels
        mode = self.table[slot, k.MODE]
        if mode == k.HEAD:
            self._head(conn, slot)
        elif mode == k.BODY:
            if why == k.COMPLETE and self.raw(slot)[2][-len(SSE_END) :] == SSE_END:
                self.num_responses += 1
                conn.finish(None, "")
            else:
                self._look(conn, slot)
        if conn.slot == slot and conn.item >= 0:
            used, num = self.table[slot, 1:3].tolist()
            if used > MOST_BYTES or num == SLOT_READS:
                self._write_part(conn, slot)

    def _head(self, conn: Connection, slot: int) -> None:
        k = self.kernels
        row = self.table[slot]
        data = self.raw(slot)[2]
        head = read_head(bytes(data[:HEAD_LIMIT_BYTES]))
        if head is None:
            return
        if head.framing != Framing.CHUNKED:
            self.pull(conn, slot)
            conn.perhaps_complete()
            if conn.slot == slot and conn.item >= 0:
                self.demote(conn)
            return
        conn.take_head(head)
        self._remember(head, bytes(data[: head.body_at]))
        row[k.MODE], row[k.BODY_AT], row[k.WALK_AT] = k.BODY, head.body_at, head.body_at
        if data[-len(SSE_END) :] == SSE_END:
            self.num_responses += 1
            conn.finish(None, "")
        else:
            self._look(conn, slot)

    def _remember(self, head: Head, raw: bytes) -> None:
        """Know this head by sight from now on: most servers' heads differ in their date alone."""
        m = self.memory
        if head.status != 200 or head.close or head.retry_after_s is not None or len(raw) > KNOWN_BYTES:
            return
        m.known[: len(raw)] = np.frombuffer(raw, dtype=np.uint8)
        m.varies[:] = 0
        date = _DATE.search(raw)
        if date is not None:
            m.varies[date.start(1) : date.end(1)] = 1
        m.scratch[self.kernels.KNOWN_BYTES] = len(raw)
        self.known_head = head

    def _take_known(self, conn: Connection, slot: int) -> None:
        """Compiled code went past a head that it knew: the connection learns of it when Python first needs it."""
        if conn.framing == Framing.HEAD and self.table[slot, self.kernels.MODE] == self.kernels.BODY:
            head, body_at = self.known_head, int(self.table[slot, self.kernels.BODY_AT])
            assert head is not None
            # another head, which says the same, may have become the known one since
            conn.take_head(head if head.body_at == body_at else replace(head, body_at=body_at))

    def _look(self, conn: Connection, slot: int) -> None:
        """Step over whole chunks: is this the end, or something odd?"""
        k = self.kernels
        row = self.table[slot]
        used = int(row[k.USED])
        at, state = k.walk(self.memory.data[slot], int(row[k.WALK_AT]), used)
        row[k.WALK_AT] = at
        if state == k.DONE:
            self.num_responses += 1
            conn.finish_at(used - at)
        elif state == k.ODD:
            self.demote(conn)
            conn.hand_over()

    def _write_part(self, conn: Connection, slot: int) -> None:
        """Spill what has been read up to the last whole chunk that a read ended with."""
        k = self.kernels
        self._look(conn, slot)
        if conn.slot != slot or conn.item < 0:
            return
        row = self.table[slot]
        num, at = int(row[k.NUM_READS]), int(row[k.WALK_AT])
        ends = self.memory.ends[slot]
        keep = int(np.searchsorted(ends[:num], at, side="right"))
        if not keep:
            self.demote(conn)
            return
        cut = int(ends[keep - 1])
        stamps, end_words, data = self.raw(slot)
        self.client.spill.part(self.client.positions[conn.item], stamps[: 16 * keep], end_words[:keep], data[:cut])
        rest, left = num - keep, int(row[k.USED]) - cut
        m = self.memory
        m.data[slot, :left] = m.data[slot, cut : cut + left].copy()
        m.stamps[slot, : 2 * rest] = m.stamps[slot, 2 * keep : 2 * num].copy()
        ends[:rest] = ends[keep:num] - np.uint32(cut)
        row[k.USED], row[k.NUM_READS], row[k.WALK_AT] = left, rest, at - cut
        row[k.BASE] += cut
        conn.base += cut

    def watchdog(self, now: int, limits: Limits) -> int:
        """Limits of every connection on this path; the reads of answers in flight."""
        out = self.memory.out
        found, num_reads = self.kernels.overdue(self.table, now, limits.first_ns, limits.stall_ns, limits.total_ns, out)
        for slot, reason, _ in out[:found].tolist():
            conn = self.conns[slot]
            if conn is not None and conn.item >= 0:
                self.handle(conn, slot, reason, 0)
        return int(num_reads)

    # The loop

    def start(self, loop: asyncio.AbstractEventLoop, timers: dict[int, Callable[[], None]]) -> None:
        """Serve until ``client.done`` is set. ``timers``: descriptors that must be heard at once."""
        self.loop = loop
        self.timers = timers
        for fd, callback in timers.items():
            loop.remove_reader(fd)
            self.poll.register(fd, select.EPOLLIN)
            self.callbacks[fd] = callback
        self.backend = loop._get_backend_id()  # type: ignore[attr-defined]
        self.poll.register(self.backend, select.EPOLLIN)
        self.callbacks[self.backend] = self._loop_has_something
        self.active = True
        loop.call_soon(self._turn)

    def _loop_has_something(self) -> None:
        self.turn_due = True

    def _turn(self) -> None:
        """Serve until the event loop has something to do, let it, and come back."""
        done = self.client.done
        try:
            # Descriptors that were given to the event loop meanwhile are watched only after its next wait.
            while not self.turn_due and not done.is_set():
                self._once()
        finally:
            self.turn_due = False
            if done.is_set():
                self._leave()
            else:
                self.loop.call_soon(self._turn)

    def _once(self) -> None:
        m, pending = self.memory, self.pending
        found = self.kernels.receive(self.poll.fileno(), self._timeout_ms(), *m.arguments)
        if found < 0:
            raise OSError(-found, os.strerror(-found))
        for row, reason, error in m.out[:found].tolist():
            if reason:
                # Who an event is for is settled now: handling another one may close and open connections.
                pending.append((self.conns[row], row, reason, error))
            else:  # timers go first
                self.callbacks[row]()
        for _ in range(min(len(pending), _PER_TURN)):
            conn, row, reason, error = pending.popleft()
            if conn is not None and conn.slot == row and not conn.dead:
                self.handle(conn, row, reason, error)
        for _ in range(len(self.soon)):
            function, arguments = self.soon.popleft()
            function(*arguments)
        while self.held and self.held[0][0] <= time.monotonic_ns():
            heapq.heappop(self.held)[2]()

    def _timeout_ms(self) -> int:
        if self.soon or self.pending:
            return 0
        if self.held:
            return max(0, -(-(self.held[0][0] - time.monotonic_ns()) // 1_000_000))
        return -1

    def _leave(self) -> None:
        """Back to the event loop alone, until the next phase."""
        self.active = False
        for fd, callback in self.timers.items():
            self.poll.unregister(fd)
            self.loop.add_reader(fd, callback)
        self.poll.unregister(self.backend)
        self.callbacks.clear()
        while self.soon:
            function, arguments = self.soon.popleft()
            self.loop.call_soon(function, *arguments)

    def close(self) -> None:
        self.poll.close()
