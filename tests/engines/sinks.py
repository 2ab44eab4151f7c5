"""What the tests of engines share: a sink that keeps everything, and requests."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from bench.records import ChunkRecord, EngineMetric, EngineStep, GpuSample, Request


class KeepingSink:
    """A RecordSink in memory. ``error``: raised by the first ``update_manifest`` (as a full disk would)."""

    def __init__(self, error: Exception | None = None) -> None:
        self.steps: list[EngineStep] = []
        self.metrics: list[EngineMetric] = []
        self.telemetry: list[GpuSample] = []
        self.manifest: dict[str, Any] = {}
        self.chunk_tokens: dict[int, int] = {}
        self.error = error

    def append_chunk(self, chunk: ChunkRecord) -> None:
        self.append_chunk_columns(index=np.array([chunk.index]), tokens=np.array([chunk.tokens]))

    def append_chunk_columns(self, **columns: Any) -> None:
        for index, tokens in zip(columns["index"].tolist(), columns["tokens"].tolist(), strict=True):
            self.chunk_tokens[index] = self.chunk_tokens.get(index, 0) + tokens

    def append_step(self, step: EngineStep) -> None:
        self.steps.append(step)

    def append_step_columns(self, **columns: Any) -> None:
        self.steps += [
            EngineStep(*row) for row in zip(*(columns[f.name].tolist() for f in fields(EngineStep)), strict=True)
        ]

    def append_metric(self, metric: EngineMetric) -> None:
        self.metrics.append(metric)

    def append_telemetry(self, sample: GpuSample) -> None:
        self.telemetry.append(sample)

    def append_telemetry_columns(self, **columns: Any) -> None:
        rows = zip(*(np.asarray(c).tolist() for c in columns.values()), strict=True)
        self.telemetry += [GpuSample(**dict(zip(columns, row, strict=True))) for row in rows]

    def update_manifest(self, **values: Any) -> None:
        if self.error is not None:
            raise self.error
        self.manifest.update(values)


def some_requests(n: int, *, num_warmup: int = 0, isl: int = 8, osl: int = 4, seed: int = 0) -> tuple[Request, ...]:
    """``n`` requests with random token ids in 256..4095; the first ``num_warmup`` are warm-up."""
    rng = np.random.default_rng(seed)
    return tuple(
        Request(
            index=i,
            osl=osl,
            isl=isl,
            prompt_token_ids=rng.integers(256, 4096, isl).astype(np.int32),
            phase="warmup" if i < num_warmup else "measured",
        )
        for i in range(n)
    )
