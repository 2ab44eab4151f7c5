"""What a sending process looks at several times a second: time limits, its own lag, the clocks, and the driver's wishes."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from bench.load.clocks import DeadlineTimer, paired_reading
from bench.load.control import Control, Stop
from bench.load.target import handshake_problem

if TYPE_CHECKING:
    from bench.load.client import Client
    from bench.load.connection import Connection

#: Between two looks. On the compiled path, which needs nothing but limits from them, they come less often: after a rest a
#: look costs 150 us, most of it for what has left the caches.
TICK_NS, COMPILED_TICK_NS = 100_000_000, 400_000_000
#: A socket whose last data came together with a reset is watched no more by libuv, which tells nobody: quiet
#: connections are read directly every so many ticks of 100 ms, or at each longer one.
QUIET_LOOK_TICKS = 2


class Watchdog:
    """Of one client. ``fileno()`` is readable when :meth:`look` is due, :meth:`tick` for those who have read it."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.timer = DeadlineTimer()
        self.num_ticks = self.next_ns = 0
        self.tick_ns = TICK_NS if client.reads is None else COMPILED_TICK_NS

    def fileno(self) -> int:
        return self.timer.fileno()

    def arm(self) -> None:
        """The first look is a tick from now, and the others follow."""
        self.next_ns = time.monotonic_ns() + self.tick_ns
        self.timer.arm_every(self.next_ns, self.tick_ns)

    def look(self) -> None:
        self.timer.acknowledge()
        self.tick()

    def tick(self) -> None:
        client, now = self.client, time.monotonic_ns()
        late = now - self.next_ns
        if late < 0:  # told once more of a look that has been had
            return
        self.next_ns += self.tick_ns * (1 + late // self.tick_ns)
        client.measures.tick_lag_ns.append(late)
        reading = paired_reading()
        client.measures.offsets.append(reading)
        client.offset_ns = reading[1]
        client.words[Control.NUM_READS] = client.num_reads_done + self._check_connections(now)
        client.words[Control.IN_FLIGHT] = client.in_flight
        client.step_limit(now)
        stop = int(client.control.header[Control.STOP])
        if os.getppid() != client.parent_pid:
            stop = Stop.ABORT  # the driver is gone
        if stop:
            client.stop(now, abort=stop >= Stop.ABORT)

    def _check_connections(self, now: int) -> int:
        """Limits of every connection; the reads of the answers in flight."""
        client, reads = self.client, 0
        limits = client.limits
        self.num_ticks += 1
        quiet = client.reads is not None or self.num_ticks % QUIET_LOOK_TICKS == 0
        for conn in self._on_event_loop():
            if conn.item >= 0:
                reads += len(conn.ends)
                conn.check(now, limits, quiet)
            elif not conn.ready and now - conn.opened_ns > limits.connect_s * 1e9:
                conn.lost("connect_timeout", _late_connection(conn, limits.connect_s))
        if client.reads is not None:
            reads += client.reads.watchdog(now, limits) + client.reads.num_reads_logged
        return reads

    def _on_event_loop(self) -> list[Connection]:
        """Connections that the compiled path does not watch."""
        client = self.client
        if client.reads is None:
            return list(client.all)
        if client.reads.num_taken == len(client.all):
            return []
        return [conn for conn in client.all if conn.slot < 0]

    def close(self) -> None:
        self.timer.close()


def _late_connection(conn: Connection, limit_s: float) -> str:
    if conn.tls is None:
        return f"no connection within {limit_s:g} s"
    return f"no TLS handshake within {limit_s:g} s: {handshake_problem(TimeoutError())}"
