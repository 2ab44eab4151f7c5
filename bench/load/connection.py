"""One keep-alive connection: the hot path. A read is a stamp, an append and a look at the last bytes, nothing else.

The kernel's receive timestamp says when the bytes arrived, however late this process woke up for them. Several chunks
that wait together are one read with one stamp: the last one's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import time
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.load.clocks import STAMP_SPACE, enable_kernel_stamps, pack_realtime_ns
from bench.load.incoming import Incoming
from bench.load.target import handshake_problem

if TYPE_CHECKING:
    from bench.load.client import Client

READ_BYTES = 65536


class Connection(Incoming):
    """A socket, and the response that it is receiving: in buffers of its own, or, with ``slot`` >= 0, in those of the
    compiled path."""

    __slots__ = (
        "client",
        "connect_ns",
        "kernel_stamps",
        "opened_ns",
        "outgoing",
        "reader",
        "reused",
        "slot",
        "sock",
        "tls",
        "tls_in",
        "tls_out",
    )

    def __init__(self, client: Client) -> None:
        super().__init__()
        self.client = client
        self.slot = -1
        self.reused = self.kernel_stamps = False
        self.outgoing = b""
        self.connect_ns = 0
        self.tls: ssl.SSLObject | None = None
        self.reader: Callable[[], None] | None = None

    # Opening

    def open(self, family: int, address: Any) -> None:
        """Start connecting; ``client.opened`` or ``client.failed`` follows."""
        self.opened_ns = self.last_read_ns = time.monotonic_ns()
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        if family != socket.AF_UNIX:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.kernel_stamps = enable_kernel_stamps(self.sock)
        try:
            self.sock.connect(address)
        except BlockingIOError:
            self.client.loop.add_writer(self.sock, self._connected)
        except OSError as e:
            self.client.loop.call_soon(self.lost, "connect", _reason(e))
        else:
            self.client.loop.call_soon(self._connected)

    def _connected(self) -> None:
        if self.dead:
            return
        self.client.loop.remove_writer(self.sock)
        error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self.lost("connect", _reason(OSError(error, "")))
            return
        context = self.client.tls_context
        if context is None:
            reads = self.client.reads
            if reads is None or not reads.adopt(self):
                self.watch()
            self._opened()
            return
        self.tls_in, self.tls_out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.tls_in, self.tls_out, server_hostname=self.client.target.host)
        self.reader = self._tls_reader()
        self.client.loop.add_reader(self.sock, self.reader)
        self._handshake()

    def watch(self) -> None:
        """Receive on the event loop's path."""
        self.reader = self._plain_reader()
        self.client.loop.add_reader(self.sock, self.reader)

    def _handshake(self) -> None:
        assert self.tls is not None
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            self._send_bytes(self.tls_out.read())
            return
        except ssl.SSLCertVerificationError as e:
            self.lost("connect", f"certificate not accepted: {e.verify_message}")
            return
        except ssl.SSLError as e:
            self.lost("connect", f"TLS handshake failed: {handshake_problem(e)}")
            return
        self._send_bytes(self.tls_out.read())
        if not self.dead:
            self._opened()

    def _opened(self) -> None:
        self.ready = True
        self.connect_ns = time.monotonic_ns() - self.opened_ns
        self.client.opened(self)

    # Sending

    def send(self, item: int, data: bytes) -> None:
        """Send a request; ``sent_ns`` is the clock just before the bytes go to the kernel."""
        self.item = item
        if self.tls is not None:
            self.tls.write(data)
            data = self.tls_out.read()
        reads = self.client.reads if self.slot >= 0 else None
        if reads is not None:
            reads.begin(self)
        self.sent_ns = self.last_read_ns = time.monotonic_ns()
        if reads is not None:
            reads.sent(self.slot, self.sent_ns)
        self._send_bytes(data)

    def _send_bytes(self, data: bytes) -> None:
        if not data or self.dead:
            return
        if self.outgoing:
            self.outgoing += data
            return
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as e:
            self._send_failed(e)
            return
        self._sent(data, sent)

    def _send_failed(self, e: OSError) -> None:
        # A reset may be announced here while the answer that explains it is still to be read.
        self.client.loop.call_soon(self._lost_after_send, _reason(e))

    def _sent(self, data: bytes, num: int) -> None:
        if num < len(data):
            self.outgoing = data[num:]
            self.client.loop.add_writer(self.sock, self._writable)

    def sent_short(self, num: int) -> None:
        """Compiled code sent ``num`` bytes of the request in flight, or failed with errno ``-num``."""
        if num >= 0 or -num in (errno.EAGAIN, errno.EINTR):
            self._sent(self.client.request(self.item), max(num, 0))
        else:
            self._send_failed(OSError(-num, os.strerror(-num)))

    def _lost_after_send(self, reason: str) -> None:
        if not self.dead and self.item >= 0 and not self.num_reads():
            self.lost("reset", reason)

    def _writable(self) -> None:
        data, self.outgoing = self.outgoing, b""
        self.client.loop.remove_writer(self.sock)
        self._send_bytes(data)

    # Receiving

    def _plain_reader(self) -> Callable[[], None]:
        """The read callback of a plain connection, with everything it needs bound to locals."""
        recvmsg, buf, add_end = self.sock.recvmsg, self.buf, self.ends.append
        add_bytes, add_stamp, ends_with, space = self.buf.extend, self.stamps.extend, self.buf.endswith, STAMP_SPACE
        if not self.kernel_stamps:
            space = 0
        time_ns = time.time_ns

        def read() -> None:
            try:
                data, control, _, _ = recvmsg(READ_BYTES, space)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as e:
                self.lost("reset", _reason(e))
                return
            if not data:
                self.ended()
                return
            add_bytes(data)
            add_stamp(control[0][2] if control else pack_realtime_ns(time_ns()))
            add_end(len(buf))
            if ends_with(self.tail):
                self.perhaps_complete()

        return read

    def _tls_reader(self) -> Callable[[], None]:
        """As the plain one; the plaintext takes the stamp of the ciphertext that completed it."""
        recvmsg, space = self.sock.recvmsg, STAMP_SPACE if self.kernel_stamps else 0

        def read() -> None:
            try:
                data, control, _, _ = recvmsg(READ_BYTES, space)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as e:
                self.lost("reset" if self.ready else "connect", _reason(e))
                return
            if not data:
                self.ended()
                return
            self.tls_in.write(data)
            if not self.ready:
                self._handshake()
                if not self.ready:
                    return
            self._decrypt(control[0][2] if control else pack_realtime_ns(time.time_ns()))

        return read

    def _decrypt(self, stamp: bytes) -> None:
        assert self.tls is not None
        before = len(self.buf)
        closed = False
        while not self.dead:
            try:
                plain = self.tls.read(READ_BYTES)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLError as e:
                self.lost("reset", f"TLS: {e.reason or e}")
                return
            if not plain:
                closed = True
                break
            self.buf += plain
        self._send_bytes(self.tls_out.read())  # session tickets, key updates
        if self.dead:
            return
        if len(self.buf) > before:
            self.stamps += stamp
            self.ends.append(len(self.buf))
            if self.buf.endswith(self.tail):
                self.perhaps_complete()
        if closed and not self.dead:
            self.ended()

    def drain(self) -> None:
        """Read until nothing is left, without waiting for the event loop to say so."""
        for _ in range(1000):
            before = len(self.ends) + self.base
            if self.dead or self.reader is None:
                return
            self.reader()
            if len(self.ends) + self.base == before:
                return

    # The end

    def raw(self) -> tuple[bytearray | memoryview, array[int] | memoryview, bytearray | memoryview]:
        """(stamps, ends of the reads, bytes) received and not yet written out."""
        if self.slot >= 0 and self.client.reads is not None and self.client.reads.num_reads(self.slot):
            return self.client.reads.raw(self.slot)
        return self.stamps, self.ends, self.buf

    def num_reads(self) -> int:
        """0: nothing of the response has come."""
        num = len(self.ends) + self.base
        if self.slot >= 0 and self.client.reads is not None:
            num += self.client.reads.num_reads(self.slot)
        return num

    def unsolicited(self) -> None:
        self.client.unsolicited(self)

    def spill_part(self, keep: int, cut: int) -> None:
        self.client.spill.part(
            self.client.positions[self.item], self.stamps[: 16 * keep], self.ends[:keep], self.buf[:cut]
        )

    def finish(self, error: str | None, detail: str, *, until_close: bool = False) -> None:
        """The response is over, well or badly."""
        hold_s = (self.retry_after_s or 0.0) if self.status == 429 else 0.0
        self.client.record(self, error, detail, until_close)
        self.item = -1
        if self.close_after or error is not None or until_close:
            self.close()
        else:
            self.reset_response()
            self.reused = True
            self._back_to_fast_path()
            self.client.idle.append(self)
        self.client.slot_free(hold_s)

    def _back_to_fast_path(self) -> None:
        reads = self.client.reads
        if reads is None:
            return
        if self.slot >= 0:
            reads.end(self.slot)
        elif reads.adopt(self):
            self.client.loop.remove_reader(self.sock)
            self.reader = None

    def lost(self, error: str, detail: str) -> None:
        """The connection is gone, or given up."""
        if self.dead:
            return
        self.close()
        if not self.ready:
            self.client.failed(self, error, detail)
        elif self.item >= 0:
            stale = self.reused and error == "reset" and not self.num_reads()
            if stale and self.client.retry(self):
                return
            self.client.record(self, error, detail, False)
            self.item = -1
            self.client.slot_free(0.0)

    def close(self) -> None:
        if self.dead:
            return
        self.dead = True
        with contextlib.suppress(OSError, ValueError):
            if self.slot >= 0 and self.client.reads is not None:
                self.client.reads.release(self)
            else:
                self.client.loop.remove_reader(self.sock)
            if self.outgoing or not self.ready:
                self.client.loop.remove_writer(self.sock)
        self.sock.close()
        self.client.closed(self)


def _reason(e: OSError) -> str:
    return e.strerror or (os.strerror(e.errno) if e.errno else str(e)) or type(e).__name__
