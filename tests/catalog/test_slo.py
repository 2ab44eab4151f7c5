"""SLOs: the grammar both ways, presets, and which requests are good."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.catalog.slo import METRICS, Slo, SloLimit, list_slo, load_slo, parse_slo
from bench.errors import BadInput, UnknownName


def test_the_grammar() -> None:
    s = parse_slo("TTFT p99 <= 500 ms and tpot P95 <= 40ms, e2e < 2 s for 95 % of requests")
    assert s.limits == (SloLimit("ttft", 0.5, 99.0), SloLimit("tpot", 0.04, 95.0), SloLimit("e2e", 2.0, None))
    assert (s.min_ratio, s.required_ratio) == (0.95, 0.95)
    assert parse_slo("ttft p99.9 <= 1 s").limits[0].percentile == 99.9
    assert parse_slo("ttft p99 <= 1 s and tpot p95 <= 1 s").required_ratio == 0.95
    assert parse_slo("ttft <= 1 s").required_ratio == 1.0


limits = st.builds(
    SloLimit,
    st.sampled_from(METRICS),
    st.integers(1, 100_000).map(lambda ms: ms / 1000),
    st.one_of(st.none(), st.sampled_from([50.0, 90.0, 95.0, 99.0, 99.9])),
)


@given(
    st.lists(limits, min_size=1, max_size=4, unique_by=lambda x: (x.metric, x.percentile)),
    st.sampled_from([None, 0.9, 0.99, 1.0]),
)
def test_text_and_back(found: list[SloLimit], share: float | None) -> None:
    slo = Slo(tuple(found), share)
    again = parse_slo(slo.text)
    assert again.min_ratio == (pytest.approx(share) if share else None)
    for a, b in zip(again.limits, slo.limits, strict=True):
        assert (a.metric, a.percentile) == (b.metric, b.percentile)
        assert a.limit_s == pytest.approx(b.limit_s, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ttft p99 <= 500", "cannot read"),
        ("", "cannot read"),
        ("ttft > 500 ms", "cannot read"),
        ("latency <= 500 ms", "unknown metric 'latency'"),
        ("ttft <= 500 min", "unknown unit 'min'"),
        ("ttft p100 <= 1 s", "percentile p100"),
        ("ttft p0 <= 1 s", "percentile p0"),
        ("ttft <= 0 ms", "above 0"),
        ("ttft <= 1 s for 101 % of requests", "at most 100"),
        ("ttft <= 1 s and ttft <= 2 s", "two limits on ttft"),
    ],
)
def test_what_is_not_an_slo(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        parse_slo(text)


def test_presets() -> None:
    names = {s.name for s in list_slo()}
    assert {"interactive-chat", "mlperf-llama2-70b-server", "mlperf-deepseek-r1-interactive"} <= names
    s = load_slo("mlperf-llama3.1-405b-interactive")
    assert s.limits == (SloLimit("ttft", 4.5, 99.0), SloLimit("tpot", 0.08, 99.0))
    assert all(s.source and s.as_of for s in list_slo())
    with pytest.raises(UnknownName, match="interactive-chat"):
        load_slo("interactive-chad")


def test_good_requests() -> None:
    s = parse_slo("ttft p99 <= 500 ms and tpot p95 <= 40 ms")
    assert s.request_meets(ttft=0.5, tpot=0.04)
    assert not s.request_meets(ttft=0.51, tpot=0.01)
    assert not s.request_meets(ttft=None, tpot=0.01)
    assert s.request_meets(ttft=0.1, tpot=None)  # one output token has no TPOT


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('name: mine\nslo: "ttft p99 <= 1 s"\nsource: contract\nas_of: 2026-01-01\n')
    assert load_slo(str(path)).name == "mine"
    path.write_text('name: mine\nslo: "ttft p99 <= 1"\nsource: contract\nas_of: 2026-01-01\n')
    with pytest.raises(BadInput, match=r"mine.yaml:2: slo: SLO: cannot read"):
        load_slo(str(path))
