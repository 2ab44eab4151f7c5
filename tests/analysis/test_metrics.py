"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.analysis import metrics as m
from bench.analysis.columns import RequestColumns
from bench.analysis.goodput import met_slo
from bench.catalog.slo import parse_slo
from bench.records import RequestRecord


def record(index: int = 0, **changes: object) -> RequestRecord:
    """Due at 1.0, sent at 1.1, first token at 1.5, last at 3.5, done at 3.6, ISL 100, OSL 21."""
    base: dict[str, object] = {
        "index": index, "phase": "measured", "isl": 100, "osl": 21, "due_s": 1.0, "sent_s": 1.1, "first_token_s": 1.5,
        "last_token_s": 3.5, "done_s": 3.6, "first_chunk_tokens": 1, "num_chunks": 21,
    }  # fmt: skip
    return RequestRecord(**(base | changes))  # type: ignore[arg-type]


def columns(*records: RequestRecord) -> RequestColumns:
    return RequestColumns.of(records)


def test_latencies_by_hand() -> None:
    c = columns(record())
    assert m.ttft_s(c)[0] == pytest.approx(0.5)
    assert m.ttft_service_s(c)[0] == pytest.approx(0.4)
    assert m.send_lateness_s(c)[0] == pytest.approx(0.1)
    assert m.e2e_s(c)[0] == pytest.approx(2.6)
    assert m.tpot_s(c)[0] == pytest.approx(2.0 / 20)


def test_tpot_leaves_out_the_tokens_of_the_first_chunk() -> None:
    # 21 tokens, 5 of them in the first chunk: 16 tokens took the 2 s after it
    assert m.tpot_s(columns(record(first_chunk_tokens=5)))[0] == pytest.approx(2.0 / 16)


@pytest.mark.parametrize(
    "changes", [{"osl": 1}, {"osl": 5, "first_chunk_tokens": 5}, {"osl": None}, {"error": "timeout"}]
)
def test_tpot_is_undefined_where_nothing_followed_the_first_chunk(changes: dict[str, object]) -> None:
    assert math.isnan(m.tpot_s(columns(record(**changes)))[0])


def test_closed_loop_ttft_counts_from_the_sending() -> None:
    c = columns(record(due_s=None))
    assert m.ttft_s(c)[0] == m.ttft_service_s(c)[0] == pytest.approx(0.4)


def test_failed_requests_are_never_in_a_latency() -> None:
    c = columns(record(error="reset"))
    for function in (m.ttft_s, m.ttft_service_s, m.e2e_s, m.tpot_s):
        assert math.isnan(function(c)[0])
    assert m.send_lateness_s(c)[0] == pytest.approx(0.1)  # the client did send it


def test_itl_is_the_gaps_within_requests() -> None:
    index = np.array([7, 8, 7, 8, 7, 9])
    t = np.array([1.0, 1.05, 1.2, 1.15, 1.5, 9.0])
    gaps = m.itl_s(index, t, np.array([7, 8]))
    assert sorted(gaps) == pytest.approx([0.1, 0.2, 0.3])


def test_tokens_of_a_window() -> None:
    c = columns(record())  # 1 token at 1.5, then 20 over 2 s: 10 a second
    assert m.output_tokens_in(c, 0, 10) == 21
    assert m.output_tokens_in(c, 0, 2.5) == pytest.approx(1 + 10)
    assert m.output_tokens_in(c, 2.0, 3.0) == pytest.approx(10)
    assert m.output_tokens_in(c, 4.0, 9.0) == 0
    assert m.input_tokens_in(c, 1.4, 1.6) == 100
    assert m.input_tokens_in(c, 1.6, 9.0) == 0
    assert m.completed_in(c, 0, 3.59) == 0
    assert m.completed_in(c, 0, 3.6) == 1


def test_a_single_token_counts_where_it_arrived() -> None:
    c = columns(record(osl=1, last_token_s=1.5))
    assert m.output_tokens_in(c, 1.0, 2.0) == 1
    assert m.output_tokens_in(c, 1.6, 2.0) == 0


@given(st.lists(st.floats(0.0, 20.0), min_size=1, max_size=6))
def test_tokens_of_adjoining_windows_add_up(cuts: list[float]) -> None:
    rng = np.random.default_rng(1)
    records = []
    for i in range(40):
        first = float(rng.uniform(0, 10))
        osl = int(rng.integers(1, 60))
        records.append(record(i, osl=osl, first_token_s=first, last_token_s=first + 0.05 * (osl - 1), done_s=first + 5))
    c = columns(*records)
    edges = [-1.0, *sorted(cuts), 30.0]
    # a boundary exactly on a first token would count it on both sides; random floats do not hit one
    total = sum(m.output_tokens_in(c, a, b) for a, b in pairwise(edges) if b > a)
    assert total == pytest.approx(float(c.osl.sum()))


def test_in_flight_mean() -> None:
    c = columns(record(0, sent_s=0.0, done_s=4.0), record(1, sent_s=2.0, done_s=6.0))
    assert m.in_flight_mean(c, 0.0, 4.0) == pytest.approx((4 + 2) / 4)


def test_goodput_counts_errors_as_not_met() -> None:
    c = columns(
        record(0),  # TTFT 0.5, TPOT 0.1
        record(1, first_token_s=1.9),  # TTFT 0.9
        record(2, error="timeout"),
        record(3, osl=1, last_token_s=1.5),  # TPOT undefined: only TTFT counts
        record(4, first_token_s=None),
    )
    met = met_slo(c, parse_slo("ttft p99 <= 600 ms and tpot p95 <= 100 ms"))
    # 2.0 s over 20 tokens is 100 ms to within rounding; give it room
    met = met_slo(c, parse_slo("ttft p99 <= 600 ms and tpot p95 <= 101 ms"))
    assert met.tolist() == [True, False, False, True, False]
    assert met_slo(c, parse_slo("e2e <= 1 s")).tolist() == [False] * 5
    assert met_slo(c, parse_slo("itl <= 101 ms")).tolist() == [True, True, False, True, True]


def test_every_metric_has_a_definition_and_a_direction() -> None:
    for key, d in m.METRICS.items():
        assert d.formula and d.title, key
        assert d.better in ("higher", "lower", "neither")
    assert "ttft_p99_s" in m.METRICS and m.METRICS["ttft_p99_s"].unit == "s"
