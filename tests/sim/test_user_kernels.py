"""The user's kernel measurements correct the shipped curves, and broken ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.catalog.hardware import load_hardware
from bench.catalog.model import load_model
from bench.errors import BadInput
from bench.sim.model_shape import LayerGroup
from bench.sim.op_times import decode_attention_s, gemm_s, prefill_attention_s
from bench.sim.step_time import build_step_time, device_of
from bench.sim.step_time_kernel import step_time_s
from bench.sim.user_kernels import read_kernel_scales

H100 = load_hardware("h100-sxm")
DEVICE = device_of(H100)
GROUP = LayerGroup(1, 32, 8, 128)


def case(family: str, op: str, shape: dict[str, int], time_s: float, status: str = "ok") -> dict[str, Any]:
    return {"family": family, "op": op, "dtype": "bf16", "shape": shape, "status": status, "time_s": {"value": time_s}}


def summary(folder: Path, memory: float, compute: float, decode: float, prefill: float) -> Path:
    """A summary.json of a device that is slower than the curves by these factors."""
    cases = []
    for n in (4096, 6144, 14336):
        cases.append(
            case(
                "gemm",
                "linear",
                {"m": 8, "n": n, "k": 4096},
                memory * gemm_s(DEVICE, np.array([8.0]), n, 4096, "bf16")[0],
            )
        )
        cases.append(
            case(
                "gemm",
                "linear",
                {"m": 8192, "n": n, "k": 4096},
                compute * gemm_s(DEVICE, np.array([8192.0]), n, 4096, "bf16")[0],
            )
        )
    heads = {"heads": 32, "kv_heads": 8, "head_dim": 128}
    for length in (1024, 2048, 4096):
        t = decode_attention_s(DEVICE, GROUP, "bf16", 1, np.array([32.0]), np.array([float(length)]))[0]
        cases.append(
            case("attention", "paged_decode", {"batch": 32, "context": length, "block_size": 16, **heads}, decode * t)
        )
        t = prefill_attention_s(DEVICE, GROUP, "bf16", 1, np.array([float(length)]), np.array([(length + 1) / 2]))[0]
        cases.append(case("attention", "prefill", {"batch": 1, "length": length, **heads}, prefill * t))
    cases.append(case("gemm", "linear", {"m": 8, "n": 4096, "k": 4096}, 1.0))  # a slower implementation of the same
    cases.append(case("gemm", "linear", {"m": 8, "n": 512, "k": 512}, 1e-9, status="wrong"))
    (folder / "summary.json").write_text(json.dumps({"kind": "kernels", "cases": cases}))
    return folder


def test_the_ratios_are_those_of_the_measured_device(tmp_path: Path) -> None:
    scales = read_kernel_scales(summary(tmp_path, 1.3, 1.2, 1.5, 0.9), DEVICE)
    found = (scales.memory, scales.compute, scales.decode_attention, scales.prefill_attention)
    assert found == pytest.approx((1.3, 1.2, 1.5, 0.9))
    assert scales.num_cases == (3, 3, 3, 3)


def test_slower_kernels_make_slower_steps(tmp_path: Path) -> None:
    model = load_model("llama-3.1-8b")
    shipped = build_step_time(model, H100)
    measured = build_step_time(model, H100, kernels=summary(tmp_path, 1.3, 1.3, 1.3, 1.3))
    assert measured.trust == "user-kernels" and "kernels measured on H100-SXM" in measured.source
    a, b = (step_time_s(s.coefficients(), 0, 0, 0.0, 0, 32, 32000, 1000, 32)[0] for s in (shipped, measured))
    assert 1.15 < b / a < 1.31  # all but the small kernels and the launch


@pytest.mark.parametrize("text", ["", "{}", '{"kind": "other", "cases": []}', "[]"])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(BadInput, match=r"summary\.json"):
        read_kernel_scales(tmp_path, DEVICE)


def test_too_few_cases_are_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"kind": "kernels", "cases": []}))
    with pytest.raises(BadInput, match="too few"):
        read_kernel_scales(tmp_path, DEVICE)


def test_kernels_of_another_device_are_refused(tmp_path: Path) -> None:
    file = summary(tmp_path, 1.0, 1.0, 1.0, 1.0) / "summary.json"
    data = json.loads(file.read_text())
    for device, found in (
        ({"kind": "cuda", "name": "NVIDIA A100-SXM4-80GB"}, "measured on A100-80-SXM, not on H100-SXM"),
        ({"kind": "cpu", "name": "some CPU"}, "measured on cpu, not on H100-SXM"),
    ):
        file.write_text(json.dumps({**data, "device": device}))
        with pytest.raises(BadInput, match=found):
            read_kernel_scales(tmp_path, DEVICE)
    for device in ({"kind": "cuda", "name": "NVIDIA H100 80GB HBM3"}, {"kind": "cuda", "name": "a card nobody knows"}):
        file.write_text(json.dumps({**data, "device": device}))
        assert read_kernel_scales(tmp_path, DEVICE).num_cases
