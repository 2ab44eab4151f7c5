"""The roofline in the report: kernels of the same device and dtype, and a reason where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.report.roofline_chart import _answer, kernel_points
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
