"""A response as it comes in: the bytes of its reads, their stamps, and where it ends.

This is the event loop's path; ``compiled_reads`` does the same in machine code for answers that it understands.
"""

from __future__ import annotations

from array import array

from bench.load.share import Limits
from bench.load.wire import SSE_END, Framing, Head, ParsedResponse, Walk, read_head, walk_chunks

#: In-flight bytes beyond which a response is written out in parts, so that memory stays bounded.
PART_BYTES = 1 << 17


class Incoming:
    """The response that a connection is receiving.

    ``item`` is the position (in this process's share of the schedule) of the request in flight, or -1. ``tail`` is what
    the received bytes must end with for the response to be possibly complete: empty until the head is read. ``base``
    bytes of it have been written out already.
    """

    __slots__ = (
        "base",
        "body_at",
        "body_left",
        "buf",
        "close_after",
        "dead",
        "ends",
        "framing",
        "idle_reads",
        "item",
        "last_read_ns",
        "parsed",
        "ready",
        "retry_after_s",
        "sent_ns",
        "stamps",
        "status",
        "tail",
        "walk_at",
    )

    def __init__(self) -> None:
        self.buf, self.stamps, self.ends = bytearray(), bytearray(), array("I")
        self.item = -1
        self.dead = self.ready = False
        self.last_read_ns = self.sent_ns = 0
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

    # What the connection does

    def finish(self, error: str | None, detail: str, *, until_close: bool = False) -> None:
        """The response is over, well or badly."""
        raise NotImplementedError

    def lost(self, error: str, detail: str) -> None:
        """The connection is gone, or given up."""
        raise NotImplementedError

    def drain(self) -> None:
        """Read until nothing is left."""
        raise NotImplementedError

    def unsolicited(self) -> None:
        """Bytes came that nobody asked for."""
        raise NotImplementedError

    def spill_part(self, keep: int, cut: int) -> None:
        """Write out the first ``keep`` reads, ``cut`` bytes."""
        raise NotImplementedError

    # Where the response ends

    def perhaps_complete(self) -> None:
        """Called when the bytes end as a complete response would."""
        if self.item < 0:
            self.unsolicited()
            return
        if self.framing == Framing.HEAD:
            head = read_head(self.buf)
            if head is None:
                return
            self.take_head(head)
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

    def take_head(self, head: Head) -> None:
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
            self.finish_at(len(self.buf) - at)
        elif state == Walk.ODD:
            self.hand_over()
        else:
            # Only bytes that end like a last chunk need another look from here on.
            self.tail = b"\r\n\r\n"

    def finish_at(self, extra: int) -> None:
        """The response is complete, and ``extra`` bytes follow it."""
        if extra:
            self.finish("malformed_http", f"{extra} bytes after the end of the response")
        else:
            self.finish(None, "")

    def hand_over(self) -> None:
        """From here on httptools says where the response ends."""
        self._to_parser()
        self._feed_parser()

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

    def check(self, now_ns: int, limits: Limits, look: bool) -> None:
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
        if now_ns - self.sent_ns > limits.total_ns:
            self.over_limit("total", limits)
        elif not has_body and now_ns - self.sent_ns > limits.first_ns:
            self.over_limit("first", limits)
        elif has_body and now_ns - self.last_read_ns > limits.stall_ns:
            self.over_limit("stall", limits)

    def over_limit(self, which: str, limits: Limits) -> None:
        """A time limit (``total``, ``first``, ``stall``) was passed."""
        if which == "total":
            self.lost("timeout", f"not complete {limits.total_s:g} s after it was sent")
        elif which == "first":
            self.lost("stall", f"no byte of the answer for {limits.first_ns / 1e9:g} s")
        else:
            self.lost("stall", f"no byte for {limits.stall_s:g} s in the middle of the answer")

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
        self.spill_part(keep, cut)
        rest = array("I", [e - cut for e in self.ends[keep:]])
        self.ends[:] = rest
        del self.stamps[: 16 * keep]
        del self.buf[:cut]
        self.base += cut
        self.walk_at -= cut
