"""How to drive a schedule, how far a run is, and what comes back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from bench.load.honesty import Honesty
from bench.load.share import Limits
from bench.records import RequestRecord


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to drive, apart from the schedule.

    Args:
        num_processes: None: one, and more only where one would not do and cores are free.
        cpus: pin process k to ``cpus[k % len]``, to keep the client off the engine's cores.
        exact_osl: an output length other than the requested one is an error (servers that honour ``ignore_eos``).
        drain_s: once enough was measured (minima reached, stopped on request, too many errors), how long requests in flight
            may take before they are aborted. At a maximum duration they are aborted at once.
        preconnect: connections opened before the clock starts, at most.
        capacity_chunks_per_s: receive path -> this client's measured capacity on this machine, for the verdict.
        receive_path: "compiled" reads plain connections in machine code (Linux; elsewhere and over TLS the event loop does
            it), "auto" does so where enough chunks are expected to be worth loading it. The result says which it was.
        real_time: run the sending processes before ordinary ones where the kernel allows it (``bench.priority``). None: where
            the server is on this machine, and may want the cores that they run on.
        keep_raw: leave the scratch folder (raw responses) and report where it is.
    """

    limits: Limits = field(default_factory=Limits)
    num_processes: int | None = None
    cpus: tuple[int, ...] | None = None
    exact_osl: bool = False
    drain_s: float = 30.0
    preconnect: int = 1024
    capacity_chunks_per_s: Mapping[str, float] | None = None
    capacity_source: str | None = None
    scratch_parent: str | None = None
    keep_raw: bool = False
    receive_path: Literal["auto", "compiled", "event_loop"] = "auto"
    real_time: bool | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is now."""

    elapsed_s: float
    num_total: int
    num_done: int
    num_errors: int
    in_flight: int
    num_reads: int
    stage: str  # "connect", "warmup", "main", "drain", "parse"


@dataclass(slots=True)
class LoadResult:
    """Records in order of completion; chunks come in blocks from disk until :meth:`close`."""

    records: list[RequestRecord]
    honesty: Honesty
    main_start_s: float
    stop_reason: str
    scratch: Path
    chunk_files: list[Path]

    def chunk_blocks(self) -> Iterator[dict[str, np.ndarray]]:
        """Columns index, t_s, tokens, num_events; about a million rows a block."""
        for path in self.chunk_files:
            with np.load(path) as data:
                yield {name: data[name] for name in data.files}

    def close(self, *, keep_raw: bool = False) -> None:
        if not keep_raw:
            shutil.rmtree(self.scratch, ignore_errors=True)
