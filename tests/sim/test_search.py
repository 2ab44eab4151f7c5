"""The search finds what an exhaustive look finds, and explains it from what it simulated."""

from __future__ import annotations

import pytest

pytest.importorskip("numba")

from bench.catalog.hardware import load_hardware
from bench.catalog.model import load_model
from bench.catalog.slo import load_slo
from bench.errors import BadInput
from bench.sim.compiled import simulate
from bench.sim.fleets import FleetShape
from bench.sim.search import search, usd_per_million
from bench.sim.search_explain import explain
from bench.sim.search_points import Draws
from bench.sim.search_space import Demand, Space
from bench.sim.setup import engine_setup

H100, A100 = load_hardware("H100-SXM"), load_hardware("A100-80-SXM")
MODEL = load_model("llama-3.1-8b")


def test_closed_loop_under_an_slo() -> None:
    slo = load_slo("ttft p99 <= 500 ms and tpot p99 <= 20 ms")
    found = search(MODEL, Space((H100, A100), (1, 2), max_gpus=2), Demand(512, 128), simulate, slo=slo)
    best = found.ranked[0]
    good = [p for p in found.points if p.broken is None]
    assert best.score == max(p.score for p in good)
    assert best.setup.hardware.name == "H100-SXM" and best.num_gpus == 2
    assert found.confirmed is not None and found.confirmed.broken is None
    assert found.confirmed.values["tpot_p99_s"] <= 0.020
    # one level more of the same engine breaks the SLO, and the explanation says so
    above = [p for p in found.points if p.setup is best.setup and p.level > best.level]
    assert above and above[0].broken is not None
    text = "\n".join(explain(found, "throughput"))
    assert str(above[0].level) in text and "A100-80-SXM" in text


def test_replicas_for_a_rate_by_cost() -> None:
    slo = load_slo("ttft p99 <= 2 s and tpot p99 <= 30 ms")
    prices = {"H100-SXM": 2.5, "A100-80-SXM": 1.5}
    space = Space((H100, A100), (1,), max_gpus=8)
    demand = Demand(1024, 128, rate_per_s=20.0)
    found = search(MODEL, space, demand, simulate, objective="cost", slo=slo, price_per_gpu_hour=prices)
    by_gpu = {p.setup.hardware.name: p for p in found.ranked}
    assert set(by_gpu) == {"H100-SXM", "A100-80-SXM"}
    assert by_gpu["A100-80-SXM"].num_engines > by_gpu["H100-SXM"].num_engines
    costs = [usd_per_million(p, prices[p.setup.hardware.name]) for p in found.ranked]
    assert costs == sorted(costs)


def test_what_cannot_be_is_said() -> None:
    big = load_model("llama-3.1-405b")
    with pytest.raises(BadInput, match="does not fit"):
        search(big, Space((H100,), (8,)), Demand(512, 128), simulate)
    with pytest.raises(BadInput, match="goodput"):
        search(MODEL, Space((H100,), (1,)), Demand(512, 128), simulate, objective="goodput")
    found = search(MODEL, Space((H100,), (1,)), Demand(512, 128), simulate, slo=load_slo("ttft p99 <= 1 ms"))
    assert not found.ranked and found.points[0].broken is not None
    with pytest.raises(BadInput, match="no price"):
        search(MODEL, Space((H100,), (1,)), Demand(64, 16), simulate, objective="cost")


def test_pools_are_tried_beside_plain_fleets() -> None:
    slo = load_slo("ttft p99 <= 1 s and tpot p99 <= 12 ms")
    space = Space((H100,), (1,), max_gpus=4, kv_link="nvlink")
    found = search(MODEL, space, Demand(2048, 128), simulate, slo=slo)
    assert {p.pools for p in found.points} == {None, "1:1", "1:2", "2:1", "1:3", "3:1"}
    assert all(p.num_gpus <= 4 for p in found.points)
    # a short time per token beside long prompts is what pools are for
    assert found.ranked[0].pools is not None
    assert "pools none instead of" in "\n".join(explain(found, "throughput"))
    at_rate = search(MODEL, space, Demand(2048, 128, rate_per_s=12.0), simulate, slo=slo)
    shapes = [p.shape for p in at_rate.points if p.shape.disaggregated]
    assert shapes and {s.prefill + s.decode for s in shapes} <= {2, 3, 4}
    assert at_rate.confirmed is not None and at_rate.confirmed.broken is None


def test_a_router_that_follows_prefixes_finds_more_in_the_cache() -> None:
    draws = Draws(Demand(1024, 16, prefix_tokens=512, prefix_groups=40))
    hits = {}
    for routing in ("round_robin", "least_loaded", "prefix_aware"):
        shape = FleetShape(4, routing)  # type: ignore[arg-type]
        setup = engine_setup(MODEL, H100, {"max_model_len": 2048}, shape=shape)
        result = simulate(draws.inputs(setup.fleet(), 200, 8, None))
        hits[routing] = int(result.num_hit_tokens.sum())
    assert hits["prefix_aware"] > 1.2 * max(hits["round_robin"], hits["least_loaded"])
