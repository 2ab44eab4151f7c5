"""Throttling, clocks, limits, temperature and activity of windows."""

from __future__ import annotations

import pytest

from bench.records import GpuSample
from bench.telemetry.baseline import baseline_of, measure_idle
from bench.telemetry.series import series_of
from bench.telemetry.window import (
    counted_in,
    cross_check_activity,
    mean_in,
    reasons_text,
    report_window,
    share_of_time,
    temperature_drift_c,
    throttled_s,
)

from .conftest import FakeNvml, counter_samples


def one(samples: list[GpuSample]):  # type: ignore[no-untyped-def]
    (series,) = series_of(samples).values()
    return series


def ramp(**columns: object) -> list[GpuSample]:
    """100 samples, 0.1 s apart; each column is a function of time."""
    return [
        GpuSample(t_s=i / 10, device="GPU-x", **{k: f(i / 10) for k, f in columns.items()})  # type: ignore[operator, arg-type]
        for i in range(101)
    ]


def test_means_are_weighted_by_time() -> None:
    # read every 0.1 s in the first second, then every second: the mean must not lean to the first second
    times = [i / 10 for i in range(10)] + [float(i) for i in range(1, 11)]
    samples = [GpuSample(t_s=t, device="GPU-x", gpu_util_ratio=1.0 if t < 1 else 0.0) for t in times]
    assert mean_in(one(samples), "gpu_util_ratio", 0, 10) == pytest.approx(0.095, abs=0.01)


def test_a_column_never_read_has_no_mean() -> None:
    assert mean_in(one(ramp(power_w=lambda t: 1.0)), "tensor_active_ratio", 0, 10) is None


def test_share_of_time() -> None:
    s = one(ramp(power_w=lambda t: 700.0 if t >= 7 else 300.0))
    assert share_of_time(s, "power_w", 690, 0, 10) == pytest.approx(0.3, abs=0.02)
    assert share_of_time(s, "power_w", 690, 8, 10) == 1.0


def test_throttled_seconds_by_reason() -> None:
    s = one(ramp(throttled_sw_power_s=lambda t: 100 + 0.3 * t, throttled_hw_thermal_s=lambda t: 5.0))
    assert throttled_s(s, 2, 8) == {"power cap": pytest.approx(1.8), "thermal, by hardware": 0.0}


def test_counters_not_covered_or_reset_are_unknown() -> None:
    s = one(ramp(throttled_sw_power_s=lambda t: t if t < 5 else t - 5))
    assert counted_in(s, "throttled_sw_power_s", 2, 8) is None
    assert counted_in(s, "throttled_sw_power_s", 6, 9) == pytest.approx(3)
    assert counted_in(s, "throttled_sw_power_s", 8, 14) is None


def test_temperature_drift() -> None:
    assert temperature_drift_c(one(ramp(temperature_c=lambda t: 50 + 2 * t)), 0, 10) == pytest.approx(18, abs=1)


def test_reasons_in_words() -> None:
    assert reasons_text(0) == "none"
    assert reasons_text(0x24) == "power cap, thermal, by software"


def test_report_and_its_warnings() -> None:
    s = one(
        ramp(
            throttled_sw_thermal_s=lambda t: 0.5 * t,
            sm_clock_hz=lambda t: 1.4e9,
            gpu_util_ratio=lambda t: 1.0,
            temperature_c=lambda t: 40 + 3 * t,
            power_w=lambda t: 695.0,
            num_foreign_processes=lambda t: 1 if t > 5 else 0,
            memory_used_bytes=lambda t: int(1e9 * (1 + t)),
        )
    )
    report = report_window(s, {"max_sm_clock_hz": 2.0e9, "power_limit_w": 700.0}, 0, 10)
    assert report.clock_drop_ratio == pytest.approx(0.3)
    assert report.at_power_limit_ratio == 1.0
    assert report.max_memory_used_bytes == 11_000_000_000
    assert report.num_foreign_processes == 1
    codes = {w.code for w in report.warnings}
    assert {"clocks-throttled", "clocks-low", "temperature-drifts", "foreign-process"} <= codes
    assert all(w.remedy and w.scope == "GPU-x" for w in report.warnings)


def test_a_quiet_device_has_no_warnings() -> None:
    facts = {"max_sm_clock_hz": 2e9, "power_limit_w": 700.0}
    samples = counter_samples(
        300, 40, sm_clock_hz=1.98e9, gpu_util_ratio=1.0, temperature_c=60.0, throttled_sw_power_s=3.0
    )
    report = report_window(one(samples), facts, 2, 38)
    assert report.warnings == ()
    assert report.at_power_limit_ratio == 0.0


def test_unknown_facts_give_unknown_figures() -> None:
    report = report_window(one(counter_samples(300, 40)), {}, 2, 38)
    assert report.clock_drop_ratio is None and report.at_power_limit_ratio is None
    assert report.throttled_s == {} and report.temperature_drift_c is None


def test_a_window_without_samples_says_so() -> None:
    report = report_window(one(counter_samples(300, 10)), {}, 50, 60)
    assert "no-telemetry" in {w.code for w in report.warnings}


@pytest.mark.parametrize(
    ("mfu", "mbu", "tensor", "dram", "codes"),
    [
        (0.4, 0.6, 0.5, 0.7, set()),
        (0.4, 0.6, 0.3, 0.7, {"mfu-contradicted"}),
        (0.4, 0.9, 0.5, 0.7, {"mbu-contradicted"}),
        (0.4, 0.6, None, None, set()),
        (0.1, 0.1, 0.9, 0.9, set()),  # busy pipes at low efficiency contradict nothing
    ],
)
def test_arithmetic_against_measured_activity(mfu, mbu, tensor, dram, codes) -> None:  # type: ignore[no-untyped-def]
    found = cross_check_activity("GPU-x", mfu=mfu, mbu=mbu, tensor_active_ratio=tensor, dram_bandwidth_ratio=dram)
    assert {w.code for w in found} == codes


def test_baseline_from_counter_and_from_power() -> None:
    counter = baseline_of(one(counter_samples(72, 8)), 1, 7)
    assert counter.method == "counter" and counter.power_w == pytest.approx(72, rel=0.02)
    assert counter.uncertainty_w == pytest.approx(2 * 72 * 0.1 / 6, rel=0.1)
    power = baseline_of(one(ramp(power_w=lambda t: 70.0)), 1, 9)
    assert power.method == "power" and power.power_w == pytest.approx(70)
    nothing = baseline_of(one(ramp(gpu_util_ratio=lambda t: 0.0)), 1, 9)
    assert nothing.power_w is None and nothing.problem


def test_idle_power_is_measured(fake_nvml: FakeNvml) -> None:
    devices = fake_nvml.configure("gpu 0 power_w 68", "gpu 1 unsupported 83", "gpu 1 unsupported 191", num_gpus=2)
    found = measure_idle(devices, 1.2)
    assert found[devices[0]].method == "counter"
    assert found[devices[0]].power_w == pytest.approx(68, rel=0.05)
    assert found[devices[1]].method == "power" and found[devices[1]].power_w == pytest.approx(300)


def test_idle_power_of_what_is_not_there(fake_nvml: FakeNvml) -> None:
    fake_nvml.configure()
    found = measure_idle(["GPU-none"], 0.1)
    assert found["GPU-none"].power_w is None and "GPU-none" in str(found["GPU-none"].problem)
