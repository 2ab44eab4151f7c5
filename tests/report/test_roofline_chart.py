"""The roofline in the report: kernels of the same device and dtype, and a reason where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.catalog.hardware import load_hardware
from bench.report.roofline_chart import _answer, _beyond_data_sheet, kernel_points
from bench.report.roofline_picture import CellPoint
from bench.roofline import Ceilings


def case(family: str, dtype: str, flops: float, size: float, time_s: float, status: str = "ok") -> dict:  # type: ignore[type-arg]
    return {
        "family": family,
        "dtype": dtype,
        "status": status,
        "flops": flops,
        "bytes": size,
        "time_s": {"value": time_s},
    }


def test_kernels_of_other_dtypes_and_failed_ones_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    cases = [
        case("gemm", "bf16", 2e9, 1e6, 1e-3),
        case("gemm", "int8", 2e9, 1e6, 1e-3),
        case("attention", "fp32", 1e9, 1e9, 1e-2),
        case("memory", "fp32", 0, 1e9, 1e-2),  # a copy does no arithmetic
        case("norm", "bf16", 1e6, 1e6, 1e-3, status="n/a"),
        {"family": "gemm", "dtype": "bf16", "status": "ok", "flops": None, "bytes": None, "time_s": None},
    ]
    path.write_text(json.dumps({"cases": cases}))
    points = kernel_points(path, "bf16")
    assert [(p.family, p.flops_per_s) for p in points] == [
        ("gemm", pytest.approx(2e12)),
        ("attention", pytest.approx(1e11)),
    ]
    path.write_text("torn")
    assert kernel_points(path, "bf16") == ()


def test_the_answer_names_the_nearer_limit() -> None:
    ceilings = Ceilings("dev", {"bf16": 100.0}, 10.0, 1.0, "measured kernels")
    text = _answer(CellPoint("TP 1, batch size 8", 20.0, 5.0), ceilings, "bf16")
    assert "20% of the bf16 ceiling" in text and "50% of the memory ceiling" in text and "memory is the nearer" in text


def test_more_than_the_device_can_do_is_no_answer() -> None:
    ceilings = Ceilings("dev", {"bf16": 100.0}, 10.0, 1.0, "data sheet")
    text = _answer(CellPoint("TP 1, batch size 8", 129.0, 5.0), ceilings, "bf16")
    assert "129% of the bf16 ceiling" in text and "cannot be" in text and "nearer" not in text


def test_kernels_beyond_the_data_sheet_are_no_ceilings() -> None:
    hardware = load_hardware("H200-SXM")
    peak, memory = hardware.peak_flops["bf16"], hardware.memory_bandwidth_bytes_per_s
    known = frozenset({"bf16", "memory"})
    assert not _beyond_data_sheet(Ceilings("x", {"bf16": peak}, memory, 0.0, "k", measured=known), hardware, "bf16")
    text = _beyond_data_sheet(Ceilings("x", {"bf16": 600 * peak}, memory, 0.0, "k", measured=known), hardware, "bf16")
    assert "bf16 594 PFLOP/s against 989 TFLOP/s" in text and "memory" not in text
    assert not _beyond_data_sheet(Ceilings("x", {"bf16": 600 * peak}, memory, 0.0, "k", measured=known), None, "bf16")
