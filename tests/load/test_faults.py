"""Every fault that the mock can play: what the record says, and that nothing hangs."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Callable
from typing import Any, get_args

import pytest

from bench.load.mock import Fault
from bench.load.mock_config import FAULT_KINDS
from bench.load.schedule import closed_loop
from bench.records import ERROR_CLASSES
from tests.load.conftest import make_requests, run

#: Fault -> (class of the record, part of its detail). None: not a fault, the answer must be read right.
EXPECTED: dict[str, tuple[str | None, str]] = {
    "refuse": ("reset", ""),
    "no_accept": ("connect_timeout", "no connection within 1 s"),
    "http_400": ("http_4xx", "400"),
    "http_401": ("http_4xx", "401"),
    "http_404": ("http_4xx", "404"),
    "http_429": ("http_429", "429"),
    "http_500": ("http_5xx", "500"),
    "http_503": ("http_5xx", "503"),
    "redirect": ("http_4xx", "307"),
    "reset_first": ("reset", ""),
    "reset_mid": ("reset", ""),
    "close_mid": ("reset", "closed before the response was complete"),
    "stall_first": ("stall", "no byte of the answer for 1 s"),
    "stall_mid": ("stall", "no byte for 0.6 s"),
    "malformed_http": ("malformed_http", ""),
    "malformed_chunk": ("malformed_http", ""),
    "malformed_sse": ("malformed_sse", "not JSON"),
    "truncated": ("truncated", "without [DONE]"),
    "no_done": ("truncated", "without [DONE]"),
    "wrong_usage": ("wrong_token_count", "usage says 5"),
    "wrong_osl": ("wrong_token_count", "usage says 6 tokens, 8 were asked for"),
    "no_usage": (None, ""),
    "server_error": ("server_error", "EngineCore died"),
    "garbage_after": ("malformed_http", "after the end"),
    "dribble": (None, ""),
    "trailers": (None, ""),
    "chunk_extension": (None, ""),
    "until_close": (None, ""),
    "content_length": (None, ""),
    "early_hints": (None, ""),
    "upper_case": (None, ""),
    "crlf_events": (None, ""),
    "split_events": (None, ""),
}


def test_the_table_is_complete() -> None:
    assert set(EXPECTED) == set(FAULT_KINDS)
    classes = {c for c, _ in EXPECTED.values() if c}
    elsewhere = {"connect", "timeout", "aborted", "engine_error"}  # tested below, or in-process engines only
    assert classes | elsewhere == set(ERROR_CLASSES)


@pytest.mark.parametrize("kind", FAULT_KINDS)
def test_fault_becomes_a_record(kind: str, serve_mock: Callable[..., Any]) -> None:
    error, detail = EXPECTED[kind]
    started = time.monotonic()
    with serve_mock(faults=(Fault(kind, retry_after_s=0.2),)) as url:  # type: ignore[arg-type]
        schedule = closed_loop(make_requests(4), 4)
        result = run(url, schedule)
    result.close()
    assert time.monotonic() - started < 12, "limits must hold"
    assert len(result.records) == 4, "every request is a record"
    for r in result.records:
        if kind == "refuse":
            # Accepted and reset at once: some see it while connecting, some while sending.
            assert r.error in ("reset", "connect")
            continue
        assert r.error == error, (r.error, r.error_detail)
        assert detail in (r.error_detail or "")
        if error is None:
            assert r.osl == 8 and r.num_chunks is not None and r.num_chunks >= 1
            assert r.first_token_s is not None and r.done_s is not None and r.sent_s is not None
            assert r.sent_s <= r.first_token_s <= r.last_token_s <= r.done_s  # type: ignore[operator]
        if kind == "http_429":
            assert r.retry_after_s == 0.2
        if kind == "no_usage":
            assert r.token_source == "chunks"
    expected_errors = 0 if error is None else 4
    assert sum(result.honesty.errors.values()) == expected_errors


def test_partial_answers_keep_what_arrived(serve_mock: Callable[..., Any]) -> None:
    with serve_mock(faults=(Fault("reset_mid", at_chunk=3),)) as url:
        result = run(url)
    result.close()
    assert {r.osl for r in result.records} == {3}
    assert all(r.first_token_s is not None for r in result.records)


def test_faults_hit_only_their_share(serve_mock: Callable[..., Any]) -> None:
    with serve_mock(faults=(Fault("http_500", every=4),)) as url:
        result = run(url, closed_loop(make_requests(40), 8))
    result.close()
    failed = sorted(r.index for r in result.records if r.error)
    assert failed == [3, 7, 11, 15, 19, 23, 27, 31, 35, 39]
    assert result.honesty.errors == {"http_5xx": 10}


def test_nobody_listens() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    result = run(f"http://127.0.0.1:{port}")
    result.close()
    assert {r.error for r in result.records} == {"connect"}
    assert all("refused" in (r.error_detail or "").lower() for r in result.records)
    for r in result.records:  # never sent, but every attempt has its moment: when the request got its slot
        assert r.sent_s is None and r.due_s is not None and r.done_s is not None and r.connect_s is not None
        assert 0 <= r.due_s <= r.done_s - r.connect_s


def test_total_limit(serve_mock: Callable[..., Any]) -> None:
    """A server that keeps sending, but too slowly: the total limit ends it."""
    from bench.load.driver import LoadOptions, drive
    from bench.load.mock import Delay
    from bench.load.share import Limits
    from bench.load.target import Target

    with serve_mock(itl=Delay(0.1)) as url:
        options = LoadOptions(limits=Limits(total_s=0.7, stall_s=5))
        result = drive(closed_loop(make_requests(2, osl=100), 2), Target(url, model="m"), options)
    result.close()
    assert {r.error for r in result.records} == {"timeout"}
    assert all(r.osl and 3 <= r.osl <= 8 for r in result.records)


def test_retry_after_is_honoured_in_a_closed_loop(serve_mock: Callable[..., Any]) -> None:
    with serve_mock(faults=(Fault("http_429", retry_after_s=0.5),)) as url:
        started = time.monotonic()
        result = run(url, closed_loop(make_requests(3), 1))
        took = time.monotonic() - started
    result.close()
    sent = sorted(r.sent_s for r in result.records if r.sent_s is not None)
    assert [b - a >= 0.5 for a, b in itertools.pairwise(sent)] == [True, True]
    assert took < 8


def test_a_connection_that_went_stale_is_replaced_once(serve_mock: Callable[..., Any]) -> None:
    """`close_after` servers: every answer on a fresh connection, none lost."""
    with serve_mock(faults=(Fault("until_close"),)) as url:
        result = run(url, closed_loop(make_requests(6), 1))
    result.close()
    assert [r.error for r in result.records] == [None] * 6
    assert result.honesty.num_connections >= 6


def test_error_classes_are_those_of_the_records() -> None:
    from bench.records import ErrorClass

    assert get_args(ErrorClass) == ERROR_CLASSES
