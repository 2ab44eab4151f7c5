"""The fast path against llhttp: it says where a response ends exactly as the parser does, or hands over."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bench.load.parse import events_of
from bench.load.wire import Framing, ParsedResponse, Walk, parse_pieces, read_head, walk_chunks

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

payloads = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=40),
        st.sampled_from(
            [b"0\r\n\r\n", b"\r\n0\r\n\r\n", b"data: [DONE]\n\n", b"\r\n", b"5\r\nabc", b'data: {"a":1}\n\n']
        ),
    ),
    max_size=6,
)


def chunked(parts: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in parts) + b"0\r\n\r\n"


def fast_end(data: bytes) -> int | None:
    """Where the fast path says that the response ends; None: not yet, or handed over."""
    head = read_head(data)
    if head is None or head.framing == Framing.ODD:
        return None
    if head.framing == Framing.LENGTH:
        end = head.body_at + (head.length or 0)
        return end if len(data) >= end else None
    at, state = walk_chunks(data, head.body_at)
    return at if state == Walk.DONE else None


@settings(max_examples=300, deadline=None)
@given(payloads, st.lists(st.integers(1, 30), min_size=1, max_size=30))
def test_chunked_end_is_where_llhttp_says(parts: list[bytes], cuts: list[int]) -> None:
    """Read by read: the fast path reports the end at exactly the read at which httptools does, whatever the splits."""
    data = HEAD + chunked(parts)
    parser, at, k = ParsedResponse(), 0, 0
    while at < len(data):
        step = cuts[k % len(cuts)]
        parser.feed(data[at : at + step], k)
        at, k = at + step, k + 1
        assert (fast_end(data[:at]) is not None) == parser.done, at
    assert parser.done and b"".join(b for _, b in parser.body) == b"".join(parts)
    assert fast_end(data) == len(data)


@settings(max_examples=600, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 200), st.sampled_from(["replace", "insert", "delete"]), payloads)
@example(b"\x00", 9, "replace", [])
@example(b" ", 20, "insert", [b"a"])
def test_damaged_responses_are_never_misread(junk: bytes, where: int, how: str, parts: list[bytes]) -> None:
    """If the fast path says complete, llhttp says complete, with the same end; otherwise it must have handed over."""
    data = HEAD + chunked(parts or [b"x"])
    where %= len(data)
    if how == "replace":
        data = data[:where] + junk + data[where + len(junk) :]
    elif how == "insert":
        data = data[:where] + junk + data[where:]
    else:
        data = data[:where] + data[where + len(junk) :]
    end = fast_end(data)
    if end is None:
        return
    parser = parse_pieces([data[:end]])
    assert parser.error is None and parser.done
    early = parse_pieces([data[: end - 1]])
    assert not early.done


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                [
                    b"Content-Length",
                    b"content-length",
                    b"Transfer-Encoding",
                    b"Connection",
                    b"Trailer",
                    b"X-A",
                    b"X A",
                    b"Retry-After",
                    b" Folded",
                    b"Upgrade",
                    b"Content-Encoding",
                ]
            ),
            st.sampled_from(
                [
                    b"3",
                    b"chunked",
                    b"Chunked",
                    b"gzip, chunked",
                    b"close",
                    b"keep-alive",
                    b"+3",
                    b"3, 3",
                    b"0x3",
                    b"",
                    b"upgrade",
                    b"identity",
                    b"\x003",
                    b"3 ",
                ]
            ),
        ),
        max_size=4,
    ),
    st.sampled_from(
        [
            b"HTTP/1.1 200 OK",
            b"HTTP/1.0 200 OK",
            b"HTTP/1.1 204 No Content",
            b"HTTP/1.1 103 X",
            b"HTTP/1.1 2000 X",
            b"HTTP/1.1 200",
        ]
    ),
)
def test_heads(fields: list[tuple[bytes, bytes]], line: bytes) -> None:  # fmt: skip
    """Whatever the head: the fast path never sees an end that llhttp does not see."""
    head = line + b"\r\n" + b"".join(b"%b: %b\r\n" % f for f in fields) + b"\r\n"
    for body in (b"abc", b"3\r\nabc\r\n0\r\n\r\n"):
        data = head + body
        end = fast_end(data)
        if end is not None:
            parser = parse_pieces([data[:end]])
            assert parser.error is None and parser.done, data


def test_odd_things_are_handed_over() -> None:
    odd = [
        b"HTTP/1.1 103 Early Hints\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n",
        b"220 smtp\r\n\r\n",
        b"S",
    ]
    for data in odd:
        head = read_head(data)
        assert head is not None and head.framing == Framing.ODD, data
    for incomplete in (b"", b"HTT", b"HTTP/1.1 200 OK\r\nContent-Le"):
        assert read_head(incomplete) is None
    assert walk_chunks(b"5;x=y\r\nabcde\r\n0\r\n\r\n", 0)[1] == Walk.ODD
    assert walk_chunks(b"0\r\nX: y\r\n\r\n", 0)[1] == Walk.ODD
    assert walk_chunks(b"1_0\r\n", 0)[1] == Walk.ODD
    assert walk_chunks(b"-1\r\n", 0)[1] == Walk.ODD


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text(alphabet="ab {}:", max_size=8), max_size=6),
    st.lists(st.integers(1, 12), min_size=1, max_size=20),
    st.sampled_from(["\n", "\r\n"]),
)
def test_events_and_the_reads_that_completed_them(texts: list[str], cuts: list[int], eol: str) -> None:
    data = "".join(f"data: {t}{eol}{eol}" for t in texts).encode()
    pieces, at, k = [], 0, 0
    while at < len(data):
        step = cuts[k % len(cuts)]
        pieces.append((k, data[at : at + step]))
        at, k = at + step, k + 1
    events = events_of(pieces)
    assert [e.decode().strip("\r\n") for _, e in events] == [f"data: {t}".strip("\r\n") for t in texts]
    # The read of an event is the one that holds its last byte.
    end = 0
    for read, event in events:
        end += len(event)
        before = sum(len(p) for i, p in pieces if i < read)
        assert before < end <= before + len(dict(pieces)[read])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
def test_pieces_join(size: int) -> None:
    data = HEAD + chunked([b"data: 1\n\n", b"data: [DONE]\n\n"])
    parsed = parse_pieces(data[i : i + size] for i in range(0, len(data), size))
    assert parsed.done and parsed.status == 200 and not parsed.extra
