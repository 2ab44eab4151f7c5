"""Finding the end of an HTTP/1.1 response: the only parsing that the hot path does.

The fast path knows two framings, each exactly: ``Transfer-Encoding: chunked`` without extensions or trailers, and
``Content-Length``. Everything else (interim responses, trailers, extensions, no length, HTTP/1.0, folded or doubled
headers, anything odd) answers ``ODD`` and goes to httptools (llhttp, Node's parser). Whole responses are parsed by
httptools after the run in any case; what is decided here is only where one ends.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class Framing(IntEnum):
    """How the end of the response is found."""

    HEAD = 0  # the head is not complete yet
    CHUNKED = 1
    LENGTH = 2
    ODD = 3  # not for the fast path: httptools decides


class Walk(IntEnum):
    NEED = 0
    DONE = 1
    ODD = 2


#: How every SSE answer of the OpenAI API ends inside chunked transfer. JSON cannot hold raw line ends, so these bytes do
#: not occur earlier in such a stream.
SSE_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"
HEAD_LIMIT_BYTES = 65536
_STATUS_LINE = re.compile(rb"HTTP/1\.1 ([2-5]\d\d)(?: [\t\x20-\x7e\x80-\xff]*)?\r\n")
_HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([\t\x20-\x7e\x80-\xff]*?)[ \t]*\r\n")
_SIZE = re.compile(rb"[0-9a-fA-F]{1,8}")
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked[ \t]*\r\n", re.I)


@dataclass(frozen=True, slots=True)
class Head:
    """What the hot path needs of a response's head."""

    framing: Framing
    status: int
    body_at: int
    length: int | None = None
    close: bool = False
    retry_after_s: float | None = None


_UNKNOWN = Head(Framing.ODD, 0, 0)


def read_head(data: bytes | bytearray) -> Head | None:
    """The head at the start of ``data``; None while it is not complete. Anything unusual has framing ``ODD``."""
    end = data.find(b"\r\n\r\n", 0, HEAD_LIMIT_BYTES)
    if end < 0:
        plausible = data[:9] == b"HTTP/1.1 "[: len(data)]
        return None if plausible and len(data) < HEAD_LIMIT_BYTES else _UNKNOWN
    raw = bytes(data[: end + 2])
    line = _STATUS_LINE.match(raw)
    if line is None:
        return _UNKNOWN
    status, at = int(line[1]), line.end()
    headers: dict[bytes, bytes] = {}
    while at < len(raw):
        field = _HEADER.match(raw, at)
        if field is None:
            return _UNKNOWN
        name = field[1].lower()
        if name in headers and name in (b"content-length", b"transfer-encoding", b"connection"):
            return _UNKNOWN
        headers[name] = field[2]
        at = field.end()
    return _framing(status, end + 4, headers)


def _framing(status: int, body_at: int, headers: dict[bytes, bytes]) -> Head:
    if status in (204, 304) or b"trailer" in headers or b"upgrade" in headers:
        return Head(Framing.ODD, status, body_at)
    connection = headers.get(b"connection", b"keep-alive").lower()
    if connection not in (b"keep-alive", b"close"):
        return Head(Framing.ODD, status, body_at)
    retry = _seconds(headers.get(b"retry-after"))
    coding, length = headers.get(b"transfer-encoding"), headers.get(b"content-length")
    close = connection == b"close"
    if coding is not None and coding.lower() == b"chunked" and length is None:
        return Head(Framing.CHUNKED, status, body_at, None, close, retry)
    if coding is None and length is not None and length.isdigit() and len(length) < 16:
        return Head(Framing.LENGTH, status, body_at, int(length), close, retry)
    return Head(Framing.ODD, status, body_at)


def _seconds(value: bytes | None) -> float | None:
    """Retry-After in seconds; the date form is left to the parser after the run."""
    if value is None or not re.fullmatch(rb"\d+(\.\d+)?", value):
        return None
    return float(value)


def walk_chunks(data: bytes | bytearray, at: int) -> tuple[int, Walk]:
    """Step over whole chunks from ``at``. Returns the position of the first chunk that is not complete, or the end of
    the body with ``DONE``. ``ODD`` at extensions, trailers and anything malformed."""
    total = len(data)
    while True:
        eol = data.find(b"\r\n", at, at + 10)
        if eol < 0:
            rest = bytes(data[at : at + 10])
            return at, Walk.NEED if re.fullmatch(rb"[0-9a-fA-F]{0,8}\r?", rest) and len(rest) < 10 else Walk.ODD
        text = bytes(data[at:eol])
        if not _SIZE.fullmatch(text):
            return at, Walk.ODD
        size = int(text, 16)
        after = eol + 2 + size
        if size == 0:
            tail = bytes(data[after : after + 2])
            if tail == b"\r\n":
                return after + 2, Walk.DONE
            return at, Walk.NEED if b"\r\n".startswith(tail) else Walk.ODD
        tail = bytes(data[after : after + 2])
        if after + 2 > total:
            return at, Walk.NEED if b"\r\n".startswith(tail) else Walk.ODD
        if tail != b"\r\n":
            return at, Walk.ODD
        at = after + 2


class ParsedResponse:
    """httptools' view of a response, fed piece by piece. Used for odd responses during the run, for all after it.

    ``body`` collects (piece number, bytes); ``done`` is set at the end of the final (not interim) message, and ``extra``
    when bytes follow it.
    """

    def __init__(self) -> None:
        import httptools

        self._parser = httptools.HttpResponseParser(self)
        self._errors: tuple[type[Exception], ...] = (httptools.HttpParserError, httptools.HttpParserUpgrade)
        self.headers: dict[str, str] = {}
        self.status = 0
        self.body: list[tuple[int, bytes]] = []
        self.done = False
        self.headers_done = False
        self.error: str | None = None
        self.extra = False
        self.num_fed = 0
        self._piece = 0
        self.has_length = False

    def feed(self, data: bytes, piece: int) -> None:
        """Feed the bytes of read number ``piece``; problems go to ``error``."""
        self._piece = piece
        self.num_fed += len(data)
        if self.error is not None:
            return
        if self.done:
            self.extra = self.extra or bool(data)
            return
        try:
            self._parser.feed_data(data)
        except self._errors as e:
            if not self.done:
                self.error = str(e) or type(e).__name__
            else:
                self.extra = True

    @property
    def until_close(self) -> bool:
        """The body has no length of its own: the end of the connection is its end."""
        return self.headers_done and not self.has_length

    # httptools' callbacks
    def on_message_begin(self) -> None:
        self.extra = self.extra or self.done

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.done:
            self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self.done:
            return
        self.status = self._parser.get_status_code()
        if self.status >= 200:
            self.headers_done = True
            chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
            self.has_length = chunked or "content-length" in self.headers or self.status in (204, 304)

    def on_body(self, data: bytes) -> None:
        if self.headers_done and not self.done:
            self.body.append((self._piece, data))

    def on_message_complete(self) -> None:
        if self.status >= 200:
            self.done = True
        else:
            self.headers.clear()


def parse_pieces(pieces: Any) -> ParsedResponse:
    """Parse a whole response given as an iterable of the bytes of each read."""
    parsed = ParsedResponse()
    for k, piece in enumerate(pieces):
        parsed.feed(bytes(piece), k)
    return parsed
