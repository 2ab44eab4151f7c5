"""One sending process: paces its share of the schedule, keeps connections, and leaves raw responses behind.

Nothing is decided here that the schedule does not say: which request is due when was fixed before the clock started.
"""

from __future__ import annotations

import asyncio
import functools
import os
import ssl
import struct
import time
from array import array
from collections import deque
from typing import Any

import numpy as np

from bench.load.agenda import Agenda
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
#: The same for those that compiled code sends: some 10 us each.
SENDS_AT_ONCE = 64
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
        self.loop.compiled = None if self.reads is None else self.reads.loop
        self.parent_pid = parent_pid
        self.share, self.bodies, self.spill, self.limits = share, bodies, spill, limits
        self.control, self.words = control, control.workers[rank]
        self.limit = max_in_flight if semaphore_fd is None else None
        self.steps, self.batch, self.semaphore_fd = in_flight_steps, batch, semaphore_fd
        self.positions: list[int] = share.positions.tolist()
        self.body_at: list[int] = share.body_at.tolist()
        self.head = target.request_head()
        self.idle: list[Connection] = []
        self.all: set[Connection] = set()
        self.waiting: deque[tuple[int, int, int]] = deque()  # (row, due_ns or 0, begun at or 0 where sent before)
        self.num_opening = self.num_reads_done = 0
        self.agenda = Agenda(share)
        self.in_flight = self.batch_left = self.num_held = 0
        self.stopping = False
        self.waits_for_slot = False
        self.due_of: dict[int, int] = {}
        self.retried: set[int] = set()
        self.first_sent: dict[int, int] = {}
        self.done = asyncio.Event()
        if self.reads is not None:
            self.reads.give_requests(share, self.head, bodies)
        self.timer = DeadlineTimer()
        self.measures = Measures(array("q"), array("q"), [paired_reading()])
        self.offset_ns = self.measures.offsets[0][1]
        self.watchdog = Watchdog(self)

    # Phases

    async def connect(self, number: int) -> None:
        """Open ``number`` connections before the clock starts, as far as the server lets us within the limit."""
        loop = self.loop
        loop.add_reader(self.timer.fileno(), self.on_timer)
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
        self.agenda.start(rows, start_ns)
        self.done.clear()
        self.timer.arm(max(start_ns, 1))
        if not len(rows):
            return
        if self.reads is not None:
            self.reads.give_queue(rows, turns=self._turns(rows))
            self.reads.loop.start(self.event_loop)
        await self.done.wait()

    def _turns(self, rows: np.ndarray) -> bool:
        """Whether these are a plain closed loop: whenever an answer is over, the next request may go out."""
        plain = self.semaphore_fd is None and not self.steps and not self.batch and not self.agenda.num_followups
        return plain and self.limit is not None and bool((self.share.due_ns[rows] < 0).all())

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
        agenda = self.agenda
        if self.stopping or not agenda.start_ns:
            return
        for _ in range(SENDS_PER_TURN):
            now = time.monotonic_ns()
            if now < agenda.start_ns:
                self.timer.arm(agenda.start_ns)
                return
            if self.reads is not None and self.reads.turns and self._send_idle():
                self.loop.call_soon(self.pump)
                return
            row, due = agenda.candidate(now)
            if row < 0:
                break
            if not self._take_slot():
                return
            agenda.take(row)
            self._launch(row, due)
        else:
            self.loop.call_soon(self.pump)  # let the reads that wait have their turn
            return
        if due:
            self.timer.arm(due)
        elif not self.in_flight and agenda.is_over:
            self.done.set()

    def _send_idle(self) -> int:
        """In a plain closed loop: the next requests go out on the connections that rest, in one go. How many did."""
        assert self.reads is not None and self.limit is not None
        slots: list[int] = []
        room = min(self.limit - self.in_flight, self.agenda.num_left, SENDS_AT_ONCE)
        while len(slots) < room and self.idle and self.idle[-1].slot >= 0:
            slots.append(self.idle.pop().slot)
        if slots:
            self.in_flight += len(slots)
            self.reads.send(slots)
        return len(slots)

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

    def on_timer(self) -> None:
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
        self.waiting.append((row, due, time.monotonic_ns()))
        self._open()

    def _send(self, conn: Connection, row: int) -> None:
        conn.send(row, self.request(row))

    def request(self, row: int) -> bytes:
        """The bytes of a request."""
        return self.head + self.bodies[self.body_at[row] : self.body_at[row + 1]]

    def slot_free(self, hold_s: float) -> None:
        """A request is over. In a closed loop a 429's Retry-After is honoured: the slot rests that long."""
        if hold_s > 0 and self.agenda.due_is_free and not self.stopping:
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

    def _release(self) -> None:
        self.in_flight -= 1
        if self.semaphore_fd is not None:
            os.eventfd_write(self.semaphore_fd, 1)
        while self.waiting and self.idle:
            self._send_waiting(self.idle.pop(), connected=False)
        if self.stopping:
            if self.in_flight <= self.num_held:
                self.done.set()
        elif not self.agenda.is_over:
            self.pump()
        elif not self.in_flight:
            self.done.set()

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
        row, _, begun_ns = self.waiting.popleft()
        self.due_of.setdefault(row, begun_ns)  # of a closed loop: due when it got its slot
        conn.item, conn.sent_ns = row, 0
        conn.connect_ns = time.monotonic_ns() - conn.opened_ns
        self.record(conn, error, detail, False)
        self.slot_free(CONNECT_BACKOFF_S if self.agenda.due_is_free else 0.0)

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
        """Leave the raw response behind; the next turn of its session becomes due. (``compiled_reads`` logs answers without a
        fault itself, and calls :meth:`logged`.)"""
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
        self.agenda.follow_up(row, now)

    def logged(self, row: int, end_ns: int) -> None:
        """Compiled code left the raw response behind; the rest of what a record brings with it."""
        if self.due_of:
            self.due_of.pop(row, None)
        self.agenda.follow_up(row, end_ns)
        self._release()

    # Watching

    def step_limit(self, now: int) -> None:
        if self.steps and self.semaphore_fd is None and self.agenda.start_ns:
            t = (now - self.agenda.start_ns) / 1e9
            limit = [c for at, c in self.steps if at <= max(t, 0.0)][-1]
            if limit != self.limit:
                self.limit = limit
                self.pump()

    def stop(self, now: int, *, abort: bool) -> None:
        """Send nothing new. Requests that were due and not sent are recorded as aborted; with ``abort`` those in flight
        are, too."""
        if not self.stopping:
            self.stopping = True
            for row, due in self.agenda.overdue(now):
                self._never_sent(row, due)
            while self.waiting:
                row, due, _ = self.waiting.popleft()
                self._never_sent(row, due)
                self._release()
        if abort:
            if self.reads is not None:
                self.reads.sync_all()
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
