"""The report's roofline: how close the cells came to what this device's memory and arithmetic allow."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.analysis.efficiency import compute_dtype, hardware_of, why_no_steps
from bench.analysis.run_facts import RunFacts
from bench.analysis.summary import Summary
from bench.catalog.hardware import Hardware
from bench.catalog.model import load_model
from bench.errors import BenchError
from bench.report.figures import origin_label
from bench.report.model import Chart
from bench.report.roofline_cells import cell_points
from bench.report.roofline_picture import CellPoint, KernelPoint, RooflineData
from bench.roofline import Ceilings, load_kernel_ceilings
from bench.units import si

#: Measured rates above the data sheet by more than this are errors, not ceilings (boost clocks make up some per cent).
_CREDIBLE = 1.1
#: A cell may seem to exceed a ceiling by what arithmetic leaves out (rounding of the window's ends, caches).
_OVER = 1.05
_FAMILIES = ("gemm", "attention", "moe", "memory", "norm")


def kernel_results(folder: Path, facts: RunFacts) -> Path | None:
    """The newest result of `bench kernels` of the device that a run was on, beside its experiment; None without one."""
    names = {str(g.get("name")) for g in facts.gpus} if facts.on_gpu else {str(facts.cpu.get("model"))}
    found = []
    for path in (folder.resolve().parent.parent / "kernels").glob("*/*/summary.json"):
        device = (_read(path).get("device") or {}) if path.is_file() else {}
        if str(device.get("name")) in names:
            found.append(path)
    return max(found, key=lambda p: p.parent.name, default=None)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def kernel_points(path: Path, dtype: str) -> tuple[KernelPoint, ...]:
    """Every kernel of a result that did arithmetic on bytes: its rate and its intensity.

    Matrix products of another dtype than the ceiling's are left out: they have a ceiling of their own.
    """
    out = []
    for case in _read(path).get("cases") or ():
        time_s = (case.get("time_s") or {}).get("value")
        flops, size = case.get("flops"), case.get("bytes")
        fits = case.get("family") in _FAMILIES and (case.get("family") != "gemm" or case.get("dtype") == dtype)
        if case.get("status") == "ok" and fits and time_s and flops and size:
            out.append(KernelPoint(case["family"], flops / time_s, flops / size))
    return tuple(out)


def rooflines(folder: Path, summaries: Sequence[Summary]) -> list[tuple[str, Chart | None, str]]:
    """(title, chart, why there is none) of each device that the cells of ``folder`` are of: its ceilings and its cells."""
    devices: dict[str, list[Summary]] = {}
    for s in summaries:
        hardware = hardware_of(s.facts)
        devices.setdefault(hardware.name if hardware is not None else "", []).append(s)
    out = []
    for device, some in devices.items():
        chart, why = roofline(folder, some[0].facts, origin_label(some), frozenset(s.cell_id for s in some))
        title = "Roofline"
        if len(devices) > 1:
            title = f"Roofline of {device or 'a device that the catalogue does not know'}"
            chart = chart and replace(chart, name=f"roofline_{re.sub('[^a-z0-9]+', '_', device.lower()).strip('_')}")
        out.append((title, chart, why))
    return out


def roofline(
    folder: Path, facts: RunFacts, label: str, cells: Collection[str] | None = None
) -> tuple[Chart | None, str]:
    """(chart, why there is none) of the device of ``facts`` with its ``cells`` (ids; None: all of the folder).

    Ceilings are measured kernels where there are some, else the data sheet.
    """
    path = kernel_results(folder, facts)
    hardware = hardware_of(facts)
    try:
        if path is not None:
            ceilings = load_kernel_ceilings(path, hardware if facts.on_gpu else None)
        elif hardware is not None and hardware.kind == "gpu":
            ceilings = Ceilings.from_hardware(hardware)
        else:
            return None, "no ceilings are known for this device: run `bench kernels`"
        points, _ = cell_points(folder, cells=cells)
        if not points or facts.spec is None:
            return None, why_no_steps(facts)
        dtype = compute_dtype(facts, load_model(facts.spec.model), ceilings)
        beyond = _beyond_data_sheet(ceilings, hardware, dtype)
        if beyond and hardware is not None:
            path, ceilings = None, Ceilings.from_hardware(hardware)
    except BenchError as e:
        return None, str(e)
    kernels = kernel_points(path, dtype) if path is not None else ()
    data = RooflineData(ceilings, (dtype,), tuple(points), kernels)
    best = max(points, key=lambda p: p.flops_per_s)
    title = f"Roofline of {ceilings.name}"
    answer = f"{_answer(best, ceilings, dtype)}{beyond}"
    return Chart("roofline", title, answer, roofline=data, origin_label=label), ""


def _beyond_data_sheet(c: Ceilings, hardware: Hardware | None, dtype: str) -> str:
    """A sentence where measured kernels outdo the data sheet, so that they cannot be ceilings; "" where they do not."""
    if hardware is None or not hardware.peak_flops:
        return ""
    sheet = Ceilings.from_hardware(hardware)
    pairs = [(c.peak(dtype), sheet.peak(dtype), dtype, "FLOP/s")] if dtype in c.measured else []
    pairs += [(c.memory_bytes_per_s, sheet.memory_bytes_per_s, "memory", "B/s")] if "memory" in c.measured else []
    found = [
        f"{name} {si(ours, unit)} against {si(theirs, unit)}"
        for ours, theirs, name, unit in pairs
        if ours > _CREDIBLE * theirs
    ]
    if not found:
        return ""
    return (
        f" The kernels measured on this device outdo its data sheet ({', '.join(found)}), which cannot be: they are left out, and "
        "the ceilings are the data sheet's. Doubt this device's other times too."
    )


def _answer(best: CellPoint, c: Ceilings, dtype: str) -> str:
    """What the best cell reached of both ceilings, and which of the two is the nearer one."""
    mfu = best.flops_per_s / c.peak(dtype)
    mbu = best.bytes_per_s / c.memory_bytes_per_s
    if max(mfu, mbu) > _OVER:
        return (
            f"The cell that does most, {best.label}, seems to reach {mfu:.0%} of the {dtype} ceiling and {mbu:.0%} of the memory "
            f"ceiling ({c.source}). More than 100 % cannot be: its times, its token counts or the ceilings are wrong."
        )
    nearer = "memory" if mbu >= mfu else "arithmetic"
    return (
        f"The cell that does most, {best.label}, reaches {mfu:.0%} of the {dtype} ceiling and {mbu:.0%} of the memory ceiling "
        f"({c.source}); {nearer} is the nearer limit. What is far below both is lost to launch, host and scheduling."
    )
