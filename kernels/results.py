"""From raw samples to figures: rates, peaks, shares, and the files of a kernel run (format: ``docs/kernels.md``)."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.errors import BadInput
from bench.records import Estimate
from kernels.bounds import bounds_of
from kernels.config import SuiteConfig
from kernels.cpu_peaks import derived_peaks
from kernels.device import Device
from kernels.suite import SuiteRun, iterate_lines
from kernels.timing import median_estimate

SCHEMA_VERSION = 1
SAMPLES, SUMMARY, LOG = "samples.jsonl", "summary.json", "child.log"
#: A memory case counts as out of cache from this many times the last-level cache.
OUT_OF_CACHE = 4.0
_ARRAYS = {"copy": 2, "read": 1, "write": 1, "triad": 3}


def summarise(
    suite: SuiteConfig,
    device: Device,
    software: dict[str, Any],
    lines: list[dict[str, Any]],
    *,
    started: datetime,
    wall_s: float,
    nominal: dict[str, Any] | None,
    status: str = "complete",
) -> dict[str, Any]:
    """The content of summary.json from the lines of samples.jsonl: a pure function, so it can be rebuilt at any time.

    ``nominal`` comes from :func:`nominal_peaks`.
    """
    rows = [_row(line) for line in lines]
    measured = measured_peaks(rows, device)
    for row in rows:
        _add_shares(row, measured, nominal)
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    summary = {
        "schema_version": SCHEMA_VERSION,
        "kind": "kernels",
        "origin": "measured",
        "status": status,
        "suite": {"name": suite.name, "digest": suite.digest, "config": suite.model_dump(mode="json")},
        "started_utc": started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "wall_s": wall_s,
        "host": {"os": platform.platform(), "num_cpus": os.cpu_count()},
        "device": device.to_dict(),
        "software": software,
        "peaks": {"measured": measured, "nominal": nominal},
        "counts": counts,
        "cases": rows,
    }
    return {**summary, "bounds": bounds_of(summary)}


def _row(line: dict[str, Any]) -> dict[str, Any]:
    """One case of the summary: identity, status, time with interval, rates, worst check."""
    keep = ("case_id", "family", "op", "impl", "dtype", "shape", "tags", "status", "reason", "backend", "notes")
    row: dict[str, Any] = {k: line.get(k) for k in keep}
    work = line.get("work") or {}
    row |= {k: work.get(k) for k in ("flops", "bytes", "link_bytes")}
    checks = line.get("checks") or []
    row["check"] = max(checks, key=lambda c: c["rms_error"]) if checks else None
    timing = line.get("timing")
    if timing and timing["seconds"]:
        time_s = median_estimate(timing["seconds"])
        row["time_s"] = asdict(time_s)
        row["timing"] = {k: timing[k] for k in ("clock", "inner_calls", "flushed_bytes", "warmup_calls", "notes")}
        row["flops_per_s"] = _rate(work.get("flops"), time_s, "FLOP/s")
        row["bytes_per_s"] = _rate(work.get("bytes"), time_s, "B/s")
        row["link_bytes_per_s"] = _rate(work.get("link_bytes"), time_s, "B/s")
    row |= {name: line[name] for name in ("energy", "referee") if line.get(name)}
    return row


def _rate(amount: float | None, time_s: Estimate, unit: str) -> dict[str, Any] | None:
    """amount / time with the interval turned round: the shortest time is the highest rate."""
    if not amount:
        return None
    low = amount / time_s.high if time_s.high else None
    high = amount / time_s.low if time_s.low else None
    return asdict(Estimate(amount / time_s.value, low, high, time_s.confidence, time_s.method, time_s.num_runs, unit))


# ---- peaks -----------------------------------------------------------------------------------------------------------


def out_of_cache(row: dict[str, Any], device: Device) -> bool:
    """Whether a memory case's arrays together exceed the last-level cache enough to be a figure of memory."""
    return _ARRAYS[row["op"]] * row["shape"]["bytes"] >= OUT_OF_CACHE * device.l2_bytes


def measured_peaks(rows: list[dict[str, Any]], device: Device) -> dict[str, Any]:
    """The best that any case reached: bandwidth (and that of copy), FLOP/s by type, link bytes/s.

    Where no memory case is out of cache (a CPU whose last-level cache is shared and huge), the largest size of each
    operation stands in, and ``bandwidth_in_cache`` says so.
    """
    timed = [r for r in rows if r["status"] == "ok" and r.get("time_s")]
    memory = [r for r in timed if r["family"] == "memory"]
    outside = [r for r in memory if out_of_cache(r, device)]
    candidates = outside
    if not outside:
        largest = {op: max(r["shape"]["bytes"] for r in memory if r["op"] == op) for op in {r["op"] for r in memory}}
        candidates = [r for r in memory if r["shape"]["bytes"] == largest[r["op"]]]
    peaks: dict[str, Any] = {"source": "bench kernels", "flops_per_s": {}, "case_ids": {}}
    _take_best(peaks, "bandwidth_bytes_per_s", candidates, "bytes_per_s")
    _take_best(peaks, "copy_bytes_per_s", [r for r in candidates if r["op"] == "copy"], "bytes_per_s")
    peaks["bandwidth_in_cache"] = bool(memory) and not outside
    linked = [r for r in timed if r.get("link_bytes_per_s")]
    _take_best(peaks, "link_bytes_per_s", [r for r in linked if r["family"] == "collectives"], "link_bytes_per_s")
    for op in ("host_to_device", "device_to_host", "device_to_device"):
        _take_best(peaks, f"{op}_bytes_per_s", [r for r in linked if r["op"] == op], "link_bytes_per_s")
    for row in timed:
        if row["family"] == "gemm":
            best = peaks["flops_per_s"].get(row["dtype"])
            if best is None or row["flops_per_s"]["value"] > best["value"]:
                peaks["flops_per_s"][row["dtype"]] = row["flops_per_s"]
                peaks["case_ids"][f"flops_per_s.{row['dtype']}"] = row["case_id"]
    return peaks


def _take_best(peaks: dict[str, Any], name: str, rows: list[dict[str, Any]], rate: str) -> None:
    best = max(rows, key=lambda r: r[rate]["value"], default=None)
    peaks[name] = best[rate] if best else None
    if best:
        peaks["case_ids"][name] = best["case_id"]


def nominal_peaks(device: Device) -> dict[str, Any] | None:
    """The data sheet's peaks of a GPU in the catalogue, or a CPU's from its instructions and measured clock."""
    if device.kind == "cpu":
        return derived_peaks(device)
    from bench.catalog.hardware import match_device

    hardware = match_device(device.name, device.memory_bytes)
    if hardware is None:
        return None
    return {
        "kind": "data sheet",
        "hardware": hardware.name,
        "source": "; ".join(sorted({fact.source for fact in hardware.facts.values()})),
        "bandwidth_bytes_per_s": hardware.memory_bandwidth_bytes_per_s,
        "flops_per_s": dict(hardware.peak_flops),
        "link_bytes_per_s": hardware.link_bandwidth_bytes_per_s,
        "pcie_bytes_per_s": hardware.pcie_bandwidth_bytes_per_s,
    }


def _add_shares(row: dict[str, Any], measured: dict[str, Any], nominal: dict[str, Any] | None) -> None:
    """What bounds the case, and its share of that bound: ideal time (roofline) / measured time."""
    if row["status"] != "ok" or not row.get("time_s"):
        return
    time_s = row["time_s"]["value"]
    bandwidth = measured.get("bandwidth_bytes_per_s")
    ceilings = {dtype: estimate["value"] for dtype, estimate in measured["flops_per_s"].items()}
    ideal = ideal_time(row, bandwidth["value"] if bandwidth else None, ceilings)
    if row["family"] == "host":
        row["bound"] = "overhead"
    elif row["family"] in ("collectives", "link"):
        row["bound"] = "link"
        row["nominal_ratio"] = _link_share(row, nominal)
        best = measured.get("link_bytes_per_s" if row["family"] == "collectives" else f"{row['op']}_bytes_per_s")
        row["measured_ratio"] = row["link_bytes_per_s"]["value"] / best["value"] if best else None
    else:
        row["bound"] = ideal[1] if ideal else None
        row["measured_ratio"] = ideal[0] / time_s if ideal else None
        if nominal:
            sheet = ideal_time(row, nominal.get("bandwidth_bytes_per_s"), nominal["flops_per_s"])
            row["nominal_ratio"] = sheet[0] / time_s if sheet else None
            row["bound"] = row["bound"] or (sheet[1] if sheet else None)
        if row["bound"] is None and row["family"] in ("memory", "norm"):
            row["bound"] = "memory"  # by their arithmetic on any machine


def ideal_time(row: dict[str, Any], bandwidth: float | None, flops: dict[str, float]) -> tuple[float, str] | None:
    """(seconds, "compute" or "memory") of the roofline: max(flops / peak, bytes / bandwidth).

    Only matrix products are held against the peak of their type: the few operations of a norm do not use the matrix
    unit. A missing bandwidth or peak leaves the other bound alone; None when neither is known.
    """
    peak = flops.get(row["dtype"]) if row["family"] in ("gemm", "attention", "moe") else None
    by_compute = row["flops"] / peak if row.get("flops") and peak else None
    by_memory = row["bytes"] / bandwidth if row.get("bytes") and bandwidth else None
    if by_compute is None and by_memory is None:
        return None
    if by_memory is None or (by_compute is not None and by_compute > by_memory):
        return (by_compute or 0.0), "compute"
    return by_memory, "memory"


def _link_share(row: dict[str, Any], nominal: dict[str, Any] | None) -> float | None:
    if not nominal:
        return None
    pcie = row["op"] in ("host_to_device", "device_to_host")
    limit = nominal.get("pcie_bytes_per_s" if pcie else "link_bytes_per_s")
    return row["link_bytes_per_s"]["value"] / limit if limit else None


# ---- files -----------------------------------------------------------------------------------------------------------


def write_summary(folder: Path, summary: dict[str, Any]) -> Path:
    """Write summary.json atomically."""
    path = folder / SUMMARY
    part = path.with_suffix(".part")
    part.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    os.replace(part, path)
    return path


def load_summary(path: str | Path) -> dict[str, Any]:
    """A summary by file or folder. Raises BadInput when it is not one, or of a version that this code does not know."""
    path = Path(path)
    file = path / SUMMARY if path.is_dir() else path
    try:
        summary = json.loads(file.read_text())
    except FileNotFoundError:
        raise BadInput("no kernel results here", where=str(path), next_step="run `bench kernels`") from None
    except ValueError as error:
        raise BadInput(f"not a kernel summary: {error}", where=str(file)) from None
    if not isinstance(summary, dict) or summary.get("kind") != "kernels":
        raise BadInput("not a kernel summary", where=str(file), next_step="give a folder under results/kernels/")
    if summary["schema_version"] != SCHEMA_VERSION:
        raise BadInput(
            f"schema_version {summary['schema_version']}, this version reads {SCHEMA_VERSION}",
            where=str(file),
            next_step="update tokenyield, or rebuild the summary from samples.jsonl",
        )
    return summary


def rebuild(folder: Path) -> dict[str, Any]:
    """The summary of ``folder`` computed anew from samples.jsonl and the header of the stored one."""
    old = load_summary(folder)
    suite = SuiteConfig.model_validate(old["suite"]["config"])
    started = datetime.strptime(old["started_utc"], "%Y-%m-%dT%H:%M:%SZ")
    new = summarise(
        suite,
        Device.from_dict(old["device"]),
        old["software"],
        list(iterate_lines(folder / SAMPLES)),
        started=started,
        wall_s=old["wall_s"],
        nominal=old["peaks"]["nominal"],
        status=old["status"],
    )
    return {**new, "host": old["host"]}


def summary_of(run: SuiteRun, lines: list[dict[str, Any]], started: datetime) -> dict[str, Any]:
    """The summary of a run that just ended."""
    assert run.device is not None
    status = "interrupted" if run.interrupted else "complete"
    nominal = nominal_peaks(run.device)
    return summarise(
        run.suite, run.device, run.software, lines, started=started, wall_s=run.wall_s, nominal=nominal, status=status
    )
