"""Fleet sizing and cost: hand-made cases and properties."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.decide.fleet import Rival, day_of_rates, fleet_cost, flips, replicas_for, with_redundancy
from bench.decide.ownership import FineTune, Owned, owned_hour
from bench.errors import BadInput


def test_replicas_by_hand() -> None:
    assert replicas_for(50, 21, 0.15) == 3
    assert replicas_for(50, 25, 0.0) == 2  # an exact fit needs no third
    assert replicas_for(50.1, 25, 0.0) == 3
    assert replicas_for(0, 25, 0.0) == 1
    for wrong in ((-1, 1, 0), (1, 0, 0), (1, 1, 1)):
        with pytest.raises(BadInput):
            replicas_for(*wrong)


def test_redundancy_by_hand() -> None:
    assert with_redundancy(3, 1, 1) == 4
    assert with_redundancy(4, 0, 2) == 8  # either zone alone carries all
    assert with_redundancy(4, 0, 3) == 6  # two of three zones carry 4
    assert with_redundancy(5, 1, 3) == 9


@given(n=st.integers(1, 200), spare=st.integers(0, 5), zones=st.integers(1, 6))
def test_one_zone_may_be_lost(n: int, spare: int, zones: int) -> None:
    total = with_redundancy(n, spare, zones)
    assert total >= n + spare
    if zones > 1:
        assert total % zones == 0 and total - total // zones >= n


def test_the_day() -> None:
    assert day_of_rates(10, None, None) == (10,) * 24
    shape = tuple(range(1, 25))
    rates = day_of_rates(48, None, tuple(float(x) for x in shape))
    assert max(rates) == 48 and rates[0] == 2
    spread = day_of_rates(10, 5, None)
    assert max(spread) == 10 and sum(spread) / 24 == pytest.approx(5)


def cost(rates: tuple[float, ...], **more: float):  # type: ignore[no-untyped-def]
    base = {"capacity_per_s": 10.0, "num_serving": 5, "num_replicas": 6, "gpus_per_replica": 2, "usd_per_gpu_hour": 3.0}
    base |= {"tokens_per_request": 1000.0, "headroom": 0.0, "engine_start_s": 0.0, **more}
    return fleet_cost(rates_per_s=rates, **base)  # type: ignore[arg-type]


def test_cost_by_hand() -> None:
    flat = cost((50.0,) * 24)
    assert flat.always_usd_per_month == 6 * 2 * 3 * 720 == flat.scaled_usd_per_month
    assert flat.tokens_per_month == 50 * 720 * 3600 * 1000
    assert flat.utilisation_ratio == pytest.approx(50 / 60)
    half = cost((50.0,) * 12 + (10.0,) * 12)
    assert half.scaled_replica_hours_per_day == 12 * 6 + 12 * 2
    started = cost((50.0,) * 12 + (10.0,) * 12, engine_start_s=1800.0)
    assert started.scaled_replica_hours_per_day == 12 * 6 + 12 * 2 + 4 * 0.5


@settings(max_examples=200)
@given(rates=st.lists(st.floats(0.0, 50.0), min_size=24, max_size=24), start=st.floats(0, 7200))
def test_autoscaling_never_costs_more_and_never_less_than_its_parts(rates: list[float], start: float) -> None:
    if sum(rates) <= 0:
        return
    c = cost(tuple(rates), engine_start_s=start)
    assert c.scaled_usd_per_month <= c.always_usd_per_month * (1 + 1e-9)
    least = 24 * (1 + 1) * 2 * 3.0 * 30  # at least one serving and one spare replica at every hour
    assert c.scaled_usd_per_month >= least * (1 - 1e-9)
    assert 0 < c.utilisation_ratio <= c.scaled_utilisation_ratio * (1 + 1e-9)


def test_flips_are_where_the_curves_cross() -> None:
    a, b = Rival("a", 10, 3.0, 0, 1, 0.0), Rival("b", 10, 3.6, 0, 1, 0.0)
    f = flips(a, [b], 1000)
    assert f.price_factor == pytest.approx(1.2, rel=0.025) and f.price_winner == "b"
    assert f.throughput_factor is not None and f.throughput_factor == pytest.approx(1 / 1.2, rel=0.03)
    assert f.more_volume_factor is None  # both scale alike: only rounding could flip it, and 1000 is even
    assert flips(a, [], 10).price_factor is None


def test_owned_hour_by_hand() -> None:
    parts = owned_hour(Owned(capex_usd=25_920, life_years=3, power_w=1000, usd_per_kwh=0.1, pue=1.5, spare_ratio=0.1))
    assert parts.capital_usd == pytest.approx(25_920 * 1.1 / (36 * 720))
    assert parts.power_usd == pytest.approx(0.15)
    assert parts.total_usd == pytest.approx(1.1 + 0.15)


money = st.floats(0, 1e5)


@given(capex=money, power=st.floats(0, 3000), hosting=money, staff=st.floats(0, 10), spare=st.floats(0, 1))
def test_total_is_never_below_its_parts(capex: float, power: float, hosting: float, staff: float, spare: float) -> None:
    p = owned_hour(Owned(capex, 4, power, 0.12, 1.3, hosting, spare, staff, 80))
    parts = (p.capital_usd, p.power_usd, p.hosting_usd, p.staff_usd)
    assert all(x >= 0 for x in parts) and p.total_usd >= max(parts)


def test_owned_and_fine_tune_refuse_nonsense() -> None:
    for wrong in ({"capex_usd": -1}, {"life_years": 0}, {"pue": 0.5}, {"power_w": float("nan")}, {"resale_ratio": 2}):
        with pytest.raises(BadInput):
            Owned(**{"capex_usd": 1, "life_years": 1, "power_w": 1, "usd_per_kwh": 1, **wrong})  # type: ignore[arg-type]
    with pytest.raises(BadInput):
        FineTune(-1, 12)
    tune = FineTune(1200, 12, 4)
    assert tune.usd_per_month == 100 and tune.usd_per_million(10e6) == 10 and tune.share_of_serving_usd(400) == 100
