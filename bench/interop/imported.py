"""What every reader of a foreign format returns: one run of another tool, in this project's records and metrics.

A reader maps by definition, never by name. Where a file has each request's times they become ordinary records; where it
has only durations or only a summary, the metrics whose definition agrees with ours are kept by key, and the rest is named
with the reason why it could not be mapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench.records import RequestRecord

LoadKind = Literal["offline", "closed_loop", "open_loop"]


@dataclass(frozen=True, slots=True)
class ImportedLoad:
    """How the tool sent its requests. ``batch_size`` of an offline load is the number submitted at once."""

    kind: LoadKind
    concurrency: int | None = None
    batch_size: int | None = None
    rate_per_s: float | None = None
    max_in_flight: int | None = None  # a limit over an open loop

    def to_dict(self) -> dict[str, Any]:
        """The manifest's ``schedule``: ``max_in_flight`` is the concurrency of a closed loop."""
        limit = self.concurrency if self.kind == "closed_loop" else self.max_in_flight
        known = {"batch_size": self.batch_size, "rate_per_s": self.rate_per_s, "max_in_flight": limit}
        return {"kind": self.kind, **{k: v for k, v in known.items() if v is not None}}

    @property
    def times_from_send(self) -> bool:
        """Whether a request's due time is its send time, so that latencies from the send are latencies from the due time."""
        return self.kind != "open_loop"


@dataclass(frozen=True, slots=True, eq=False)
class ChunkColumns:
    """Every streamed chunk: request index (int64), time (float64 seconds), tokens (int64), all of one length."""

    index: np.ndarray
    t_s: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True, slots=True)
class ForeignRun:
    """One run as another tool recorded it.

    ``reported`` are the tool's own numbers in our units, by our keys, over the tool's own window; times there count from
    the send (``ttft_service_*``, ``tpot_*``, ``itl_*``, ``e2e_service_*``). They are the metrics of a run without
    records, and what the records are checked against where there are any. ``recount`` says which of them can be.
    """

    format: str
    tool: str
    part: str = ""  # which part of the file, where it holds several runs: "benchmarks[1]"
    tool_version: str | None = None
    model: str | None = None
    load: ImportedLoad | None = None
    isl_tokens: float | None = None  # nominal or mean prompt length: names the cell, is no measurement
    osl_tokens: float | None = None
    started_utc: str | None = None
    local_date: str | None = None  # where the file gives local time without a zone
    records: tuple[RequestRecord, ...] = ()
    chunks: ChunkColumns | None = None
    duration_s: float | None = None  # the tool's own window
    num_completed: int | None = None
    num_failed: int | None = None
    errors: Mapping[str, int] = field(default_factory=dict)  # class -> number, where there are no records
    reported: Mapping[str, float] = field(default_factory=dict)
    recount: tuple[str, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what could not be mapped, and how definitions differ
    engine: str | None = None
    engine_version: str | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    gpu: str | None = None  # as the file names it
    num_gpus: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # the tool's own settings, for the provenance
    companions: tuple[Path, ...] = ()  # files beside the named one that were read too


def statistics(key: str, values: np.ndarray) -> dict[str, float]:
    """Mean and percentiles of per-request values (seconds) by our method: {"ttft_service_p50_s": ...}; too few are left out."""
    from bench.analysis.metrics import PERCENTILES
    from bench.analysis.stats import percentile

    data = values[~np.isnan(values)]
    if not len(data):
        return {}
    out = {f"{key}_mean_s": float(data.mean())}
    for q in PERCENTILES:
        found = percentile(data, q)
        if found is not None:
            out[f"{key}_p{q}_s"] = found
    return out


def enough_for(key: str, num_requests: int | None) -> bool:
    """Whether a sample of ``num_requests`` allows this percentile by our rule; unknown samples and other keys pass."""
    import re

    found = re.search(r"_p(\d+)_s$", key)
    if found is None or num_requests is None or key.startswith("itl_"):
        return True
    q = int(found[1])
    return num_requests * (100 - q) >= 100 or (num_requests == 1 and q == 50)
