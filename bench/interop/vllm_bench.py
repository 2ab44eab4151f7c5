"""Results of ``vllm bench serve``, ``throughput``, ``latency`` and ``sweep serve`` (vLLM 0.30 to 0.33), Python and Rust.

Arrays are in seconds, summaries in milliseconds. ``start_times`` are readings of a monotonic clock. A failed request stands
as zeros among the arrays, so it is told by its error text (or by a TTFT of zero) and becomes a failed record. Throughput
there divides by the whole duration, ramp and drain included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bench.errors import BadInput
from bench.interop.imported import ChunkColumns, ForeignRun, ImportedLoad, statistics
from bench.interop.reading import MOST_TOKENS, ForeignFile, Part, error_class
from bench.records import RequestRecord

NAME = "vllm-bench"
TOOL = "vllm bench"
_METRICS = {"ttft": "ttft_service", "tpot": "tpot", "itl": "itl", "e2el": "e2e_service"}
_STATISTICS = {"mean": "mean", "median": "p50", "p50": "p50", "p90": "p90", "p95": "p95", "p99": "p99"}
_ARRAYS = ("input_lens", "output_lens", "ttfts", "itls", "start_times", "generated_texts", "errors", "latencies")
#: vLLM's own argument names that a sweep writes beside the result.
_ENGINE_ARGS = (
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "max_num_seqs", "max_num_batched_tokens",
    "quantization", "kv_cache_dtype", "dtype", "gpu_memory_utilization", "enforce_eager",
)  # fmt: skip
_SERVE_KEYS = (
    "endpoint_type", "backend", "label", "tokenizer_id", "num_prompts", "request_rate", "burstiness", "max_concurrency",
    "ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps", "run_number", "request_goodput", "max_output_tokens_per_s",
    "max_concurrent_requests",
)  # fmt: skip


def _is_serve(d: Mapping[str, Any]) -> bool:
    return "request_throughput" in d and "completed" in d and "duration" in d and "results" not in d


def _is_throughput(d: Mapping[str, Any]) -> bool:
    return {"elapsed_time", "num_requests", "total_num_tokens"} <= set(d)


def _is_latency(d: Mapping[str, Any]) -> bool:
    return {"avg_latency", "latencies", "percentiles"} <= set(d)


def recognise(document: Any) -> bool:
    first = document[0] if isinstance(document, list) and document else document
    return isinstance(first, Mapping) and (_is_serve(first) or _is_throughput(first) or _is_latency(first))


def read(file: ForeignFile) -> Iterator[ForeignRun]:
    """Every run in the file: one object, one a line (``--append-result``), or a sweep's list.

    Raises:
        BadInput: with file, key and reason.
    """
    listed = isinstance(file.first, list)
    documents = file.first if listed else file.documents
    for i, document in enumerate(documents):
        at = f"[{i}]" if listed else f"line {i + 1}" if len(documents) > 1 else ""
        part = Part(document, file.path, at)
        if _is_throughput(part.data):
            yield _throughput(part)
        elif _is_latency(part.data):
            yield _latency(part)
        elif _is_serve(part.data):
            yield _serve(part)
        else:
            raise BadInput("is no result of vllm bench", where=part.where(), next_step="name the format with --format")


def _serve(part: Part) -> ForeignRun:
    if part.has("total_input_sequences"):
        raise BadInput("is a benchmark of a pooling model; it generates no tokens", where=part.where())
    load, notes = _load(part)
    duration_s = part.needed_number("duration")
    completed, failed = part.integer("completed"), part.integer("failed")
    reported = _reported(part, completed, failed)
    records: tuple[RequestRecord, ...] = ()
    chunks = None
    if part.has("start_times") and part.has("ttfts"):
        records, chunks, more = _records(part, load)
        notes += more
        ok = sum(r.error is None for r in records)
        if completed is not None and ok != completed:
            notes.append(f"the file counts {completed} completed requests, its lists hold {ok} without an error")
    else:
        notes.append("no per-request times in the file (written without --save-detailed)")
        latencies = part.numbers("latencies")
        if latencies is not None:
            reported |= statistics("e2e_service", np.where(latencies > 0, latencies, np.nan))
    if part.has("request_goodput"):
        notes.append(
            "request_goodput counts against the tool's own limits and is not taken over; give --slo to count it anew"
        )
    if part.has("steady_state"):
        notes.append("its steady_state part is not taken over; ours is found from the records")
    isl, osl = (part.number(k) for k in ("total_input_tokens", "total_output_tokens"))
    return ForeignRun(
        format=NAME, tool=f"{TOOL} serve", part=part.at, model=part.text("model_id"), load=load,
        isl_tokens=isl / completed if isl and completed else None,
        osl_tokens=osl / completed if osl and completed else None,
        local_date=part.text("date"), records=records, chunks=chunks, duration_s=duration_s,
        num_completed=completed, num_failed=failed, reported=reported,
        recount=tuple(reported), notes=tuple(notes), engine_args=_engine_args(part),
        settings=_settings(part),
    )  # fmt: skip


def _settings(part: Part) -> dict[str, Any]:
    known = {*_ARRAYS, "queue_times", "date", "model_id", "duration", "completed", "failed", "rtfx", "steady_state"}
    return {
        k: v
        for k, v in part.data.items()
        if isinstance(v, (str, int, float, bool)) and k not in known and not k.endswith("_ms") and "throughput" not in k
        and not k.startswith("total_")
    }  # fmt: skip


def _engine_args(part: Part) -> dict[str, Any]:
    """vLLM arguments that a sweep wrote beside the result, under either spelling."""
    found = {k.replace("-", "_"): v for k, v in part.data.items()}
    return {k: found[k] for k in _ENGINE_ARGS if k in found}


def _load(part: Part) -> tuple[ImportedLoad, list[str]]:
    rate, limit = part.data.get("request_rate"), part.integer("max_concurrency")
    if rate in ("inf", "Infinity", None) or rate == float("inf"):
        if limit is not None:
            return ImportedLoad("closed_loop", concurrency=limit), []
        number = part.integer("num_prompts") or part.integer("completed")
        return ImportedLoad("offline", batch_size=number), ["all requests were sent at once: read as one batch"]
    try:
        rate_per_s = float(str(rate))
    except (TypeError, ValueError):
        raise BadInput(f"expected a rate or inf, got {rate!r}", where=part.where("request_rate")) from None
    notes = []
    if part.has("ramp_up_strategy"):
        notes.append("the request rate was ramped up: the stated rate is not the rate throughout")
    return ImportedLoad("open_loop", rate_per_s=rate_per_s, max_in_flight=limit), notes


def _reported(part: Part, completed: int | None, failed: int | None) -> dict[str, float]:
    """The tool's summary in seconds and tokens/s, by our keys; medians are p50."""
    out: dict[str, float] = {}
    for theirs, ours in _METRICS.items():
        for word, name in _STATISTICS.items():
            value = part.number(f"{word}_{theirs}_ms")
            if value is not None and completed:
                out[f"{ours}_{name}_s"] = value / 1e3
    for theirs, ours in (
        ("output_throughput", "output_tokens_per_s"),
        ("total_token_throughput", "total_tokens_per_s"),
        ("request_throughput", "requests_per_s"),
    ):
        value = part.number(theirs)
        if value is not None:
            out[ours] = value
    for theirs, ours in (("total_input_tokens", "isl_mean_tokens"), ("total_output_tokens", "osl_mean_tokens")):
        value = part.number(theirs)
        if value is not None and completed:
            out[ours] = value / completed
    if completed is not None and failed is not None and completed + failed:
        out["error_ratio"] = failed / (completed + failed)
    return out


def _records(part: Part, load: ImportedLoad) -> tuple[tuple[RequestRecord, ...], ChunkColumns | None, list[str]]:
    starts, ttfts = part.numbers("start_times"), part.numbers("ttfts")
    assert starts is not None and ttfts is not None
    n = len(starts)
    arrays: dict[str, Any] = {k: part.numbers(k) for k in ("input_lens", "output_lens", "latencies", "queue_times")}
    arrays |= {k: part.sequence(k) for k in ("itls", "errors")}
    for key, values in {"ttfts": ttfts, **arrays}.items():
        if values is not None and len(values) != n:
            raise BadInput(f"has {len(values)} entries, start_times has {n}", where=part.where(key))
    if not n:
        return (), None, ["the file holds no request"]
    for key in ("input_lens", "output_lens"):
        if arrays[key] is not None and np.nanmax(np.append(arrays[key], 0)) > MOST_TOKENS:
            raise BadInput("holds a number of tokens that cannot be", where=part.where(key))
    gaps = _gaps(part, arrays["itls"], n)
    latencies = arrays["latencies"]
    if latencies is None:
        latencies = ttfts + np.array([g.sum() for g in gaps])
    waits = arrays["queue_times"] if load.kind == "open_loop" else None
    due = starts if waits is None else starts - np.maximum(np.nan_to_num(waits), 0)
    zero = float(np.nanmin(due))
    notes = []
    if load.kind == "open_loop":
        notes.append("due times: the moment the tool's pacing released a request" if waits is not None else
                     "no queue_times in the file: a request counts as due when it was sent")  # fmt: skip
    records, unknown = [], 0
    for i in range(n):
        text = str((arrays["errors"] or [""] * n)[i] or "")
        times = (due[i] - zero, starts[i] - zero)
        if text or not ttfts[i] > 0:
            record, recognised = _failed(i, text, times, arrays["input_lens"])
            unknown += not recognised
        else:
            record = RequestRecord(
                index=i, phase="measured", isl=_count(arrays["input_lens"], i), osl=_count(arrays["output_lens"], i),
                due_s=float(times[0]), sent_s=float(times[1]), first_token_s=float(times[1] + ttfts[i]),
                last_token_s=float(times[1] + latencies[i]), done_s=float(times[1] + latencies[i]),
                num_chunks=len(gaps[i]) + 1 if arrays["itls"] is not None else None,
            )  # fmt: skip
        records.append(record)
    if unknown:
        notes.append(f"{unknown} failures could not be told by their text and are recorded as server_error")
    chunks, more = _chunks(records, gaps) if arrays["itls"] is not None else (None, [])
    return tuple(records), chunks, notes + more


def _failed(i: int, text: str, times: tuple[float, float], input_lens: np.ndarray | None) -> tuple[RequestRecord, bool]:
    found, recognised = error_class(text) if text else ("server_error", False)
    lines = text.strip().splitlines()
    detail = (lines[-1] if lines else "no error text; the file holds zeros")[:300]
    record = RequestRecord(
        index=i, phase="measured", isl=_count(input_lens, i), osl=None, due_s=float(times[0]), sent_s=float(times[1]),
        first_token_s=None, last_token_s=None, done_s=None, error=found, error_detail=detail,
    )  # fmt: skip
    return record, recognised


def _count(values: np.ndarray | None, i: int) -> int | None:
    return None if values is None or np.isnan(values[i]) else int(values[i])


def _gaps(part: Part, itls: Any, n: int) -> list[np.ndarray]:
    if itls is None:
        return [np.zeros(0)] * n
    try:
        gaps = [np.asarray(row if row is not None else [], dtype=np.float64) for row in itls]
    except (TypeError, ValueError):
        gaps = []
    if len(gaps) != n or any(g.ndim != 1 for g in gaps):
        raise BadInput("expected a list of lists of seconds", where=part.where("itls"))
    return gaps


def _chunks(records: list[RequestRecord], gaps: list[np.ndarray]) -> tuple[ChunkColumns | None, list[str]]:
    """Chunk times from TTFT and gaps. Where chunks and tokens differ in number, a request's tokens are spread evenly."""
    index, t_s, tokens, uneven = [], [], [], 0
    for record, own in zip(records, gaps, strict=True):
        if record.error is not None or record.first_token_s is None:
            continue
        k = len(own) + 1
        index.append(np.full(k, record.index, dtype=np.int64))
        t_s.append(record.first_token_s + np.concatenate([[0.0], np.cumsum(own)]))
        total = k if record.osl is None else record.osl
        uneven += total != k
        tokens.append(np.diff(np.round(np.linspace(0, total, k + 1))).astype(np.int64))
    if not index:
        return None, []
    notes = ["a gap is one between two events of the stream; events read at once count there as gaps near zero"]
    if uneven:
        notes.append(
            f"{uneven} requests have more or fewer tokens than chunks: their tokens are spread evenly over the chunks"
        )
    return ChunkColumns(np.concatenate(index), np.concatenate(t_s), np.concatenate(tokens)), notes


def _throughput(part: Part) -> ForeignRun:
    elapsed_s, number = part.needed_number("elapsed_time"), part.integer("num_requests")
    tokens = part.needed_number("total_num_tokens")
    if not elapsed_s > 0:
        raise BadInput(f"expected a time > 0, got {elapsed_s!r}", where=part.where("elapsed_time"))
    reported = {"total_tokens_per_s": tokens / elapsed_s, "requests_per_s": (number or 0) / elapsed_s}
    absent = {"output_tokens_per_s": "vllm bench throughput writes prompt and output tokens as one number"}
    return ForeignRun(
        format=NAME, tool=f"{TOOL} throughput", part=part.at, model=part.text("model_id"),
        load=ImportedLoad("offline", batch_size=number), duration_s=elapsed_s, num_completed=number,
        reported=reported, absent=absent,
        notes=("all prompts were given at once; no latencies in the file",),
        engine="vllm", engine_args=_engine_args(part),
    )  # fmt: skip


def _latency(part: Part) -> ForeignRun:
    latencies = part.numbers("latencies")
    if latencies is None:
        raise BadInput("is missing", where=part.where("latencies"))
    absent = {"output_tokens_per_s": "vllm bench latency writes neither batch size nor lengths"}
    return ForeignRun(
        format=NAME, tool=f"{TOOL} latency", part=part.at, model=part.text("model_id"),
        load=ImportedLoad("offline"), num_completed=len(latencies),
        reported=statistics("e2e_service", latencies) or {"e2e_service_mean_s": part.needed_number("avg_latency")},
        absent=absent, notes=("a latency is that of a whole batch; its size is not in the file: give --batch-size",),
        engine="vllm", engine_args=_engine_args(part),
    )  # fmt: skip
