"""Results of the ML.ENERGY benchmark: ``results.json``.

Its lists are in seconds, its summaries in milliseconds. A request's start time is not in the file, so distributions are computed
from the durations of the successful requests. Gaps of exactly zero stand for further tokens of one chunk and are no ITL of ours.
Energy is of the GPUs that served, over the tool's steady state; throughput there is over the whole run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bench.interop.imported import ForeignRun, ImportedLoad, statistics
from bench.interop.reading import ForeignFile, Part, error_class

NAME = "ml-energy"
TOOL = "ML.ENERGY benchmark"
_RATES = {
    "output_throughput": "output_tokens_per_s",
    "total_token_throughput": "total_tokens_per_s",
    "request_throughput": "requests_per_s",
}


def recognise(document: Any) -> bool:
    return isinstance(document, Mapping) and "steady_state_energy" in document and "completed" in document


def read(file: ForeignFile) -> Iterator[ForeignRun]:
    """The run of the file.

    Raises:
        BadInput: with file, key and reason.
    """
    top = Part(file.first, file.path)
    duration_s, completed = top.needed_number("duration"), top.integer("completed")
    reported: dict[str, float] = {}
    for theirs, ours in _RATES.items():
        value = top.number(theirs)
        if value is not None:
            reported[ours] = value
    rows = [Part(r, file.path, f"results[{i}]") for i, r in enumerate(top.sequence("results") or [])]
    failed = sum(not r.data.get("success") for r in rows)
    reported |= _distributions([r for r in rows if r.data.get("success")])
    if rows:
        reported["error_ratio"] = failed / len(rows)
    notes = ["times count from the send; the file has no start times of requests"]
    notes += _energy(top, reported)
    limit, rate = top.integer("max_concurrency"), top.data.get("request_rate")
    if isinstance(rate, (int, float)) and np.isfinite(rate):
        load = ImportedLoad("open_loop", rate_per_s=float(rate), max_in_flight=limit)
    elif limit is not None:
        load = ImportedLoad("closed_loop", concurrency=limit)
    else:
        load = ImportedLoad("offline", batch_size=top.integer("num_prompts"))
        notes.append("all requests were sent at once: their TTFT holds the wait in the engine's queue")
    args = {k: top.data[k] for k in ("max_num_seqs", "max_num_batched_tokens") if top.has(k)}
    yield ForeignRun(
        format=NAME, tool=TOOL, model=top.text("model_id"), load=load, isl_tokens=reported.get("isl_mean_tokens"),
        osl_tokens=reported.get("osl_mean_tokens"), local_date=top.text("date"), duration_s=duration_s,
        num_completed=completed, num_failed=failed, errors=_errors(rows), reported=reported, notes=tuple(notes),
        engine="vllm", engine_args=args, gpu=top.text("gpu_model"), num_gpus=top.integer("num_gpus"),
        settings={k: top.data.get(k) for k in ("endpoint_type", "seed", "max_output_tokens") if top.has(k)},
    )  # fmt: skip


def _distributions(good: list[Part]) -> dict[str, float]:
    if not good:
        return {}

    def column(key: str) -> np.ndarray:
        return np.array([np.nan if (v := r.number(key)) is None else v for r in good])

    ttft, latency, osl, isl = (column(k) for k in ("ttft", "latency", "output_len", "input_len"))
    ttft = np.where(ttft > 0, ttft, np.nan)  # zero: not streamed
    with np.errstate(invalid="ignore", divide="ignore"):
        tpot = np.where(osl > 1, (latency - ttft) / (osl - 1), np.nan)
    gaps = [g for r in good if (g := r.numbers("itl")) is not None and len(g)]
    pooled = np.concatenate(gaps) if gaps else np.zeros(0)
    out = statistics("ttft_service", ttft) | statistics("e2e_service", latency) | statistics("tpot", tpot)
    out |= statistics("itl", pooled[pooled > 0])
    for key, data in (("isl_mean_tokens", isl), ("osl_mean_tokens", osl)):
        if not np.isnan(data).all():
            out[key] = float(np.nanmean(data))
    return out


def _energy(top: Part, reported: dict[str, float]) -> list[str]:
    energy_j, length_s = top.number("steady_state_energy"), top.number("steady_state_duration")
    per_token = top.number("steady_state_energy_per_token")
    if not per_token or energy_j is None or energy_j <= 0 or per_token < 0:
        return ["no energy of the steady state in the file"]
    reported["energy_j_per_output_token"] = per_token
    notes = ["energy and power are over the tool's steady state, throughput over the whole run"]
    if length_s:
        reported["power_w"] = energy_j / length_s
        rate = energy_j / per_token / length_s
        notes.append(f"in its steady state of {length_s:.4g} s it produced {rate:.4g} output tokens/s")
    return notes


def _errors(rows: list[Part]) -> dict[str, int]:
    out: dict[str, int] = {}
    for r in rows:
        if not r.data.get("success"):
            found, _ = error_class(r.text("error") or "")
            out[found] = out.get(found, 0) + 1
    return out
