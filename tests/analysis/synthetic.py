"""Run folders with known numbers, marked as simulated (or as measured where a test needs the checks of measured runs)."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np

from bench.config.experiment import Experiment
from bench.config.sweep import Cell, expand
from bench.records import EngineStep, GpuSample, RequestRecord
from bench.runner.results import write_resolved
from bench.store import RunReader, RunWriter

EXPERIMENT: dict[str, Any] = {
    "name": "synthetic",
    "why": "How do throughput and latency of a made-up engine change with batch size and tensor parallelism?",
    "model": "llama-3.1-8b",
    "weights": "dummy",
    "engine": {"kind": "vllm", "args": {"tensor_parallel_size": 1}},
    "load": {"kind": "offline", "batch_size": 1},
    "workload": {"isl": 1024, "osl": 256},
    "sweep": {"grid": {"tensor_parallel_size": [1, 2, 4], "batch_size": [1, 4, 16, 64, 256]}},
    "gpu_price_usd_per_hour": 4.0,
}


def experiment(**changes: Any) -> Experiment:
    return Experiment.model_validate({**EXPERIMENT, **changes})


def offline_records(
    batch: int, num_batches: int, step_s: float, isl: int, osl: int, rng: np.random.Generator
) -> list[RequestRecord]:
    """Batches one after the other: a prefill of ``step_s * batch / 8``, then a token for everyone each ``step_s``."""
    records = []
    start = 0.0
    for b in range(num_batches):
        first = start + step_s * (1 + batch / 8)
        last = first + step_s * (osl - 1)
        for i in range(batch):
            jitter = float(rng.uniform(0, step_s / 10))
            records.append(
                RequestRecord(
                    index=b * batch + i, phase="measured", isl=isl, osl=osl, due_s=0.0, sent_s=start,
                    first_token_s=first + jitter, last_token_s=last + jitter, done_s=last + jitter,
                    finish_reason="length", first_chunk_tokens=1, num_chunks=osl, token_source="engine", num_cached_tokens=0,
                )
            )  # fmt: skip
        start = last + step_s / 10
    return records


def write_run(
    folder: Path,
    cell: Cell,
    repeat: int,
    *,
    origin: str = "simulated",
    seed: int = 0,
    num_gpus: int | None = None,
    t0_s: float = 0.0,
    status: str = "complete",
    noise: float = 0.01,
    **manifest: Any,
) -> RunReader:
    """One run of a made-up engine: a step takes (6 ms + 0.05 ms * batch) / tp^0.8, with ``noise`` from run to run."""
    spec = cell.spec
    rng = np.random.default_rng([seed, repeat, spec.tensor_parallel_size, int(spec.load.batch_size)])
    batch, tp = spec.load.batch_size, spec.tensor_parallel_size
    step_s = (6e-3 + 5e-5 * batch) / tp**0.8 * (1 + noise * float(rng.standard_normal()))
    isl, osl = spec.workload.isl.tokens, spec.workload.osl.tokens
    gpus = tp if num_gpus is None else num_gpus
    devices = [f"GPU-{i}" for i in range(gpus)]
    stamp = (datetime(2026, 11, 24, 6, tzinfo=timezone.utc) + timedelta(seconds=t0_s)).isoformat()
    base = {
        "created_utc": stamp, "t0_utc": stamp, "experiment": "synthetic", "cell_id": cell.cell_id, "axes": cell.axes_dict(),
        "cell": spec.model_dump(mode="json"), "repeat": repeat, "run_number": repeat, "origin": origin, "seed": seed,
        "engine": {
            "kind": "vllm", "version": "0.32.0", "effective_args": {"tensor_parallel_size": tp, "max_num_seqs": 256},
            "num_gpus": gpus, "device_uuids": devices, "kv_capacity_tokens": 400_000,
        },
        "fingerprint": {"devices": ["NVIDIA H100 80GB HBM3"] * gpus or ["cpu"], "engine_version": "vllm 0.32.0"},
        "provenance": {
            "host": {"name": "node-1", "os": "Linux 6.1"},
            "gpus": [{"name": "NVIDIA H100 80GB HBM3", "uuid": d, "driver": "580.1"} for d in devices],
        },
        "schedule": {"kind": "offline", "max_in_flight": batch},
        "telemetry": {"devices": {d: {"max_sm_clock_hz": 1.98e9, "power_limit_w": 700.0} for d in devices}, "error": None},
    } | manifest  # fmt: skip
    writer = RunWriter(folder / cell.cell_id / f"run-{repeat}-20261124T06{int(t0_s):04d}Z", base)
    records = offline_records(batch, max(1, round(4 / (step_s * osl))), step_s, isl, osl, rng)
    for r in records:
        writer.append_request(r)
    _steps(writer, records, batch, isl, osl, step_s)
    _telemetry(writer, devices or ["cpu"], records[-1].done_s or 1.0, batch, rng)
    writer.finish(status)
    return RunReader.open(writer.folder)


def _steps(writer: RunWriter, records: list[RequestRecord], batch: int, isl: int, osl: int, step_s: float) -> None:
    number = 0
    for r in records[::batch]:
        assert r.first_token_s is not None
        for k in range(osl):
            context = 0 if k == 0 else batch * (isl + k)
            prefill = batch * isl if k == 0 else 0
            writer.append_step(
                EngineStep(number, r.first_token_s + k * step_s, step_s, batch, 0, 0.3 + 0.5 * batch / 256, prefill,
                           0 if k == 0 else batch, batch if k == 0 else 0, 0 if k == 0 else batch, context)
            )  # fmt: skip
            number += 1


def _telemetry(writer: RunWriter, devices: list[str], end_s: float, batch: int, rng: np.random.Generator) -> None:
    power = 390 + 290 * (1 - np.exp(-batch / 60))
    energy = dict.fromkeys(devices, 1e6)
    for t in np.arange(-3.0, end_s + 1.0, 0.1):
        busy = 0 <= t <= end_s
        for i, device in enumerate(devices):
            w = (power if busy else 120.0) + float(rng.normal(0, 3))
            energy[device] += w * 0.1
            gpu = device != "cpu"
            writer.append_telemetry(
                GpuSample(
                    float(t), device, index=i if gpu else None, power_w=w if gpu else None, energy_j=energy[device] if gpu else None,
                    energy_t_s=float(t) if gpu else None, gpu_util_ratio=float(np.clip((0.98 if busy else 0.02) + rng.normal(0, 0.01), 0, 1)),
                    sm_clock_hz=1.9e9 if gpu else None, temperature_c=60.0 if gpu else None,
                    memory_used_bytes=int(7.2e10), num_foreign_processes=0 if gpu else None, throttled_sw_power_s=0.0 if gpu else None,
                )
            )  # fmt: skip


def write_experiment(
    root: Path, exp: Experiment | None = None, *, repeats: int = 3, skip: dict[str, str] | None = None, **run: Any
) -> tuple[Path, list[Cell]]:
    """A whole experiment under ``root``; returns its folder and cells."""
    exp = exp or experiment()
    cells = expand(exp)
    folder = root / exp.name
    write_resolved(folder, exp, tuple(cells), skip or {})
    t0 = 0.0
    for repeat in range(1, repeats + 1):
        for cell in cells:
            if cell.cell_id in (skip or {}):
                continue
            write_run(folder, cell, repeat, t0_s=t0, **run)
            t0 += 10
    return folder, cells
