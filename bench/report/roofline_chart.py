"""The report's roofline: how close the cells came to what this device's memory and arithmetic allow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.analysis.efficiency import compute_dtype, hardware_of, why_no_steps
from bench.analysis.run_facts import RunFacts
from bench.catalog.hardware import Hardware
from bench.catalog.model import load_model
from bench.errors import BenchError
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


def roofline(folder: Path, facts: RunFacts, origin_label: str) -> tuple[Chart | None, str]:
    """(chart, why there is none). Ceilings are measured kernels where there are some, else the data sheet."""
    path = kernel_results(folder, facts)
    hardware = hardware_of(facts)
    try:
        if path is not None:
            ceilings = load_kernel_ceilings(path, hardware if facts.on_gpu else None)
        elif hardware is not None and hardware.kind == "gpu":
            ceilings = Ceilings.from_hardware(hardware)
        else:
            return None, "no ceilings are known for this device: run `bench kernels`"
        points, _ = cell_points(folder)
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
    return Chart("roofline", title, answer, roofline=data, origin_label=origin_label), ""


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
