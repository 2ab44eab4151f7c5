"""Several engines: nobody is lost or served twice, pools keep prefills away from decodes, and a fleet of one is one engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.catalog.hardware import load_hardware
from bench.catalog.model import load_model
from bench.errors import BadInput
from bench.records import Request, Schedule
from bench.sim.fleets import FleetShape, link_bytes_per_s, transfer_s_per_token
from bench.sim.inputs import Fleet, Replica, SimResult, prepare
from bench.sim.loop import simulate
from bench.sim.scheduler import SchedulerConfig
from bench.sim.setup import engine_setup
from tests.sim import step_times

MODEL, H100 = load_model("llama-3.1-8b"), load_hardware("H100-SXM")
POOLS = ("prefill", "prefill", "decode", "decode")


def prompts_cost(coef: Any, *load: Any) -> tuple[float, float]:
    """10 ms a step, and 1 ms for every 10 prompt tokens."""
    return 0.010 + 1e-4 * load[1], 0.001


def fleet(roles: tuple[str, ...], routing: str = "least_loaded", **fields: Any) -> Fleet:
    transfer = {k: fields.pop(k, 0.0) for k in ("transfer_latency_s", "transfer_s_per_token")}
    base: dict[str, Any] = {
        "max_num_seqs": 32, "max_num_batched_tokens": 1024, "max_model_len": 1024, "num_blocks": 4000,
        "enable_prefix_caching": False,
    }  # fmt: skip
    config = SchedulerConfig(**{**base, **fields})
    return Fleet(tuple(Replica(config, np.zeros(1), r) for r in roles), routing, **transfer)  # type: ignore[arg-type]


def schedule(n: int = 60, seed: int = 0, rate_per_s: float = 40.0) -> Schedule:
    rng = np.random.default_rng(seed)
    requests = tuple(Request(i, int(rng.integers(2, 60)), int(rng.integers(100, 400))) for i in range(n))
    return Schedule("open_loop", requests, np.cumsum(rng.exponential(1 / rate_per_s, n)))


def gaps(r: SimResult) -> np.ndarray:
    every = np.diff(r.token_s)
    every[r.token_offsets[1:-1] - 1] = np.nan
    return every[~np.isnan(every)]


@pytest.mark.parametrize("routing", ["round_robin", "least_loaded", "prefix_aware"])
@pytest.mark.parametrize("roles", [("both",) * 3, POOLS, ("prefill", "decode")])
def test_every_request_is_served_once(roles: tuple[str, ...], routing: str) -> None:
    offered = schedule()
    r = simulate(prepare(offered, fleet(roles, routing, transfer_s_per_token=1e-5)), prompts_cost)
    assert sorted(r.completion_order.tolist()) == list(range(60))
    assert r.num_output_tokens.tolist() == [q.osl for q in offered.requests]
    assert all(roles[k] != "prefill" for k in r.replica)
    prompt_tokens = sum(q.isl or 0 for q in offered.requests)
    outputs = sum(q.osl for q in offered.requests)
    pooled = "prefill" in roles
    # a decode replica computes the last prompt token again, a step like any decode
    assert r.steps["prefill_tokens"].sum() == prompt_tokens
    assert r.steps["decode_requests"].sum() == outputs - (0 if pooled else len(offered.requests))


def test_decodes_of_a_pool_are_not_disturbed_by_prompts() -> None:
    together = simulate(prepare(schedule(), fleet(("both",) * 4)), prompts_cost)
    apart = simulate(prepare(schedule(), fleet(POOLS)), prompts_cost)
    assert gaps(together).max() > 0.025  # a prompt of some hundred tokens came between
    assert gaps(apart).max() == pytest.approx(0.010, abs=2e-3)
    in_pool = np.isin(apart.steps["replica"], [2, 3])
    assert apart.steps["prefill_tokens"][in_pool].sum() == 0 and apart.steps["decode_requests"][~in_pool].sum() == 0


def test_the_transfer_shows_in_the_time_to_first_token_and_nowhere_else() -> None:
    one = Schedule("closed_loop", (Request(0, 20, 300),), None, 1)
    plain = simulate(prepare(one, fleet(("both",))), prompts_cost)
    still = simulate(prepare(one, fleet(("prefill", "decode"))), prompts_cost)
    moved = simulate(
        prepare(one, fleet(("prefill", "decode"), transfer_latency_s=0.05, transfer_s_per_token=1e-3)), prompts_cost
    )
    # without a transfer a pool of one and one is the plain loop, but for the step that computes the last prompt token again
    assert still.first_token_s[0] == pytest.approx(plain.first_token_s[0] + 0.011)
    assert gaps(still)[2:-1] == pytest.approx(gaps(plain)[2:-1])
    assert moved.first_token_s[0] - still.first_token_s[0] == pytest.approx(0.05 + 300 * 1e-3)
    assert gaps(moved) == pytest.approx(gaps(still))


def test_caches_leave_a_prefill_replica_one_after_the_other() -> None:
    two = Schedule("offline", (Request(0, 5, 200), Request(1, 5, 200)), np.zeros(2))
    r = simulate(prepare(two, fleet(("prefill", "decode"), transfer_s_per_token=1e-3)), prompts_cost)
    assert r.first_token_s[1] - r.first_token_s[0] == pytest.approx(0.2, abs=0.02)
    both = simulate(prepare(two, fleet(("prefill", "prefill", "decode"), transfer_s_per_token=1e-3)), prompts_cost)
    assert both.first_token_s[1] == pytest.approx(both.first_token_s[0], abs=0.012)


def test_a_fleet_of_one_is_one_engine_and_ranks_are_engines() -> None:
    one = engine_setup(MODEL, H100, {"max_model_len": 2048})
    again = engine_setup(MODEL, H100, {"max_model_len": 2048}, shape=FleetShape(1, "prefix_aware"))
    ranks = engine_setup(MODEL, H100, {"max_model_len": 2048, "data_parallel_size": 3})
    three = engine_setup(MODEL, H100, {"max_model_len": 2048}, shape=FleetShape(3))
    assert (one.num_gpus, ranks.num_gpus, three.num_gpus) == (1, 3, 3)
    for a, b in ((one, again), (ranks, three)):
        left, right = (simulate(prepare(schedule(), s.fleet()), step_times.step_time_s) for s in (a, b))
        assert np.array_equal(left.token_s, right.token_s, equal_nan=True)
        assert np.array_equal(left.replica, right.replica)


def test_bytes_and_links() -> None:
    shape = FleetShape(prefill=1, decode=2, kv_link="ndr")
    # Llama 3.1 8B: 2 x 8 heads x 128 x 2 bytes x 32 layers = 131,072 bytes a token
    assert transfer_s_per_token(shape, MODEL, H100, None, 1, 1) == pytest.approx(131072 / 50e9)
    assert transfer_s_per_token(shape, MODEL, H100, "fp8", 2, 1) == pytest.approx(131072 / 4 / 50e9)
    assert transfer_s_per_token(FleetShape(2), MODEL, H100, None, 1, 1) == 0.0
    assert link_bytes_per_s("nvlink", H100) == 450e9 and link_bytes_per_s("PCIe", H100) == 63e9
    assert link_bytes_per_s("40 GB/s", H100) == 40e9 and link_bytes_per_s("400Gb/s", H100) == 50e9
    setup = engine_setup(MODEL, H100, {"max_model_len": 2048}, shape=shape)
    assert setup.num_gpus == 3 and setup.fleet().transfer_s_per_token == pytest.approx(131072 / 50e9)
    assert [r.role for r in setup.fleet().replicas] == ["prefill", "decode", "decode"]
    assert setup.facts()["fleet"]["kv_link"] == "ndr"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prefill": 1}, "decode pool"),
        ({"prefill": 1, "decode": 1}, "link"),
        ({"engines": 2, "prefill": 1, "decode": 1, "kv_link": "ndr"}, "not both"),
        ({"kv_link": "ndr"}, "no KV cache moves"),
        ({"engines": 0}, "at least one"),
    ],
)
def test_fleets_that_cannot_be_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        FleetShape(**fields)


def test_links_that_cannot_be_are_refused() -> None:
    for name, device in (("string", H100), ("nvlink", load_hardware("L4")), ("0 GB/s", H100)):
        with pytest.raises(BadInput, match="kv_link"):
            link_bytes_per_s(name, device)
