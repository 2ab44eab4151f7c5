"""Runs an experiment on this machine: cells grouped by engine, each run a folder, each failure a record.

Order: engines in sweep order; inside one engine repeat by repeat over its cells, so that the repeats of two cells are
interleaved and drift does not look like a difference.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from bench.config.loading import LoadedExperiment
from bench.config.sweep import Cell
from bench.engines.host import EngineLaunch, EngineProcess
from bench.errors import BadInput, BenchError, EngineUnavailable
from bench.records import EngineInfo
from bench.runner import events
from bench.runner.feasible import Machine, check_engine_args, check_telemetry, why_not
from bench.runner.models import prepare_model
from bench.runner.one_run import FailedRun, RunContext, execute
from bench.runner.results import (
    CellState,
    cell_state,
    check_same_machine,
    only_one,
    stale_cells,
    write_resolved,
)
from bench.runner.run_time import ENGINE_START_S, rough_run_s
from bench.runner.simulated import check_simulated
from bench.telemetry.baseline import measure_idle
from bench.telemetry.gpus import memory_used, visible_devices, wait_for_release
from bench.units import bytes_text, counted

#: After this many engine deaths in a row at one cell, the rest of its repeats are left for the next invocation.
MAX_DEATHS_PER_CELL = 2


@dataclass
class Outcome:
    """What an invocation came to."""

    num_complete: int = 0
    num_failed: int = 0
    num_missing: int = 0
    interrupted: bool = False
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Todo:
    """One run that is missing: the ``repeat``-th of ``cell`` (1-based), stored as run number ``run_number``."""

    cell: Cell
    repeat: int
    run_number: int


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived; raised in the main thread at the next safe moment."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turns SIGINT and SIGTERM into one :class:`Interrupted`; later ones are ignored while everything is wound down."""
    seen = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if not seen:
            seen = True
            raise Interrupted

    old = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def missing_runs(states: list[CellState], repeats: int) -> list[Todo]:
    """What is still to be run, in sweep order (cell by cell)."""
    todo: list[Todo] = []
    for state in states:
        number = state.next_run_number
        done = len(state.complete)
        todo += [Todo(state.cell, done + k + 1, number + k) for k in range(state.num_missing(repeats))]
    return todo


def engine_groups(todo: list[Todo]) -> list[list[Todo]]:
    """Runs that share one engine start, in sweep order of the engines; inside one, repeat by repeat."""
    groups: dict[str, list[Todo]] = {}
    for t in todo:
        groups.setdefault(t.cell.engine_key, []).append(t)
    return [sorted(g, key=lambda t: t.repeat) for g in groups.values()]


def estimate_s(
    todo: list[Todo], states: list[CellState], machine: Machine, archs: dict[str, Any], base: Path | None = None
) -> float:
    """A rough guess of the whole invocation's seconds; ``base``: the experiment file's folder."""
    past = {s.cell.cell_id: s.complete for s in states}
    starts = len({t.cell.engine_key for t in todo if t.cell.spec.engine.kind in ("vllm", "vllm_server")})
    runs = sum(rough_run_s(t.cell, machine, archs.get(t.cell.spec.model), past[t.cell.cell_id], base) for t in todo)
    return starts * ENGINE_START_S[machine.kind] + runs


class LocalRunner:
    """One invocation of `bench run`."""

    def __init__(
        self,
        loaded: LoadedExperiment,
        folder: Path,
        display: events.Display,
        machine: Machine,
        archs: dict[str, Any],
        provenance: dict[str, Any],
    ) -> None:
        self.loaded, self.folder, self.display, self.machine, self.archs = loaded, folder, display, machine, archs
        self.provenance = provenance
        self.experiment = loaded.experiment
        self.outcome = Outcome()
        self._engine: EngineProcess | None = None
        self._info = EngineInfo(kind="", version="")
        self._deaths: dict[str, int] = {}
        self._done_s: list[tuple[float, float]] = []  # (estimated, measured) seconds of finished runs
        self._start = time.monotonic()
        self._memory_before: dict[str, int] = {}
        self._runs_on_engine = 0
        self._left: list[Todo] = []
        self._states: list[CellState] = []
        self._idle_gpu: dict[str, Any] | None = None
        self._idle_power_w: dict[str, float | None] | None = None

    # -- whole sweep --------------------------------------------------------------------------------------------

    def run(self, only: set[str] | None = None) -> Outcome:
        """Run what is missing. Returns the outcome; raises BadInput before anything starts, StoreError on a full disk."""
        check_telemetry(self.loaded, self.machine)
        check_engine_args(self.loaded)
        check_simulated(self.loaded, self.archs)
        with only_one(self.folder):
            skipped = {c.cell_id: reason for c in self.loaded.cells if (reason := self._why_not(c))}
            cells = [c for c in self.loaded.cells if c.cell_id not in skipped and (only is None or c.cell_id in only)]
            if not cells:
                reasons = sorted(set(skipped.values())) or ["no cell is selected"]
                raise BadInput(
                    f"none of its {len(self.loaded.cells)} cells can run here: {'; '.join(reasons[:3])}",
                    where=str(self.loaded.path),
                    next_step="`bench doctor` says what this machine can do",
                )
            self._states = states = [cell_state(self.folder, c) for c in cells]
            check_same_machine(states, self._fingerprint_known(), self.folder)
            write_resolved(self.folder, self.experiment, self.loaded.cells, skipped)
            todo = missing_runs(states, self.experiment.repeats)
            self._announce(cells, states, todo, skipped)
            self.outcome.num_missing = len(todo)
            with interruptible():
                try:
                    self._run_groups(engine_groups(todo), len(todo))
                except (Interrupted, KeyboardInterrupt):
                    self.outcome.interrupted = True
                finally:
                    self._stop_engine()
        self.display.show(
            events.Finished(
                self.outcome.num_complete,
                self.outcome.num_failed,
                self.outcome.num_missing,
                time.monotonic() - self._start,
                self.outcome.interrupted,
            )
        )
        return self.outcome

    def _why_not(self, cell: Cell) -> str | None:
        return why_not(cell, self.machine, self.archs.get(cell.spec.model))

    def _fingerprint_known(self) -> dict[str, Any]:
        """What is known before an engine is up, of what must not change within an experiment."""
        return {
            "devices": [g.get("name") for g in self.provenance.get("gpus", [])] or ["cpu"],
            "cpu": self.provenance.get("cpu", {}).get("model"),
        }

    def _announce(self, cells: list[Cell], states: list[CellState], todo: list[Todo], skipped: dict[str, str]) -> None:
        total, base = len(cells) * self.experiment.repeats, self.loaded.path.parent
        self._estimates = {
            s.cell.cell_id: rough_run_s(s.cell, self.machine, self.archs.get(s.cell.spec.model), s.complete, base)
            for s in states
        }
        about = estimate_s(todo, states, self.machine, self.archs, base) if todo else None
        self.display.show(events.Plan(self.experiment.name, len(cells), total, total - len(todo), len(skipped), about))
        for reason in sorted(set(skipped.values())):
            n = sum(r == reason for r in skipped.values())
            self.display.show(events.Notice("note", f"{counted(n, 'cell')} cannot run here: {reason}"))
        stale = stale_cells(self.folder, self.loaded.cells)
        if stale:
            text = f"{len(stale)} cells in {self.folder} belong to an earlier configuration: kept, but not part of this"
            self.display.show(events.Notice("note", text))

    def _run_groups(self, groups: list[list[Todo]], num_runs: int) -> None:
        self._left = [t for g in groups for t in g]
        index = 0
        for group in groups:
            try:
                for todo in group:
                    index += 1
                    if self._deaths.get(todo.cell.cell_id, 0) >= MAX_DEATHS_PER_CELL:
                        self._left.remove(todo)
                        continue
                    self._one(todo, index, num_runs, sum(t in self._left for t in group))
                    self._left.remove(todo)
            except EngineUnavailable:  # recorded as a failed run already
                given_up = [t for t in group if t in self._left]
                self._left = [t for t in self._left if t not in given_up]
                if len(given_up) > 1:
                    text = f"{len(given_up) - 1} more runs need this engine and are left for the next `bench run`"
                    self.display.show(events.Notice("error", text))
            finally:
                self._stop_engine()

    # -- one run ------------------------------------------------------------------------------------------------

    def _one(self, todo: Todo, index: int, num_runs: int, num_in_group: int) -> None:
        engine, info = self._ensure_engine(todo, num_in_group)
        self.display.show(
            events.RunStarted(todo.cell.cell_id, todo.repeat, self.experiment.repeats, index, num_runs, 0)
        )
        started = time.monotonic()
        context = self._context(todo, info, engine)
        try:
            result = execute(context, engine, self._progress(todo, started))
        except FailedRun as e:
            self.outcome.num_failed += 1
            self.outcome.failures.append(f"{todo.cell.cell_id} run {todo.run_number}: {e.reason}")
            self._finished(todo, "failed", None, started, e.reason, e.folder)
            if e.engine_died:
                self._deaths[todo.cell.cell_id] = self._deaths.get(todo.cell.cell_id, 0) + 1
                self._stop_engine()
            return
        self._deaths.pop(todo.cell.cell_id, None)
        if self._runs_on_engine == 0:
            self._idle_power_w = result.idle_power_w
        self.outcome.num_complete += 1
        self.outcome.num_missing -= 1
        self._done_s.append((self._estimates[todo.cell.cell_id], time.monotonic() - started))
        self._finished(todo, "complete", result.output_tokens_per_s, started, None, result.folder)

    def _finished(
        self, todo: Todo, status: str, rate: float | None, started: float, reason: str | None, folder: Path
    ) -> None:
        self.display.show(
            events.RunFinished(
                todo.cell.cell_id, todo.repeat, status, rate, time.monotonic() - started, reason, str(folder)
            )
        )

    def _progress(self, todo: Todo, started: float) -> Any:
        def report(num_requests: int, rate: float) -> None:
            elapsed = time.monotonic() - started
            self.display.show(
                events.RunProgress(
                    todo.cell.cell_id, todo.repeat, num_requests, rate, elapsed, self._left_s(todo, elapsed)
                )
            )

        return report

    def _left_s(self, now: Todo, elapsed: float) -> float:
        """Seconds left of this invocation: the rough estimates, scaled by how far off they have been so far."""
        guessed = sum(g for g, _ in self._done_s)
        scale = sum(m for _, m in self._done_s) / guessed if guessed > 0 else 1.0
        rest = sum(self._estimates[t.cell.cell_id] for t in self._left) * scale
        keys = {t.cell.engine_key for t in self._left} - {now.cell.engine_key}
        return max(0.0, rest - elapsed) + len(keys) * ENGINE_START_S[self.machine.kind]

    def _context(self, todo: Todo, info: EngineInfo, engine: EngineProcess) -> RunContext:
        arch = self.archs.get(todo.cell.spec.model)
        return RunContext(
            experiment=self.experiment,
            cell=todo.cell,
            repeat=todo.repeat,
            run_number=todo.run_number,
            cell_folder=self.folder / todo.cell.cell_id,
            info=info,
            provenance=self.provenance,
            fingerprint={
                **self._fingerprint_known(),
                "engine_kind": info.kind,
                "engine_version": info.version,
            },
            vocab_size=int(getattr(arch, "vocab_size", 0) or 32_000),
            base=self.loaded.path.parent,
            first_of_engine=self._runs_on_engine == 0,
            idle_power_w=self._idle_power_w,
            idle_gpu=self._idle_gpu,
        )

    # -- engine -------------------------------------------------------------------------------------------------

    def _ensure_engine(self, todo: Todo, num_in_group: int) -> tuple[EngineProcess, EngineInfo]:
        if self._engine is not None:
            self._runs_on_engine += 1
            return self._engine, self._info
        spec = todo.cell.spec
        label = f"{spec.engine.kind} {spec.model} TP {spec.tensor_parallel_size}"
        self.display.show(events.EngineStarting(label, num_in_group))
        launch = EngineLaunch(
            kind=spec.engine.kind,
            model=prepare_model(spec, self.archs.get(spec.model), self.folder),
            weights=spec.weights,
            args=spec.engine_args,
            env=dict(getattr(spec.engine, "env", {})),
            spec=spec.engine.model_dump(mode="json"),
            load_kind=self._load_kind(todo.cell.engine_key),
        )
        log = self.folder / f"engine-start-{todo.cell.cell_id}.log"
        devices = visible_devices()
        self._memory_before = memory_used(devices)
        if devices and self._idle_gpu is None and self.experiment.telemetry.source in ("auto", "nvml"):
            # the first of two baselines: these GPUs before anything is loaded (the other is the loaded, idle engine)
            self._idle_gpu = {d: asdict(b) for d, b in measure_idle(devices).items()}
        self._idle_power_w = None
        engine = EngineProcess(launch, log)
        self._engine = engine
        started = time.monotonic()
        try:
            self._info = engine.start(self.experiment.limits.engine_start_s)
        except EngineUnavailable as e:
            self._record_start_failure(todo, e, log, started)
            raise
        self._runs_on_engine = 0
        info = self._info
        same_kind = [s for s in self._states if s.cell.spec.engine.kind == spec.engine.kind]
        check_same_machine(same_kind, {"engine_version": info.version}, self.folder)
        self.display.show(events.EngineReady(label, info.start_s or 0.0, info.version, info.kv_capacity_tokens))
        return engine, info

    def _load_kind(self, engine_key: str) -> str:
        """ "offline" only where every run left for this engine is: the other mode serves offline batches too."""
        kinds = [t.cell.spec.load.kind for t in self._left if t.cell.engine_key == engine_key]
        return next((k for k in kinds if k != "offline"), "offline")

    def _record_start_failure(self, todo: Todo, error: BenchError, log: Path, started: float) -> None:
        """A start that failed is a failed run of the cell it was for: with its reason and the end of its log."""
        from bench.runner.one_run import record_failure

        info = EngineInfo(kind=todo.cell.spec.engine.kind, version="")
        context = self._context_without_engine(todo, info)
        folder = record_failure(context, str(error), getattr(error, "log_tail", ""), log)
        self.outcome.num_failed += 1
        self.outcome.failures.append(f"{todo.cell.cell_id} run {todo.run_number}: {error}")
        self._finished(todo, "failed", None, started, str(error), folder)

    def _context_without_engine(self, todo: Todo, info: EngineInfo) -> RunContext:
        self._runs_on_engine = 0
        assert self._engine is not None
        return self._context(todo, info, self._engine)

    def _stop_engine(self) -> None:
        """End the engine and wait until its GPU memory is free again, so that the next one starts on a clean device."""
        if self._engine is None:
            return
        try:
            self._engine.stop()
        except (Interrupted, KeyboardInterrupt):
            self._engine.stop()
            raise
        finally:
            self._engine = None
        if self._memory_before:
            limit_s = self.experiment.limits.memory_release_s
            released = wait_for_release(
                tuple(self._memory_before), used_before_bytes=self._memory_before, limit_s=limit_s
            )
            if not released.released:
                held = ", ".join(f"{d}: {bytes_text(b)}" for d, b in released.remaining_bytes.items())
                text = f"GPU memory was not released within {limit_s:g} s ({held})"
                self.display.show(events.Notice("warning", text))
