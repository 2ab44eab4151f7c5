"""What the runner tells while it runs. A display is anything that takes these events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Plan:
    """Before anything starts."""

    experiment: str
    num_cells: int
    num_runs_total: int
    num_runs_done: int
    num_skipped: int
    estimate_s: float | None


@dataclass(frozen=True, slots=True)
class EngineStarting:
    """An engine is being started; ``label`` tells which (model, TP, ...)."""

    label: str
    num_runs: int


@dataclass(frozen=True, slots=True)
class EngineReady:
    label: str
    start_s: float
    version: str
    kv_capacity_tokens: int | None


@dataclass(frozen=True, slots=True)
class RunStarted:
    cell_id: str
    repeat: int
    repeats: int
    run_index: int  # 1-based position among the runs of this invocation
    num_runs: int
    warmup_requests: int


@dataclass(frozen=True, slots=True)
class RunProgress:
    """At most a few times a second while a run goes on."""

    cell_id: str
    repeat: int
    num_requests: int
    output_tokens_per_s: float  # over the last few seconds
    elapsed_s: float
    left_s: float | None  # of the whole invocation


@dataclass(frozen=True, slots=True)
class RunFinished:
    cell_id: str
    repeat: int
    status: str
    output_tokens_per_s: float | None
    duration_s: float
    reason: str | None
    folder: str


@dataclass(frozen=True, slots=True)
class Notice:
    """Something the user should know: a skipped cell, a stale result, an engine that had to be restarted."""

    level: str  # note, warning, error
    message: str


@dataclass(frozen=True, slots=True)
class Finished:
    num_complete: int
    num_failed: int
    num_missing: int
    elapsed_s: float
    interrupted: bool


Event = Plan | EngineStarting | EngineReady | RunStarted | RunProgress | RunFinished | Notice | Finished


class Display(Protocol):
    """Shows events. ``close`` is called once, whatever happened."""

    def show(self, event: Event) -> None: ...
    def close(self) -> None: ...
