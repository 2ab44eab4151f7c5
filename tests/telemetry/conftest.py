"""The fake NVIDIA driver: compiled once, found by pynvml through LD_LIBRARY_PATH in processes that the tests start."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.records import GpuSample

SOURCE = Path(__file__).parent / "fake_nvml" / "fake_nvml.c"
ROOT = Path(__file__).parents[2]


def uuid_of(index: int) -> str:
    return f"GPU-{index:08d}-0000-0000-0000-00000000000{index % 10}"


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler to build the fake NVML with")
    folder = tmp_path_factory.mktemp("fake_nvml")
    target = folder / "libnvidia-ml.so.1"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(target), str(SOURCE)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder


@dataclass
class FakeNvml:
    """Writes the fake's settings and starts Python in its world."""

    folder: Path
    config_path: Path
    monkeypatch: pytest.MonkeyPatch

    def configure(self, *lines: str, num_gpus: int = 1) -> list[str]:
        """Settings for every process started from now on; gives the UUIDs."""
        self.config_path.write_text("\n".join([f"num_gpus {num_gpus}", *lines]) + "\n")
        self.monkeypatch.setenv("FAKE_NVML_CONFIG", str(self.config_path))
        self.monkeypatch.setenv("LD_LIBRARY_PATH", str(self.folder))
        self.monkeypatch.setenv("PYTHONPATH", str(ROOT))
        return [uuid_of(i) for i in range(num_gpus)]

    def python(self, code: str, *arguments: str) -> object:
        """Runs ``code`` in a fresh process with the fake driver; it prints one JSON value, which is returned."""
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, env=dict(os.environ)
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def fake_nvml(fake_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    return FakeNvml(fake_library, tmp_path / "fake_nvml.conf", monkeypatch)


def counter_samples(
    power_w: float,
    duration_s: float,
    *,
    device: str = "GPU-x",
    period_s: float = 0.1,
    sample_s: float = 0.05,
    offset_j: float = 1000.0,
    shift_s: float = 0.013,
    **constant: float,
) -> list[GpuSample]:
    """What a sampler would see of a device at constant power whose counter moves every ``period_s``."""
    samples = []
    for i in range(round(duration_s / sample_s) + 1):
        t = i * sample_s + shift_s
        energy = offset_j + power_w * period_s * int(t / period_s + 1e-9)
        samples.append(GpuSample(t_s=t, device=device, energy_j=energy, energy_t_s=t, power_w=power_w, **constant))  # type: ignore[arg-type]
    return samples


def wait_until(condition: object, limit_s: float = 10.0) -> bool:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False
