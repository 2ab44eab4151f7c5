"""Arrivals are what they say, for any number of processes; same seed, same bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.errors import BadInput
from bench.load.arrivals import RateProfile, due_times, due_times_until, index_of_dispersion
from bench.load.schedule import closed_loop, concurrency_ramp, offline, open_loop, split, trace
from tests.load.conftest import make_requests


def chi_square_band(n_windows: int) -> tuple[float, float]:
    """Central 99.9 % of the index of dispersion of Poisson counts: chi2(n - 1) / (n - 1)."""
    from scipy.stats import chi2

    low, high = chi2.ppf([0.0005, 0.9995], n_windows - 1) / (n_windows - 1)
    return float(low), float(high)


@pytest.mark.parametrize("processes", [1, 2, 3, 10])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_poisson_is_poisson_for_any_number_of_processes(processes: int, seed: int) -> None:
    schedule = open_loop(make_requests(20_000), 100.0, seed=seed)
    shares = split(schedule, processes)
    assert schedule.due_s is not None
    merged = np.sort(np.concatenate([schedule.due_s[s] for s in shares]))
    np.testing.assert_array_equal(merged, schedule.due_s)  # nothing drawn twice, nothing lost
    windows = int(merged[-1] / 0.5)
    low, high = chi_square_band(windows)
    assert low < index_of_dispersion(merged, 0.5) < high
    gaps = np.diff(merged)
    from scipy.stats import kstest

    assert kstest(gaps, "expon", args=(0, 0.01)).pvalue > 1e-3
    # Each process's own share of a Poisson process split in turn is smoother (gamma of shape `processes`), not burstier.
    if processes > 1:
        own = schedule.due_s[shares[0]]
        assert index_of_dispersion(own, 20.0 * processes / 100) < 1.0


@pytest.mark.parametrize("burstiness", [0.25, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("processes", [1, 4])
def test_gamma_dispersion(burstiness: float, processes: int) -> None:
    """In windows that are long against a gap the index of dispersion is the gaps' squared coefficient of variation."""
    schedule = open_loop(make_requests(40_000), 200.0, arrivals="gamma", burstiness=burstiness, seed=5)
    assert schedule.due_s is not None
    merged = np.sort(np.concatenate([schedule.due_s[s] for s in split(schedule, processes)]))
    assert index_of_dispersion(merged, 1.0) == pytest.approx(1 / burstiness, rel=0.3)
    gaps = np.diff(merged)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(1 / burstiness, rel=0.1)


def test_constant_has_no_dispersion_and_starts_at_zero() -> None:
    due = due_times("constant", 1000, 50.0, np.random.default_rng(0))
    assert due[0] == 0 and index_of_dispersion(due, 1.0) < 0.01
    np.testing.assert_allclose(np.diff(due), 0.02, atol=1e-9)


def test_same_seed_same_bytes() -> None:
    a, b = (open_loop(make_requests(500), 20.0, seed=7).digest() for _ in range(2))
    assert a == b
    assert open_loop(make_requests(500), 20.0, seed=8).digest() != a
    # Pinned: a change here changes every recorded schedule.
    first = open_loop(make_requests(500), 20.0, seed=7).due_s
    assert first is not None
    np.testing.assert_array_equal(first[:3], np.array([0.053083687, 0.058416528, 0.130568212]))


@settings(max_examples=60, deadline=None)
@given(
    rates=st.lists(st.floats(0.5, 200), min_size=1, max_size=5),
    kind=st.sampled_from(["step", "linear"]),
    seed=st.integers(0, 1000),
)
def test_profiles_ascend_and_follow_their_integral(rates: list[float], kind: str, seed: int) -> None:
    profile = RateProfile(tuple(3.0 * k for k in range(len(rates))), tuple(rates), kind)  # type: ignore[arg-type]
    due = due_times("poisson", 300, profile, np.random.default_rng(seed))
    assert np.all(np.diff(due) >= 0)
    expected = [profile.expected_requests(float(t)) for t in due[::30]]
    np.testing.assert_allclose(profile.time_of(np.asarray(expected)), due[::30], atol=1e-6)


def test_until_draws_the_right_number() -> None:
    counts = [len(due_times_until("poisson", 10.0, 50.0, np.random.default_rng(s))) for s in range(200)]
    assert np.mean(counts) == pytest.approx(500, rel=0.02)
    assert np.var(counts) / np.mean(counts) == pytest.approx(1.0, rel=0.4)


def test_a_ramp_of_rates() -> None:
    due = due_times("constant", 500, RateProfile.ramp(0, 100, 10), np.random.default_rng(0))
    assert due[-1] == pytest.approx(10, abs=0.05)
    assert due[124] == pytest.approx(5, abs=0.05)  # a quarter of the requests in the first half


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf")])
def test_bad_rates(bad: float) -> None:
    with pytest.raises(BadInput):
        due_times("poisson", 10, bad, np.random.default_rng(0))


def test_bad_profiles() -> None:
    for times, rates in (((1.0,), (1.0,)), ((0.0, 0.0), (1.0, 1.0)), ((0.0,), (0.0,)), ((0.0, 1.0), (1.0, -1.0))):
        with pytest.raises(BadInput):
            RateProfile(times, rates)


def test_sessions_stay_whole() -> None:
    from bench.workload.synthetic import FixedLength, Sessions, build_sessions

    items = build_sessions(
        7, FixedLength(8), FixedLength(4), FixedLength(3), Sessions(FixedLength(3)), vocab_size=999, seed=1
    )
    schedule = closed_loop(items, 4)
    for share in split(schedule, 3):
        sessions = {schedule.requests[p].session for p in share}
        for other in split(schedule, 3):
            if other is not share and len(other) and other[0] != share[0]:
                assert sessions.isdisjoint({schedule.requests[p].session for p in other})


def test_phases_by_time_and_shapes() -> None:
    schedule = open_loop(make_requests(100), 10.0, arrivals="constant", ramp_up_s=2.0, cool_down_s=1.0)
    phases = [r.phase for r in schedule.requests]
    assert phases.count("ramp_up") == 20 and phases.count("cool_down") == 10 and phases[50] == "measured"
    with pytest.raises(BadInput):
        open_loop(make_requests(10), 10.0, ramp_up_s=100)
    assert offline(make_requests(4), batch_size=2).kind == "offline"
    assert concurrency_ramp(1, 5, 8.0) == ((0.0, 1), (2.0, 2), (4.0, 3), (6.0, 4), (8.0, 5))
    with pytest.raises(BadInput):
        closed_loop(make_requests(4), 2, steps=((1.0, 2),))


def test_trace_scaling() -> None:
    s = trace(make_requests(3), [0.0, 1.0, 4.0], time_scale=0.5)
    assert s.due_s is not None and s.due_s.tolist() == [0.0, 0.5, 2.0]
    for bad in ([0.0, 2.0, 1.0], [-1.0, 0.0, 1.0], [0.0, float("nan"), 1.0], [0.0, 1.0]):
        with pytest.raises(BadInput):
            trace(make_requests(3), bad)
