"""What the mock keeps of a connection and of the answer that it writes there."""

from __future__ import annotations

import socket
from array import array

from bench.load.mock_config import Fault
from bench.load.mock_response import Ask, Plan


class Stream:
    """One answer being written."""

    __slots__ = (
        "arrival_ns",
        "conn",
        "fault",
        "gaps_ns",
        "next",
        "plan",
        "request_id",
        "start_ns",
        "tokens",
        "writes_ns",
    )

    def __init__(self, conn: Connection, ask: Ask | None, plan: Plan, arrival_ns: int, fault: Fault | None) -> None:
        self.conn, self.plan, self.arrival_ns, self.fault = conn, plan, arrival_ns, fault
        self.request_id = -1 if ask is None else ask.request_id
        self.tokens = 0 if ask is None else ask.osl
        self.start_ns = 0
        self.next = 0
        self.gaps_ns: list[int] = []
        self.writes_ns = array("q")


class Connection:
    __slots__ = ("inbuf", "out", "raw", "sock", "stamp_ns", "stamped", "stream", "tls_ready")

    def __init__(self, sock: socket.socket, stamped: bool, tls: bool) -> None:
        self.sock, self.stamped, self.tls_ready = sock, stamped, not tls
        self.inbuf = bytearray()
        self.out = bytearray()
        self.stream: Stream | None = None
        self.stamp_ns = 0
