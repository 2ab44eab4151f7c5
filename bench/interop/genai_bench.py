"""Results of genai-bench: one JSON per (scenario, concurrency), with ``experiment_metadata.json`` beside them.

Latencies are in seconds or milliseconds: ``_time_unit`` says which. ``tpot`` is ours; a request's start time is not in the file,
so the tool's statistics are taken (its percentiles are interpolated as ours). Its ``output_throughput`` is a rate within one
request and is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from bench.errors import BadInput
from bench.interop.imported import ForeignRun, ImportedLoad
from bench.interop.reading import ForeignFile, Part, error_class, read_file

NAME = "genai-bench"
TOOL = "genai-bench"
METADATA_NAME = "experiment_metadata.json"
_DISTRIBUTIONS = {"ttft": "ttft_service", "e2e_latency": "e2e_service", "tpot": "tpot"}
_STATISTICS = ("mean", "p50", "p90", "p95", "p99")
_RATES = {
    "mean_output_throughput_tokens_per_s": "output_tokens_per_s",
    "mean_input_throughput_tokens_per_s": "input_tokens_per_s",
    "requests_per_second": "requests_per_s",
}


def recognise(document: Any) -> bool:
    if not isinstance(document, Mapping):
        return False
    return "aggregated_metrics" in document or {"benchmark_version", "traffic_scenario", "api_backend"} <= set(document)


def read(file: ForeignFile) -> Iterator[ForeignRun]:
    """The run of one result file.

    Raises:
        BadInput: with file, key and reason; for the metadata file alone.
    """
    top = Part(file.first, file.path)
    metrics = top.part("aggregated_metrics")
    if metrics is None:
        raise BadInput("this is the experiment's metadata, without results", where=str(file.path),
                       next_step="name the result files beside it")  # fmt: skip
    beside = file.path.with_name(METADATA_NAME)
    metadata = Part(read_file(beside).first, beside) if beside.is_file() else None
    if metrics.text("iteration_type") == "batch_size":
        raise BadInput("is a benchmark of embeddings; it generates no tokens", where=metrics.where("iteration_type"))
    notes = ["times count from the send; the file has no start times of requests"]
    factor, more = _seconds_per_unit(top, metadata)
    if not metrics.has("run_duration"):
        more.append("token rates are requests/s times mean lengths: this version's own are means of per-request rates")
    reported = _reported(metrics, factor)
    completed, failed = metrics.integer("num_completed_requests"), metrics.integer("num_error_requests")
    isl, osl = _lengths(metrics.text("scenario"))
    yield ForeignRun(
        format=NAME, tool=TOOL, tool_version=(metadata.text("benchmark_version") if metadata else None) or None,
        model=metadata.text("model") if metadata else None,
        load=ImportedLoad("closed_loop", concurrency=metrics.integer("num_concurrency")),
        isl_tokens=isl or reported.get("isl_mean_tokens"), osl_tokens=osl or reported.get("osl_mean_tokens"),
        duration_s=metrics.number("run_duration") or None, num_completed=completed, num_failed=failed,
        errors=_errors(metrics), reported=reported,
        absent={"itl_p50_s": "genai-bench keeps no times of single chunks"}, notes=(*notes, *more),
        engine=metadata.text("server_engine") if metadata else None,
        engine_version=metadata.text("server_version") if metadata else None,
        gpu=metadata.text("server_gpu_type") if metadata else None, num_gpus=_gpus(metadata),
        settings={"scenario": metrics.text("scenario"), "task": metadata.text("task") if metadata else None},
        companions=(beside,) if metadata is not None else (),
    )  # fmt: skip


def _gpus(metadata: Part | None) -> int | None:
    text = metadata.text("server_gpu_count") if metadata is not None else None
    return int(text) if text and text.isdigit() and int(text) > 0 else None


def _seconds_per_unit(top: Part, metadata: Part | None) -> tuple[float, list[str]]:
    unit = top.text("_time_unit") or (metadata.text("metrics_time_unit") if metadata is not None else None)
    if unit not in (None, "s", "ms"):
        raise BadInput(f"expected s or ms, got {unit!r}", where=top.where("_time_unit"))
    if unit is None:
        return 1.0, ["the file names no unit of time: read as seconds, as versions without that field write it"]
    return (1e-3 if unit == "ms" else 1.0), []


def _reported(metrics: Part, factor: float) -> dict[str, float]:
    out: dict[str, float] = {}
    stats = metrics.part("stats")
    for theirs, ours in _DISTRIBUTIONS.items():
        field = stats.part(theirs) if stats is not None else None
        for statistic in _STATISTICS:
            value = field.number(statistic) if field is not None else None
            if value is not None:
                out[f"{ours}_{statistic}_s"] = value * factor
    for theirs, ours in (("num_input_tokens", "isl_mean_tokens"), ("num_output_tokens", "osl_mean_tokens")):
        field = stats.part(theirs) if stats is not None else None
        value = field.number("mean") if field is not None else None
        if value is not None:
            out[ours] = value
    for theirs, ours in _RATES.items():
        value = metrics.number(theirs)
        if value is not None:
            out[ours] = value
    per_minute = metrics.number("requests_per_minute")
    if per_minute is not None:
        out.setdefault("requests_per_s", per_minute / 60)
    good, bad = metrics.integer("num_completed_requests"), metrics.integer("num_error_requests")
    if good is not None and bad is not None and good + bad > 0:
        out["error_ratio"] = bad / (good + bad)  # its error_rate is 0 in 0.0.5, however many failed
    if not metrics.has("run_duration"):
        # before that field existed, its throughputs were means of per-request rates
        for key, length in (("output_tokens_per_s", "osl_mean_tokens"), ("input_tokens_per_s", "isl_mean_tokens")):
            out.pop(key, None)
            if length in out and "requests_per_s" in out:
                out[key] = out["requests_per_s"] * out[length]
    if "output_tokens_per_s" in out and "input_tokens_per_s" in out:
        out["total_tokens_per_s"] = out["output_tokens_per_s"] + out["input_tokens_per_s"]
    return out


def _errors(metrics: Part) -> dict[str, int]:
    out: dict[str, int] = {}
    frequency = metrics.part("error_codes_frequency")
    for code in frequency.data if frequency is not None else ():
        found, _ = error_class("", int(code) if str(code).lstrip("-").isdigit() else None)
        out[found] = out.get(found, 0) + ((frequency.integer(code) if frequency is not None else 0) or 0)
    return out


def _lengths(scenario: str | None) -> tuple[float | None, float | None]:
    """Nominal lengths of ``D(in,out)`` and ``N(mean,sd)/(mean,sd)``; (None, None) for others."""
    text = scenario or ""
    found = re.fullmatch(r"D\((\d+),(\d+)\)", text)
    if found:
        return float(found[1]), float(found[2])
    found = re.fullmatch(r"N\((\d+),\d+\)/\((\d+),\d+\)", text)
    return (float(found[1]), float(found[2])) if found else (None, None)
