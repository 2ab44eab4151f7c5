"""Energy of windows, on samples whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.records import Estimate, Warning_
from bench.telemetry.energy import (
    WindowEnergy,
    change_points,
    energy_per_token,
    integrate_power,
    net_energy_j,
    total_energy,
    window_energy,
)
from bench.telemetry.series import Series, series_of

from .conftest import counter_samples


def series(**options: float) -> Series:
    (only,) = series_of(counter_samples(**{"power_w": 400.0, "duration_s": 40.0, **options})).values()  # type: ignore[arg-type]
    return only


def test_change_points_leave_out_the_first_reading() -> None:
    times, values = change_points(np.array([0.0, 1, 2, 3, 4]), np.array([5.0, 5, 6, 6, 9]))
    assert times.tolist() == [2, 4] and values.tolist() == [6, 9]


def test_constant_power_is_exact() -> None:
    energy = window_energy(series(), 3.21, 35.77)
    assert energy.energy_j == pytest.approx(400 * (35.77 - 3.21), rel=0.002)
    assert energy.uncertainty_j == pytest.approx(2 * 400 * 0.1, rel=0.05)
    assert energy.mean_power_w == pytest.approx(400, rel=0.002)
    assert energy.warnings == () and energy.problem is None


def test_naive_reading_of_the_counter_would_be_worse() -> None:
    samples = counter_samples(400, 10)
    s = series_of(samples)["GPU-x"]
    start_s, end_s = 2.095, 4.305  # just before a step, just after one
    exact = 400 * (end_s - start_s)
    energy = s.columns["energy_j"]
    naive = energy[s.t_s <= end_s][-1] - energy[s.t_s <= start_s][-1]
    ours = window_energy(s, start_s, end_s)
    assert ours.energy_j is not None
    assert abs(ours.energy_j - exact) < 0.5 * abs(naive - exact)


@settings(max_examples=60, deadline=None)
@given(
    powers=st.lists(st.floats(50, 1000), min_size=4, max_size=12),
    period_s=st.floats(0.02, 0.2),
    start=st.floats(0.15, 0.4),
    end=st.floats(0.6, 0.85),
    shift_s=st.floats(0, 0.05),
)
def test_the_truth_lies_within_the_stated_bounds(
    powers: list[float], period_s: float, start: float, end: float, shift_s: float
) -> None:
    # power changes each second; the counter steps each period, the sampler looks each 50 ms
    def joules(t: np.ndarray) -> np.ndarray:
        edges = np.arange(len(powers) + 1, dtype=float)
        return np.interp(t, edges, np.concatenate(([0.0], np.cumsum(powers))))

    t = np.arange(0, len(powers), 0.05) + shift_s
    counter = joules(np.floor(t / period_s) * period_s)
    columns = {"energy_j": counter, "energy_t_s": t, "power_w": np.full(len(t), np.nan), "power_average_w": t * np.nan}
    s = Series("GPU-x", t, columns, np.zeros(len(t), bool))
    start_s, end_s = start * len(powers), end * len(powers)
    energy = window_energy(s, start_s, end_s)
    assert energy.energy_j is not None
    exact = float(joules(np.array([end_s]))[0] - joules(np.array([start_s]))[0])
    # one period at each end, at the power of that end; beside a step of power the neighbour's power bounds it
    slack = 2 * (max(period_s, 0.05) + 0.05) * (max(powers) - min(powers))
    assert abs(energy.energy_j - exact) <= energy.uncertainty_j + slack


def test_a_window_at_the_edge_of_the_samples() -> None:
    s = series(duration_s=10.0)
    assert window_energy(s, 0.2, 10.0).energy_j == pytest.approx(400 * 9.8, rel=0.01)
    beyond = window_energy(s, 5.0, 20.0)
    assert beyond.energy_j is None and "not covered" in str(beyond.problem)


def test_no_counter_no_energy() -> None:
    samples = [replace(s, energy_j=None, energy_t_s=None) for s in counter_samples(300, 5)]
    energy = window_energy(series_of(samples)["GPU-x"], 1, 4)
    assert energy.energy_j is None and "no readable energy counter" in str(energy.problem)
    assert energy.integrated_j == pytest.approx(900)  # stays a cross-check and is not promoted


def test_a_reset_counter_is_refused_inside_and_harmless_outside_the_window() -> None:
    samples = counter_samples(300, 20)
    reset = [replace(s, energy_j=s.energy_j - 3000.0) if s.t_s >= 8 else s for s in samples]  # type: ignore[operator]
    s = series_of(reset)["GPU-x"]
    inside = window_energy(s, 5, 15)
    assert inside.energy_j is None and "reset" in str(inside.problem)
    assert window_energy(s, 10, 18).energy_j == pytest.approx(2400, rel=0.01)
    assert window_energy(s, 1, 6).energy_j == pytest.approx(1500, rel=0.02)


def test_a_lost_gpu_has_no_energy() -> None:
    samples = counter_samples(300, 10)
    samples[100] = replace(samples[100], lost=True, energy_j=None)
    energy = window_energy(series_of(samples)["GPU-x"], 1, 9)
    assert energy.energy_j is None and "lost" in str(energy.problem)


def test_an_empty_window() -> None:
    assert window_energy(series(), 5, 5).problem == "the window is empty"


@pytest.mark.parametrize(("factor", "warned"), [(1.0, False), (1.04, False), (0.96, False), (1.08, True), (0.92, True)])
def test_integral_and_counter_are_compared(factor: float, warned: bool) -> None:
    samples = [replace(s, power_w=400 * factor) for s in counter_samples(400, 40)]
    energy = window_energy(series_of(samples)["GPU-x"], 2, 38)
    assert energy.disagreement_ratio == pytest.approx(factor - 1, abs=0.005)
    assert ("energy-disagrees" in {w.code for w in energy.warnings}) is warned


def test_integral_uses_the_mean_where_there_is_no_instant_power() -> None:
    samples = [replace(s, power_w=None, power_average_w=250.0) for s in counter_samples(400, 10)]
    assert integrate_power(series_of(samples)["GPU-x"], 2, 8) == pytest.approx(1500)


def test_integral_refuses_gaps() -> None:
    samples = [s for s in counter_samples(400, 20) if not 5 < s.t_s < 10]
    assert integrate_power(series_of(samples)["GPU-x"], 2, 18) is None


def test_short_windows_warn_and_very_short_ones_refuse() -> None:
    s = series()
    refused = energy_per_token(window_energy(s, 5, 6.9), 1000)
    assert isinstance(refused, Warning_) and refused.code == "energy-window-too-short"
    short = window_energy(s, 5, 15)
    assert {w.code for w in short.warnings} == {"energy-window-short"}
    estimate = energy_per_token(short, 1000)
    assert isinstance(estimate, Estimate)
    assert estimate.value == pytest.approx(4.0, rel=0.01)
    assert estimate.low is not None and estimate.high is not None
    assert estimate.low < estimate.value < estimate.high and estimate.unit == "J/token"
    assert not window_energy(s, 5, 36).warnings


def test_a_slow_counter_needs_a_longer_window() -> None:
    s = series(period_s=0.5)
    assert isinstance(energy_per_token(window_energy(s, 5, 14), 1000), Warning_)  # 9 s < 20 periods = 10 s
    assert isinstance(energy_per_token(window_energy(s, 5, 16), 1000), Estimate)


def test_no_tokens_and_no_counter_have_reasons() -> None:
    for energy, tokens in (
        (window_energy(series(), 2, 38), 0),
        (WindowEnergy("GPU-x", 0, 40, None, problem="no counter"), 10),
    ):
        answer = energy_per_token(energy, tokens)
        assert isinstance(answer, Warning_) and answer.code == "energy-unknown"


def test_net_of_a_baseline() -> None:
    gross = window_energy(series(), 2, 32)
    net = net_energy_j(gross, 100.0, 2.0)
    assert net is not None and net.low is not None and net.high is not None
    assert net.value == pytest.approx(300 * 30, rel=0.01)
    assert net.high - net.low == pytest.approx(2 * (gross.uncertainty_j + 2.0 * 30))
    per_token = energy_per_token(gross, 900, net)
    assert isinstance(per_token, Estimate) and per_token.value == pytest.approx(10, rel=0.01)
    assert net_energy_j(gross, None) is None


def test_devices_add_up_and_one_unknown_makes_the_sum_unknown() -> None:
    both = series_of([*counter_samples(300, 40, device="a"), *counter_samples(500, 40, device="b")])
    parts = [window_energy(s, 2, 38) for s in both.values()]
    total = total_energy(parts)
    assert total.energy_j == pytest.approx(800 * 36, rel=0.01)
    assert total.uncertainty_j == pytest.approx(sum(p.uncertainty_j for p in parts))
    assert total.integrated_j == pytest.approx(800 * 36, rel=0.01)
    unknown = total_energy([parts[0], WindowEnergy("b", 2, 38, None, problem="no counter")])
    assert unknown.energy_j is None and "b: no counter" in str(unknown.problem)
    with pytest.raises(ValueError, match="same window"):
        total_energy([parts[0], window_energy(both["b"], 3, 38)])
