"""Serving a schedule over HTTP, for every engine that is an URL: the driver's records and chunks, the server's metrics,
and what both say of their own quality."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from bench.engines.base import RecordSink
from bench.load.driver import LoadOptions, LoadResult, Progress, drive
from bench.load.oneshot import ask
from bench.load.target import Target
from bench.records import RequestRecord, Schedule
from bench.telemetry import vllm_metrics


def serve_over_http(
    target: Target,
    schedule: Schedule,
    sink: RecordSink,
    t0_monotonic_s: float,
    options: LoadOptions,
    *,
    metrics_path: str | None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Iterator[RequestRecord]:
    """Drive ``target`` and give back what happened: records as the iterator's items, chunks and metrics to ``sink``,
    the honesty block and the server's view to the manifest (keys ``client`` and ``server_view``)."""
    scraper = None
    if metrics_path is not None:

        def fetch() -> str:
            reply = ask(target, "GET", metrics_path, timeout_s=5.0)
            if reply.status != 200:
                raise ValueError(f"status {reply.status}")
            return reply.body.decode("utf-8", "replace")

        scraper = vllm_metrics.MetricsScraper(fetch, sink.append_metric, t0_monotonic_s)
        scraper.start()
    cancelled: Any = getattr(sink, "cancelled", None)
    heartbeat: Any = getattr(sink, "heartbeat", None)
    seen = [-1]

    def progress(p: Progress) -> None:
        # Reads are signs of life of the server; preparing and parsing are ours.
        if heartbeat is not None and (p.num_reads != seen[0] or p.stage in ("connect", "parse") or not p.in_flight):
            seen[0] = p.num_reads
            heartbeat()
        if on_progress is not None:
            on_progress(p)

    try:
        result = drive(
            schedule,
            target,
            options,
            t0_monotonic_s=t0_monotonic_s,
            on_progress=progress,
            should_stop=cancelled.is_set if isinstance(cancelled, threading.Event) else None,
        )
    except BaseException:
        if scraper is not None:
            scraper.stop()
        raise
    try:
        _deliver(result, schedule, sink, scraper)
        yield from result.records
    finally:
        result.close(keep_raw=options.keep_raw)


def _deliver(
    result: LoadResult, schedule: Schedule, sink: RecordSink, scraper: vllm_metrics.MetricsScraper | None
) -> None:
    for block in result.chunk_blocks():
        sink.append_chunk_columns(**block)
    values: dict[str, Any] = {
        "client": {
            **result.honesty.to_dict(),
            "reason": "; ".join(result.honesty.reasons) or None,
            "main_start_s": result.main_start_s,
            "stop_reason": result.stop_reason,
        }
    }
    if scraper is not None:
        time.sleep(0.2)  # the server counts a request just after its last byte
        scraper.stop()
        clean = all(r.error is None for r in result.records)
        if scraper.last:
            view = vllm_metrics.compare(scraper, result.records, schedule.requests, clean=clean)
            values["server_view"] = vllm_metrics.to_dict(view)
    sink.update_manifest(**values)
