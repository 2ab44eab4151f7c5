"""Peaks, shares and files, from hand-made samples: every figure can be computed on paper."""

from __future__ import annotations

import json
from datetime import datetime, timezone

import pytest

from bench.errors import BadInput
from kernels import picture, results, table
from kernels.case import Case, make_case
from kernels.config import SuiteConfig
from kernels.device import Device

GPU = Device("cuda", 0, "NVIDIA H100 80GB HBM3", 85_520_809_984, 50 * 2**20, 132, (9, 0), "GPU-x", 1)
SUITE = SuiteConfig(name="mine", why="test")
STARTED = datetime(2026, 11, 24, 6, tzinfo=timezone.utc)
NOMINAL = {
    "kind": "data sheet",
    "hardware": "x",
    "source": "a sheet",
    "bandwidth_bytes_per_s": 4e12,
    "flops_per_s": {"bf16": 1e15, "fp8": 2e15},
    "link_bytes_per_s": 450e9,
    "pcie_bytes_per_s": 64e9,
}


def line(case: Case, seconds: float, **work: float) -> dict:
    times = [seconds * f for f in (0.9, 0.95, 1.0, 1.0, 1.0, 1.05, 1.1)]
    check = {
        "passed": True,
        "output": "y",
        "reference": "fp64",
        "max_error": 1e-3,
        "max_tolerance": 1e-2,
        "rms_error": 1e-4,
        "rms_tolerance": 1e-3,
        "num_values": 5,
    }
    timing = {
        "seconds": times,
        "clock": "cuda events",
        "inner_calls": 1,
        "flushed_bytes": 0,
        "warmup_calls": 2,
        "notes": [],
    }
    base = {"flops": 0.0, "bytes": 0.0, "link_bytes": 0.0}
    return {
        "case_id": case.case_id,
        **case.to_dict(),
        "status": "ok",
        "reason": None,
        "work": {**base, **work},
        "checks": [check],
        "timing": timing,
    }


def missing_line(case: Case, reason: str, status: str = "n/a") -> dict:
    return {"case_id": case.case_id, **case.to_dict(), "status": status, "reason": reason}


COPY = make_case("memory", "copy", "torch", "fp32", {"bytes": 2**30})
CACHED = make_case("memory", "copy", "torch", "fp32", {"bytes": 2**20})
LARGE = make_case("gemm", "linear", "torch", "bf16", {"m": 8192, "n": 8192, "k": 8192})
SMALL = make_case("gemm", "linear", "torch", "bf16", {"m": 1, "n": 4096, "k": 4096}, {"layer": "o_proj"})
NORM = make_case("norm", "silu_mul", "triton", "bf16", {"tokens": 8, "intermediate": 64})
REDUCE = make_case("collectives", "all_reduce", "torch", "bf16", {"bytes": 2**26, "ranks": 2})
UP = make_case("link", "host_to_device", "torch", "fp32", {"bytes": 2**28})
LAUNCH = make_case("host", "launch", "torch", "fp32", {"values": 1024})

LINES = [
    line(COPY, 1e-3, bytes=3e9),  # 3 TB/s
    line(CACHED, 1e-6, bytes=8e6),  # 8 TB/s, in cache
    line(LARGE, 1e-3, flops=8e11, bytes=4e8),  # 800 TFLOP/s
    line(SMALL, 2e-5, flops=3e7, bytes=3e7),  # memory bound: 10 us at 3 TB/s
    line(NORM, 4e-6, flops=1e3, bytes=6e6),  # 2 us at 3 TB/s
    line(REDUCE, 1e-3, link_bytes=2e8),
    line(UP, 1e-2, link_bytes=5e8),
    line(LAUNCH, 3e-6),
    missing_line(make_case("gemm", "linear", "torch", "fp8", {"m": 1, "n": 16, "k": 16}), "no fp8 unit"),
    missing_line(make_case("gemm", "linear", "torch", "fp8", {"m": 2, "n": 16, "k": 16}), "no fp8 unit"),
    missing_line(
        make_case("moe", "grouped_gemm", "triton", "bf16", {"tokens": 1, "experts": 2, "top_k": 1, "n": 8, "k": 8}),
        "y: error max 1",
        "wrong",
    ),
]


def summary(lines=LINES, device=GPU, nominal=NOMINAL) -> dict:
    return results.summarise(SUITE, device, {}, lines, started=STARTED, wall_s=1.0, nominal=nominal)


def row(made: dict, case: Case) -> dict:
    return next(r for r in made["cases"] if r["case_id"] == case.case_id)


def test_rates_turn_the_interval_round():
    r = row(summary(), COPY)
    assert r["time_s"]["value"] == pytest.approx(1e-3)
    assert (r["time_s"]["low"], r["time_s"]["high"]) == (pytest.approx(0.9e-3), pytest.approx(1.1e-3))
    rate = r["bytes_per_s"]
    assert rate["value"] == pytest.approx(3e12) and rate["unit"] == "B/s"
    assert rate["low"] == pytest.approx(3e9 / 1.1e-3) and rate["high"] == pytest.approx(3e9 / 0.9e-3)


def test_the_best_bandwidth_is_measured_outside_the_cache():
    peaks = summary()["peaks"]["measured"]
    assert peaks["bandwidth_bytes_per_s"]["value"] == pytest.approx(3e12) and not peaks["bandwidth_in_cache"]
    assert peaks["case_ids"]["bandwidth_bytes_per_s"] == COPY.case_id
    assert peaks["flops_per_s"]["bf16"]["value"] == pytest.approx(8e14)
    assert peaks["link_bytes_per_s"]["value"] == pytest.approx(2e11)
    assert peaks["host_to_device_bytes_per_s"]["value"] == pytest.approx(5e10)
    inside = summary([LINES[1]])["peaks"]["measured"]
    assert inside["bandwidth_in_cache"] and inside["bandwidth_bytes_per_s"]["value"] == pytest.approx(8e12)


def test_shares_of_the_roofline():
    made = summary()
    large, small, norm = row(made, LARGE), row(made, SMALL), row(made, NORM)
    assert large["bound"] == "compute" and large["measured_ratio"] == pytest.approx(1.0)
    assert large["nominal_ratio"] == pytest.approx(0.8)
    assert small["bound"] == "memory" and small["measured_ratio"] == pytest.approx(0.5)
    assert small["nominal_ratio"] == pytest.approx(3e7 / 4e12 / 2e-5)
    assert norm["bound"] == "memory" and norm["measured_ratio"] == pytest.approx(0.5)
    assert row(made, REDUCE)["bound"] == "link" and row(made, REDUCE)["nominal_ratio"] == pytest.approx(2e11 / 450e9)
    assert row(made, UP)["nominal_ratio"] == pytest.approx(5e10 / 64e9)
    assert row(made, LAUNCH)["bound"] == "overhead" and "measured_ratio" not in row(made, LAUNCH)
    assert row(made, CACHED)["measured_ratio"] > 1  # in a cache, and the page says so


def test_without_a_data_sheet_there_is_no_nominal_share():
    made = summary(nominal=None)
    assert row(made, LARGE)["bound"] == "compute" and row(made, LARGE).get("nominal_ratio") is None
    assert "not in configs/hardware" in "\n".join(table.closing_lines(made))


def test_a_wrong_case_has_no_time_and_sets_no_peak():
    made = summary()
    wrong = next(r for r in made["cases"] if r["status"] == "wrong")
    assert "time_s" not in wrong and made["counts"] == {"ok": 8, "n/a": 2, "wrong": 1}


def test_the_catalogue_supplies_the_data_sheet_of_a_known_gpu():
    nominal = results.nominal_peaks(GPU)
    assert nominal is not None and nominal["kind"] == "data sheet" and nominal["hardware"].lower().startswith("h100")
    assert nominal["flops_per_s"]["bf16"] == pytest.approx(989e12, rel=0.01)
    unknown = Device("cuda", 0, "NVIDIA Nothing 9000", 2**30, 2**20, 1, (9, 0))
    assert results.nominal_peaks(unknown) is None


def test_a_cpu_has_derived_peaks():
    pytest.importorskip("numba")
    device = Device("cpu", 0, "x", 2**30, 2**20, 4, features=("avx2", "avx512f", "amx_bf16"))
    peaks = results.nominal_peaks(device)
    assert peaks is not None and peaks["kind"] == "derived" and 3e8 < peaks["clock_hz"] < 1e10
    assert peaks["flops_per_s"] == {
        "fp32": pytest.approx(4 * 64 * peaks["clock_hz"]),
        "bf16": pytest.approx(4 * 1024 * peaks["clock_hz"]),
    }


def test_files_go_there_and_back_and_the_summary_can_be_rebuilt(tmp_path):
    made = summary()
    (tmp_path / results.SAMPLES).write_text("".join(json.dumps(x) + "\n" for x in LINES))
    results.write_summary(tmp_path, made)
    assert results.load_summary(tmp_path) == json.loads(json.dumps(made))
    assert json.loads(json.dumps(results.rebuild(tmp_path))) == results.load_summary(tmp_path)


def test_a_torn_last_line_is_dropped(tmp_path):
    from kernels.suite import iterate_lines

    file = tmp_path / results.SAMPLES
    file.write_text(json.dumps(LINES[0]) + "\n" + json.dumps(LINES[1])[:40])
    assert [x["case_id"] for x in iterate_lines(file)] == [COPY.case_id]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no kernel results here"),
        ("{", "not a kernel summary"),
        ("[]", "not a kernel summary"),
        ('{"kind": "kernels", "schema_version": 99}', "schema_version 99"),
    ],
)
def test_what_is_not_a_summary_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / results.SUMMARY).write_text(text)
    with pytest.raises(BadInput, match=message):
        results.load_summary(tmp_path)


def test_the_table_shows_every_measured_case_and_gathers_the_rest():
    text = table.plain(summary())
    assert "Memory" in text and "3.00 TB/s" in text and "800 TFLOP/s" in text and "o_proj" in text
    assert "gemm: fp8: no fp8 unit (2 cases)" in text
    assert "WRONG" in text and "y: error max 1" in text
    assert table.missing(summary()) == [("gemm: fp8", "no fp8 unit", 2)]


def test_the_picture_is_drawn_with_and_without_data(tmp_path):
    pytest.importorskip("matplotlib")
    for name, lines in (("some", LINES), ("none", LINES[-2:])):
        path = tmp_path / f"{name}.png"
        picture.draw(summary(lines), path)
        assert path.stat().st_size > 10_000 and path.with_suffix(".svg").exists()


def test_labels_never_lie_on_each_other():
    assert picture.spread([1.0, 1.1, 5.0], 1.35) == [1.0, 1.35, 5.0]
