"""Plans: the SLO is met at the stated demand and missed at 1.5 times the capacity; bad demands get one line."""

from __future__ import annotations

import pytest

from bench.catalog.hardware import load_hardware
from bench.catalog.model import load_model
from bench.catalog.slo import load_slo
from bench.config.demand import Demand
from bench.decide.capacity import ReplicaSpec, Traffic, capacity, replica_model, run_fleet
from bench.decide.plan import make_plan
from bench.errors import BadInput
from bench.sim.setup import engine_setup
from bench.workload.lengths import FixedLength

SLO = "ttft p99 <= 1 s and tpot p95 <= 50 ms"


def demand(**more) -> Demand:  # type: ignore[no-untyped-def]
    base = {
        "model": "llama-3.1-8b",
        "peak_rate_per_s": 60,
        "isl": 500,
        "osl": 60,
        "slo": SLO,
        "headroom": 0.0,
        "spare_replicas": 0,
        "candidates": [{"gpu": g, "tensor_parallel_sizes": [1]} for g in ("H100-SXM", "A100-80-SXM")],
    }
    return Demand.model_validate({**base, **more})


@pytest.fixture(scope="module")
def plan():  # type: ignore[no-untyped-def]
    return make_plan(demand())


def test_met_at_the_demand_and_missed_at_one_and_a_half(plan) -> None:  # type: ignore[no-untyped-def]
    assert len(plan.fleets) == 2
    for fleet in plan.fleets:
        assert fleet.at_peak is not None and fleet.at_peak.met
    # with several replicas and no head-room, rounding up cannot hide half as much load again
    slim = max(plan.fleets, key=lambda f: f.cost.num_serving)
    assert slim.cost.num_serving >= 2
    model = replica_model(slim.spec, 560)
    limit = slim.capacity_per_s * slim.cost.num_serving
    verdict = run_fleet(
        model, slim.cost.num_serving, Traffic(FixedLength(500), FixedLength(60)), 1.5 * limit, load_slo(SLO)
    )
    assert not verdict.met


def test_cheapest_first_and_labelled(plan) -> None:  # type: ignore[no-untyped-def]
    costs = [f.cost.always_usd_per_month for f in plan.fleets]
    assert costs == sorted(costs)
    assert all(f.origin == "simulated" for f in plan.fleets)
    assert any(w.code == "simulated" for w in plan.warnings)
    assert plan.fleets[1].name in plan.why_runner_up_lost


def test_capacity_is_where_the_slo_turns() -> None:
    spec = ReplicaSpec(load_hardware("A100-80-SXM"), load_model("llama-3.1-8b"))
    traffic, slo = Traffic(FixedLength(500), FixedLength(60)), load_slo(SLO)
    found = capacity(spec, traffic, slo)
    assert found.rate_per_s is not None and found.verdict is not None and found.verdict.met
    assert not run_fleet(found.model, 1, traffic, found.rate_per_s * 1.1, slo).met  # type: ignore[arg-type]
    tighter = capacity(spec, traffic, load_slo("ttft p99 <= 1 s and tpot p95 <= 20 ms"))
    assert (tighter.rate_per_s or 0) < found.rate_per_s
    longer = capacity(spec, Traffic(FixedLength(2000), FixedLength(60)), slo)
    assert (longer.rate_per_s or 0) < found.rate_per_s


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slo": "ttft p99 <= 1 ms"}, "misses the SLO"),
        ({"model": "llama-3.1-405b"}, "no candidate can serve"),
        ({"slo": "itl p99 <= 50 ms"}, "give the limit as tpot"),
        ({"candidates": [{"gpu": "H100-SXM", "price": "nobody"}]}, "unknown GPU price"),
        ({"candidates": [{"gpu": "H999"}]}, "H999"),
    ],
)
def test_what_cannot_be_planned_gets_one_line(change: dict, words: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(BadInput) as caught:
        make_plan(demand(**change))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.next_step


def test_a_plan_without_head_room_is_met_at_its_demand_and_missed_at_one_and_a_half() -> None:
    """With many replicas rounding up hides next to nothing: the plan's own checks must say both."""
    found = make_plan(demand(peak_rate_per_s=330, candidates=[{"gpu": "H100-SXM", "tensor_parallel_sizes": [1]}]))
    fleet = found.fleets[0]
    assert fleet.cost.num_serving >= 4
    assert fleet.at_peak is not None and fleet.at_peak.met
    assert fleet.beyond is not None and not fleet.beyond.met


def test_a_replica_takes_requests_in_one_at_a_time() -> None:
    """The HTTP front end is that of a predicted engine, one a replica: tiny requests are bound by it, not by the GPU."""
    spec = ReplicaSpec(load_hardware("H100-SXM"), load_model("tiny-llama"))
    model = replica_model(spec, 64)
    assert not isinstance(model, str)
    one, three = model.fleet(1), model.fleet(3)
    served = engine_setup(spec.model, spec.hardware, {"max_model_len": 512}, over_http=True).fleet()
    assert one.front_end_s == served.front_end_s > 0 and one.request_before_s == served.request_before_s
    assert three.front_end_s == pytest.approx(one.front_end_s / 3)
    slo, traffic = load_slo("ttft p99 <= 1 s"), Traffic(FixedLength(32), FixedLength(1))
    limit = 1 / one.front_end_s
    # a burst of Poisson arrivals waits a little before the limit; beyond it the queue grows with the run
    below, above = (run_fleet(model, 1, traffic, r * limit, slo).values for r in (0.8, 2.0))
    assert max(below.values()) < 0.1 < 0.5 * 1500 / (2 * limit) < max(above.values())
