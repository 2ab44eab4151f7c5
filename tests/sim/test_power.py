"""Power from load: the published anchors, and what must hold for any run."""

from __future__ import annotations

import numpy as np
import pytest

from bench.catalog.hardware import load_hardware
from bench.catalog.model import load_model
from bench.errors import BadInput
from bench.sim.interface import Interval
from bench.sim.power import (
    StepPower,
    energy_per_token_interval,
    load_power_fit,
    power_interval,
    power_ratio,
    step_power,
)
from bench.sim.step_time import build_step_time
from bench.sim.step_time_kernel import step_time_s

H100, MODEL = load_hardware("h100-sxm"), load_model("qwen3-8b")
COLUMNS = (
    "prefill_requests",
    "prefill_tokens",
    "prefill_pairs",
    "prefill_context",
    "decode_requests",
    "decode_context_sum",
)


def decoding(
    batch: int, context: int = 640, num_steps: int = 50, hardware: object = H100
) -> tuple[dict[str, np.ndarray], float]:
    """Steps of a steady decode at ``batch``, back to back."""
    array = build_step_time(MODEL, H100, quantization="fp8_block").coefficients()
    gpu, host = step_time_s(array, 0, 0, 0.0, 0, batch, batch * context, context, batch)
    period = max(gpu, host)
    ones = np.ones(num_steps)
    steps = dict.fromkeys(COLUMNS, 0 * ones)
    steps |= {
        "decode_requests": batch * ones,
        "decode_context_sum": batch * context * ones,
        "gpu_s": gpu * ones,
        "host_s": host * ones,
    }
    steps |= {"end_s": period * np.arange(1, num_steps + 1), "scheduled_s": period * np.arange(num_steps)}
    return steps, period * num_steps


def power(batch: int, step_time: Interval | None = None) -> StepPower:
    steps, duration = decoding(batch)
    return step_power(MODEL, H100, steps, duration, quantization="fp8_block", step_time=step_time)


@pytest.mark.parametrize(("batch", "published_w"), [(1, 394), (16, 438), (64, 579), (128, 624), (256, 679)])
def test_published_power_of_an_h100_lies_in_the_interval(batch: int, published_w: float) -> None:
    # Qwen3-8B FP8 128/1024 on vLLM 0.30; the coefficients were fitted on other runs. The steps are predicted, too.
    found = power(batch, build_step_time(MODEL, H100, quantization="fp8_block").interval("tpot"))
    assert found.interval.low_ratio <= published_w / found.mean_power_w <= found.interval.high_ratio


def test_uncertain_steps_make_power_uncertain() -> None:
    alone, wider, widest = (
        power(16, time).interval for time in (None, Interval(0.9, 1.1, 0.9, "x"), Interval(0.6, 1.6, 0.9, "x"))
    )
    assert power(16, Interval(1.0, 1.0, 0.9, "x")).interval.high_ratio == pytest.approx(alone.high_ratio)
    assert (
        widest.low_ratio < wider.low_ratio < alone.low_ratio and alone.high_ratio < wider.high_ratio < widest.high_ratio
    )
    # longer steps lower power, but less than in proportion: the floor stays
    assert widest.low_ratio > alone.low_ratio / 1.6 and "step time: x" in widest.basis


def test_power_is_not_linear_in_the_batch() -> None:
    one, many = power(1).mean_power_w, power(256).mean_power_w
    assert 0.5 * H100.tdp_w < one < many < H100.tdp_w


def test_energy_per_token_falls_with_the_batch() -> None:
    small, large = power(4), power(64)
    assert large.energy_j / 64 < small.energy_j / 4


def test_idle_time_costs_idle_power() -> None:
    steps, duration = decoding(8)
    busy, half = (step_power(MODEL, H100, steps, duration * n, quantization="fp8_block") for n in (1, 2))
    idle_w = load_power_fit().idle * H100.tdp_w
    assert half.energy_j - busy.energy_j == pytest.approx(idle_w * duration, rel=0.05)


def test_power_never_passes_the_limit() -> None:
    fit = load_power_fit()
    assert power_ratio(fit, np.array([5.0]), np.array([5.0]), np.array([5.0]))[0] <= 1.0
    assert (np.diff(power_ratio(fit, np.linspace(0, 1, 9), np.zeros(9), np.zeros(9))) > 0).all()


def test_a_run_without_steps_idles() -> None:
    empty = {name: np.zeros(0) for name in (*COLUMNS, "gpu_s", "host_s", "end_s", "scheduled_s")}
    found = step_power(MODEL, H100, empty, 10.0, tp=2)
    assert found.energy_j == pytest.approx(2 * 10.0 * found.mean_power_w)


def test_another_device_gets_the_wider_interval() -> None:
    steps, duration = decoding(8)
    other = step_power(MODEL, load_hardware("b200"), steps, duration, quantization="fp8_block").interval
    own = power(8).interval
    assert other.high_ratio - other.low_ratio > own.high_ratio - own.low_ratio and "scaled" in other.basis


def test_a_cpu_has_no_power_model() -> None:
    steps, duration = decoding(8)
    with pytest.raises(BadInput, match="no power limit"):
        step_power(MODEL, load_hardware("cpu"), steps, duration)


def test_energy_per_token_has_an_interval_at_least_as_wide_as_either_part() -> None:
    rate = Interval(0.9, 1.1)
    power, found = power_interval("H100-SXM"), energy_per_token_interval("H100-SXM", rate)
    assert found.low_ratio < min(power.low_ratio, 1 / rate.high_ratio)
    assert found.high_ratio > max(power.high_ratio, 1 / rate.low_ratio)
    assert energy_per_token_interval("L40S", rate).high_ratio > found.high_ratio  # a device that was not fitted
