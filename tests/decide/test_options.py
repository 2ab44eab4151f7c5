"""Adapters that share replicas, started hours, batch prices, simulated options, demand from a trace."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.config.decision import Decision
from bench.config.demand import Demand
from bench.decide.breakeven import crossing
from bench.decide.decision import compare
from bench.decide.options import Mix, SelfHost
from bench.decide.traffic import growth_factor, load_of
from bench.errors import BadInput
from bench.records import Estimate


def host(rate: float, usd: float, **more) -> SelfHost:  # type: ignore[no-untyped-def]
    return SelfHost("h", "H100-SXM", 1, usd, Estimate(rate, None, None), **more)


@given(rate=st.floats(10, 1e5), usd=st.floats(0.1, 20), volume=st.floats(1e4, 1e12), share=st.integers(1, 12))
def test_sharing_adapters_pay_together_what_one_would(rate: float, usd: float, volume: float, share: int) -> None:
    one, part = host(rate, usd), host(rate, usd, num_sharing=share)
    assert share * part.monthly_usd(volume) == pytest.approx(one.monthly_usd(share * volume))
    assert part.utilisation(volume) == pytest.approx(one.utilisation(share * volume))
    assert part.monthly_usd(volume) <= one.monthly_usd(volume) * (1 + 1e-9)


@settings(max_examples=200, deadline=None)
@given(
    rate=st.floats(50, 50_000), usd=st.floats(0.2, 20), per_million=st.floats(0.05, 30), fixed=st.one_of(st.just(0.0), st.floats(1, 5000)),
    share=st.integers(1, 4),
)  # fmt: skip
def test_started_hours_by_formula_and_on_the_curve(
    rate: float, usd: float, per_million: float, fixed: float, share: int
) -> None:
    option = host(rate, usd, billing="by_hour", whole_hours=True, fixed_usd_per_month=fixed, num_sharing=share)
    a, hour = per_million / 1e6, option.tokens_per_paid_hour / share

    def cheaper(volume: float) -> bool:
        return option.monthly_usd(volume) <= a * volume * (1 + 1e-9)

    found = crossing(option, a)
    if found.first_tokens is None:
        assert not any(cheaper(hour * k) for k in (1, 2, 10, 1000))
        return
    # the crossing may be the very end of a started hour, where rounding decides which side it falls on
    assert any(cheaper(found.first_tokens * f) for f in (1 - 1e-9, 1, 1 + 1e-9))
    ends = [hour * n for n in range(1, 150) if hour * n < found.first_tokens * (1 - 1e-9)]
    assert not any(cheaper(v) for v in [*(found.first_tokens * f for f in (0.2, 0.7, 0.999)), *ends])
    assert found.always_tokens is not None
    n = math.floor(found.always_tokens / hour)
    assert all(cheaper(hour * (n + k) * (1 + 1e-6)) for k in range(1, 20))


def decision(**more) -> Decision:  # type: ignore[no-untyped-def]
    base = {
        "name": "d", "why": "a test", "mix": "3:1", "apis": ["example-gpt-4o"],
        "options": [{"name": "h", "gpu": "H100-SXM", "usd_per_gpu_hour": 4, "tokens_per_s": 800}],
    }  # fmt: skip
    return Decision.model_validate({**base, **more})


def test_batch_and_cached_prices() -> None:
    found = compare(decision(apis=["example-gpt-4o", {"name": "example-gpt-4o", "batch": True, "cached_input": 0.5}]))
    plain, batch = found.apis
    mix = Mix(3, 1)
    assert plain.monthly_usd(4e6, mix) == pytest.approx(3 * 2.5 + 10)
    assert batch.monthly_usd(4e6, mix) == pytest.approx((1.5 * 2.5 + 1.5 * 1.25 + 10) / 2)
    assert "batch" in batch.name and "50% cached" in batch.name


def test_fine_tuning_and_adapters_reach_the_cost() -> None:
    tune = {"one_off_usd": 1200, "months": 12, "num_adapters_sharing": 4}
    found = compare(
        decision(
            options=[{"name": "h", "gpu": "H100-SXM", "usd_per_gpu_hour": 4, "tokens_per_s": 800, "fine_tune": tune}]
        )
    )
    assert found.options[0].option.monthly_usd(1e6) == pytest.approx(2880 / 4 + 100)


def test_a_dedicated_endpoint_is_an_option_by_its_price() -> None:
    option = {
        "name": "dedicated",
        "gpu": "H100-SXM",
        "price": "together-h100..b200-dedicated-endpoint-dedicated",
        "tokens_per_s": 800,
    }
    found = compare(decision(options=[option]))
    assert found.options[0].option.usd_per_gpu_hour == 3.99 and "Together" in found.options[0].price.source


def test_a_simulated_option_is_labelled_and_has_an_interval() -> None:
    simulate = {"model": "llama-3.1-8b", "isl": 300, "osl": 100, "concurrencies": [1, 8, 32]}
    found = compare(decision(options=[{"name": "s", "gpu": "H100-SXM", "usd_per_gpu_hour": 4, "simulate": simulate}]))
    o = found.options[0]
    assert o.option.origin == "simulated" and "concurrency 32" in o.rate.source and o.rate.curve is not None
    e = o.option.tokens_per_s
    assert e.low is not None and e.high is not None and e.low < e.value < e.high
    rates = [p.total_tokens_per_s.value for p in o.rate.curve.points]
    speeds = [p.output_tokens_per_s_per_user for p in o.rate.curve.points]
    assert rates == sorted(rates) and speeds == sorted(speeds, reverse=True)
    # one user alone: tokens/s per user and per replica differ only by the time to the first token
    assert o.rate.curve.points[0].output_tokens_per_s.value == pytest.approx(speeds[0], rel=0.15)
    assert {w.code for w in found.warnings} >= {"simulated"}
    pair = found.pairs[0]
    assert pair.first is None or pair.first.low is not None


def trace_demand(path: Path, **more) -> Demand:  # type: ignore[no-untyped-def]
    candidates = [{"gpu": "H100-SXM", "tensor_parallel_sizes": [1]}]
    return Demand.model_validate(
        {"model": "llama-3.1-8b", "slo": "ttft p99 <= 1 s", "candidates": candidates, "trace": str(path), **more}
    )


def write_trace(path: Path, times_s: list[float]) -> None:
    rows = (
        {"timestamp": int(t * 1000), "input_length": 100 + i % 7, "output_length": 50, "hash_ids": []}
        for i, t in enumerate(times_s)
    )
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_a_trace_gives_rates_and_lengths(tmp_path: Path) -> None:
    # 1 request/s for 10 minutes, in whose middle a minute has 5/s
    times = sorted([float(t) for t in range(600)] + [300 + k / 4 for k in range(240)])
    write_trace(tmp_path / "t.jsonl", times)
    load = load_of(trace_demand(tmp_path / "t.jsonl"))
    assert load.peak_per_s == pytest.approx(5, rel=0.02)
    assert sum(load.rates_per_s) / 24 == pytest.approx(840 / 599, rel=1e-6)
    assert load.traffic.osl.mean_tokens == 50 and load.traffic.isl.max_tokens == 106
    twice = load_of(trace_demand(tmp_path / "t.jsonl", trace_time_scale=0.5, peak_window_s=30))
    assert twice.peak_per_s == pytest.approx(10, rel=0.02)
    with pytest.raises(BadInput, match="peak window"):
        load_of(trace_demand(tmp_path / "t.jsonl", peak_window_s=6000))


def test_a_trace_of_a_day_gives_its_shape(tmp_path: Path) -> None:
    times = [h * 3600 + k * 3600 / n for h in range(24) for n in (10 + 5 * (h % 3),) for k in range(n)]
    write_trace(tmp_path / "t.jsonl", sorted([*times, 86_399.0]))
    load = load_of(trace_demand(tmp_path / "t.jsonl", peak_window_s=3600))
    assert load.rates_per_s[0] == pytest.approx(10 / 3600) and load.rates_per_s[2] == pytest.approx(20 / 3600)
    assert max(load.rates_per_s) <= load.peak_per_s


def test_growth_compounds() -> None:
    base = {
        "model": "llama-3.1-8b",
        "slo": "ttft p99 <= 1 s",
        "candidates": [{"gpu": "H100-SXM"}],
        "isl": 10,
        "osl": 10,
        "peak_rate_per_s": 10,
    }
    grown = Demand.model_validate({**base, "growth_per_month": 0.1, "horizon_months": 12})
    assert growth_factor(grown) == pytest.approx(1.1**12)
    assert load_of(grown).grown(2.0).peak_per_s == 20


def test_what_flips_a_decision_is_where_costs_meet() -> None:
    from bench.decide.sensitivity import decision_flips

    found = compare(decision())  # 1 x H100 at $4/h and 800 tokens/s against $4.375 per million
    hosts = [o.option for o in found.options]
    cheap = 2880 / (found.apis[0].usd_per_token(found.mix))
    flips = {f.lever: f for f in decision_flips(hosts, found.apis, found.mix, cheap / 4)}
    assert flips["gpu_price"].factor == pytest.approx(1 / 4, rel=0.03) and flips["gpu_price"].winner == "h"
    assert flips["api_price"].factor == pytest.approx(4, rel=0.03)
    assert flips["volume"].factor == pytest.approx(4, rel=0.03)
    assert "throughput" not in flips  # one replica has room enough: it costs the same, however fast
    back = {f.lever: f for f in decision_flips(hosts, found.apis, found.mix, cheap * 2)}
    assert back["gpu_price"].factor == pytest.approx(2, rel=0.03) and back["gpu_price"].winner == found.apis[0].name
    assert back["volume"].factor == pytest.approx(1 / 2, rel=0.03)
