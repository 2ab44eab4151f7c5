"""One keep-alive connection: the hot path. A read is a stamp, an append and a look at the last bytes, nothing else.

The kernel's receive timestamp says when the bytes arrived, however late this process woke up for them. Several chunks
that wait together are one read with one stamp: the last one's.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import time
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.load.clocks import STAMP_SPACE, enable_kernel_stamps, pack_realtime_ns
from bench.load.wire import SSE_END, Framing, Head, ParsedResponse, Walk, read_head, walk_chunks

if TYPE_CHECKING:
    from bench.load.client import Client

READ_BYTES = 65536
#: In-flight bytes beyond which a response is written out in parts, so that memory stays bounded.
PART_BYTES = 1 << 17


class Connection:
    """A socket and the response it is receiving.

    ``item`` is the position (in this process's share of the schedule) of the request in flight, or -1. ``tail`` is what
    the received bytes must end with for the response to be possibly complete: empty until the head is read.
    """

    __slots__ = (
        "base",
        "body_at",
        "body_left",
        "buf",
        "client",
        "close_after",
        "connect_ns",
        "dead",
        "ends",
        "framing",
        "idle_reads",
        "item",
        "kernel_stamps",
        "last_read_ns",
        "opened_ns",
        "outgoing",
        "parsed",
        "reader",
        "ready",
        "retry_after_s",
        "reused",
        "sent_ns",
        "sock",
        "stamps",
        "status",
        "tail",
        "tls",
        "tls_in",
        "tls_out",
        "walk_at",
    )

    def __init__(self, client: Client) -> None:
        self.client = client
        self.buf, self.stamps, self.ends = bytearray(), bytearray(), array("I")
        self.item = -1
        self.dead = self.ready = self.reused = self.kernel_stamps = False
        self.outgoing = b""
        self.connect_ns = 0
        self.last_read_ns = 0
        self.tls: ssl.SSLObject | None = None
        self.reader: Callable[[], None] | None = None
        self.reset_response()

    def reset_response(self) -> None:
        """Ready for the next response."""
        self.tail = b""
        self.framing = Framing.HEAD
        self.base = self.walk_at = self.body_at = self.body_left = self.idle_reads = 0
        self.parsed: ParsedResponse | None = None
        self.status = 0
        self.close_after = False
        self.retry_after_s: float | None = None
        self.buf.clear()
        self.stamps.clear()
        del self.ends[:]

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
            self.reader = self._plain_reader()
            self.client.loop.add_reader(self.sock, self.reader)
            self._opened()
            return
        self.tls_in, self.tls_out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.tls_in, self.tls_out, server_hostname=self.client.target.host)
        self.reader = self._tls_reader()
        self.client.loop.add_reader(self.sock, self.reader)
        self._handshake()

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
            self.lost("connect", f"TLS handshake failed: {e.reason or e}")
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
        self.sent_ns = self.last_read_ns = time.monotonic_ns()
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
            # A reset may be announced here while the answer that explains it is still to be read.
            self.client.loop.call_soon(self._lost_after_send, _reason(e))
            return
        if sent < len(data):
            self.outgoing = data[sent:]
            self.client.loop.add_writer(self.sock, self._writable)

    def _lost_after_send(self, reason: str) -> None:
        if not self.dead and self.item >= 0 and not self.ends and not self.base:
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

    # Where the response ends

    def perhaps_complete(self) -> None:
        """Called when the bytes end as a complete response would."""
        if self.item < 0:
            self.client.unsolicited(self)
            return
        if self.framing == Framing.HEAD:
            head = read_head(self.buf)
            if head is None:
                return
            self._take_head(head)
        if self.framing == Framing.CHUNKED:
            if self.buf.endswith(SSE_END):
                self.finish(None, "")
                return
            self._walk()
        elif self.framing == Framing.LENGTH:
            left = self.body_left - self.base - len(self.buf)
            if left == 0:
                self.finish(None, "")
            elif left < 0:
                self.finish("malformed_http", f"{-left} bytes after the end of the response")
        else:
            self._feed_parser()

    def _take_head(self, head: Head) -> None:
        self.framing, self.status, self.body_at = head.framing, head.status, head.body_at
        self.close_after, self.retry_after_s = head.close, head.retry_after_s
        if head.framing == Framing.CHUNKED:
            self.tail, self.walk_at = b"\r\n", head.body_at
        elif head.framing == Framing.LENGTH:
            self.body_left = head.body_at + (head.length or 0)
        else:
            self._to_parser()

    def _walk(self) -> None:
        at, state = walk_chunks(self.buf, self.walk_at)
        self.walk_at = at
        if state == Walk.DONE:
            extra = len(self.buf) - at
            self.finish(
                "malformed_http" if extra else None, f"{extra} bytes after the end of the response" if extra else ""
            )
        elif state == Walk.ODD:
            self._to_parser()
            self._feed_parser()
        else:
            # Only bytes that end like a last chunk need another look from here on.
            self.tail = b"\r\n\r\n"

    def _to_parser(self) -> None:
        """Hand over to httptools: from here on it alone says where the response ends."""
        self.framing, self.tail, self.close_after = Framing.ODD, b"", True
        self.parsed = ParsedResponse()
        if self.base:
            self.finish("malformed_http", "the framing of a long response became unreadable")

    def _feed_parser(self) -> None:
        if self.parsed is None or self.item < 0:
            return
        parsed = self.parsed
        parsed.feed(bytes(self.buf[parsed.num_fed - self.base :]), 0)
        self.status = parsed.status
        if parsed.error is not None:
            self.finish("malformed_http", parsed.error)
        elif parsed.done:
            self.finish("malformed_http" if parsed.extra else None, "bytes after the end" if parsed.extra else "")

    def ended(self) -> None:
        """The peer closed the connection in an orderly way."""
        if not self.ready:
            self.lost("connect", "closed during the handshake")
        elif self.item < 0:
            self.lost("", "")
        elif self.parsed is not None and self.parsed.until_close and self.parsed.error is None:
            self.finish(None, "", until_close=True)
        else:
            self.lost("reset", "closed before the response was complete")

    def check(self, now_ns: int, first_ns: int, stall_ns: int, timeout_ns: int, look: bool) -> None:
        """The watchdog's look (every tick): limits on the first body byte, on pauses after it and on the whole; ends that
        did not look like one; long responses."""
        if self.item < 0 or not self.ready:
            return
        reads = len(self.ends) + self.base
        if reads != self.idle_reads:
            self.idle_reads, self.last_read_ns = reads, now_ns
        else:
            # Quiet since the last tick: an end that did not look like one, or a reset that nobody told us of.
            if self.framing == Framing.CHUNKED:
                self._walk()
            if look and self.item >= 0 and not self.dead:
                self.drain()
            if self.item < 0 or self.dead:
                return
        if len(self.buf) > PART_BYTES:
            self._write_part()
        has_body = self.base > 0 or len(self.buf) > self.body_at
        if now_ns - self.sent_ns > timeout_ns:
            self.lost("timeout", f"not complete {timeout_ns / 1e9:g} s after it was sent")
        elif not has_body and now_ns - self.sent_ns > first_ns:
            self.lost("stall", f"no byte of the answer for {first_ns / 1e9:g} s")
        elif has_body and now_ns - self.last_read_ns > stall_ns:
            self.lost("stall", f"no byte for {stall_ns / 1e9:g} s in the middle of the answer")

    def _write_part(self) -> None:
        """Spill what has been read, keep what the search for the end still needs."""
        if self.framing == Framing.CHUNKED:
            self.walk_at, state = walk_chunks(self.buf, self.walk_at)
            if state != Walk.NEED:
                self.perhaps_complete()
                return
        elif self.framing == Framing.HEAD:
            return
        # What stays in the buffer must start where a read started: cut at the last read that ended before walk_at.
        limit = self.walk_at if self.framing == Framing.CHUNKED else len(self.buf)
        keep = len(self.ends)
        while keep and self.ends[keep - 1] > limit:
            keep -= 1
        if not keep:
            return
        cut = self.ends[keep - 1]
        self.client.spill.part(
            self.client.positions[self.item], self.stamps[: 16 * keep], self.ends[:keep], self.buf[:cut]
        )
        rest = array("I", [e - cut for e in self.ends[keep:]])
        self.ends[:] = rest
        del self.stamps[: 16 * keep]
        del self.buf[:cut]
        self.base += cut
        self.walk_at -= cut

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
            self.client.idle.append(self)
        self.client.slot_free(hold_s)

    def lost(self, error: str, detail: str) -> None:
        """The connection is gone, or given up."""
        if self.dead:
            return
        self.close()
        if not self.ready:
            self.client.failed(self, error, detail)
        elif self.item >= 0:
            stale = self.reused and error == "reset" and not self.ends and not self.base
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
            self.client.loop.remove_reader(self.sock)
            self.client.loop.remove_writer(self.sock)
        self.sock.close()
        self.client.closed(self)


def _reason(e: OSError) -> str:
    return e.strerror or (os.strerror(e.errno) if e.errno else str(e)) or type(e).__name__
