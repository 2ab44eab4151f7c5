"""Displays for the runner's events: a live one for terminals, plain lines for logs, JSON lines for machines."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import IO, Any

from bench.runner.events import (
    Display,
    EngineReady,
    EngineStarting,
    Event,
    Finished,
    Notice,
    Plan,
    RunFinished,
    RunProgress,
    RunStarted,
)
from bench.units import counted, duration_text, significant

PLAIN_PROGRESS_EVERY_S = 15.0


def display_for(mode: str, stream: IO[str] | None = None) -> Display:
    """The display for ``mode``: "json", "plain", "live", or "auto" (live on a terminal, else plain)."""
    out = stream or sys.stdout
    if mode == "json":
        return JsonDisplay(out)
    if mode == "live" or (mode == "auto" and out.isatty()):
        return LiveDisplay(out)
    return PlainDisplay(out)


def line_of(event: Event) -> str | None:
    """One plain line for an event, or None where it is not worth one."""
    match event:
        case Plan():
            skipped = f", {counted(event.num_skipped, 'cell')} cannot run here" if event.num_skipped else ""
            done = f", {event.num_runs_done} done already" if event.num_runs_done else ""
            about = f"; about {duration_text(event.estimate_s)}" if event.estimate_s else ""
            return f"{event.experiment}: {counted(event.num_cells, 'cell')}, {counted(event.num_runs_total, 'run')}{done}{skipped}{about}"
        case EngineStarting():
            return f"starting engine: {event.label} ({event.num_runs} runs)"
        case EngineReady():
            kv = f", KV cache {event.kv_capacity_tokens:,} tokens" if event.kv_capacity_tokens else ""
            return f"engine ready after {duration_text(event.start_s)}: {event.version}{kv}"
        case RunStarted():
            return f"[{event.run_index}/{event.num_runs}] {event.cell_id} repeat {event.repeat}/{event.repeats}"
        case RunProgress():
            left = f", {duration_text(event.left_s)} left" if event.left_s is not None else ""
            return (
                f"    {event.num_requests} requests, {significant(event.output_tokens_per_s)} tokens/s now, "
                f"{duration_text(event.elapsed_s)}{left}"
            )
        case RunFinished():
            if event.status != "complete":
                return f"    {event.status} after {duration_text(event.duration_s)}: {event.reason}"
            rate = (
                "" if event.output_tokens_per_s is None else f", {significant(event.output_tokens_per_s)} tokens/s out"
            )
            return f"    done in {duration_text(event.duration_s)}{rate}"
        case Notice():
            return f"{event.level}: {event.message}"
        case Finished():
            state = "interrupted" if event.interrupted else "finished"
            return (
                f"{state} after {duration_text(event.elapsed_s)}: {event.num_complete} runs complete, "
                f"{event.num_failed} failed, {event.num_missing} missing"
            )
    return None


class PlainDisplay:
    """Lines; progress inside a run at most every 15 s."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._last_progress = 0.0

    def show(self, event: Event) -> None:
        if isinstance(event, RunProgress):
            now = time.monotonic()
            if now - self._last_progress < PLAIN_PROGRESS_EVERY_S:
                return
            self._last_progress = now
        if isinstance(event, RunStarted):
            self._last_progress = time.monotonic()
        text = line_of(event)
        if text is not None:
            print(text, file=self._out, flush=True)

    def close(self) -> None:
        pass


class JsonDisplay:
    """One JSON object a line: {"event": "run_finished", ...}."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out

    def show(self, event: Event) -> None:
        name = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(event).__name__).lstrip("_")
        print(json.dumps({"event": name, **asdict(event)}), file=self._out, flush=True)

    def close(self) -> None:
        pass


class LiveDisplay:
    """A bar over all runs with the cell, the repeat, tokens/s now and the time left; finished runs scroll above it."""

    def __init__(self, out: IO[str]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = Console(file=out)
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TextColumn("[bold]{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            transient=True,
        )
        self._task: Any = None

    def show(self, event: Event) -> None:
        text = line_of(event)
        if isinstance(event, Plan):
            self._console.print(text, markup=False)
            self._progress.start()
            total = event.num_runs_total
            self._task = self._progress.add_task("", total=total, completed=event.num_runs_done, rate="", left="")
            return
        if self._task is None:
            self._console.print(text, markup=False)
            return
        if isinstance(event, EngineStarting):
            self._progress.update(self._task, description=f"starting engine {event.label}", rate="")
        elif isinstance(event, RunStarted):
            name = f"{event.cell_id} repeat {event.repeat}/{event.repeats}"
            self._progress.update(self._task, description=name, rate="")
        elif isinstance(event, RunProgress):
            left = "" if event.left_s is None else f"{duration_text(event.left_s)} left"
            rate = f"{significant(event.output_tokens_per_s)} tokens/s"
            self._progress.update(self._task, rate=rate, left=left)
        elif isinstance(event, RunFinished):
            if event.status == "complete":
                self._progress.advance(self._task)
            self._progress.console.print(f"{event.cell_id} repeat {event.repeat} {(text or '').strip()}", markup=False)
        elif isinstance(event, Finished):
            self._progress.stop()
            self._console.print(text, markup=False)
        else:
            self._progress.console.print(text, markup=False)

    def close(self) -> None:
        self._progress.stop()
