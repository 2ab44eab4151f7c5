"""The one protocol between the runner and whatever serves requests.

An engine serves a schedule and reports what happened. It knows nothing of sweeps, statistics, cost or files: records go
to the caller as the iterator's items, everything else (steps, chunks, metrics) to the ``RecordSink`` it is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from typing_extensions import Self

from bench.records import ChunkRecord, EngineInfo, EngineMetric, EngineStep, GpuSample, RequestRecord, Schedule


class RecordSink(Protocol):
    """Where an engine puts what is not a request record. ``bench.store.RunWriter`` is one."""

    def append_chunk(self, chunk: ChunkRecord) -> None: ...
    def append_chunk_columns(self, **columns: Any) -> None: ...
    def append_step(self, step: EngineStep) -> None: ...
    def append_step_columns(self, **columns: Any) -> None: ...
    def append_metric(self, metric: EngineMetric) -> None: ...
    def append_telemetry(self, sample: GpuSample) -> None: ...
    def append_telemetry_columns(self, **columns: Any) -> None: ...
    def update_manifest(self, **values: Any) -> None: ...


@runtime_checkable
class Engine(Protocol):
    """Serves schedules.

    ``run`` yields records in order of completion; failed requests are records with ``error`` set, never exceptions.
    Times in records are seconds since ``t0_monotonic_s`` (a ``time.monotonic()`` reading), which the caller takes when
    the run starts and shares with the telemetry sampler. One engine serves many runs, one after the other.
    Offline schedules with ``max_in_flight = B`` come in batches of B, each submitted whole when the one before is done;
    with ``max_in_flight = None`` all requests are submitted at once. Requests of phase "warmup" are served first, to
    their end, before anything else is submitted, and are reported with their phase.
    """

    def __enter__(self) -> Self:
        """Load weights, start the server or connect. Raises EngineUnavailable with the reason."""
        ...

    def __exit__(self, *exc: object) -> None:
        """Free the GPU and end every child process that was started, even after a crash."""
        ...

    def info(self) -> EngineInfo:
        """Version, effective arguments, KV-cache capacity: goes into the manifest."""
        ...

    def run(self, schedule: Schedule, sink: RecordSink, t0_monotonic_s: float) -> Iterator[RequestRecord]:
        """Serve ``schedule`` and yield a record per request that was submitted."""
        ...
