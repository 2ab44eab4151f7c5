"""The real sampling process against the fake driver, through the real pynvml."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from bench.telemetry.columns import SampleFile, read_samples
from bench.telemetry.energy import window_energy
from bench.telemetry.sampler import Sampler
from bench.telemetry.series import read_series
from bench.telemetry.source import Rates
from bench.telemetry.window import report_window

from .conftest import FakeNvml, uuid_of


def record(path: Path, devices: list[str], duration_s: float, **options: object) -> tuple[SampleFile, dict]:
    with Sampler(path, time.monotonic(), devices=devices, **options) as sampler:  # type: ignore[arg-type]
        assert sampler.error is None
        time.sleep(duration_s)
    assert sampler.error is None, sampler.error
    return read_samples(path), sampler.stats


def undisturbed(stats: dict) -> bool:
    """Whether the machine let the sampler keep its times: only then may a test expect exact ones."""
    return stats["num_missed_deadlines"] == 0 and stats["jitter_s"]["max"] < 0.01


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "telemetry.arrow"


def test_eight_gpus_are_read_with_their_own_values(fake_nvml: FakeNvml, path: Path) -> None:
    settings = [f"gpu {i} power_w {100 + i}" for i in range(8)] + [f"gpu {i} temperature_c {40 + i}" for i in range(8)]
    devices = fake_nvml.configure(*settings, num_gpus=8)
    file, stats = record(path, devices, 1.3)
    assert set(file.devices) == set(devices)
    for i, device in enumerate(devices):
        series = read_series(path)[device]
        assert set(series.readings("power_w")[1]) == {100.0 + i}
        assert set(series.readings("temperature_c")[1]) == {40.0 + i}
        assert set(series.readings("index")[1]) == {float(i)}
        assert stats["devices"][device]["power_limit_w"] == 700
    assert not file.torn


def test_only_the_named_gpus_are_sampled_in_the_given_order(fake_nvml: FakeNvml, path: Path) -> None:
    fake_nvml.configure(num_gpus=8)
    file, stats = record(path, [uuid_of(5), uuid_of(2)], 0.3)
    assert file.devices == (uuid_of(5), uuid_of(2))
    assert list(stats["devices"]) == [uuid_of(5), uuid_of(2)]


def test_units_and_activity(fake_nvml: FakeNvml, path: Path) -> None:
    (device,) = fake_nvml.configure(
        "gpu 0 sm_mhz 1410",
        "gpu 0 pcie_bytes_per_s 3145728",
        "gpu 0 num_links 2",
        "gpu 0 nvlink_kib_per_s 1024",
        "gpu 0 used_bytes 123456789",
        "gpu 0 throttled_sw_power 0.5",
    )
    record(path, [device], 1.4)
    s = read_series(path)[device]
    expected = {
        "sm_clock_hz": 1410e6,
        "memory_clock_hz": 2619e6,
        "sm_active_ratio": 0.9,
        "sm_occupancy_ratio": 0.4,
        "tensor_active_ratio": 0.3,
        "dram_bandwidth_ratio": 0.6,
        "pcie_tx_bytes_per_s": 3145728,
        "nvlink_rx_bytes_per_s": 2 * 1024 * 1024,
        "gpu_util_ratio": 1.0,
        "memory_util_ratio": 0.4,
        "memory_used_bytes": 123456789,
        "memory_temperature_c": 55,
        "throttle_reasons": 4,
    }
    for column, value in expected.items():
        times, values = s.readings(column)
        assert len(values), column
        assert values == pytest.approx(np.full(len(values), value)), column
    times, throttled = s.readings("throttled_sw_power_s")
    assert np.diff(throttled).sum() == pytest.approx(0.5 * (times[-1] - times[0]), rel=0.05)


def test_rates_of_the_groups(fake_nvml: FakeNvml, path: Path) -> None:
    (device,) = fake_nvml.configure()
    _, stats = record(path, [device], 2.05)
    s = read_series(path)[device]
    # as many rows as ticks were kept; a machine too busy to keep them shows it in missed deadlines
    assert len(s.t_s) == stats["num_ticks"]
    assert stats["num_ticks"] + stats["num_missed_deadlines"] in range(40, 46)
    if undisturbed(stats):
        assert len(s.readings("sm_clock_hz")[0]) in range(9, 13)
        assert len(s.readings("temperature_c")[0]) in (2, 3, 4)


def test_samples_share_the_runs_time_origin(fake_nvml: FakeNvml, path: Path) -> None:
    (device,) = fake_nvml.configure()
    t0 = time.monotonic() - 100.0
    with Sampler(path, t0, devices=[device]):
        before = time.monotonic() - t0
        time.sleep(0.3)
        after = time.monotonic() - t0
    s = read_series(path)[device]
    assert s.t_s[0] > 100.0
    assert before - 0.2 < s.t_s[0] <= s.t_s[-1] < after + 0.2
    # the driver stamps in wall time; after translation it is the same moment (bar a tick that was interrupted)
    stamps = s.readings("energy_t_s")[1]
    assert np.median(np.abs(stamps - s.t_s)) < 0.05


def test_energy_of_a_window_matches_the_power_that_was_drawn(fake_nvml: FakeNvml, path: Path) -> None:
    # 250 W, then 650 W: the counter's exact value is known from the time of the step
    t0 = time.monotonic()
    (device,) = fake_nvml.configure(
        f"t0_monotonic_s {t0:.6f}", "gpu 0 power_w 250", "gpu 0 step_at_s 1.6", "gpu 0 step_power_w 650"
    )
    with Sampler(path, t0, devices=[device]) as sampler:
        time.sleep(max(2.0, t0 + 3.0 - time.monotonic()))
    series = read_series(path)[device]
    start_s, end_s = float(series.t_s[0]) + 0.4, float(series.t_s[-1]) - 0.2
    energy = window_energy(series, start_s, end_s)
    exact_j = 250 * max(0.0, 1.6 - start_s) + 650 * (end_s - max(1.6, start_s))
    assert energy.energy_j is not None
    assert abs(energy.energy_j - exact_j) <= energy.uncertainty_j
    if undisturbed(sampler.stats):
        power_at_start = 250 if start_s < 1.6 else 650
        assert energy.uncertainty_j == pytest.approx(0.1 * (power_at_start + 650), rel=0.25)
        assert energy.counter_period_s == pytest.approx(0.1, abs=0.03)
        assert energy.integrated_j == pytest.approx(exact_j, rel=0.05)


def test_a_counter_that_wraps_goes_on(fake_nvml: FakeNvml, path: Path) -> None:
    # 300 W: 32 bits of mJ wrap 450 J after the origin, at 1.5 s
    t0 = time.monotonic()
    (device,) = fake_nvml.configure(
        f"t0_monotonic_s {t0:.6f}", "gpu 0 energy_bits 32", f"gpu 0 energy_offset_mj {2**32 - 450_000}"
    )
    with Sampler(path, t0, devices=[device]) as sampler:
        time.sleep(max(0.5, t0 + 2.2 - time.monotonic()))
    times, energy_j = read_series(path)[device].readings("energy_j")
    if times[0] > 1.4:
        pytest.skip("this machine was too busy to start the sampler before the wrap")
    assert sampler.stats["devices"][device]["energy_counter_wraps"] == 1
    assert np.all(np.diff(energy_j) >= 0)
    assert energy_j[-1] > 2**32 / 1000
    grown = energy_j[-1] - energy_j[0]
    assert grown == pytest.approx(300 * (times[-1] - times[0]), abs=300 * 0.2)


def test_traffic_counters_of_32_bits_that_wrap_many_times_a_second(fake_nvml: FakeNvml, path: Path) -> None:
    (device,) = fake_nvml.configure(
        "gpu 0 gpm 0",
        "gpu 0 pcie_bits 32",
        "gpu 0 pcie_bytes_per_s 20e9",
        "gpu 0 num_links 3",
        "gpu 0 nvlink_kib_per_s 5e6",
    )
    _, stats = record(path, [device], 2.3)
    s = read_series(path)[device]
    if undisturbed(stats):
        assert s.readings("pcie_rx_bytes_per_s")[1] == pytest.approx(20e9, rel=0.01)
    assert s.readings("nvlink_tx_bytes_per_s")[1] == pytest.approx(3 * 5e6 * 1024, rel=0.01)
    assert stats["devices"][device]["num_nvlinks_read"] == 3


def test_activity_can_be_left_to_another_profiler(fake_nvml: FakeNvml, path: Path) -> None:
    (device,) = fake_nvml.configure()
    file, stats = record(path, [device], 0.6, gpm=False)
    assert stats["devices"][device]["gpm"] is False
    assert {s.sm_active_ratio for s in file.samples()} == {None}
    assert any(s.gpu_util_ratio is not None for s in file.samples())


def test_unsupported_readings_are_unknown_and_never_zero(fake_nvml: FakeNvml, path: Path) -> None:
    fields = (83, 191, 186, 74, 269, 82)
    devices = fake_nvml.configure("gpu 0 gpm 0", *[f"gpu 0 unsupported {f}" for f in fields], num_gpus=2)
    file, stats = record(path, devices, 0.6)
    rows = [s for s in file.samples() if s.device == devices[0]]
    for column in [
        "energy_j",
        "energy_t_s",
        "power_w",
        "throttled_sw_power_s",
        "throttled_sw_thermal_s",
        "memory_temperature_c",
        "sm_active_ratio",
        "tensor_active_ratio",
        "dram_bandwidth_ratio",
        "nvlink_tx_bytes_per_s",
    ]:
        assert {getattr(r, column) for r in rows} == {None}, column
    assert {r.power_average_w for r in rows} == {300.0}
    assert {r.throttled_hw_power_s for r in rows} == {0.0}  # supported, and truly zero
    assert stats["devices"][devices[0]]["energy_field"] is None
    assert stats["num_failed_reads"] == 0
    # the neighbour has everything
    assert all(s.power_w == 300.0 for s in file.samples() if s.device == devices[1])


def test_the_newer_energy_field_stands_in_for_the_older_one(fake_nvml: FakeNvml, path: Path) -> None:
    (device,) = fake_nvml.configure("gpu 0 unsupported 83")
    _, stats = record(path, [device], 0.3)
    assert stats["devices"][device]["energy_field"] == 191
    assert len(read_series(path)[device].readings("energy_j")[0]) > 2


def test_a_driver_that_refuses_a_call_with_an_unknown_field(fake_nvml: FakeNvml, path: Path) -> None:
    (device,) = fake_nvml.configure("gpu 0 refuse_unknown 1", "gpu 0 no_temperature_v 1", "gpu 0 no_memory_v2 1")
    record(path, [device], 0.4)
    s = read_series(path)[device]
    assert len(s.readings("energy_j")[0]) > 2
    assert len(s.readings("power_w")[0]) == 0
    assert len(s.readings("temperature_c")[0]) >= 1
    assert len(s.readings("memory_used_bytes")[0]) >= 1


def test_a_gpu_lost_in_the_middle_is_recorded_and_the_others_go_on(
    fake_nvml: FakeNvml, path: Path, tmp_path: Path
) -> None:
    lost_file = tmp_path / "lost"
    devices = fake_nvml.configure(f"gpu 1 lost_file {lost_file}", num_gpus=3)
    t0 = time.monotonic()
    with Sampler(path, t0, devices=devices) as sampler:
        time.sleep(0.8)
        lost_at_s = time.monotonic() - t0
        lost_file.touch()
        time.sleep(1.6)
    assert sampler.error is None
    series = read_series(path)
    lost = series[devices[1]]
    assert lost.lost.any() and lost.t_s[lost.lost][0] >= lost_at_s - 0.01
    assert (lost.t_s[~lost.lost] <= lost_at_s + 0.5).all()
    assert np.isnan(lost.columns["power_w"][lost.lost]).all()
    assert not np.isnan(lost.columns["power_w"][~lost.lost]).any()
    for other in (devices[0], devices[2]):
        assert not series[other].lost.any()
        assert series[other].t_s[-1] > lost_at_s + 1.0
    assert sampler.stats["devices"][devices[1]]["lost"] is True
    report = report_window(lost, sampler.stats["devices"][devices[1]], float(lost.t_s[0]), float(lost.t_s[-1]))
    assert report.energy.energy_j is None and "lost" in str(report.energy.problem)
    assert "gpu-lost" in {w.code for w in report.warnings}


def test_a_gpu_that_comes_back_is_read_again(fake_nvml: FakeNvml, path: Path, tmp_path: Path) -> None:
    lost_file = tmp_path / "lost"
    (device,) = fake_nvml.configure(f"gpu 0 lost_file {lost_file}")
    with Sampler(path, time.monotonic(), devices=[device]) as sampler:
        time.sleep(0.3)
        lost_file.touch()
        time.sleep(0.3)
        lost_file.unlink()
        time.sleep(1.6)
    s = read_series(path)[device]
    assert s.lost.any() and not s.lost[-1]
    assert sampler.stats["devices"][device]["lost"] is False


def test_a_passing_error_leaves_a_gap_and_no_zeros(fake_nvml: FakeNvml, path: Path, tmp_path: Path) -> None:
    error_file = tmp_path / "error"
    (device,) = fake_nvml.configure(f"gpu 0 error_file {error_file}")
    with Sampler(path, time.monotonic(), devices=[device]) as sampler:
        time.sleep(0.4)
        error_file.touch()
        time.sleep(0.4)
        error_file.unlink()
        time.sleep(0.5)
    s = read_series(path)[device]
    there = np.isfinite(s.columns["power_w"])
    assert set(s.columns["power_w"][there]) == {300.0}
    assert there[0] and not there.all() and there[-1] and not s.lost.any()
    assert sampler.stats["devices"][device]["num_read_errors"] > 0


def test_an_error_at_the_start_is_not_taken_for_unsupported(fake_nvml: FakeNvml, path: Path, tmp_path: Path) -> None:
    error_file = tmp_path / "error"
    error_file.touch()
    (device,) = fake_nvml.configure(f"gpu 0 error_file {error_file}")
    with Sampler(path, time.monotonic(), devices=[device]):
        time.sleep(0.2)
        error_file.unlink()
        time.sleep(0.8)
    assert len(read_series(path)[device].readings("energy_j")[0]) > 2


def test_no_driver_is_said_and_does_not_raise(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "lib"
    broken.mkdir()
    (broken / "libnvidia-ml.so.1").write_text("not a library")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(broken))
    with Sampler(path, time.monotonic(), devices=[uuid_of(0)]) as sampler:
        pass
    assert sampler.error is not None and "NVML" in sampler.error
    assert sampler.pid is None


@pytest.mark.parametrize(("code", "words"), [(9, "kernel module"), (18, "reboot"), (4, "/dev/nvidia")])
def test_a_driver_that_does_not_start_says_what_to_do(fake_nvml: FakeNvml, path: Path, code: int, words: str) -> None:
    fake_nvml.configure(f"init_error {code}")
    with Sampler(path, time.monotonic(), devices=[uuid_of(0)]) as sampler:
        pass
    assert words in str(sampler.error)


def test_an_unknown_gpu_names_the_present_ones(fake_nvml: FakeNvml, path: Path) -> None:
    fake_nvml.configure(num_gpus=2)
    with Sampler(path, time.monotonic(), devices=["GPU-nowhere"]) as sampler:
        pass
    assert "GPU-nowhere" in str(sampler.error) and uuid_of(1) in str(sampler.error)


def test_foreign_processes_are_counted_and_own_ones_are_not(fake_nvml: FakeNvml, path: Path) -> None:
    import os
    import subprocess

    other = subprocess.Popen(["sleep", "30"], start_new_session=True)
    try:
        devices = fake_nvml.configure(
            f"gpu 0 process {os.getpid()}", "gpu 1 process 1", f"gpu 1 process {os.getpid()}", num_gpus=2
        )
        # process 1 is an ancestor of everything and a descendant of nothing
        record(path, devices, 0.3)
        series = read_series(path)
        assert set(series[devices[0]].readings("num_foreign_processes")[1]) == {0.0}
        assert set(series[devices[1]].readings("num_foreign_processes")[1]) == {1.0}
    finally:
        other.kill()
        other.wait()


def test_gpus_and_host_side_by_side(fake_nvml: FakeNvml, path: Path) -> None:
    (device,) = fake_nvml.configure()
    record(path, [device, "cpu"], 0.6)
    series = read_series(path)
    assert set(series) == {device, "cpu"}
    assert len(series["cpu"].readings("memory_used_bytes")[0]) >= 1


def test_rates_can_be_chosen(fake_nvml: FakeNvml, path: Path) -> None:
    (device,) = fake_nvml.configure()
    _, stats = record(path, [device], 0.5, rates=Rates(100, 10, 2))
    assert stats["rates_hz"] == {"fast": 100, "middle": 10, "slow": 2}
    assert stats["num_ticks"] + stats["num_missed_deadlines"] in range(45, 60)
