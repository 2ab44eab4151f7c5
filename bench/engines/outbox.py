"""The engine process's sink: gathers records and sends them to the tool in batches, off the engine's own path."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.engines.processes import descendants, proc_stat
from bench.engines.wire import Batch, Channel
from bench.records import ChunkRecord, EngineMetric, EngineStep, GpuSample, RequestRecord

#: How often what has gathered is sent. A kill of the engine loses at most this much of its records.
SEND_INTERVAL_S = 0.25
_PIDS_EVERY = 8  # batches between two looks at which processes the engine has


class Outbox:
    """``bench.engines.base.RecordSink`` over a Channel.

    The engine's thread only appends to lists (atomic under the interpreter's lock); a thread of its own pickles and
    sends every ``SEND_INTERVAL_S``. ``cancelled`` is set when the tool wants the run ended early.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._number = 0
        self._batch = Batch(0)
        self._chunks: list[ChunkRecord] = []
        self._columns: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._reported: set[int] = set()
        self.cancelled = threading.Event()
        self._thread = threading.Thread(target=self._send_regularly, name="outbox", daemon=True)
        self._thread.start()

    def begin(self, number: int) -> None:
        with self._lock:
            self._number = number
            self._batch = Batch(number)
            self._chunks, self._columns = [], []
        self.cancelled.clear()

    def add_record(self, record: RequestRecord) -> None:
        self._batch.records.append(record)

    def append_step(self, step: EngineStep) -> None:
        self._batch.steps.append(step)

    def append_step_columns(self, **columns: Any) -> None:
        self._batch.steps.extend(EngineStep(**row) for row in _rows(columns))

    def append_chunk(self, chunk: ChunkRecord) -> None:
        self._chunks.append(chunk)

    def append_chunk_columns(self, **columns: Any) -> None:
        self._columns.append(columns)

    def append_metric(self, metric: EngineMetric) -> None:
        self._batch.metrics.append(metric)

    def append_telemetry(self, sample: GpuSample) -> None:
        self._batch.telemetry.append(sample)

    def append_telemetry_columns(self, **columns: Any) -> None:
        self._batch.telemetry.extend(GpuSample(**row) for row in _rows(columns))

    def update_manifest(self, **values: Any) -> None:
        self._batch.manifest.update(values)

    def heartbeat(self) -> None:
        """Nothing is in flight because nothing is due: not a hang."""
        self._batch.alive = True

    def flush(self) -> None:
        """Send what there is now."""
        with self._lock:
            batch, self._batch = self._batch, Batch(self._number)
            chunks, self._chunks = self._chunks, []
            columns, self._columns = self._columns, []
        if chunks:
            columns.append(
                {
                    "index": np.array([c.index for c in chunks], dtype=np.int64),
                    "t_s": np.array([c.t_s for c in chunks]),
                    "tokens": np.array([c.tokens for c in chunks], dtype=np.int64),
                    "num_events": np.array([c.num_events for c in chunks], dtype=np.int64),
                }
            )
        if columns:
            batch.chunks = {k: np.concatenate([np.asarray(c[k]) for c in columns]) for k in columns[0]}
        if not batch.is_empty():
            self._channel.send("batch", batch)

    def report_processes(self) -> None:
        """Tell the tool of processes that it has not heard of, so that it can end them whatever happens to this one."""
        new = descendants(os.getpid()) - self._reported
        if new:
            self._reported |= new
            stats = [(pid, proc_stat(pid)) for pid in new]
            self._channel.send("pids", [(pid, stat.start_ticks) for pid, stat in stats if stat is not None])

    def _send_regularly(self) -> None:
        count = 0
        while not self._closing.wait(SEND_INTERVAL_S):
            try:
                self.flush()
                count += 1
                if count % _PIDS_EVERY == 1:
                    self.report_processes()
            except OSError:
                return  # the tool is gone; the guardian ends this process

    def close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=5)


def _rows(columns: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of columns of equal length, with Python's own numbers."""
    values = (np.asarray(column).tolist() for column in columns.values())
    return (dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True))
