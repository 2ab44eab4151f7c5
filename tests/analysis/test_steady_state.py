"""Which part of a run counts."""

from __future__ import annotations

import numpy as np

from bench.analysis.columns import RequestColumns
from bench.analysis.steady_state import find_window, in_flight
from bench.records import Phase, RequestRecord


def request(index: int, sent: float, done: float | None, phase: Phase = "measured") -> RequestRecord:
    end = None if done is None else done
    return RequestRecord(index, phase, 10, 10, None, sent, sent + 0.1, end, end)


def closed_loop(concurrency: int, num: int, service_s: float = 1.0, ramp_s: float = 0.5) -> list[RequestRecord]:
    """A closed loop that fills over ``ramp_s`` and serves each request in ``service_s``."""
    free = [i * ramp_s / max(1, concurrency - 1) for i in range(concurrency)]
    out = []
    for i in range(num):
        slot = int(np.argmin(free))
        sent = free[slot]
        free[slot] = sent + service_s * (1 + 0.05 * (i % 3))
        out.append(request(i, sent, free[slot]))
    return out


def test_offline_counts_the_whole_batch() -> None:
    records = [request(0, 0.0, 5.0, "warmup"), request(1, 6.0, 9.0), request(2, 6.0, 11.0), request(3, 11.5, 14.0)]
    window = find_window(RequestColumns.of(records), "offline", 2)
    assert window is not None
    assert (window.start_s, window.end_s, window.kind, window.steady) == (6.0, 14.0, "batch", True)


def test_closed_loop_starts_at_full_concurrency_and_ends_at_the_last_admission() -> None:
    records = closed_loop(4, 60)
    window = find_window(RequestColumns.of(records), "closed_loop", 4)
    assert window is not None and window.steady and window.kind == "steady"
    assert window.start_s == 0.5  # the fourth was sent then
    assert window.end_s == max(r.sent_s for r in records if r.sent_s is not None)


def test_a_concurrency_never_reached_is_not_steady() -> None:
    window = find_window(RequestColumns.of(closed_loop(4, 60)), "closed_loop", 9)
    assert window is not None and not window.steady and "never reached" in window.reason
    assert window.kind == "whole"


def test_a_run_of_one_wave_is_not_steady() -> None:
    records = [request(i, 0.0, 5.0) for i in range(8)]
    window = find_window(RequestColumns.of(records), "closed_loop", 8)
    assert window is not None and not window.steady
    assert (window.start_s, window.end_s) == (0.0, 5.0)


def test_warmup_alone_is_nothing() -> None:
    assert find_window(RequestColumns.of([request(0, 0.0, 1.0, "warmup")]), "closed_loop", 1) is None
    assert find_window(RequestColumns.of([]), "offline", None) is None


def open_loop(rate: float, service_s: float, seconds: float, servers: int) -> list[RequestRecord]:
    rng = np.random.default_rng(5)
    due = np.cumsum(rng.exponential(1 / rate, int(rate * seconds)))
    free = np.zeros(servers)
    out = []
    for i, t in enumerate(due):
        k = int(free.argmin())
        start = max(t, free[k])
        free[k] = start + service_s
        out.append(request(i, float(t), float(free[k])))
    return out


def test_open_loop_below_capacity_is_steady() -> None:
    window = find_window(RequestColumns.of(open_loop(20, 0.2, 60, 8)), "open_loop", None)
    assert window is not None and window.steady
    assert window.start_s < 10 and window.length_s > 40


def test_open_loop_above_capacity_says_that_it_grows() -> None:
    window = find_window(RequestColumns.of(open_loop(60, 0.2, 60, 8)), "open_loop", None)
    assert window is not None and not window.steady and "growing" in window.reason


def test_in_flight_frees_a_slot_before_it_is_filled() -> None:
    times, level = in_flight(RequestColumns.of([request(0, 0.0, 1.0), request(1, 1.0, 2.0)]))
    assert level.max() == 1
    assert list(times) == [0.0, 1.0, 1.0, 2.0]


def test_a_server_that_dies_does_not_end_the_window_with_its_last_answer() -> None:
    """Refused connections were never sent, but they were tried: they belong to the window, its length and its errors."""
    served = closed_loop(2, 20)  # until about 10 s
    end = max(r.done_s or 0.0 for r in served)
    refused = [
        RequestRecord(100 + i, "measured", 10, 0, None, None, None, None, end + 0.1 * i, "connect")
        for i in range(1, 101)
    ]
    cut = RequestRecord(300, "measured", 10, 0, None, None, None, None, None, "aborted")
    c = RequestColumns.of([*served, *refused, cut])
    window = find_window(c, "closed_loop", 2)
    assert window is not None and window.steady
    assert window.end_s == end + 0.1 * 100
    counted = c.where((c.phase == "measured") & window.holds(c.due_s))
    assert np.count_nonzero(~counted.ok) == 100, "and what was never tried is not counted"


def test_a_refused_open_loop_counts_to_its_last_arrival() -> None:
    served = [
        RequestRecord(i, "measured", 10, 10, i / 10, i / 10, i / 10 + 0.05, i / 10 + 0.2, i / 10 + 0.2)
        for i in range(50)
    ]
    refused = [RequestRecord(i, "measured", 10, 0, i / 10, None, None, None, i / 10, "connect") for i in range(50, 150)]
    window = find_window(RequestColumns.of([*served, *refused]), "open_loop", None)
    assert window is not None and window.end_s == 14.9


def test_nothing_but_refused_connections_is_a_window_without_a_steady_part() -> None:
    refused = [RequestRecord(i, "measured", 10, 0, None, None, None, None, float(i), "connect") for i in range(5)]
    window = find_window(RequestColumns.of(refused), "closed_loop", 2)
    assert window is not None and not window.steady and "no request could be sent" in window.reason
