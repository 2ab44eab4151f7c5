"""The compiled hot path: plain connections whose answers are read, stamped and appended without entering Python.

An answer that is anything but ``200 chunked`` text leaves for the event loop's path with the bytes that have come so far, and
its connection comes back when the answer is over.

Answers that end as they should are logged by compiled code, and in a plain closed loop it sends the next request at once. What
a connection receives is therefore told by the table; :meth:`CompiledReads.sync` brings the ``Connection`` up to it.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.load.compiled_loop import CompiledLoop
from bench.load.compiled_memory import KNOWN_BYTES, MOST_BYTES, SLOT_BYTES, SLOT_READS, TOUCHED_BYTES, Memory
from bench.load.share import Limits, Share
from bench.load.wire import HEAD_LIMIT_BYTES, SSE_END, Framing, Head, read_head

if TYPE_CHECKING:
    from bench.load.client import Client
    from bench.load.connection import Connection

#: What may differ from head to head of one server.
_DATE = re.compile(rb"\r\ndate:([^\r\n]*)\r\n", re.IGNORECASE)
#: Connections that this path takes; further ones stay with the event loop.
MOST_CONNECTIONS = 4096


class CompiledReads:
    """Connections of one client on the compiled path."""

    def __init__(self, client: Client, kernels: Any, num_connections: int) -> None:
        self.client, self.kernels = client, kernels
        self.memory = Memory(kernels, min(MOST_CONNECTIONS, max(64, num_connections)))
        self.table = self.memory.table
        num = len(self.table)
        self.conns: list[Connection | None] = [None] * num
        self.free = list(range(num - 1, -1, -1))
        self.poll = select.epoll()
        self.loop = CompiledLoop(self)
        self.num_responses = 0
        self.turns = False
        self.known_head: Head | None = None

    # Connections

    def adopt(self, conn: Connection) -> bool:
        """Take a connection without a response; False when there is no room."""
        if not self.free:
            return False
        slot = self.free.pop()
        fd = conn.sock.fileno()
        self.memory.know_descriptor(fd, slot)
        self.table[slot, : self.kernels.SLOT] = 0
        self.table[slot, self.kernels.FD] = fd
        self.table[slot, self.kernels.MODE] = self.kernels.IDLE
        self.table[slot, self.kernels.ITEM] = -1
        self.table[slot, self.kernels.STORE] = 2 | conn.kernel_stamps
        self.conns[slot], conn.slot = conn, slot
        self.memory.data[slot, :TOUCHED_BYTES:4096] = 0
        self.poll.register(fd, self._mask)
        return True

    _mask = select.EPOLLIN | getattr(select, "EPOLLRDHUP", 0x2000) | select.EPOLLET if hasattr(select, "EPOLLET") else 0

    @property
    def num_taken(self) -> int:
        """Connections that this path serves now."""
        return len(self.conns) - len(self.free)

    def begin(self, conn: Connection) -> None:
        """A request is about to go out on the slot's connection."""
        k, row, item = self.kernels, self.table[conn.slot], conn.item
        row[k.USED : k.SLOT] = 0
        row[k.MODE], row[k.ITEM] = k.HEAD, item
        row[k.DUE_NS], row[k.CONNECT_NS] = self.client.due_of.get(item, 0), conn.connect_ns
        row[k.STORE] = 0 if item in self.client.retried else 2 | conn.kernel_stamps

    def sent(self, slot: int, sent_ns: int) -> None:
        """It goes out now."""
        at = slot * self.kernels.NUM_COLUMNS
        self.memory.cells[at + self.kernels.SENT_NS] = self.memory.cells[at + self.kernels.LAST_NS] = sent_ns

    def send(self, slots: list[int]) -> None:
        """The queue's next requests go out on resting connections."""
        m, k, client = self.memory, self.kernels, self.client
        m.to_send[: len(slots)] = slots
        m.state[k.NEXT] = client.agenda.next
        short = k.send_many(m.table, m.to_send, len(slots), *m.send_arguments)
        client.agenda.next = m.state[k.NEXT]
        for slot, reason, num in m.out[:short].tolist():
            self.loop.pending.append((self.conns[slot], slot, reason, num))

    def end(self, slot: int) -> None:
        """The response is over; the connection is kept."""
        k = self.kernels
        row = self.table[slot]
        row[k.USED] = row[k.NUM_READS] = 0
        row[k.MODE], row[k.ITEM] = k.IDLE, -1

    def sync(self, conn: Connection, slot: int) -> None:
        """What compiled code has done since Python last looked: the connection learns of it when it is first needed."""
        k, cells, at = self.kernels, self.memory.cells, slot * self.kernels.NUM_COLUMNS
        item = cells[at + k.ITEM]
        if item != conn.item:
            conn.reset_response()
            conn.item, conn.reused, conn.connect_ns = item, True, 0
            conn.sent_ns = conn.last_read_ns = cells[at + k.SENT_NS]
        if conn.framing == Framing.HEAD and cells[at + k.MODE] == k.BODY:
            head, body_at = self.known_head, cells[at + k.BODY_AT]
            assert head is not None
            # another head, which says the same, may have become the known one since
            conn.take_head(head if head.body_at == body_at else replace(head, body_at=body_at))

    def sync_all(self) -> None:
        for slot, conn in enumerate(self.conns):
            if conn is not None:
                self.sync(conn, slot)

    def release(self, conn: Connection) -> None:
        """Let go of a connection, which is in step with the table. What its answer has brought so far moves to the
        connection's own buffers."""
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
        m, at = self.memory, slot * SLOT_READS
        used, num = m.cells[slot * self.kernels.NUM_COLUMNS + 1 : slot * self.kernels.NUM_COLUMNS + 3]
        return (
            m.stamp_bytes[16 * at : 16 * (at + num)],
            m.end_words[at : at + num],
            m.data_bytes[slot * SLOT_BYTES : slot * SLOT_BYTES + used],
        )

    @property
    def num_compiled(self) -> int:
        """Answers that this path saw the end of."""
        return self.num_responses + self.memory.state[self.kernels.NUM_LOGGED]

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

    def handle(self, conn: Connection, slot: int, reason: int, info: int) -> None:
        """What compiled code leaves to Python, for one connection. More may have come since: what holds is the slot's
        state now."""
        k = self.kernels
        self.sync(conn, slot)
        why = reason & ~k.MORE
        if why <= k.FULL:
            self._received(conn, slot, why)
        elif why == k.ENDED:
            conn.ended()
        elif why == k.LOST:
            conn.lost("reset", os.strerror(info))
        elif why == k.OVER:
            self._over(conn, slot, info)
        elif why == k.SHORT:
            conn.sent_short(info)
        elif why == k.ALL_OVER:
            pass  # its connections have been taken already
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

    def take_rested(self) -> None:
        """Connections whose answers are over, of which Python did not have to know at once."""
        m, k = self.memory, self.kernels
        num = m.state[k.NUM_RESTED]
        if num:
            m.state[k.NUM_RESTED] = 0
            for slot, item in m.rested[: 2 * num].reshape(-1, 2).tolist():
                conn = self.conns[slot]
                assert conn is not None
                self._over(conn, slot, item)

    def _over(self, conn: Connection, slot: int, item: int) -> None:
        """Compiled code logged an answer, and the connection rests."""
        conn.item = -1
        if conn.framing != Framing.HEAD:
            conn.reset_response()
        conn.reused = True
        self.client.idle.append(conn)
        self.client.logged(item, self.memory.cells[slot * self.kernels.NUM_COLUMNS + self.kernels.LAST_NS])

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
        if head.status == 200 and not head.close and head.retry_after_s is None:
            self._remember(head, bytes(data[: head.body_at]))
        else:
            row[k.STORE] = 0
        row[k.MODE], row[k.BODY_AT], row[k.WALK_AT] = k.BODY, head.body_at, head.body_at
        if data[-len(SSE_END) :] == SSE_END:
            self.num_responses += 1
            conn.finish(None, "")
        else:
            self._look(conn, slot)

    def _remember(self, head: Head, raw: bytes) -> None:
        """Know this head by sight from now on: most servers' heads differ in their date alone."""
        m = self.memory
        if len(raw) > KNOWN_BYTES:
            return
        m.known[: len(raw)] = np.frombuffer(raw, dtype=np.uint8)
        m.varies[:] = 0
        date = _DATE.search(raw)
        if date is not None:
            m.varies[date.start(1) : date.end(1)] = 1
        m.scratch[self.kernels.KNOWN_BYTES] = len(raw)
        self.known_head = head

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
            if conn is not None:
                self.handle(conn, slot, reason, 0)
        return int(num_reads)

    # What compiled code sends and logs

    def give_requests(self, share: Share, head: bytes, rest: memoryview) -> None:
        """All that may be sent: what is common to the requests, and what follows it in each."""
        self.memory.give_requests(share, head, rest, self.client.words)
        self.client.spill.collect = self.take_log

    def give_queue(self, rows: np.ndarray, *, turns: bool) -> None:
        """The rows of the share that are sent in this phase; whether a further one may go out whenever an answer is over."""
        self.memory.give_queue(rows)
        self.memory.state[self.kernels.END] = len(rows)
        self.turns = turns

    @property
    def num_reads_logged(self) -> int:
        """Reads of the answers that compiled code logged."""
        return self.memory.state[self.kernels.READS_LOGGED]

    def take_log(self) -> None:
        """Hand the log over to the spill, and the lags to the measures."""
        m, k = self.memory, self.kernels
        if m.state[k.LOG_USED]:
            self.client.spill.take(m.log_bytes[: m.state[k.LOG_USED]])
            m.state[k.LOG_USED] = 0
        if m.state[k.NUM_LAGS]:
            self.client.measures.read_lag_ns.extend(m.lags[: m.state[k.NUM_LAGS]].tolist())
            m.state[k.NUM_LAGS] = 0

    def close(self) -> None:
        self.poll.close()
