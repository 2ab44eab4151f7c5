"""The loop while the compiled path serves: it waits on an epoll set in which the event loop's own set is one more descriptor, and
gives the event loop a turn when that has something to do (connections that open, TLS, answers that the fast path does not
understand)."""

from __future__ import annotations

import heapq
import itertools
import os
import select
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

    from bench.load.compiled_reads import CompiledReads
    from bench.load.connection import Connection

#: Events that Python handles (some 30 us each) before compiled code reads again, so that a crowd of heads and ends does
#: not let the chunks of other answers merge.
_PER_TURN = 4


class CompiledLoop:
    """Of one client: hands what compiled code leaves over to those whom it concerns."""

    def __init__(self, reads: CompiledReads) -> None:
        self.reads = reads
        self.active = self.turn_due = False
        self.pending: deque[tuple[Connection | None, int, int, int]] = deque()
        self.soon: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self.held: list[tuple[int, int, Callable[[], None]]] = []
        self.serial = itertools.count()
        self.callbacks: dict[int, Callable[[], None]] = {}

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Serve until ``client.done`` is set."""
        self.loop = loop
        client = self.reads.client
        # Both must be heard at once. The watchdog's repeats, and compiled code reads it.
        watchdog = client.watchdog.fileno()
        self.reads.memory.know_descriptor(watchdog, self.reads.kernels.TIMER)
        for fd, callback in ((client.timer.fileno(), client.on_timer), (watchdog, client.watchdog.tick)):
            loop.remove_reader(fd)
            self.reads.poll.register(fd, select.EPOLLIN)
            self.callbacks[fd] = callback
        self.backend = loop._get_backend_id()  # type: ignore[attr-defined]
        self.reads.poll.register(self.backend, select.EPOLLIN)
        self.callbacks[self.backend] = self._loop_has_something
        self.active = True
        loop.call_soon(self._turn)

    def _loop_has_something(self) -> None:
        self.turn_due = True

    def _turn(self) -> None:
        """Serve until the event loop has something to do, let it, and come back."""
        done = self.reads.client.done
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
        reads, pending = self.reads, self.pending
        m, client, k = reads.memory, reads.client, reads.kernels
        m.state[k.TURNS] = reads.turns and not client.stopping and not client.waiting
        m.state[k.NEXT], m.state[k.OFFSET_NS] = client.agenda.next, client.offset_ns
        m.state[k.LOG_FD] = client.spill.ready_fd()
        m.state[k.IN_FLIGHT] = client.in_flight - client.num_held
        found = k.receive(reads.poll.fileno(), self._timeout_ms(), *m.arguments)
        client.agenda.next = m.state[k.NEXT]
        reads.take_rested()
        if found < 0:
            raise OSError(-found, os.strerror(-found))
        for row, reason, info in m.out[:found].tolist():
            if reason == k.ALL_OVER:
                continue
            if reason:
                # Who an event is for is settled now: handling another one may close and open connections.
                pending.append((reads.conns[row], row, reason, info))
            else:  # timers go first
                self.callbacks[row]()
        for _ in range(min(len(pending), _PER_TURN)):
            conn, row, reason, info = pending.popleft()
            if conn is not None and conn.slot == row and not conn.dead:
                reads.handle(conn, row, reason, info)
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
        self.reads.take_log()
        client = self.reads.client
        for fd, callback in (
            (client.timer.fileno(), client.on_timer),
            (client.watchdog.fileno(), client.watchdog.look),
        ):
            self.reads.poll.unregister(fd)
            self.loop.add_reader(fd, callback)
        self.reads.poll.unregister(self.backend)
        self.callbacks.clear()
        while self.soon:
            function, arguments = self.soon.popleft()
            self.loop.call_soon(function, *arguments)
