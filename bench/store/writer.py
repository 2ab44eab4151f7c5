"""Writing a run folder as the run happens."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bench.records import ChunkRecord, EngineMetric, EngineStep, GpuSample, RequestRecord

if TYPE_CHECKING:
    pass

from bench.store.arrow import ArrowAppender
from bench.store.files import (
    CHUNKS,
    DATA_FILES,
    ENGINE_LOG,
    FLUSH_INTERVAL_S,
    MANIFEST,
    METRICS,
    REQUESTS,
    SCHEMA_VERSION,
    STEPS,
    TELEMETRY,
    file_facts,
    json_default,
    process_start_s,
    store_error,
    utc_now_text,
    write_json_atomically,
)


class RunWriter:
    """Writes one run folder as the run happens. Use as a context manager or call :meth:`finish` yourself.

    Args:
        folder: created; must not hold a run yet.
        manifest: everything known before the start (experiment, cell, seeds, origin, provenance, ...).

    Raises:
        StoreError: from any method when the disk is full or the folder cannot be written.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=False)
        except OSError as e:
            raise store_error(folder, e) from e
        self.manifest: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "status": "running",
            "t0_utc": None,
            "t0_monotonic_s": None,
            "writer_pid": os.getpid(),
            "writer_start_s": process_start_s(os.getpid()),
            "warnings": [],
            **manifest,
        }
        self._requests: IO[str] | None = None
        self._appenders: dict[str, ArrowAppender] = {}
        self._last_flush = time.monotonic()
        # Metrics and telemetry come from threads of their own.
        self._lock = threading.RLock()
        self.num_requests = 0
        write_json_atomically(folder / MANIFEST, self.manifest)

    def update_manifest(self, **values: Any) -> None:
        """Merge ``values`` and write the manifest again (atomically)."""
        self.manifest.update(values)
        write_json_atomically(self.folder / MANIFEST, self.manifest)

    def append_request(self, record: RequestRecord) -> None:
        try:
            if self._requests is None:
                self._requests = open(self.folder / REQUESTS, "a", encoding="utf-8")
            self._requests.write(json.dumps(record.to_dict(), ensure_ascii=False, default=json_default) + "\n")
        except OSError as e:
            raise store_error(self.folder / REQUESTS, e) from e
        self.num_requests += 1
        with self._lock:
            self._maybe_flush()

    def append_chunk(self, chunk: ChunkRecord) -> None:
        with self._lock:
            self._appender(CHUNKS, ChunkRecord).append(chunk)
            self._maybe_flush()

    def append_chunk_columns(self, **columns: Any) -> None:
        """Whole columns of chunks: index, t_s, tokens, num_events (numpy arrays of equal length)."""
        with self._lock:
            self._appender(CHUNKS, ChunkRecord).append_columns(columns)

    def append_step(self, step: EngineStep) -> None:
        with self._lock:
            self._appender(STEPS, EngineStep).append(step)
            self._maybe_flush()

    def append_step_columns(self, **columns: Any) -> None:
        """Whole columns of steps at once, named as the fields of EngineStep (a simulated run has ten thousands of them)."""
        with self._lock:
            self._appender(STEPS, EngineStep).append_columns(columns)

    def append_metric(self, metric: EngineMetric) -> None:
        with self._lock:
            self._appender(METRICS, EngineMetric).append(metric)
            self._maybe_flush()

    def append_telemetry(self, sample: GpuSample) -> None:
        """Only for simulated and imported runs; a live sampler writes telemetry.arrow itself."""
        with self._lock:
            self._appender(TELEMETRY, GpuSample).append(sample)
            self._maybe_flush()

    def append_telemetry_columns(self, **columns: Any) -> None:
        """Whole columns of samples, named as the fields of GpuSample; missing ones are not available."""
        with self._lock:
            self._appender(TELEMETRY, GpuSample).append_columns(columns)

    def _appender(self, name: str, record_type: type) -> ArrowAppender:
        if name not in self._appenders:
            self._appenders[name] = ArrowAppender(self.folder / name, record_type)
        return self._appenders[name]

    def _maybe_flush(self) -> None:
        now = time.monotonic()
        if now - self._last_flush >= FLUSH_INTERVAL_S:
            self.flush()
            self._last_flush = now

    def flush(self) -> None:
        try:
            if self._requests is not None:
                self._requests.flush()
        except OSError as e:
            raise store_error(self.folder / REQUESTS, e) from e
        with self._lock:
            for appender in self._appenders.values():
                appender.flush()

    def finish(self, status: str, **values: Any) -> None:
        """Close every file, then replace the manifest with its final form. ``status`` is "complete" or "failed"."""
        if self._requests is not None:
            try:
                self._requests.flush()
                os.fsync(self._requests.fileno())
                self._requests.close()
            except OSError as e:
                raise store_error(self.folder / REQUESTS, e) from e
            self._requests = None
        for appender in self._appenders.values():
            appender.close()
        names = [n for n in (*DATA_FILES, ENGINE_LOG) if (self.folder / n).exists()]
        facts = {n: file_facts(self.folder / n) for n in names}
        self.update_manifest(status=status, files=facts, finished_utc=utc_now_text(), **values)
