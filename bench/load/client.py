"""One sending process: paces its share of the schedule, keeps connections, and leaves raw responses behind.

Nothing is decided here that the schedule does not say: which request is due when was fixed before the clock started.
"""

from __future__ import annotations

import asyncio
import functools
import heapq
import os
import ssl
import struct
import time
from array import array
from collections import deque
from typing import Any

import numpy as np

from bench.load.clocks import DeadlineTimer, paired_reading
from bench.load.compiled_reads import CompiledReads
from bench.load.connection import Connection
from bench.load.control import Control
from bench.load.loop_gate import LoopGate
from bench.load.share import Limits, Measures, Share
from bench.load.spill import SpillWriter
from bench.load.target import Address, Target
from bench.load.watchdog import Watchdog

_MAX_HOLD_S = 60.0
#: Requests sent in one go, so that a burst of sends does not keep the reads waiting.
SENDS_PER_TURN = 16
#: A closed loop whose server refuses connections would burn its whole schedule in a moment: its slots wait this long.
CONNECT_BACKOFF_S = 0.1


class Client:
    """Sends a share of the schedule. All methods run on one event loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        target: Target,
        address: Address,
        share: Share,
        bodies: memoryview,
        spill: SpillWriter,
        control: Control,
        rank: int,
        limits: Limits,
        *,
        max_in_flight: int | None,
        in_flight_steps: tuple[tuple[float, int], ...] | None,
        batch: bool,
        semaphore_fd: int | None,
        tls_context: ssl.SSLContext | None,
        parent_pid: int,
        kernels: Any = None,
        num_connections: int = 0,
    ) -> None:
        self.target, self.address, self.tls_context = target, address, tls_context
        self.event_loop, self.loop = loop, LoopGate(loop)
        self.reads = None if kernels is None or target.is_tls else CompiledReads(self, kernels, num_connections)
        self.loop.reads = self.reads
        self.parent_pid = parent_pid
        self.share, self.bodies, self.spill, self.limits = share, bodies, spill, limits
        self.control, self.words = control, control.workers[rank]
        self.limit = max_in_flight if semaphore_fd is None else None
        self.steps, self.batch, self.semaphore_fd = in_flight_steps, batch, semaphore_fd
        self.positions: list[int] = share.positions.tolist()
        self.due: list[int] = share.due_ns.tolist()
        self.body_at: list[int] = share.body_at.tolist()
        self.head = target.request_head()
        self.idle: list[Connection] = []
        self.all: set[Connection] = set()
        self.waiting: deque[tuple[int, int, int]] = deque()  # (row, due_ns or 0, connections opened for it at)
        self.num_opening = self.num_reads_done = 0
        self.queue: list[int] = []
        self.next = 0
        self.later: list[tuple[int, int]] = []  # (ready ns, row) of follow-up turns
        self.start_ns = 0
        self.in_flight = self.batch_left = self.num_held = 0
        self.stopping = False
        self.waits_for_slot = False
        self.num_followups = int((~share.is_root).sum())
        self.due_of: dict[int, int] = {}
        self.retried: set[int] = set()
        self.first_sent: dict[int, int] = {}
        self.done = asyncio.Event()
        self.timer = DeadlineTimer()
        self.measures = Measures(array("q"), array("q"), [paired_reading()])
        self.offset_ns = self.measures.offsets[0][1]
        self.watchdog = Watchdog(self)

    # Phases

    async def connect(self, number: int) -> None:
        """Open ``number`` connections before the clock starts, as far as the server lets us within the limit."""
        loop = self.loop
        loop.add_reader(self.timer.fileno(), self._on_timer)
        loop.add_reader(self.watchdog.fileno(), self.watchdog.look)
        if self.semaphore_fd is not None:
            loop.add_reader(self.semaphore_fd, self._on_semaphore)
            loop.remove_reader(self.semaphore_fd)
        self.watchdog.arm()
        deadline = time.monotonic() + self.limits.connect_s + 1
        for start in range(0, number, 128):  # a listen queue holds few; do not overrun it
            for _ in range(min(128, number - start)):
                self._open()
            while self.num_opening and time.monotonic() < deadline:
                await asyncio.sleep(0.002)
            if self.measures.num_failed_connects:
                break
        self.measures.num_failed_connects = 0

    async def serve(self, rows: np.ndarray, start_ns: int) -> None:
        """Send the given root rows (in order) and their follow-ups; returns when all are done."""
        self.queue, self.next, self.start_ns = rows.tolist(), 0, start_ns
        self.done.clear()
        self.timer.arm(max(start_ns, 1))
        if not self.queue:
            return
        if self.reads is not None:
            timers = {self.timer.fileno(): self._on_timer, self.watchdog.fileno(): self.watchdog.look}
            self.reads.start(self.event_loop, timers)
        await self.done.wait()

    def close(self) -> None:
        for conn in list(self.all):
            conn.close()
        for timer in (self.timer, self.watchdog):
            self.loop.remove_reader(timer.fileno())
            timer.close()
        if self.reads is not None:
            self.reads.close()

    # Pacing

    def pump(self) -> None:
        """Send whatever is due and allowed, then sleep until the next is."""
        if self.stopping or not self.start_ns:
            return
        for _ in range(SENDS_PER_TURN):
            now = time.monotonic_ns()
            if now < self.start_ns:
                self.timer.arm(self.start_ns)
                return
            row, due = self._candidate(now)
            if row < 0:
                break
            if not self._take_slot():
                return
            if self.later and row == self.later[0][1]:
                heapq.heappop(self.later)
            else:
                self.next += 1
            self._launch(row, due)
        else:
            self.loop.call_soon(self.pump)  # let the reads that wait have their turn
            return
        if due:
            self.timer.arm(due)
        elif self.next >= len(self.queue) and not self.in_flight and not self.later:
            self.done.set()

    def _candidate(self, now: int) -> tuple[int, int]:
        """(row, due) of the request to send now, due 0 meaning "when a slot is free"; or (-1, when to look again)."""
        row, due = -1, 0
        if self.next < len(self.queue):
            row = self.queue[self.next]
            due = self.due[row]
            due = 0 if due < 0 else due + self.start_ns
        if self.later and (row < 0 or due == 0 or self.later[0][0] < due):
            ready = self.later[0][0]
            if ready <= now or row < 0 or due > ready:
                row, due = self.later[0][1], ready
        if row >= 0 and due > now:
            return -1, due
        return row, due

    def _take_slot(self) -> bool:
        if self.semaphore_fd is not None:
            try:
                os.eventfd_read(self.semaphore_fd)
            except BlockingIOError:
                if not self.waits_for_slot:
                    self.waits_for_slot = True
                    self.loop.add_reader(self.semaphore_fd, self._on_semaphore)
                return False
        elif self.batch and self.limit is not None:
            if self.in_flight == 0:
                self.batch_left = self.limit
            if self.batch_left == 0:
                return False
            self.batch_left -= 1
        elif self.limit is not None and self.in_flight >= self.limit:
            return False
        self.in_flight += 1
        return True

    def _on_semaphore(self) -> None:
        self.waits_for_slot = False
        assert self.semaphore_fd is not None
        self.loop.remove_reader(self.semaphore_fd)
        self.pump()

    def _on_timer(self) -> None:
        self.timer.acknowledge()
        self.pump()

    def _launch(self, row: int, due: int) -> None:
        if due:
            self.due_of[row] = due
        while self.idle:
            conn = self.idle.pop()
            if not conn.dead:
                conn.connect_ns = 0
                self._send(conn, row)
                return
        self.waiting.append((row, due, 0))
        self._open()

    def _send(self, conn: Connection, row: int) -> None:
        body = self.bodies[self.body_at[row] : self.body_at[row + 1]]
        head = b"%bContent-Length: %d\r\nX-Request-Id: %d\r\n\r\n" % (self.head, len(body), self.positions[row])
        conn.send(row, head + body)

    def slot_free(self, hold_s: float) -> None:
        """A request is over. In a closed loop a 429's Retry-After is honoured: the slot rests that long."""
        if hold_s > 0 and self.due_is_free and not self.stopping:
            self.num_held += 1
            hold_s = min(hold_s, _MAX_HOLD_S)
            until_ns = time.monotonic_ns() + round(hold_s * 1e9)
            self.loop.call_later(hold_s, functools.partial(self._release_held, until_ns))
        else:
            self._release()

    def _release_held(self, until_ns: int) -> None:
        left_s = (until_ns - time.monotonic_ns()) / 1e9
        if left_s > 0 and not self.stopping:  # an event loop counts from when its turn began, which may be a while ago
            self.loop.call_later(left_s, functools.partial(self._release_held, until_ns))
            return
        self.num_held -= 1
        self._release()

    @property
    def due_is_free(self) -> bool:
        return self.next < len(self.queue) and self.due[self.queue[self.next]] < 0

    def _release(self) -> None:
        self.in_flight -= 1
        if self.semaphore_fd is not None:
            os.eventfd_write(self.semaphore_fd, 1)
        while self.waiting and self.idle:
            self._send_waiting(self.idle.pop(), connected=False)
        if self.stopping:
            if self.in_flight <= self.num_held:
                self.done.set()
            return
        self.pump()

    # Connections

    def _open(self) -> None:
        conn = Connection(self)
        self.all.add(conn)
        self.num_opening += 1
        self.measures.num_connections += 1
        conn.open(*self.address)

    def opened(self, conn: Connection) -> None:
        self.num_opening -= 1
        if self.waiting:
            self._send_waiting(conn, connected=True)
        else:
            self.idle.append(conn)

    def _send_waiting(self, conn: Connection, *, connected: bool) -> None:
        row, _, _ = self.waiting.popleft()
        if not connected:
            conn.connect_ns = 0
        self._send(conn, row)

    def failed(self, conn: Connection, error: str, detail: str) -> None:
        """A connection could not be opened: the longest-waiting request has failed."""
        self.num_opening -= 1
        self.measures.num_failed_connects += 1
        if not self.waiting or self.num_opening >= len(self.waiting):
            return
        row, _, _ = self.waiting.popleft()
        conn.item, conn.sent_ns = row, 0
        conn.connect_ns = time.monotonic_ns() - conn.opened_ns
        self.record(conn, error, detail, False)
        self.slot_free(CONNECT_BACKOFF_S if self.due_is_free else 0.0)

    def retry(self, conn: Connection) -> bool:
        """A kept-alive connection turned out to be closed by the server before it saw the request: once more, on a new
        one. The request's times go on from the first attempt."""
        row = conn.item
        if row in self.retried or self.stopping:
            return False
        self.retried.add(row)
        self.first_sent[row] = conn.sent_ns
        self.measures.num_retries += 1
        self.waiting.append((row, 0, 0))
        self._open()
        return True

    def unsolicited(self, conn: Connection) -> None:
        """Bytes on an idle connection: it cannot be trusted any more."""
        self.measures.num_unsolicited += 1
        conn.close()

    def closed(self, conn: Connection) -> None:
        self.all.discard(conn)
        if conn in self.idle:
            self.idle.remove(conn)

    # Records

    def record(self, conn: Connection, error: str | None, detail: str, until_close: bool) -> None:
        """Leave the raw response behind; the next turn of its session becomes due."""
        now, row = time.monotonic_ns(), conn.item
        stamps, ends, data = conn.raw()
        if len(stamps) and conn.kernel_stamps:
            seconds, nanos = struct.unpack_from("<qq", stamps, len(stamps) - 16)
            self.measures.read_lag_ns.append(now - (seconds * 1_000_000_000 + nanos - self.offset_ns))
        sent = self.first_sent.pop(row, conn.sent_ns)
        flags = (1 if conn.kernel_stamps else 0) | (2 if until_close else 0) | ((row in self.retried) << 2)
        self.spill.final(
            self.positions[row],
            self.due_of.pop(row, 0),
            sent,
            conn.connect_ns,
            now,
            error,
            detail,
            flags,
            stamps,
            ends,
            data,
        )
        words = self.words
        words[Control.NUM_DONE] += 1
        self.num_reads_done += len(ends)
        if error is not None or conn.status != 200:
            words[Control.NUM_ERRORS] += 1
        follows = int(self.share.follows[row]) if self.num_followups else -1
        if follows >= 0:
            ready = now + int(self.share.think_ns[follows])
            due = self.due[follows]
            heapq.heappush(self.later, (max(ready, due + self.start_ns if due >= 0 else 0), follows))

    # Watching

    def step_limit(self, now: int) -> None:
        if self.steps and self.semaphore_fd is None and self.start_ns:
            t = (now - self.start_ns) / 1e9
            limit = [c for at, c in self.steps if at <= max(t, 0.0)][-1]
            if limit != self.limit:
                self.limit = limit
                self.pump()

    def stop(self, now: int, *, abort: bool) -> None:
        """Send nothing new. Requests that were due and not sent are recorded as aborted; with ``abort`` those in flight
        are, too."""
        if not self.stopping:
            self.stopping = True
            for row in self.queue[self.next :]:
                due = self.due[row]
                if due < 0 or due + self.start_ns > now:
                    break
                self._never_sent(row, due + self.start_ns)
            while self.waiting:
                row, due, _ = self.waiting.popleft()
                self._never_sent(row, due)
                self._release()
        if abort:
            for conn in list(self.all):
                if conn.item >= 0:
                    conn.lost("aborted", "in flight when the run ended")
        if self.in_flight <= self.num_held:
            self.done.set()

    def _never_sent(self, row: int, due: int) -> None:
        detail = "due before the run ended, but not sent"
        self.spill.final(self.positions[row], due, 0, 0, 0, "aborted", detail, 0, bytearray(), array("I"), b"")
        self.words[Control.NUM_DONE] += 1
        self.words[Control.NUM_ERRORS] += 1
