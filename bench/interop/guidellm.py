"""Results of GuideLLM: ``benchmarks.json`` of metadata version 2 (GuideLLM 0.8).

Times are Unix seconds on the wall clock. Its ``time_per_output_token_ms`` includes the first token and its
``inter_token_latency_ms`` is a mean per request, weighted by tokens: neither is our TPOT nor our ITL. Both are left, and TPOT
is computed anew from the requests' first and last token times. ITL stays empty: the file has no times of single chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bench.errors import BadInput
from bench.interop.imported import ForeignRun, ImportedLoad
from bench.interop.reading import ForeignFile, Part, error_class, utc_text
from bench.records import ErrorClass, Phase, RequestRecord

NAME = "guidellm"
TOOL = "GuideLLM"
#: A targeted start before this Unix time is none: the tool writes offsets or zeros there.
_EARLIEST_UNIX_S = 1e9
_NOTES = (
    "times are readings of the wall clock: a step of it during the run is not visible",
    "time_per_output_token_ms (includes the first token) and inter_token_latency_ms (a mean per request) are not taken over; "
    "TPOT is computed from the requests",
    "ITL is empty: the file has no times of single chunks",
)


def recognise(document: Any) -> bool:
    return (
        isinstance(document, Mapping)
        and isinstance(document.get("benchmarks"), list)
        and (isinstance(document.get("metadata"), Mapping) and "guidellm_version" in document["metadata"])
    )


def read(file: ForeignFile) -> Iterator[ForeignRun]:
    """Every benchmark of the file.

    Raises:
        BadInput: another metadata version, or a benchmark without its parts.
    """
    top = Part(file.first, file.path)
    metadata = top.part("metadata")
    if metadata is None or not isinstance(top.data.get("benchmarks"), list):
        raise BadInput("no metadata and benchmarks: not a GuideLLM benchmarks.json", where=str(file.path))
    version = metadata.data.get("version")
    if version != 2:
        raise BadInput(f"metadata.version {version!r} is not read, 2 is", where=str(file.path),
                       next_step="write it again with GuideLLM 0.8")  # fmt: skip
    benchmarks = top.data["benchmarks"]
    if not benchmarks:
        raise BadInput("holds no benchmark", where=top.where("benchmarks"))
    settings = _settings(top)
    for i, raw in enumerate(benchmarks):
        yield _benchmark(Part(raw, file.path, f"benchmarks[{i}]"), metadata.text("guidellm_version"), settings)


def _settings(top: Part) -> dict[str, Any]:
    config = top.part("config")
    spec = config.part("spec") if config is not None else None
    if spec is None:
        return {}
    backend, data = spec.part("backend"), spec.sequence("data") or []
    first = data[0] if data and isinstance(data[0], Mapping) else {}
    keep = {k: v for k, v in first.items() if isinstance(v, (str, int, float))}
    model = backend.text("model") if backend is not None else None
    kind = backend.text("kind") if backend is not None else None
    return {"model": model, "backend": kind, "data": keep}


def _benchmark(part: Part, version: str | None, settings: dict[str, Any]) -> ForeignRun:
    load, notes = _load(part)
    start, end = part.number("start_time"), part.number("end_time")
    duration = part.number("duration")
    requests = part.part("requests")
    if start is None or requests is None:
        raise BadInput("has no start_time or no requests", where=part.where())
    records, unknown = _records(requests, load, start, end)
    if unknown:
        notes.append(f"{unknown} failures could not be told by their text and are recorded as server_error")
    data = settings.get("data") or {}
    reported = _reported(part)
    return ForeignRun(
        format=NAME, tool=TOOL, part=part.at, tool_version=version, model=settings.get("model"), load=load,
        isl_tokens=_number(data.get("prompt_tokens")), osl_tokens=_number(data.get("output_tokens")),
        started_utc=utc_text(start), records=records, duration_s=duration,
        num_completed=sum(r.error is None for r in records), num_failed=sum(r.error is not None for r in records),
        reported=reported, recount=tuple(reported),
        absent={"itl_p50_s": "GuideLLM keeps no times of single chunks"}, notes=(*_NOTES, *notes), settings=settings,
    )  # fmt: skip


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _load(part: Part) -> tuple[ImportedLoad, list[str]]:
    config = part.part("config")
    strategy = config.part("strategy") if config is not None else None
    if strategy is None:
        raise BadInput("has no config.strategy", where=part.where())
    kind, limit = strategy.text("type_"), strategy.integer("max_concurrency")
    if kind == "synchronous":
        return ImportedLoad("closed_loop", concurrency=1), []
    if kind == "concurrent":
        return ImportedLoad("closed_loop", concurrency=strategy.integer("streams") or limit), []
    if kind == "throughput":
        if limit is not None:
            return ImportedLoad("closed_loop", concurrency=limit), []
        return ImportedLoad("offline"), ["all requests were sent as fast as possible: read as one batch"]
    rate = strategy.number("rate")
    notes = [f"strategy {kind} has no single rate"] if rate is None else []
    if kind == "poisson":
        notes.append("GuideLLM 0.8.1 repeats each gap of its Poisson arrivals once per worker: burstier than Poisson")
    return ImportedLoad("open_loop", rate_per_s=rate, max_in_flight=limit), notes


def _reported(part: Part) -> dict[str, float]:
    """Means and rates of the successful requests. Its percentiles are not interpolated, so they are not compared."""
    metrics = part.part("metrics")
    if metrics is None:
        return {}
    out = {}
    for theirs, ours, factor in (
        ("time_to_first_token_ms", "ttft_service_mean_s", 1e-3),
        ("request_latency", "e2e_service_mean_s", 1.0),
        ("output_tokens_per_second", "output_tokens_per_s", 1.0),
        ("requests_per_second", "requests_per_s", 1.0),
        ("prompt_token_count", "isl_mean_tokens", 1.0),
        ("output_token_count", "osl_mean_tokens", 1.0),
    ):
        metric = metrics.part(theirs)
        good = metric.part("successful") if metric is not None else None
        value = good.number("mean") if good is not None else None
        if value is not None and good is not None and good.number("count"):
            out[ours] = value * factor
    return out


def _records(
    requests: Part, load: ImportedLoad, start: float, end: float | None
) -> tuple[tuple[RequestRecord, ...], int]:
    rows: list[tuple[float, RequestRecord]] = []
    unknown = 0
    for status in ("successful", "incomplete", "errored"):
        for i, raw in enumerate(requests.sequence(status) or []):
            one = Part(raw, requests.path, f"{requests.at}.{status}[{i}]")
            record, recognised = _record(one, status, load, start, end)
            unknown += not recognised
            rows.append((record.sent_s if record.sent_s is not None else float("inf"), record))
    rows.sort(key=lambda row: row[0])
    from dataclasses import replace

    return tuple(replace(record, index=i) for i, (_, record) in enumerate(rows)), unknown


def _record(one: Part, status: str, load: ImportedLoad, start: float, end: float | None) -> tuple[RequestRecord, bool]:
    info = one.part("info")
    timings = info.part("timings") if info is not None else None
    if info is None or timings is None:
        raise BadInput("has no info.timings", where=one.where())
    sent = timings.number("request_start")
    target = timings.number("targeted_start")
    due = target if load.kind == "open_loop" and target is not None and target >= _EARLIEST_UNIX_S else sent
    done = timings.number("request_end") or (one.number("request_end_time") if status == "successful" else None)
    error: ErrorClass | None = None
    detail, recognised = None, True
    if status != "successful":
        detail = (info.text("error") or status)[:300]
        error, recognised = ("aborted" if status == "incomplete" else None), True
        if error is None:
            error, recognised = error_class(detail)

    def since(t: float | None) -> float | None:
        return None if t is None else t - start

    phase: Phase = "measured"
    if done is not None and done < start:
        phase = "warmup"
    elif sent is not None and end is not None and sent > end:
        phase = "cool_down"
    record = RequestRecord(
        index=0, phase=phase, isl=one.integer("prompt_tokens"), osl=one.integer("output_tokens"), due_s=since(due),
        sent_s=since(sent), first_token_s=since(timings.number("first_token_iteration")),
        last_token_s=since(timings.number("last_token_iteration")), done_s=since(done), error=error,
        error_detail=detail, num_chunks=timings.integer("token_iterations") or None,
    )  # fmt: skip
    return record, recognised
