"""Results of inference-perf: ``stage_N_lifecycle_metrics.json`` (one load) and ``summary_lifecycle_metrics.json`` (all loads).

Seconds throughout, times from the send. ``time_per_output_token`` is our TPOT. Its ``inter_token_latency`` gives every token of a
chunk the chunk's time, so gaps within a chunk are zero: not our ITL, and left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bench.errors import BadInput
from bench.interop.imported import ForeignRun, ImportedLoad
from bench.interop.reading import ForeignFile, Part, error_class

NAME = "inference-perf"
TOOL = "inference-perf"
_DISTRIBUTIONS = {
    "time_to_first_token": "ttft_service",
    "request_latency": "e2e_service",
    "time_per_output_token": "tpot",
}
_STATISTICS = {"mean": "mean", "median": "p50", "p50": "p50", "p90": "p90", "p95": "p95", "p99": "p99"}
_RATES = {
    "output_tokens_per_sec": "output_tokens_per_s",
    "input_tokens_per_sec": "input_tokens_per_s",
    "total_tokens_per_sec": "total_tokens_per_s",
    "requests_per_sec": "requests_per_s",
}


def recognise(document: Any) -> bool:
    return isinstance(document, Mapping) and {"load_summary", "successes", "failures"} <= set(document)


def read(file: ForeignFile) -> Iterator[ForeignRun]:
    """The run of one report.

    Raises:
        BadInput: with file, key and reason.
    """
    top = Part(file.first, file.path)
    good, bad, sent = top.part("successes"), top.part("failures"), top.part("load_summary")
    if good is None or sent is None:
        raise BadInput("has no successes or no load_summary", where=str(file.path))
    completed, failed = good.integer("count") or 0, (bad.integer("count") if bad is not None else 0) or 0
    if not completed and not failed:
        raise BadInput("holds no request", where=top.where("successes.count"))
    rate, concurrency = sent.number("requested_rate"), sent.integer("concurrency")
    load, notes = None, []
    if concurrency:
        load = ImportedLoad("closed_loop", concurrency=concurrency)
    elif rate is not None:
        load = ImportedLoad("open_loop", rate_per_s=rate)
    else:
        notes.append(
            "this summary is over all stages, whatever their load: import the stage_N files to tell them apart"
        )
    reported = _reported(good)
    if completed + failed:
        reported["error_ratio"] = failed / (completed + failed)
    absent = {"itl_p50_s": "inference-perf counts zero gaps between the tokens of one chunk"}
    delay = sent.part("schedule_delay")
    if load is not None and load.kind == "open_loop" and delay is not None:
        for theirs, name in _STATISTICS.items():
            value = delay.number(theirs)
            if value is not None:
                reported[f"send_lateness_{name}_s"] = max(0.0, value) if theirs != "mean" else value
    yield ForeignRun(
        format=NAME, tool=TOOL, load=load, isl_tokens=reported.get("isl_mean_tokens"),
        osl_tokens=reported.get("osl_mean_tokens"), duration_s=top.number("benchmark_time_seconds") or None,
        num_completed=completed, num_failed=failed, errors=_errors(bad), reported=reported, absent=absent,
        notes=("times count from the send", *notes), settings={"schedule": _plain(sent)},
    )  # fmt: skip


def _plain(part: Part) -> dict[str, Any]:
    return {k: v for k, v in part.data.items() if isinstance(v, (int, float, str))}


def _reported(good: Part) -> dict[str, float]:
    out: dict[str, float] = {}
    latency, rates = good.part("latency"), good.part("throughput")
    for theirs, ours in _DISTRIBUTIONS.items():
        metric = latency.part(theirs) if latency is not None else None
        for statistic, name in _STATISTICS.items():
            value = metric.number(statistic) if metric is not None else None
            if value is not None:
                out[f"{ours}_{name}_s"] = value
    for theirs, ours in _RATES.items():
        value = rates.number(theirs) if rates is not None else None
        if value is not None:
            out[ours] = value
    for keys, ours in (
        (("prompt_len", "prompt_tokens"), "isl_mean_tokens"),
        (("output_len", "output_tokens"), "osl_mean_tokens"),
    ):
        for key in keys:
            metric = good.part(key)
            value = metric.number("mean") if metric is not None else None
            if value is not None:
                out.setdefault(ours, value)
    return out


def _errors(bad: Part | None) -> dict[str, int]:
    out: dict[str, int] = {}
    labels = bad.part("by_label") if bad is not None else None
    for label in labels.data if labels is not None else ():
        entry = labels.data[label] if labels is not None else None
        number = entry.get("count") if isinstance(entry, Mapping) else entry
        if isinstance(number, int):
            first = str(label).split(" ", 1)[0]
            found, _ = error_class(str(label), int(first) if first.isdigit() else None)
            out[found] = out.get(found, 0) + number
    return out
