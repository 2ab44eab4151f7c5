"""Results of AIPerf: ``profile_export_aiperf.json`` (summary) and ``profile_export.jsonl`` (one request a line).

Latencies are in milliseconds, request times in Unix nanoseconds. Its ``inter_token_latency`` is our TPOT; its
``inter_chunk_latency`` is our ITL. It counts output tokens with its own tokenizer unless told otherwise; where a request has
the server's ``usage`` that count is taken, and then its throughput and TPOT are not ours. ``total_gpu_energy`` is the energy of
every GPU of the host, whoever used it, and is not taken over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import BadInput
from bench.interop.imported import ChunkColumns, ForeignRun, ImportedLoad
from bench.interop.reading import MOST_TOKENS, ForeignFile, Part, error_class, read_file, utc_text
from bench.records import ErrorClass, Phase, RequestRecord

NAME = "aiperf"
TOOL = "AIPerf"
SUMMARY_NAME, RECORDS_NAME = "profile_export_aiperf.json", "profile_export.jsonl"
_DISTRIBUTIONS = {
    "time_to_first_token": "ttft_service",
    "request_latency": "e2e_service",
    "inter_token_latency": "tpot",
    "inter_chunk_latency": "itl",
}
_STATISTICS = {"avg": "mean", "p50": "p50", "p90": "p90", "p95": "p95", "p99": "p99"}
_RATES = {
    "output_token_throughput": "output_tokens_per_s",
    "total_token_throughput": "total_tokens_per_s",
    "request_throughput": "requests_per_s",
    "input_sequence_length": "isl_mean_tokens",
    "output_sequence_length": "osl_mean_tokens",
}
#: Our keys that rest on the number of output or prompt tokens.
_BY_TOKENS = ("tpot", "output_tokens", "total_tokens", "isl_", "osl_")
_PER_SECOND = {"ms": 1e-3, "sec": 1.0, "s": 1.0, "us": 1e-6, "ns": 1e-9}


def recognise(document: Any) -> bool:
    if not isinstance(document, Mapping):
        return False
    return "aiperf_version" in document or (
        isinstance(document.get("metadata"), Mapping)
        and "request_start_ns" in document["metadata"]
        and "metrics" in document
    )


def read(file: ForeignFile) -> Iterator[ForeignRun]:
    """The run of a summary, of its records, or of both where they lie side by side under their usual names.

    Raises:
        BadInput: with file, key and reason.
    """
    if "aiperf_version" in file.first:
        summary: Part | None = Part(file.first, file.path)
        beside = _beside(file.path, SUMMARY_NAME, RECORDS_NAME)
        lines = read_file(beside) if beside is not None else None
    else:
        lines = file
        beside = _beside(file.path, RECORDS_NAME, SUMMARY_NAME)
        summary = Part(read_file(beside).first, beside) if beside is not None else None
    yield _run(summary, lines, () if beside is None else (beside,))


def _beside(path: Path, own: str, other: str) -> Path | None:
    """The other file of the pair: the same name with the other ending, if it is there."""
    if not path.name.endswith(own):
        return None
    found = path.with_name(path.name.removesuffix(own) + other)
    return found if found.is_file() else None


def _run(summary: Part | None, lines: ForeignFile | None, companions: tuple[Path, ...]) -> ForeignRun:
    notes: list[str] = []
    load = _load(summary) if summary is not None else None
    records: tuple[RequestRecord, ...] = ()
    chunks = zero = None
    counted_by_usage = False
    if lines is not None:
        records, chunks, zero, counted_by_usage, more = _records(lines, load)
        notes += more
    else:
        notes.append(f"no per-request records: {RECORDS_NAME} does not lie beside the file")
    if summary is None:
        notes.append(f"no {SUMMARY_NAME} beside the file: tool version, load and model are unknown")
        return ForeignRun(format=NAME, tool=TOOL, records=records, chunks=chunks, started_utc=utc_text(zero),
                          notes=tuple(notes), companions=companions)  # fmt: skip
    reported, absent = _reported(summary), {}
    recount = tuple(reported)
    if counted_by_usage:
        text = "output and prompt tokens are the server's usage; the tool's own TPOT and token rates count with its tokenizer"
        recount = tuple(k for k in reported if not k.startswith(_BY_TOKENS))
        notes.append(text)
    if summary.has("total_gpu_energy"):
        absent["energy_j_per_output_token"] = (
            "AIPerf's energy is that of every GPU of the host, used by the engine or not"
        )
    if summary.data.get("is_complete") is False or summary.data.get("was_cancelled"):
        notes.append("the tool says that this run is not complete")
    model, isl, osl = _workload(summary)
    return ForeignRun(
        format=NAME, tool=TOOL, tool_version=summary.text("aiperf_version"), model=model, load=load, isl_tokens=isl,
        osl_tokens=osl, started_utc=utc_text(zero), local_date=summary.text("start_time"), records=records, chunks=chunks,
        duration_s=_duration_s(summary), num_completed=_count(summary, "request_count"),
        num_failed=_count(summary, "error_request_count") or 0, errors=_errors(summary), reported=reported, recount=recount,
        absent=absent, notes=tuple(notes), settings=_settings(summary), companions=companions,
    )  # fmt: skip


def _value(summary: Part, key: str, statistic: str = "avg") -> float | None:
    """A statistic of a metric in seconds (for times) or in its own unit."""
    metric = summary.part(key)
    if metric is None:
        return None
    value = metric.number(statistic)
    return None if value is None else value * _PER_SECOND.get(str(metric.data.get("unit")), 1.0)


def _duration_s(summary: Part) -> float | None:
    """What the tool's rates divide by: its end less its start, a little longer than its ``benchmark_duration``."""
    try:
        start, end = (datetime.fromisoformat(str(summary.data[k])) for k in ("start_time", "end_time"))
        length = (end - start).total_seconds()
    except (KeyError, ValueError, TypeError):
        length = 0.0
    return length if length > 0 else _value(summary, "benchmark_duration")


def _count(summary: Part, key: str) -> int | None:
    value = _value(summary, key)
    return None if value is None else int(value)


def _reported(summary: Part) -> dict[str, float]:
    out: dict[str, float] = {}
    for theirs, ours in _DISTRIBUTIONS.items():
        for statistic, name in _STATISTICS.items():
            value = _value(summary, theirs, statistic)
            if value is not None:
                out[f"{ours}_{name}_s"] = value
    for theirs, ours in _RATES.items():
        value = _value(summary, theirs)
        if value is not None:
            out[ours] = value
    good, bad = _count(summary, "request_count"), _count(summary, "error_request_count") or 0
    if good is not None and good + bad:
        out["error_ratio"] = bad / (good + bad)
    return out


def _errors(summary: Part) -> dict[str, int]:
    out: dict[str, int] = {}
    for raw in summary.sequence("error_summary") or []:
        entry = Part(raw, summary.path, "error_summary")
        details = entry.part("error_details")
        found, _ = _class_of(details)
        out[found] = out.get(found, 0) + (entry.integer("count") or 0)
    return out


def _class_of(details: Part | None) -> tuple[ErrorClass, bool]:
    if details is None:
        return "server_error", False
    code = details.data.get("code")
    text = f"{details.text('type') or ''} {details.text('message') or ''}"
    return error_class(text, code if isinstance(code, int) else None)


def _load(summary: Part) -> ImportedLoad | None:
    """The load of the profiling phase (0.13), or of ``loadgen`` (before)."""
    config = summary.part("input_config")
    if config is None:
        return None
    phases = [Part(p, config.path, "input_config.phases") for p in config.sequence("phases") or []]
    profiling = [p for p in phases if p.text("kind") in (None, "profiling")]
    part = profiling[-1] if profiling else config.part("loadgen")
    if part is None:
        return None
    limit = part.integer("concurrency")
    rate = part.data.get("rate", part.data.get("request_rate"))
    if isinstance(rate, (int, float)) and not isinstance(rate, bool):
        return ImportedLoad("open_loop", rate_per_s=float(rate), max_in_flight=limit)
    return ImportedLoad("closed_loop", concurrency=limit) if limit is not None else None


def _workload(summary: Part) -> tuple[str | None, float | None, float | None]:
    """(model, nominal ISL, nominal OSL) of the configuration; lengths from the results where it has none."""
    config = summary.part("input_config")
    model = isl = osl = None
    if config is not None:
        models, endpoint = config.part("models"), config.part("endpoint")
        items = (models.sequence("items") if models is not None else None) or []
        names = [i.get("name") for i in items if isinstance(i, Mapping)]
        names += (endpoint.sequence("model_names") if endpoint is not None else None) or []
        model = str(names[0]) if names else None
        for raw in config.sequence("datasets") or []:
            prompts = Part(raw, config.path, "input_config.datasets").part("prompts")
            for key in ("isl", "osl"):
                length = prompts.part(key) if prompts is not None else None
                if length is not None and key == "isl":
                    isl = length.number("mean")
                elif length is not None:
                    osl = length.number("mean")
    return model, isl or _value(summary, "input_sequence_length"), osl or _value(summary, "output_sequence_length")


def _settings(summary: Part) -> dict[str, Any]:
    config = summary.part("input_config")
    endpoint = config.part("endpoint") if config is not None else None
    keep = {k: endpoint.data.get(k) for k in ("type", "streaming") if endpoint is not None}
    return {"schema_version": summary.text("schema_version"), "endpoint": keep}


def _records(
    lines: ForeignFile, load: ImportedLoad | None
) -> tuple[tuple[RequestRecord, ...], ChunkColumns | None, float | None, bool, list[str]]:
    """(records, chunks, Unix seconds of time zero, whether tokens are the server's count, notes)."""
    rows: list[tuple[int, Part, Part]] = []
    for i, raw in enumerate(lines.documents):
        row = Part(raw, lines.path, f"line {i + 1}")
        metadata, metrics = row.part("metadata"), row.part("metrics")
        if metadata is None or metrics is None or metadata.integer("request_start_ns") is None:
            raise BadInput("has no metadata.request_start_ns or no metrics", where=row.where())
        rows.append((int(metadata.data["request_start_ns"]), row, metrics))
    rows.sort(key=lambda r: r[0])
    zero_ns = rows[0][0]
    records, pieces, unknown, by_usage = [], [], 0, 0
    for i, (start_ns, row, metrics) in enumerate(rows):
        record, gaps, recognised = _record(i, (start_ns - zero_ns) / 1e9, row, metrics, zero_ns, load)
        records.append(record)
        unknown += not recognised
        by_usage += record.token_source == "usage"
        if gaps is not None and record.first_token_s is not None:
            pieces.append((record, gaps))
    notes = [f"{d}: dropped" for d in lines.dropped]
    if unknown:
        notes.append(f"{unknown} failures could not be told by their text and are recorded as server_error")
    return tuple(records), _chunks(pieces), zero_ns / 1e9, by_usage > 0, notes


def _metric(metrics: Part, key: str) -> float | None:
    metric = metrics.part(key)
    if metric is None:
        return None
    value = metric.number("value")
    return None if value is None else value * _PER_SECOND.get(str(metric.data.get("unit")), 1.0)


def _record(
    i: int, sent: float, row: Part, metrics: Part, zero_ns: int, load: ImportedLoad | None
) -> tuple[RequestRecord, np.ndarray | None, bool]:
    metadata, details = row.part("metadata"), row.part("error")
    assert metadata is not None
    phase: Phase = "warmup" if metadata.text("benchmark_phase") == "warmup" else "measured"
    usage_out, usage_in = _metric(metrics, "usage_completion_tokens"), _metric(metrics, "usage_prompt_tokens")
    osl = usage_out if usage_out is not None else _metric(metrics, "output_sequence_length")
    isl = usage_in if usage_in is not None else _metric(metrics, "input_sequence_length")
    if max(osl or 0.0, isl or 0.0) > MOST_TOKENS:
        raise BadInput("holds a number of tokens that cannot be", where=metrics.where())
    due = sent
    if load is not None and load.kind == "open_loop" and metadata.integer("credit_issued_ns"):
        due = (int(metadata.data["credit_issued_ns"]) - zero_ns) / 1e9
    if details is not None or metadata.data.get("was_cancelled"):
        found: ErrorClass = "aborted"
        recognised = True
        if details is not None:
            found, recognised = _class_of(details)
        text = (
            " ".join(str(details.data.get(k) or "") for k in ("type", "message"))
            if details is not None
            else "cancelled"
        )
        failed = RequestRecord(
            index=i, phase=phase, isl=None, osl=None, due_s=due, sent_s=sent, first_token_s=None, last_token_s=None,
            done_s=None, error=found, error_detail=text.strip()[:300],
        )  # fmt: skip
        return failed, None, recognised
    ttft, latency = _metric(metrics, "time_to_first_token"), _metric(metrics, "request_latency")
    between = metrics.part("inter_chunk_latency")
    gaps = between.numbers("value") if between is not None else None
    gaps_s = None if gaps is None else gaps * _PER_SECOND.get(str(between.data.get("unit")) if between else "", 1.0)
    first = None if ttft is None else sent + ttft
    last = None if first is None else (first + float(gaps_s.sum()) if gaps_s is not None else sent + (latency or 0.0))
    record = RequestRecord(
        index=i, phase=phase, isl=None if isl is None else int(isl), osl=None if osl is None else int(osl), due_s=due,
        sent_s=sent, first_token_s=first, last_token_s=last, done_s=None if latency is None else sent + latency,
        num_chunks=None if gaps_s is None else len(gaps_s) + 1, token_source="usage" if usage_out is not None else "tokenizer",
    )  # fmt: skip
    return record, gaps_s, True


def _chunks(pieces: list[tuple[RequestRecord, np.ndarray]]) -> ChunkColumns | None:
    """Chunk times from TTFT and gaps; a request's tokens are spread evenly over its chunks."""
    if not pieces:
        return None
    index, t_s, tokens = [], [], []
    for record, gaps in pieces:
        k = len(gaps) + 1
        assert record.first_token_s is not None
        index.append(np.full(k, record.index, dtype=np.int64))
        t_s.append(record.first_token_s + np.concatenate([[0.0], np.cumsum(gaps)]))
        tokens.append(np.diff(np.round(np.linspace(0, record.osl or k, k + 1))).astype(np.int64))
    return ChunkColumns(np.concatenate(index), np.concatenate(t_s), np.concatenate(tokens))
