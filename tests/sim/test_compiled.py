"""The compiled loop gives bit for bit what the readable one gives, over all that a simulation can be."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.errors import BadInput
from bench.records import Request, Schedule, StopRule
from bench.sim import compiled, loop
from bench.sim.inputs import Fleet, Replica, SimInputs, SimResult, prepare
from bench.sim.scheduler import SchedulerConfig
from tests.sim import step_times
from tests.sim.cases import DrawInt, draw_config

pytest.importorskip("numba")
pytestmark = pytest.mark.timeout(900)  # the first call on a machine compiles

NUM_CASES = int(os.environ.get("TOKENYIELD_COMPILED_CASES", "150"))


def assert_same(a: SimResult, b: SimResult) -> None:
    for name in SimResult.__slots__:
        left, right = getattr(a, name), getattr(b, name)
        if isinstance(left, np.ndarray):
            assert np.array_equal(left, right, equal_nan=True), name
        elif name == "steps":
            assert list(left) == list(right)
            for column in left:
                assert np.array_equal(left[column], right[column]), column
        else:
            assert left == right, name


def both(inputs: SimInputs) -> SimResult | None:
    """The result of both; None where both find that the engine would preempt for ever."""
    try:
        readable = loop.simulate(inputs, step_times.step_time_s)
    except BadInput as e:
        with pytest.raises(BadInput, match="for ever"):
            compiled.simulate(inputs)
        assert "for ever" in str(e)
        return None
    assert_same(readable, compiled.simulate(inputs))
    return readable


def draw_requests(draw: DrawInt, longest: int, stated_prefix: bool) -> tuple[Request, ...]:
    requests = []
    sessions = draw(0, 1)
    rng = np.random.default_rng(draw(0, 10_000))
    shared = rng.integers(0, 50_000, size=(3, longest), dtype=np.int32)
    num_warm = draw(0, 3)
    for i in range(draw(1, 40)):
        isl = longest + 1 if draw(0, 19) == 0 else draw(1, longest)  # now and then longer than the model allows
        osl = draw(1, 60)
        tokens = None
        if not stated_prefix:
            tokens = rng.integers(0, 50_000, size=isl, dtype=np.int32)
            common = draw(0, min(isl, longest))
            tokens[:common] = shared[draw(0, 2), :common]
        session = draw(0, 4) if sessions and i >= num_warm else None
        turn = sum(r.session == session for r in requests) if session is not None else 0
        requests.append(
            Request(
                i, osl, isl, tokens, phase="warmup" if i < num_warm else "measured", session=session, turn=turn,
                think_s=draw(0, 20) / 100 if turn else 0.0, prefix_tokens=draw(0, isl) if stated_prefix else 0,
                priority=draw(0, 2),
            )
        )  # fmt: skip
    return tuple(requests)


def draw_schedule(draw: DrawInt, requests: tuple[Request, ...]) -> Schedule:
    kind = draw(0, 3)
    stop = (
        StopRule(max_duration_s=draw(1, 30) / 10),
        StopRule(min_duration_s=draw(0, 10) / 10, min_requests=draw(0, 20)),
        StopRule(max_requests=draw(1, 30)),
        StopRule(),
        StopRule(),
    )[draw(0, 4)]
    if kind == 0:
        return Schedule("offline", requests, np.zeros(len(requests)), draw(1, 12) if draw(0, 1) else None, stop)
    if kind == 1:
        steps = ((0.0, draw(1, 4)), (0.2, draw(1, 20)), (0.7, draw(1, 9))) if draw(0, 2) == 0 else None
        return Schedule("closed_loop", requests, None, draw(1, 16), stop, 0, steps)
    gaps = np.array([0 if r.phase == "warmup" else draw(0, 40) for r in requests]) / draw(50, 2000)
    due = np.where([r.phase == "warmup" for r in requests], 0.0, np.cumsum(gaps))
    return Schedule("open_loop" if kind == 2 else "trace", requests, due, draw(1, 8) if draw(0, 2) == 0 else None, stop)


def draw_inputs(draw: DrawInt) -> SimInputs:
    config = draw_config(draw)
    num = draw(1, 4)
    routing = ("round_robin", "least_loaded", "prefix_aware")[draw(0, 2)]
    split = num > 1 and draw(0, 2) == 0
    roles = ["prefill" if i == 0 else "decode" for i in range(num)] if split else ["both"] * num
    replicas = tuple(Replica(config, step_times.coefficients(draw(0, 2)), role) for role in roles)  # type: ignore[arg-type]
    stated = bool(draw(0, 1))
    fleet = Fleet(replicas, routing, 1e-3, 1e-6 * draw(0, 3), 1e-3 * draw(0, 2), 1e-3 * draw(0, 1))  # type: ignore[arg-type]
    inputs = prepare(draw_schedule(draw, draw_requests(draw, config.max_model_len - 1, stated)), fleet)
    stop = np.array([draw(1, int(m)) if draw(0, 5) == 0 else -1 for m in inputs.max_tokens], dtype=np.int64)
    inputs = replace(inputs, stop_after=stop, record_tokens=bool(draw(0, 3)))
    return replace(inputs, fleet=replace(fleet, front_end_s=2e-4 * draw(0, 2)))


def seeded_inputs(seed: int) -> SimInputs:
    rng = np.random.default_rng(seed)
    return draw_inputs(lambda low, high: int(rng.integers(low, high + 1)))


def test_identical_to_the_readable_loop() -> None:
    preempted = hits = rejected = stopped = cut = stalled = 0
    for seed in range(NUM_CASES):
        result = both(seeded_inputs(seed))
        if result is None:
            stalled += 1
            continue
        preempted += int(result.num_preemptions.sum())
        hits += int(result.num_hit_tokens.sum())
        rejected += int((result.ended == 3).sum())
        stopped += int((result.ended == 2).sum())
        cut += int((result.ended == 0).sum())
    if NUM_CASES >= 100:
        assert min(preempted, hits, rejected, stopped, cut) > 20 and 0 < stalled < 5


def long_inputs(seed: int) -> SimInputs:
    """Long answers with shared prefixes, scarce blocks, stop tokens: runs of decode-only steps that end in every way."""
    rng = np.random.default_rng(seed)
    n, block_size, longest = int(rng.integers(2, 12)), int(rng.choice([4, 8, 16])), 600
    config = SchedulerConfig(
        max_num_seqs=int(rng.integers(1, 12)),
        max_num_batched_tokens=int(rng.integers(64, 512)),
        max_model_len=longest,
        num_blocks=longest // block_size + 2 + int(rng.integers(0, n * 200 // block_size)),
        block_size=block_size,
        enable_prefix_caching=bool(rng.integers(2)),
        async_scheduling=bool(rng.integers(2)),
        policy="priority" if rng.integers(3) == 0 else "fcfs",
        use_v2_model_runner=bool(rng.integers(2)),
        watermark=float(rng.choice([0.0, 0.1])),
    )
    shared = rng.integers(0, 9999, 300, dtype=np.int32)
    requests = []
    for i in range(2 * n):
        tokens = rng.integers(0, 9999, int(rng.integers(1, 200)), dtype=np.int32)
        common = int(rng.integers(0, len(tokens) + 1))
        tokens[:common] = shared[:common]
        requests.append(Request(i, int(rng.integers(1, 500)), len(tokens), tokens, priority=int(rng.integers(3))))
    replicas = tuple(Replica(config, step_times.coefficients(int(rng.integers(3)))) for _ in range(rng.integers(1, 3)))
    fleet = Fleet(replicas, "least_loaded" if rng.integers(2) else "prefix_aware")
    stop = StopRule(max_duration_s=float(rng.uniform(0.5, 10))) if rng.integers(3) == 0 else StopRule()
    schedule = Schedule("closed_loop", tuple(requests), None, int(rng.integers(1, n + 1)), stop)
    if rng.integers(2):
        schedule = Schedule("open_loop", tuple(requests), np.cumsum(rng.exponential(1.0, len(requests))), None, stop)
    inputs = prepare(schedule, fleet)
    after = [int(rng.integers(1, m + 1)) if rng.integers(4) == 0 else -1 for m in inputs.max_tokens]
    return replace(inputs, stop_after=np.array(after, dtype=np.int64))


def test_fast_forward_is_exact() -> None:
    preempted = 0
    for seed in range(max(20, NUM_CASES // 5)):
        result = both(long_inputs(seed))
        preempted += int(result.num_preemptions.sum()) if result is not None else 0
    assert preempted > 20


def test_identical_at_an_ordinary_size() -> None:
    rng = np.random.default_rng(1)
    requests = tuple(
        Request(i, int(rng.integers(160, 201)), int(rng.integers(820, 1025)), prefix_tokens=100) for i in range(150)
    )
    for blocks in (30_000, 1_500):
        config = SchedulerConfig(256, 8192, 8192, max(blocks, 600))
        fleet = Fleet((Replica(config, step_times.coefficients(0)),), request_before_s=2e-3)
        result = both(prepare(Schedule("closed_loop", requests, None, 64), fleet))
        assert result is not None and result.num_output_tokens.sum() == sum(r.osl for r in requests)


def test_a_read_only_cache_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("TOKENYIELD_CACHE_DIR", str(blocked))
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(Path, "home", lambda: blocked)
    folder = compiled.cache_folder("abc")
    assert folder is None or not folder.is_relative_to(blocked)
    monkeypatch.setattr(compiled.tempfile, "gettempdir", lambda: str(blocked))
    assert compiled.cache_folder("abc") is None
