"""Virtual time: what overlaps and what waits, exact to the last bit where it can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from bench.errors import BadInput
from bench.load.arrivals import due_times
from bench.records import EngineStep, Request, Schedule, StopRule
from bench.sim import compiled
from bench.sim.arrival_limited import at_speed, served_share, throughput_interval
from bench.sim.inputs import Fleet, Replica, SimInputs, SimResult, prepare
from bench.sim.interface import Interval
from bench.sim.loop import simulate
from bench.sim.outputs import chunk_columns, request_records, step_columns
from bench.sim.router import Router
from bench.sim.scheduler import SchedulerConfig
from tests.sim import step_times


def fixed(gpu_s: float, host_s: float) -> Callable[..., tuple[float, float]]:
    return lambda coef, *load: (gpu_s, host_s)


def fleet(num: int = 1, routing: str = "round_robin", roles: tuple[str, ...] | None = None, **fields: Any) -> Fleet:
    base: dict[str, Any] = {
        "max_num_seqs": 64, "max_num_batched_tokens": 512, "max_model_len": 512, "num_blocks": 2000,
        "enable_prefix_caching": False,
    }  # fmt: skip
    config = SchedulerConfig(**{**base, **fields})
    roles = roles or ("both",) * num
    return Fleet(tuple(Replica(config, np.zeros(1), r) for r in roles), routing)  # type: ignore[arg-type]


def requests(n: int, isl: int = 16, osl: int = 11, **fields: Any) -> tuple[Request, ...]:
    return tuple(Request(i, osl, isl, **fields) for i in range(n))


def gaps(r: SimResult, i: int = 0) -> np.ndarray:
    return np.diff(r.token_s[r.token_offsets[i] : r.token_offsets[i + 1]])


@pytest.mark.parametrize(
    ("gpu_s", "host_s", "asynchronous", "period_s"),
    [(0.010, 0.002, True, 0.010), (0.002, 0.010, True, 0.010), (0.010, 0.002, False, 0.012)],
)
def test_the_period_is_the_longer_of_device_and_host_or_their_sum(
    gpu_s: float, host_s: float, asynchronous: bool, period_s: float
) -> None:
    schedule = Schedule("closed_loop", requests(1, osl=40), None, 1)
    r = simulate(prepare(schedule, fleet(async_scheduling=asynchronous)), fixed(gpu_s, host_s))
    assert gaps(r)[2:-1] == pytest.approx(period_s, rel=1e-9)


def test_pipeline_stages_overlap_batches() -> None:
    schedule = Schedule("offline", requests(8, isl=64, osl=60), np.zeros(8))
    one = simulate(prepare(schedule, fleet(max_num_batched_tokens=256)), fixed(0.01, 1e-4))
    two = simulate(prepare(schedule, fleet(max_num_batched_tokens=256, pipeline_parallel_size=2)), fixed(0.01, 1e-4))
    # two batches of 4 in turn, each through both stages: a request gets a token every 10 ms, as before
    assert np.median(gaps(two)) == pytest.approx(np.median(gaps(one)), rel=0.06)


def test_requests_of_one_moment_get_through_the_front_end_together_and_later_ones_wait_for_them() -> None:
    """One server, 2 ms a request, 10 ms in all for a lone one: by hand, for both loops."""
    service, before = 0.002, 0.010
    one = replace(fleet().replicas[0], coefficients=step_times.coefficients(0))
    busy = Fleet((one,), front_end_s=service, request_before_s=before)
    burst = prepare(Schedule("closed_loop", requests(20), None, 20), busy)
    due = np.array([0.0, 0.0, 0.0, 0.0005, 0.1])  # three clocks ring at once, one a moment later, one when all is quiet
    spread = prepare(Schedule("open_loop", requests(5), due, None), busy)
    for run in (lambda x: simulate(x, fixed(0.001, 1e-4)), compiled.simulate):
        assert run(burst).queued_s == pytest.approx(20 * service + before - service)
        waits = np.array([0, service, 2 * service, 3 * service - 0.0005, 0])
        assert run(spread).queued_s - due == pytest.approx(before + waits)


def test_a_server_that_takes_longer_than_the_engine_sets_the_rate() -> None:
    """D/D/1 beyond its capacity: request k of a steady stream waits k times what each falls behind."""
    due = 0.001 * np.arange(200)
    slow = replace(fleet(), front_end_s=0.0015, request_before_s=0.0015)
    r = simulate(prepare(Schedule("open_loop", requests(200, osl=1), due, None), slow), fixed(1e-4, 1e-5))
    assert r.queued_s - due == pytest.approx(0.0015 + 0.0005 * np.arange(200))
    assert 199 / (r.last_token_s.max() - r.last_token_s.min()) == pytest.approx(1 / 0.0015, rel=0.01)


def test_an_arrival_waits_until_the_engine_comes_round() -> None:
    schedule = Schedule("open_loop", requests(2, osl=30), np.array([0.0, 0.0155]))
    r = simulate(prepare(schedule, fleet()), fixed(0.010, 0.001))
    assert r.queued_s[1] == 0.0155
    # batches start at 1, 11, 21 ms; the one for 21 ms was handed over at 12 ms, so the arrival is scheduled at 21 ms
    assert r.scheduled_s[1] == pytest.approx(0.021)
    assert r.first_token_s[1] == pytest.approx(0.041)


def test_closed_loop_keeps_the_limit_and_open_loop_keeps_the_clock() -> None:
    r = simulate(prepare(Schedule("closed_loop", requests(10), None, 3), fleet()), fixed(0.01, 0.001))
    assert (r.sent_s[:3] == 0).all() and (r.sent_s[3:] > 0).all()
    for t in r.sent_s:
        assert ((r.sent_s <= t) & (r.last_token_s > t)).sum() <= 3
    due = np.linspace(0, 1, 10)
    r = simulate(prepare(Schedule("open_loop", requests(10), due), fleet()), fixed(0.01, 0.001))
    assert np.array_equal(r.sent_s, due) and np.array_equal(r.due_s, due)


def test_warmup_and_batches_run_one_after_the_other() -> None:
    items = tuple(Request(i, 5, 16, phase="warmup" if i < 4 else "measured") for i in range(12))
    r = simulate(prepare(Schedule("offline", items, np.zeros(12), 4), fleet()), fixed(0.01, 0.001))
    for k in (4, 8):
        assert r.sent_s[k : k + 4].min() == r.last_token_s[k - 4 : k].max()


def test_a_turn_waits_for_the_one_before_and_thinks() -> None:
    items = tuple(Request(i, 5, 16 + 20 * (i % 3), session=i // 3, turn=i % 3, think_s=0.5) for i in range(6))
    r = simulate(prepare(Schedule("closed_loop", items, None, 8), fleet()), fixed(0.01, 0.001))
    for i in (1, 2, 4, 5):
        assert r.sent_s[i] == r.last_token_s[i - 1] + 0.5


def test_stop_rules() -> None:
    stop = StopRule(min_requests=5)
    r = simulate(prepare(Schedule("closed_loop", requests(50), None, 2, stop), fleet()), fixed(0.01, 0.001))
    assert 5 <= len(r.completion_order) <= 7 and np.isnan(r.sent_s).sum() >= 40
    stop = StopRule(max_duration_s=0.3)
    schedule = Schedule("closed_loop", requests(50), None, 2, stop)
    inputs = prepare(schedule, fleet())
    r = simulate(inputs, fixed(0.01, 0.001))
    records = list(request_records(schedule, inputs, r))
    assert sum(x.error == "aborted" for x in records) == 2 and max(x.done_s or 0 for x in records) <= 0.3


def test_records_tell_the_same_story() -> None:
    schedule = Schedule("closed_loop", requests(20, isl=40), None, 6)
    inputs = prepare(schedule, fleet())
    r = simulate(inputs, fixed(0.01, 0.001))
    records = list(request_records(schedule, inputs, r))
    chunks = chunk_columns(schedule, inputs, r)
    steps = step_columns(inputs, r)
    assert [x.done_s for x in records] == sorted(x.done_s for x in records)  # type: ignore[type-var]
    assert len(chunks["t_s"]) == sum(x.osl or 0 for x in records) == 20 * 11
    assert list(steps) == [f.name for f in fields(EngineStep)]
    assert steps["prefill_tokens"].sum() == 20 * 40 and steps["decode_tokens"].sum() == 20 * 10
    assert (np.diff(steps["t_s"]) > 0).all() and (steps["step_time_s"] <= np.diff(steps["t_s"], prepend=0.0)).all()
    first = {x.index: x.first_token_s for x in records}
    at = {int(i): float(t) for i, t in zip(chunks["index"][::-1], chunks["t_s"][::-1], strict=True)}
    assert at == first


def test_a_prompt_that_is_too_long_is_an_error_record() -> None:
    schedule = Schedule("closed_loop", (*requests(1, isl=600), *requests(1)), None, 1)
    inputs = prepare(schedule, fleet())
    records = list(request_records(schedule, inputs, simulate(inputs, fixed(0.01, 0.001))))
    assert [x.error for x in records] == ["engine_error", None] and "600" in (records[0].error_detail or "")


def test_disaggregated_pools_hand_over_after_the_transfer() -> None:
    f = fleet(roles=("prefill", "decode"))
    f = Fleet(f.replicas, "least_loaded", transfer_latency_s=0.1, transfer_s_per_token=0.001)
    r = simulate(prepare(Schedule("closed_loop", requests(1, isl=100, osl=4), None, 1), f), fixed(0.01, 0.001))
    assert r.scheduled_s[0] == 0.0 and r.replica[0] == 1
    # prefill ends at 11 ms, 200 ms of transfer, then one step of the decode replica gives the first token
    assert r.first_token_s[0] == pytest.approx(0.011 + 0.2 + 0.011)
    assert r.num_output_tokens[0] == 4


def test_routers() -> None:
    router = Router("round_robin", [0, 1, 2])
    assert [router.pick([]) for _ in range(4)] == [0, 1, 2, 0]
    router = Router("least_loaded", [0, 1])
    assert [router.pick([]), router.pick([])] == [0, 1]
    router.done(1)
    assert router.pick([]) == 1
    router = Router("prefix_aware", [0, 1])
    assert [router.pick([1, 2, 3]), router.pick([7, 8, 9]), router.pick([1, 2, 4]), router.pick([7, 8, 9])] == [
        0,
        1,
        0,
        1,
    ]
    for _ in range(40):
        router.pick([1, 2, 3])
    assert router.outstanding[1] > 2  # the loaded replica does not get everything


def test_prefix_aware_routing_finds_more_in_the_cache() -> None:
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 9999, size=(4, 128), dtype=np.int32)
    items = tuple(
        Request(
            i, 8, prompt_token_ids=np.concatenate([shared[rng.integers(4)], rng.integers(0, 9999, 16, dtype=np.int32)])
        )
        for i in range(64)
    )
    schedule = Schedule("open_loop", items, np.arange(64) * 0.05)
    hits = {}
    for routing in ("round_robin", "prefix_aware"):
        inputs = prepare(schedule, fleet(4, routing, enable_prefix_caching=True))
        hits[routing] = int(simulate(inputs, fixed(0.01, 0.001)).num_hit_tokens.sum())
    assert hits["prefix_aware"] > hits["round_robin"]


def test_fleets_that_cannot_be_are_refused() -> None:
    with pytest.raises(BadInput, match="KV cache holds"):
        fleet(num_blocks=20)
    with pytest.raises(BadInput, match="disaggregated"):
        fleet(roles=("prefill", "both"))
    with pytest.raises(BadInput, match="length in tokens"):
        prepare(Schedule("closed_loop", (Request(0, 4, text="hello"),), None, 1), fleet())


def test_throughput_is_bounded_by_arrivals_where_engines_keep_up_with_them() -> None:
    """A step of 10 ms for up to 64 requests of 10 tokens: some 550 requests/s. The interval's ends are 0.5 and 1.5 of it."""
    engine = Interval(0.5, 1.5, 0.9, "rows")

    def run(rate: float) -> tuple[Interval, float]:
        due = due_times("poisson", 2000, rate, np.random.default_rng(3))
        inputs = prepare(Schedule("open_loop", requests(2000, osl=10), due), fleet(), record_tokens=False)
        share = served_share(inputs, sim(inputs))
        assert share is not None
        return throughput_interval(inputs, sim, engine), share[0]

    def sim(inputs: SimInputs) -> SimResult:
        return simulate(inputs, fixed(0.01, 0.0))

    slow, share = run(50)
    assert (
        share > 0.99
        and 0.98 < slow.low_ratio < 1 < slow.high_ratio < 1.02
        and slow.basis == "arrivals set the rate; rows"
    )
    near, share = run(450)  # the predicted engine keeps up, one half as fast would not
    assert share > 0.95 and near.low_ratio == 0.5 and 1 < near.high_ratio < 1.05
    over, share = run(900)
    assert share < 0.8 and over == engine
    few = prepare(Schedule("open_loop", requests(8), np.arange(8.0)), fleet(), record_tokens=False)
    assert throughput_interval(few, sim, engine) == engine  # too few to see a queue grow


def test_time_is_scaled_in_place_of_the_engine() -> None:
    due = due_times("poisson", 300, 300.0, np.random.default_rng(4))
    inputs = prepare(Schedule("open_loop", requests(300, osl=10), due), fleet(), record_tokens=False)
    half = simulate(inputs, fixed(0.02, 0.0))
    scaled = simulate(at_speed(inputs, 0.5), fixed(0.01, 0.0))
    assert scaled.last_token_s * 2 == pytest.approx(half.last_token_s)
