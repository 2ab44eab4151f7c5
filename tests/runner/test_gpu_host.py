"""Everything around an engine on a host with two GPUs: a fake NVIDIA driver below, the null engine in the middle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.analysis.summary import summarise_cell
from bench.store import list_cells, list_runs
from tests.telemetry.conftest import fake_library, fake_nvml  # noqa: F401

EXPERIMENT = """
name: two-gpus
why: to see a GPU host's path without a GPU
model: tiny-llama
weights: dummy
engine: {kind: "null", time_per_token_s: 0.02, args: {num_gpus: 2, tensor_parallel_size: 2}}
load: {kind: closed_loop}
workload: {isl: 16, osl: 10}
warmup: {num_requests: 2}
stop: {min_duration_s: 2.6, max_requests: 4000}
repeats: 2
gpu_price_usd_per_hour: 2.5
sweep: {grid: {concurrency: [2, 4]}}
"""


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench", *args], capture_output=True, text=True, timeout=200, env=dict(os.environ)
    )


@pytest.fixture
def results(fake_nvml, tmp_path: Path) -> Path:  # type: ignore[no-untyped-def]  # noqa: F811
    fake_nvml.configure(
        "gpu * name NVIDIA_H100_80GB_HBM3",
        "gpu * power_w 300",
        "gpu * energy_period_ms 20",
        "gpu * gpm 1",
        "gpu * sm_active 80",
        num_gpus=2,
    )
    path = tmp_path / "two-gpus.yaml"
    path.write_text(EXPERIMENT)
    done = bench("run", str(path), "--plain", "--no-report", "--results", str(tmp_path / "results"))
    assert done.returncode == 0, done.stdout + done.stderr
    return tmp_path / "results" / "runs" / "two-gpus"


def test_energy_baselines_and_provenance_of_the_held_gpus(results: Path) -> None:
    cells = list_cells(results)
    assert len(cells) == 2
    for cell in cells:
        for run in list_runs(cell):
            m = run.manifest
            assert m["engine"]["num_gpus"] == 2 and len(m["engine"]["device_uuids"]) == 2
            assert [g["name"] for g in m["provenance"]["gpus"]] == ["NVIDIA H100 80GB HBM3"] * 2
            assert m["fingerprint"]["devices"] == ["NVIDIA H100 80GB HBM3"] * 2
            assert all(b["power_w"] == pytest.approx(300, rel=0.05) for b in m["idle_gpu"].values())
            idle = m["telemetry"]["idle_power_w"]
            assert all(idle[u] == pytest.approx(300, rel=0.05) for u in m["engine"]["device_uuids"])
            assert {s.device for s in run.telemetry()} == {*m["engine"]["device_uuids"], "cpu"}
        summary = summarise_cell(list_runs(cell))
        tokens_per_s = summary.estimates["output_tokens_per_s"].value
        assert summary.estimates["energy_j_per_output_token"].value == pytest.approx(600 / tokens_per_s, rel=0.05)
        # the fake draws the same power idle and busy: nothing is left net of the loaded idle engine
        assert abs(summary.estimates["energy_net_j_per_output_token"].value) < 0.1 * 600 / tokens_per_s
        per_gpu = summary.estimates["output_tokens_per_s_per_gpu"].value
        assert per_gpu == pytest.approx(tokens_per_s / 2)


def test_the_report_speaks_of_the_gpus(results: Path) -> None:
    done = bench("report", str(results))
    assert done.returncode == 0, done.stdout + done.stderr
    html = (results / "report" / "report.html").read_text(encoding="utf-8")
    assert "H100" in html and "J" in html
    assert "SIMULATED" in html.upper()  # the null engine measures nothing: that must be said


def test_validate_and_doctor_see_the_gpus(fake_nvml, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    fake_nvml.configure("gpu * name NVIDIA_H100_80GB_HBM3", "gpu * memory_bytes 85520809984", num_gpus=2)
    done = bench("validate", "default-gpu")
    assert done.returncode == 0, done.stderr
    assert "needs 4 GPUs, this machine has 2 GPUs" in done.stdout
    assert "2" in bench("doctor").stdout
