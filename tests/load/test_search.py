"""The SLO search and the knee against optima that are known."""

from __future__ import annotations

import numpy as np
import pytest

from bench.errors import BadInput
from bench.runner.search import Margin, Probe, SweepPoint, find_highest, find_knee, judge


def probe_with(optimum: float, noise: float, seed: int = 1):
    """TTFT grows with the level and equals its limit at ``optimum``; ``noise`` is its relative sd from run to run."""
    rng = np.random.default_rng(seed)

    def probe(level: float, repeat: int) -> Probe:
        value = 0.5 * (level / optimum) ** 2 * (1 + noise * rng.standard_normal())
        return Probe(level, (Margin("ttft_p99", value, 0.5),))

    return probe


@pytest.mark.parametrize("optimum", [1.3, 7.0, 33.3, 250.0, 999.0])
@pytest.mark.parametrize("start", [1.0, 16.0, 800.0])
def test_finds_a_known_optimum_within_its_interval(optimum: float, start: float) -> None:
    result = find_highest(probe_with(optimum, 0.002), start=start, lowest=0.5, highest=2000, tolerance_ratio=0.05)
    assert result.status == "found"
    assert result.highest_met is not None and result.lowest_not_met is not None
    assert result.highest_met <= optimum * 1.01 and result.lowest_not_met >= optimum * 0.99
    assert result.lowest_not_met <= result.highest_met * 1.05


def test_whole_levels_end_at_neighbours() -> None:
    result = find_highest(probe_with(37.5, 0), start=4, lowest=1, highest=512, tolerance_ratio=0.001, whole=True)
    assert (result.status, result.highest_met, result.lowest_not_met) == ("found", 37.0, 38.0)


def test_noise_that_allows_no_verdict_is_unresolved() -> None:
    result = find_highest(probe_with(40, 0.6), start=8, lowest=1, highest=512, tolerance_ratio=0.02)
    assert result.status == "unresolved"
    assert result.unresolved_levels
    assert all(len(r.probes) == 6 for r in result.levels if r.verdict == "unresolved")


def test_coverage_over_many_noisy_searches() -> None:
    """With moderate noise the interval holds the optimum about as often as it says (95 % a verdict, several verdicts)."""
    inside = 0
    for seed in range(60):
        r = find_highest(probe_with(40, 0.05, seed), start=8, lowest=1, highest=512, tolerance_ratio=0.1)
        low, high = r.highest_met or 0, r.lowest_not_met or 1e9
        inside += low <= 40 <= high
    assert inside >= 48


def test_none_and_all() -> None:
    none = find_highest(probe_with(0.1, 0), start=8, lowest=1, highest=64)
    assert (none.status, none.highest_met, none.lowest_not_met) == ("none meets", None, 1.0)
    every = find_highest(probe_with(1000, 0), start=8, lowest=1, highest=64)
    assert (every.status, every.highest_met, every.lowest_not_met) == ("all meet", 64.0, None)


def test_undefined_is_unresolved_unless_another_limit_is_broken() -> None:
    undefined = [Probe(1, (Margin("ttft_p99", None, 0.5),))] * 3
    assert judge(undefined)[0] == "unresolved"
    broken = [Probe(1, (Margin("ttft_p99", None, 0.5), Margin("met", 0.1, 0.95, at_least=True)))] * 3
    assert judge(broken)[0] == "not met"


def test_one_run_alone_is_never_a_verdict() -> None:
    assert judge([Probe(1, (Margin("ttft_p99", 0.1, 0.5),))])[0] == "unresolved"


def test_bad_bounds() -> None:
    with pytest.raises(BadInput):
        find_highest(probe_with(4, 0), start=8, lowest=10, highest=64)


def closed_queue(level: float, slots: int = 16, service_s: float = 1.0) -> tuple[float, float]:
    """(throughput, latency) of a closed loop against ``slots`` servers: saturates at level = slots."""
    throughput = min(level, slots) / service_s
    return throughput, level / throughput


def test_knee_is_where_the_server_is_full() -> None:
    rng = np.random.default_rng(0)
    points = []
    for level in (1, 2, 4, 8, 16, 32, 64):
        for _ in range(3):
            x, r = closed_queue(level)
            points.append(SweepPoint(level, x * (1 + 0.01 * rng.standard_normal()), r))
    knee = find_knee(points)
    assert knee.level == knee.low == knee.high == 16
    assert knee.saturation_level == 16
    assert not knee.at_edge


def test_knee_at_the_edge_is_said() -> None:
    points = [SweepPoint(level, *closed_queue(level)) for level in (1, 2, 4, 8)]
    assert find_knee(points).at_edge
    with pytest.raises(BadInput):
        find_knee(points[:2])


def live_probe(url: str, num_tokens: int = 10):
    """TPOT p50 of a closed loop against a live server."""
    from bench.load.driver import drive
    from bench.load.schedule import closed_loop
    from bench.load.target import Target
    from tests.load.conftest import make_requests

    def probe(level: float, repeat: int) -> Probe:
        n = round(level)
        result = drive(closed_loop(make_requests(4 * n, osl=num_tokens), n), Target(url, model="mock"))
        result.close()
        # The first and the last of each slot run while the loop fills and empties: the middle is at full concurrency.
        middle = sorted(result.records, key=lambda r: r.sent_s or 0)[n : 3 * n]
        tpot = [(r.last_token_s - r.first_token_s) / (num_tokens - 1) for r in middle]  # type: ignore[operator]
        return Probe(level, (Margin("tpot p50", float(np.median(tpot)), 0.0275),))

    return probe


def test_a_live_search_never_claims_more_than_the_mock_s_known_optimum() -> None:
    """Inter-token time = 10 ms + 2.5 ms for each running request: 27.5 ms allow 7 at once, 8 (30 ms) are beyond. A busy
    test machine only adds time, so whatever it does, 8 must never be called met."""
    from bench.load.mock import Delay, MockConfig, running_mock

    config = MockConfig(ttft=Delay(0.005), itl=Delay(0.010), itl_per_running_s=0.0025)
    with running_mock(config) as url:
        result = find_highest(live_probe(url), start=4, lowest=2, highest=16, whole=True, max_runs=3)
    assert result.highest_met is None or result.highest_met <= 7
    assert all(p.run == "" and len(p.margins) == 1 for level in result.levels for p in level.probes)


def test_a_start_without_a_verdict_is_left_upwards_too() -> None:
    """Noise at the start alone must not end the search."""
    base = probe_with(40, 0.0)
    rng = np.random.default_rng(3)

    def probe(level: float, repeat: int) -> Probe:
        if level == 8:
            return Probe(level, (Margin("ttft_p99", 0.5 + rng.standard_normal(), 0.5),))
        return base(level, repeat)

    result = find_highest(probe, start=8, lowest=1, highest=512, tolerance_ratio=0.05)
    assert result.status == "found" and result.highest_met is not None and 38 <= result.highest_met <= 40
