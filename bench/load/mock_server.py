"""The mock's loop: one process, one epoll, absolute deadlines. See :mod:`bench.load.mock` for what it is for."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import os
import re
import select
import socket
import struct
import time
from collections import deque
from typing import Any

import numpy as np

from bench.load.clocks import STAMP_SPACE, DeadlineTimer, enable_kernel_stamps, paired_reading
from bench.load.mock_api import answer_get, fault_of, read_ask
from bench.load.mock_config import FAULT_KINDS, MockConfig
from bench.load.mock_response import Encoder, error_plan, json_response, stream_plan, whole_plan
from bench.load.mock_stream import Connection, Stream

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.I)
_AUTHORIZATION = re.compile(rb"\r\nauthorization:[ \t]*bearer ([^\r]*)", re.I)
LOG_HEAD = struct.Struct("<6q")
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 s: close() sends RST


class Server:
    """One process's loop."""

    def __init__(self, config: MockConfig, listener: socket.socket, log_path: str | None) -> None:
        self.config, self.listener = config, listener
        self.poll = select.epoll()
        self.timer = DeadlineTimer()
        self.conns: dict[int, Connection] = {}
        self.heap: list[tuple[int, int, Stream]] = []
        self.serial = itertools.count()
        self.order = itertools.count()
        self.waiting: deque[Stream] = deque()
        self.running = 0
        self.encoder = Encoder(config.tokens_per_chunk)
        self.rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(config.seed)))
        self.log = open(log_path, "ab", buffering=1 << 20) if log_path else None
        self.offset_ns = paired_reading()[1]
        self.stopping = False
        #: The process without which nobody wants the answers; None: serve until told to stop.
        self.parent_pid: int | None = None
        self.totals = {"prompt": 0, "generation": 0, "requests": 0, "ttft_sum": 0.0, "ttft_count": 0}
        self.key = os.environ.get(config.api_key_env) if config.api_key_env else None
        self.tls: Any = None
        if config.tls_cert:
            import ssl

            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.tls.load_cert_chain(config.tls_cert, config.tls_key)

    def run(self) -> None:
        self.listener.setblocking(False)
        accepts = not any(f.kind == "no_accept" for f in self.config.faults)
        if accepts:
            self.poll.register(self.listener, select.EPOLLIN)
        self.poll.register(self.timer, select.EPOLLIN)
        listen_fd, timer_fd = self.listener.fileno(), self.timer.fileno()
        next_housekeeping = time.monotonic() + 1
        while not self.stopping:
            for fd, event in self.poll.poll(1.0, 1024):
                if fd == timer_fd:
                    self.timer.acknowledge()
                elif fd == listen_fd:
                    self._accept()
                else:
                    conn = self.conns.get(fd)
                    if conn is None:
                        continue
                    if event & select.EPOLLOUT:
                        self._flush(conn)
                    if event & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                        self._readable(conn)
                if self.heap and self.heap[0][0] <= time.monotonic_ns():
                    self._write_due()
            self._write_due()
            if time.monotonic() > next_housekeeping:
                next_housekeeping = time.monotonic() + 1
                self.offset_ns = paired_reading()[1]
                self.stopping |= self.parent_pid not in (None, os.getppid())
                if self.log:
                    self.log.flush()
        if self.log:
            self.log.close()

    def _write_due(self) -> None:
        heap = self.heap
        while heap:
            due = heap[0][0]
            if due > time.monotonic_ns():
                self.timer.arm(due)
                return
            stream = heap[0][2]
            gap = self._step(stream)
            if gap is None:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (self._aligned(due + gap), next(self.order), stream))

    def _aligned(self, t_ns: int) -> int:
        if not self.config.in_step:
            return t_ns
        grid = max(1, round(self.config.itl.mean_s * 1e9))
        return -(-t_ns // grid) * grid

    def _step(self, stream: Stream) -> int | None:
        """Write what is due; the gap to the next write, or None after the last."""
        conn, writes, k = stream.conn, stream.plan.writes, stream.next
        stamp = stream.writes_ns.append
        data = writes[k]
        stream.next = k = k + 1
        # Writes without time between them go out together, as a server does that is as fast as it can be.
        while k < len(writes) and stream.gaps_ns[k] == 0 and len(data) < 65536 and self.config.itl.mean_s == 0:
            data += writes[k]
            stream.next = k = k + 1
            stamp(time.monotonic_ns())
        stamp(time.monotonic_ns())
        if conn.out:
            conn.out += data
        else:
            try:
                sent = conn.sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._drop(conn)
                return None
            if sent < len(data):
                conn.out += data[sent:]
                self.poll.modify(conn.sock, select.EPOLLIN | select.EPOLLOUT)
        if k >= len(writes):
            self._finished(stream)
            return None
        gap = stream.gaps_ns[k]
        if k >= 2 and self.config.itl_per_running_s:
            gap += round(self.config.itl_per_running_s * self.running * 1e9)
        return gap

    def _finished(self, stream: Stream) -> None:
        conn, after = stream.conn, stream.plan.after
        self._log(stream)
        if after == "stall":
            return  # holds its connection and its slot's place until the client gives up
        conn.stream = None
        self._release(stream)
        if after in ("close", "reset"):
            self._close(conn, reset=after == "reset")
        elif conn.inbuf:
            self._requests(conn)

    def _release(self, stream: Stream) -> None:
        if stream.start_ns:
            self.running -= 1
            stream.start_ns = 0
            self._admit()

    def _log(self, stream: Stream) -> None:
        written = max(0, len(stream.writes_ns) - 1)
        self.totals["generation"] += min(stream.tokens, written * self.config.tokens_per_chunk)
        if written:
            self.totals["ttft_sum"] += (stream.writes_ns[1] - stream.arrival_ns) / 1e9
            self.totals["ttft_count"] += 1
            self.totals["requests"] += 1
        if self.log and stream.request_id >= 0:
            fault = FAULT_KINDS.index(stream.fault.kind) if stream.fault else -1
            head = (stream.request_id, stream.arrival_ns, stream.start_ns, len(stream.writes_ns), stream.tokens, fault)
            self.log.write(LOG_HEAD.pack(*head))
            self.log.write(stream.writes_ns.tobytes())

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:  # out of descriptors: leave it in the queue
                return
            sock.setblocking(False)
            if self._fault_for_connection():
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                sock.close()
                continue
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stamped = False
            if self.tls is not None:
                sock = self.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            else:
                stamped = enable_kernel_stamps(sock)
            self.conns[sock.fileno()] = Connection(sock, stamped, self.tls is not None)
            self.poll.register(sock, select.EPOLLIN)

    def _fault_for_connection(self) -> bool:
        refuse = [f for f in self.config.faults if f.kind == "refuse"]
        return bool(refuse) and (refuse[0].ratio >= 1 or float(self.rng.random()) < refuse[0].ratio)

    def _readable(self, conn: Connection) -> None:
        try:
            if not conn.tls_ready:
                conn.sock.do_handshake()  # type: ignore[attr-defined]
                conn.tls_ready = True
                return
            if conn.stamped:
                data, anc, _, _ = conn.sock.recvmsg(1 << 18, STAMP_SPACE)
                conn.stamp_ns = time.monotonic_ns()
                if anc:
                    seconds, nanos = struct.unpack("<qq", anc[0][2])
                    conn.stamp_ns = seconds * 1_000_000_000 + nanos - self.offset_ns
            else:
                data = conn.sock.recv(1 << 18)
                conn.stamp_ns = time.monotonic_ns()
                while self.tls is not None and conn.sock.pending():  # type: ignore[attr-defined]
                    data += conn.sock.recv(1 << 18)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as e:
            if type(e).__name__ in ("SSLWantReadError", "SSLWantWriteError"):
                return
            return self._drop(conn)
        if not data:
            return self._drop(conn)
        conn.inbuf += data
        if conn.stream is None:
            self._requests(conn)

    def _requests(self, conn: Connection) -> None:
        while conn.stream is None and conn.sock.fileno() >= 0:
            end = conn.inbuf.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(conn.inbuf[: end + 2])
            match = _LENGTH.search(head)
            length = int(match[1]) if match else 0
            if len(conn.inbuf) < end + 4 + length:
                return
            body = bytes(conn.inbuf[end + 4 : end + 4 + length])
            del conn.inbuf[: end + 4 + length]
            self._answer(conn, head, body)

    def _answer(self, conn: Connection, head: bytes, body: bytes) -> None:
        method, _, rest = head.partition(b" ")
        path = rest.split(b" ", 1)[0].split(b"?")[0].decode("latin-1")
        if self.key is not None:
            match = _AUTHORIZATION.search(head)
            if match is None or match[1].decode("latin-1") != self.key:
                return self._once(conn, json_response("401 Unauthorized", {"error": {"message": "wrong key"}}))
        if method == b"GET":
            return self._once(conn, answer_get(path, self.config.model, self._figures()))
        chat = path.endswith("/chat/completions")
        if not chat and not path.endswith("/completions"):
            return self._once(conn, json_response("404 Not Found", {"error": {"message": f"no {path}"}}))
        try:
            ask = read_ask(head, json.loads(body), chat, self.serial, self.config.model)
        except (ValueError, KeyError, TypeError) as e:
            return self._once(conn, json_response("400 Bad Request", {"error": {"message": f"bad request: {e}"}}))
        fault = fault_of(ask, self.config)
        if fault is not None and (fault.kind.startswith("http_") or fault.kind == "redirect"):
            plan = error_plan(fault)
        elif ask.stream:
            plan = stream_plan(ask, fault, self.encoder)
        else:
            plan = whole_plan(ask)
        stream = Stream(conn, ask, plan, conn.stamp_ns, fault)
        self.totals["prompt"] += ask.isl
        conn.stream = stream
        if not plan.delayed:
            return self._once(conn, b"".join(plan.writes), stream)
        if not plan.writes:
            self._log(stream)
            return self._close(conn, reset=plan.after == "reset")
        self.waiting.append(stream)
        self._admit()

    def _once(self, conn: Connection, data: bytes, stream: Stream | None = None) -> None:
        conn.stream = None
        if stream is not None:
            stream.writes_ns.append(time.monotonic_ns())
            self._log(stream)
        conn.out += data
        self._flush(conn)

    def _admit(self) -> None:
        limit = self.config.max_running
        while self.waiting and (limit is None or self.running < limit):
            stream = self.waiting.popleft()
            if stream.conn.stream is not stream:
                continue  # its client is gone
            self.running += 1
            self._start(stream)

    def _start(self, stream: Stream) -> None:
        n = len(stream.plan.writes)
        queued = stream.arrival_ns == 0 or self.config.max_running is not None
        stream.start_ns = max(time.monotonic_ns(), 1) if queued else stream.arrival_ns
        rng = np.random.default_rng((self.config.seed, max(stream.request_id, 0), 1 << 20))
        ttft = int(self.config.ttft.sample_ns(rng, 1)[0])
        if self.config.itl.kind == "fixed":
            gaps = [round(self.config.itl.mean_s * 1e9)] * n
        else:
            gaps = self.config.itl.sample_ns(rng, n).tolist()
        stream.gaps_ns = gaps
        if stream.fault is not None and stream.fault.kind == "dribble":
            stream.gaps_ns = [1_000] * n
        due = self._aligned(stream.start_ns + ttft)
        gaps[0] = 0
        if n > 1:
            gaps[1] = 0
        if self.config.head_early and n > 1:
            first = self._step_head(stream)
            if not first:
                return
        heapq.heappush(self.heap, (due, next(self.order), stream))
        if n > 1 and not self.config.head_early:
            gaps[1] = 0

    def _step_head(self, stream: Stream) -> bool:
        """Send the head at once. False when the connection is gone."""
        stream.writes_ns.append(time.monotonic_ns())
        stream.next = 1
        if not stream.plan.writes[0]:
            return True
        try:
            stream.conn.sock.send(stream.plan.writes[0])
        except OSError:
            self._drop(stream.conn)
            return False
        return True

    def _figures(self) -> dict[str, float]:
        t = self.totals
        return {
            "num_requests_running": self.running,
            "num_requests_waiting": len(self.waiting),
            "kv_cache_usage_perc": 0.0,
            "num_preemptions_total": 0,
            "prompt_tokens_total": t["prompt"],
            "generation_tokens_total": t["generation"],
            "prefix_cache_queries_total": t["prompt"],
            "prefix_cache_hits_total": 0,
            "time_to_first_token_seconds_sum": t["ttft_sum"],
            "time_to_first_token_seconds_count": t["ttft_count"],
        }

    def _flush(self, conn: Connection) -> None:
        try:
            sent = conn.sock.send(conn.out) if conn.out else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            return self._drop(conn)
        del conn.out[:sent]
        mask = select.EPOLLIN | (select.EPOLLOUT if conn.out else 0)
        self.poll.modify(conn.sock, mask)

    def _drop(self, conn: Connection) -> None:
        """The client went away."""
        stream, conn.stream = conn.stream, None
        self._close(conn, reset=False)
        if stream is not None:
            if stream.next < len(stream.plan.writes):
                self._log(stream)
                stream.next = len(stream.plan.writes)
                self.heap = [h for h in self.heap if h[2] is not stream]
                heapq.heapify(self.heap)
            self._release(stream)

    def _close(self, conn: Connection, *, reset: bool) -> None:
        fd = conn.sock.fileno()
        if fd < 0:
            return
        with contextlib.suppress(OSError, KeyError):
            self.poll.unregister(fd)
        self.conns.pop(fd, None)
        if conn.out and not reset:
            with contextlib.suppress(OSError):
                conn.sock.send(conn.out)
        if reset:
            conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        conn.sock.close()
