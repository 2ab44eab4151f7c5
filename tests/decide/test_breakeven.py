"""Break-even by formula against break-even found on the curve, and the worked example's figures."""

from __future__ import annotations

import datetime
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bench.catalog.prices import ApiPrice
from bench.decide.breakeven import break_even, crossing
from bench.decide.options import ApiOption, Mix, SelfHost, parse_volume
from bench.errors import BadInput
from bench.records import Estimate


def api(price_in: float, price_out: float, **more) -> ApiOption:  # type: ignore[no-untyped-def]
    price = ApiPrice(
        "test/api", "USD", "test", datetime.date(2026, 1, 1), None, "", False, "Test", "api", price_in, None, price_out, None, None, None
    )  # fmt: skip
    return ApiOption(price, **more)


def host(rate: float, usd: float, gpus: int = 1, **more) -> SelfHost:  # type: ignore[no-untyped-def]
    return SelfHost("h", "H100-SXM", gpus, usd, Estimate(rate, None, None), **more)


def test_the_figures_of_the_worked_example() -> None:
    mix, volume = Mix.parse("1:2"), parse_volume("10M")
    assert api(2.5, 10).monthly_usd(volume, mix) == pytest.approx(75.0)
    two_a100 = host(500, 3.0, 2, billing="by_hour")
    assert two_a100.monthly_usd(volume) == pytest.approx(33.333, abs=1e-3)
    assert two_a100.usd_per_million(volume) == pytest.approx(3.333, abs=1e-3)
    h100 = host(800, 4.0, billing="by_hour")
    assert h100.monthly_usd(volume) == pytest.approx(13.889, abs=1e-3)
    assert h100.usd_per_million(volume) == pytest.approx(1.389, abs=1e-3)
    assert host(800, 4.0).monthly_usd(volume) == pytest.approx(2880)
    assert api(0.35, 0.35).monthly_usd(volume, mix) == pytest.approx(3.5)
    assert api(0.9, 0.9).monthly_usd(volume, mix) == pytest.approx(9.0)


rates = st.floats(50, 50_000)
prices = st.floats(0.2, 20)


@settings(max_examples=300, deadline=None)
@example(
    rate=50.0, usd=0.2, gpus=1, per_million=1.1112324282813746, least=1, fixed=735.0, peak=1.0
)  # on a stair's last token
@given(
    rate=rates,
    usd=prices,
    gpus=st.integers(1, 8),
    per_million=st.floats(0.05, 30),
    least=st.integers(1, 4),
    fixed=st.one_of(st.just(0.0), st.floats(1, 50_000)),
    peak=st.floats(1, 5),
)
def test_formula_equals_curve(
    rate: float, usd: float, gpus: int, per_million: float, least: int, fixed: float, peak: float
) -> None:
    option = host(rate, usd, gpus, min_replicas=least, fixed_usd_per_month=fixed, peak_to_mean=peak)
    a = per_million / 1e6
    found = crossing(option, a)
    capacity = option.capacity_tokens_per_month

    def cheaper(volume: float) -> bool:
        return option.monthly_usd(volume) <= a * volume * (1 + 1e-9)

    if found.first_tokens is None:
        assert a * capacity <= option.usd_per_replica_month
        assert not any(cheaper(capacity * k) for k in (1, 2, 3, 7, 50, 1000))
        return
    assert found.always_tokens is not None and found.always_tokens >= found.first_tokens
    # it is cheaper there (just above, where a stair begins; a hair above its end the next one has begun), and nowhere below
    assert cheaper(found.first_tokens) or cheaper(found.first_tokens * (1 + 1e-9))
    steps = [found.first_tokens * f for f in (0.1, 0.5, 0.9, 0.999)]
    ends = [capacity * n for n in range(1, 200) if capacity * n < found.first_tokens * (1 - 1e-9)]
    assert not any(cheaper(v) for v in [*steps, *ends])
    # from always_tokens on it stays cheaper: checked right after each of the next stairs begins, the worst places
    n = math.floor(found.always_tokens / capacity)
    worst = [found.always_tokens * 1.0001] + [capacity * (n + k) * (1 + 1e-6) for k in range(1, 30)]
    assert all(cheaper(v) for v in worst)


@settings(max_examples=100, deadline=None)
@given(rate=rates, usd=prices, volume=st.floats(1e5, 1e12), factor=st.floats(1.01, 5))
def test_cost_falls_with_throughput_and_utilisation_and_rises_with_price(
    rate: float, usd: float, volume: float, factor: float
) -> None:
    base = host(rate, usd)
    assert host(rate * factor, usd).monthly_usd(volume) <= base.monthly_usd(volume)
    assert host(rate, usd * factor).monthly_usd(volume) > base.monthly_usd(volume)
    assert host(rate, usd, max_utilisation_ratio=0.5).monthly_usd(volume) >= base.monthly_usd(volume)
    by_hour = host(rate, usd, billing="by_hour")
    assert by_hour.monthly_usd(volume) <= base.monthly_usd(volume) * (1 + 1e-9)
    assert base.monthly_usd(volume) >= base.num_replicas(volume) * base.usd_per_replica_month * (1 - 1e-12)
    assert 0 < base.utilisation(volume) <= 1 + 1e-9


def test_the_interval_of_the_crossing_follows_the_throughput() -> None:
    option = SelfHost("h", "H100-SXM", 1, 4.0, Estimate(1500, 900, 2200, num_runs=3), fixed_usd_per_month=4000)
    result = break_even(option, api(2.5, 10), Mix.parse("1:2"))
    assert result.first is not None and result.first.low is not None and result.first.high is not None
    assert result.first.low <= result.first.value <= result.first.high
    weak = SelfHost("h", "H100-SXM", 1, 4.0, Estimate(150, 140, 160))
    assert break_even(weak, api(0.4, 0.4), Mix(1, 1)).first is None


@pytest.mark.parametrize("text", ["", "1", "a:b", "-1:2", "0:0", "1:2:3"])
def test_wrong_mixes(text: str) -> None:
    with pytest.raises(BadInput):
        Mix.parse(text)


@pytest.mark.parametrize("text", ["", "0", "-5M", "ten", "10X", "nan"])
def test_wrong_volumes(text: str) -> None:
    with pytest.raises(BadInput):
        parse_volume(text)


def test_wrong_options() -> None:
    for wrong in (
        {"usd": -1.0},
        {"rate": 0.0},
        {"gpus": 0},
        {"peak_to_mean": 0.5},
        {"max_utilisation_ratio": 0.0},
        {"min_replicas": 0},
    ):
        with pytest.raises(BadInput):
            host(**{"rate": 100.0, "usd": 1.0, **wrong})  # type: ignore[arg-type]
