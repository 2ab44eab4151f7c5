"""When a late event loop makes the client the limit, and when it is only told."""

from __future__ import annotations

import io
from typing import Any

import pytest

from bench.cli.load_progress import ProgressLine
from bench.load.driver import Progress
from bench.load.honesty import Honesty, assess
from bench.load.schedule import closed_loop, open_loop
from bench.records import RequestRecord, Schedule
from tests.load.conftest import make_requests

LATE_NS = [30_000_000] * 100


def judged(schedule: Schedule, late_s: float = 0.0, **facts: Any) -> Honesty:
    base = {
        "event_loop": "uvloop", "receive_path": "compiled", "real_time": True, "real_time_refused": False, "prepare_s": 0.1, "num_compiled": 4, "cpu_s": 0.1, "wall_s": 1.0,
        "tick_lag_ns": LATE_NS, "read_lag_ns": [50_000] * 100, "num_connections": 2, "num_retries": 0,
        "num_unsolicited": 0, "num_reads_with_tokens": 80, "num_events": 80, "num_isl_differs": 0, "num_first_merged": 0,
        "num_streamed": 40, "num_kernel_stamped": 4, "num_stamped": 4, "clock_steps_ns": [], "clock_spread_ns": 0,
    }  # fmt: skip
    records = [
        RequestRecord(
            index=i,
            phase="measured",
            isl=5,
            osl=8,
            due_s=float(i),
            sent_s=i + late_s,
            first_token_s=i + 0.5,
            last_token_s=i + 1.0,
            done_s=i + 1.0,
        )
        for i in range(40)
    ]
    return assess(schedule, [{**base, **facts}], records)


def test_lag_that_touches_no_number_is_a_note() -> None:
    for schedule in (open_loop(make_requests(4), 10.0), closed_loop(make_requests(4), 2)):
        h = judged(schedule)
        assert not h.client_limited and len(h.notes) == 1 and "late by 30.0 ms" in h.notes[0]
    quiet = judged(closed_loop(make_requests(4), 2), tick_lag_ns=[1000] * 100)
    assert not quiet.client_limited and quiet.notes == ()


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"num_kernel_stamped": 0}, "so are the stamps"),
        ({"num_kernel_stamped": 2}, "so are the stamps"),
        ({"num_first_merged": 2}, "upper bound"),
        ({"read_lag_ns": LATE_NS}, "went out late"),
    ],
)
def test_lag_that_reaches_a_number_is_a_limit(facts: dict[str, Any], said: str) -> None:
    h = judged(closed_loop(make_requests(4), 2), **facts)
    assert h.client_limited and said in h.reasons[0] and h.notes == ()
    assert "real-time priority" not in h.reasons[0]
    ordinary = judged(closed_loop(make_requests(4), 2), **facts, real_time=False, real_time_refused=True)
    assert "allow them real-time priority" in ordinary.reasons[-1]
    remote = judged(closed_loop(make_requests(4), 2), **facts, real_time=False)
    assert "real-time priority" not in remote.reasons[-1]


def test_late_sends_of_an_open_loop_are_a_limit_whatever_the_stamps() -> None:
    h = judged(open_loop(make_requests(4), 10.0), late_s=0.005)
    assert h.client_limited and "sent late by 5.00 ms" in h.reasons[0]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_told_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("bench.cli.load_progress.time.monotonic", lambda: now[0])
    screen, pipe = Terminal(), io.StringIO()
    line, silent = ProgressLine(screen), ProgressLine(pipe)
    for k in range(3):
        for each in (line, silent):
            each(Progress(float(k), 100, 10 * k, k, 8, 1000 * k, "main"))
        now[0] += 1
    assert "20 of 100 done, 2 errors, 8 in flight, 10.0 requests/s, 1,000 reads/s" in screen.getvalue()
    line(Progress(4.0, 100, 100, 2, 0, 9000, "parse"))
    assert screen.getvalue().endswith("\r") and pipe.getvalue() == ""
