"""Telemetry over a window: sums over devices, energy per token, and what is absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.analysis.devices import device_window
from bench.analysis.run_facts import run_facts
from bench.analysis.steady_state import Window
from bench.records import GpuSample
from bench.store import RunReader, RunWriter

WINDOW = Window(0.0, 40.0, "steady", True, "")


def run_with(
    tmp_path: Path, devices: dict[str, dict[str, Any]], held: list[str], idle_s: float = 4.0, **manifest: Any
) -> RunReader:
    """Constant readings from -idle_s to 45 s; ``power`` while busy, 100 W before; energy follows."""
    engine = {"num_gpus": len([h for h in held if h != "cpu"]), "device_uuids": [h for h in held if h != "cpu"]}
    writer = RunWriter(tmp_path / "c" / "run-1-x", {"origin": "measured", "engine": engine, **manifest})
    energy = dict.fromkeys(devices, 5e5)
    steps = int((45 + idle_s) / 0.1)
    for i in range(steps):
        t = -idle_s + i * 0.1
        for name, about in devices.items():
            extra = {k: v for k, v in about.items() if k not in ("power", "no_counter")}
            power = about["power"] if t > 0 else 100.0
            energy[name] += power * 0.1
            counter = None if about.get("no_counter") else energy[name]
            writer.append_telemetry(
                GpuSample(t, name, power_w=power, energy_j=counter, energy_t_s=None if counter is None else t, **extra)
            )
    writer.finish("complete")
    return RunReader.open(writer.folder)


def test_power_and_energy_are_summed_over_the_devices_held(tmp_path: Path) -> None:
    devices = {
        "GPU-a": {"power": 300.0, "gpu_util_ratio": 1.0, "memory_used_bytes": 10},
        "GPU-b": {"power": 500.0, "gpu_util_ratio": 0.5, "memory_used_bytes": 30},
        "GPU-c": {"power": 700.0, "gpu_util_ratio": 1.0, "memory_used_bytes": 99},  # not the engine's
    }
    run = run_with(tmp_path, devices, ["GPU-a", "GPU-b"])
    found = device_window(run, run_facts(run), WINDOW, 10_000, 30_000)
    v = found.values
    assert v["power_w"] == pytest.approx(800, rel=0.01)
    assert v["energy_j_per_output_token"] == pytest.approx(800 * 40 / 10_000, rel=0.01)
    assert v["energy_j_per_total_token"] == pytest.approx(800 * 40 / 40_000, rel=0.01)
    assert v["energy_net_j_per_output_token"] == pytest.approx(600 * 40 / 10_000, rel=0.02)  # 2 x 100 W idle
    assert v["gpu_util_ratio"] == pytest.approx(0.75)
    assert v["memory_used_bytes"] == 40


def test_the_manifest_s_idle_power_wins(tmp_path: Path) -> None:
    run = run_with(tmp_path, {"GPU-a": {"power": 300.0}}, ["GPU-a"], telemetry={"idle_power_w": {"GPU-a": 50.0}})
    v = device_window(run, run_facts(run), WINDOW, 1000, 0).values
    assert v["energy_net_j_per_output_token"] == pytest.approx(250 * 40 / 1000, rel=0.01)


def test_without_a_baseline_there_is_no_net_energy(tmp_path: Path) -> None:
    run = run_with(tmp_path, {"GPU-a": {"power": 300.0}}, ["GPU-a"], idle_s=0.3)
    found = device_window(run, run_facts(run), WINDOW, 1000, 0)
    assert "energy_net_j_per_output_token" not in found.values
    assert "idle" in found.absent["energy_net_j_per_output_token"]


def test_one_device_without_counter_makes_the_sum_unknown(tmp_path: Path) -> None:
    devices = {"GPU-a": {"power": 300.0}, "GPU-b": {"power": 300.0, "no_counter": True}}
    run = run_with(tmp_path, devices, ["GPU-a", "GPU-b"])
    found = device_window(run, run_facts(run), WINDOW, 1000, 0)
    assert "energy_j_per_output_token" not in found.values
    assert "no readable energy counter" in found.absent["energy_j_per_output_token"]
    assert found.values["power_w"] == pytest.approx(600, rel=0.01)  # from the power readings of both


def test_short_windows_have_no_energy_per_token(tmp_path: Path) -> None:
    run = run_with(tmp_path, {"GPU-a": {"power": 300.0}}, ["GPU-a"])
    found = device_window(run, run_facts(run), Window(0.0, 1.5, "steady", True, ""), 1000, 0)
    assert "energy_j_per_output_token" not in found.values and "energy_j_per_output_token" in found.absent


def test_foreign_processes_and_throttling_are_warned_of_once(tmp_path: Path) -> None:
    devices = {n: {"power": 300.0, "num_foreign_processes": 2} for n in ("GPU-a", "GPU-b")}
    run = run_with(tmp_path, devices, ["GPU-a", "GPU-b"])
    warnings = device_window(run, run_facts(run), WINDOW, 1000, 0).warnings
    foreign = [w for w in warnings if w.code == "foreign-process"]
    assert len(foreign) == 1 and "1 more device" in foreign[0].message


def test_telemetry_of_other_devices_is_not_taken(tmp_path: Path) -> None:
    run = run_with(tmp_path, {"GPU-z": {"power": 300.0}}, ["GPU-a"])
    found = device_window(run, run_facts(run), WINDOW, 1000, 0)
    assert found.values == {} and "not the engine's devices" in found.absent["power_w"]


def test_no_telemetry_says_why(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "n" / "run-1-x", {"telemetry": {"error": "turned off in the experiment"}})
    writer.finish("complete")
    run = RunReader.open(writer.folder)
    assert device_window(run, run_facts(run), WINDOW, 1, 1).absent["power_w"] == "turned off in the experiment"
