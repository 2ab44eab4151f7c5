"""The device catalogue: complete, sourced, found by every name people use."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from bench.catalog.hardware import DTYPES, list_hardware, load_hardware, match_device
from bench.errors import BadInput, UnknownName

GIB = 2**30
EXPECTED = {
    "A100-40-SXM", "A100-80-SXM", "A100-40-PCIE", "A100-80-PCIE", "H100-SXM", "H100-PCIE", "H100-NVL", "H200-SXM",
    "B200", "L40S", "L4", "A10G", "RTX-4090", "cpu",
}  # fmt: skip


def test_every_device_asked_for_is_there() -> None:
    assert {d.name for d in list_hardware()} >= EXPECTED


def test_every_number_has_a_source_and_a_day() -> None:
    for d in list_hardware():
        if d.kind == "cpu":
            assert not d.peak_flops
            continue
        for name in (
            "memory_bytes",
            "memory_bandwidth_bytes_per_s",
            "tdp_w",
            "num_sms",
            "l2_bytes",
            "compute_capability",
        ):
            assert name in d.facts, (d.name, name)
        assert {f"peak_flops.{k}" for k in d.peak_flops} <= set(d.facts)
        for fact in d.facts.values():
            assert len(fact.source) > 10 and datetime.date(2015, 1, 1) < fact.as_of <= datetime.date(2030, 1, 1)


def test_rates_are_dense_and_in_order() -> None:
    """16-bit rates are half the 8-bit ones, and no device beats its own lower precision upwards."""
    for d in list_hardware():
        p = d.peak_flops
        if not p:
            continue
        assert set(p) <= set(DTYPES)
        assert p["fp32"] <= p["tf32"] <= p["bf16"] <= p.get("int8", p["bf16"])
        if "fp8" in p:
            assert p["fp8"] == pytest.approx(2 * p["bf16"], rel=0.03)
    assert load_hardware("H100-SXM").peak("bf16") == pytest.approx(989.4e12)
    assert load_hardware("A100-80-SXM").peak("bf16") == 312e12


def test_links_are_one_direction() -> None:
    assert load_hardware("A100-80-SXM").link_bandwidth_bytes_per_s == 300e9
    assert load_hardware("H100-SXM").link_bandwidth_bytes_per_s == 450e9
    pcie = load_hardware("H100-PCIE")  # a bridge joins two cards; four talk over PCIe
    assert (pcie.link_bytes_per_s(2), pcie.link_bytes_per_s(4)) == (300e9, 63e9)
    assert load_hardware("H100-SXM").link_bytes_per_s(8) == 450e9
    l40s = load_hardware("L40S")
    assert l40s.link_bandwidth_bytes_per_s == l40s.pcie_bandwidth_bytes_per_s


def test_cuda_sees_a_little_less_than_nominal() -> None:
    for d in list_hardware():
        if d.kind == "gpu":
            assert 0.90 < d.usable_memory_bytes / d.memory_bytes < 1.0, d.name


@pytest.mark.parametrize("name", ["H100", "h100-sxm", "H100 SXM", "h100_sxm5", "H100-80GB"])
def test_names_people_use(name: str) -> None:
    assert load_hardware(name).name == "H100-SXM"


def test_unknown_names_and_rates() -> None:
    with pytest.raises(UnknownName, match="did you mean"):
        load_hardware("H300")
    with pytest.raises(BadInput, match="no peak rate for 'fp8'"):
        load_hardware("A100").peak("fp8")
    assert load_hardware("A100").compute_dtype("fp8") == "bf16"
    assert load_hardware("H100").compute_dtype("fp8") == "fp8"


def test_matching_what_nvml_reports() -> None:
    found = match_device("NVIDIA A100-SXM4-80GB", 81920 * 2**20)
    assert found is not None and found.name == "A100-80-SXM"
    found = match_device("NVIDIA H200")
    assert found is not None and found.name == "H200-SXM"
    assert match_device("NVIDIA H100 80GB HBM3", 10 * GIB) is None  # a MIG slice is not the card
    assert match_device("Some Other GPU") is None


def test_a_device_of_ones_own(tmp_path: Path) -> None:
    good = Path("configs/hardware/l4.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(good.replace("name: L4", "name: Mine"))
    assert load_hardware(str(path)).name == "Mine"
    for old, new, message in (
        ("value: 72", "value: -72", "tdp_w.value"),
        ("tdp_w:", "tdp:", "unknown field"),
        ("  bf16:", "  bf17:", "peak_flops"),
        ("as_of: 2023-03-01", "as_of: yesterday", "as_of"),
    ):
        path.write_text(good.replace(old, new))
        with pytest.raises(BadInput, match=message) as e:
            load_hardware(str(path))
        assert "mine.yaml:" in str(e.value)
    path.write_text("name: Mine\nvendor: x\n")
    with pytest.raises(BadInput, match="a gpu needs memory_bytes"):
        load_hardware(str(path))
