"""Cost per token: worked examples and what must hold for any input."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.decide.cost import (
    Price,
    rate_usd_per_s,
    split_by_price_ratio,
    split_by_time,
    token_cost,
    usd_per_million,
    usd_per_million_estimate,
)
from bench.errors import BadInput
from bench.records import Estimate

positive = st.floats(1e-2, 1e7)


def test_worked_examples() -> None:
    # one H100 at $4/h and 800 tokens/s; two A100 at $6/h together and 500 tokens/s
    assert usd_per_million(rate_usd_per_s(4.0, 1), 800) == pytest.approx(1.3889, abs=1e-4)
    assert usd_per_million(rate_usd_per_s(3.0, 2), 500) == pytest.approx(3.3333, abs=1e-4)
    assert usd_per_million(rate_usd_per_s(4.0, 1), 800, 0.5) == pytest.approx(2.7778, abs=1e-4)


def test_estimates_turn_round() -> None:
    e = usd_per_million_estimate(rate_usd_per_s(3.6, 1), Estimate(1000, 800, 1250, 0.95, "t", 3))
    assert (e.value, e.low, e.high) == (pytest.approx(1.0), pytest.approx(0.8), pytest.approx(1.25))
    assert usd_per_million_estimate(1.0, Estimate(10, 0.0, 20)).high is None
    assert usd_per_million_estimate(1.0, Estimate(10, None, None)).low is None


@given(positive, positive, positive, st.floats(0.1, 10))
def test_split_costs_add_up_to_the_whole(usd: float, prompt: float, output: float, ratio: float) -> None:
    per_input, per_output = split_by_price_ratio(usd, prompt, output, ratio)
    assert per_output == pytest.approx(ratio * per_input)
    assert (per_input * prompt + per_output * output) / 1e6 == pytest.approx(usd)


@given(positive, positive, positive, st.floats(0, 1))
def test_time_split_adds_up_too(usd: float, prompt: float, output: float, share: float) -> None:
    per_input, per_output = split_by_time(usd, prompt, output, share)
    assert (per_input * prompt + per_output * output) / 1e6 == pytest.approx(usd)


@given(positive, positive, st.floats(0.01, 1), st.floats(1.01, 10))
def test_cost_falls_with_throughput_and_utilisation(usd: float, rate: float, use: float, factor: float) -> None:
    assert usd_per_million(usd, rate * factor, use) < usd_per_million(usd, rate, use)
    assert usd_per_million(usd, rate, use) >= usd_per_million(usd, rate, 1.0)


def test_token_cost_keeps_its_parts_consistent() -> None:
    out, total = Estimate(1000, 900, 1100, 0.95, "t, 3 runs", 3), Estimate(3000, 2700, 3300, 0.95, "t, 3 runs", 3)
    full = token_cost(Price(2.0, "test"), 2, out, total, 2000.0)
    half = token_cost(Price(2.0, "test"), 2, out, total, 2000.0, utilisation=0.5)
    e = full.estimates
    assert e["cost_usd_per_million_output_tokens"].value == pytest.approx(4 / 3600 / 1000 * 1e6)
    assert e["cost_usd_per_million_blended_tokens"].value == pytest.approx(4 / 3600 / 3000 * 1e6)
    whole = 4 / 3600
    parts = (
        e["cost_usd_per_million_input_tokens"].value * 2000 + e["cost_usd_per_million_output_tokens_split"].value * 1000
    )
    assert parts / 1e6 == pytest.approx(whole)
    for key, value in e.items():
        assert half.estimates[key].value == pytest.approx(2 * value.value)
        assert value.low is not None and value.low < value.value < (value.high or 0)


@pytest.mark.parametrize("call", [
    lambda: rate_usd_per_s(-1.0, 1), lambda: rate_usd_per_s(1.0, 0), lambda: usd_per_million(1.0, 0.0),
    lambda: usd_per_million(1.0, float("nan")), lambda: usd_per_million(1.0, 1.0, 0.0), lambda: usd_per_million(1.0, 1.0, 1.5),
    lambda: split_by_price_ratio(1, 1, 1, 0), lambda: split_by_time(1, 1, 1, 1.5),
])  # fmt: skip
def test_nonsense_is_refused(call: object) -> None:
    with pytest.raises(BadInput):
        call()  # type: ignore[operator]
