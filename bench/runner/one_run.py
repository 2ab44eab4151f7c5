"""One run: a folder, a sampler, an engine that serves one schedule. Whatever happens, the folder says so."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench import __version__
from bench.config.experiment import Experiment, TraceLoad
from bench.config.sweep import Cell
from bench.engines.host import EngineDied, EngineProcess
from bench.errors import BenchError, StoreError
from bench.records import EngineInfo, Schedule
from bench.runner.marks import mark_by_sent
from bench.runner.schedules import build_schedule
from bench.runner.tally import Tally
from bench.runner.telemetry import loaded_idle_power, sampled
from bench.store import ENGINE_LOG, TELEMETRY, RunWriter, run_folder_name, utc_now_text, warm_up
from bench.workload.synthetic import repeat_seed

#: Between the sampler's start and the run's zero: idle readings of the loaded engine (2 s = 20 counter periods) once per
#: engine, then only what it takes for the sampler to be there.
IDLE_BASELINE_S = 2.5
LEAD_S = 0.6


@dataclass(frozen=True, slots=True)
class RunContext:
    """Everything about a run that is known before it starts."""

    experiment: Experiment
    cell: Cell
    repeat: int
    run_number: int
    cell_folder: Path
    info: EngineInfo
    provenance: dict[str, Any]
    fingerprint: dict[str, Any]
    vocab_size: int
    base: Path
    first_of_engine: bool
    idle_gpu: dict[str, Any] | None = None  # mean power of each GPU before the first engine was loaded
    idle_power_w: dict[str, float | None] | None = None  # of the loaded idle engine, from its first run's samples

    @property
    def seed(self) -> int:
        """Fresh for every run number, so that no prefix of an earlier run (of whatever fate) is in a cache."""
        return repeat_seed(self.cell.spec.seed, self.run_number)


class FailedRun(Exception):
    """A run that was recorded as failed. ``engine_died``: the engine must be started again."""

    def __init__(self, reason: str, folder: Path, engine_died: bool) -> None:
        super().__init__(reason)
        self.reason, self.folder, self.engine_died = reason, folder, engine_died


@dataclass(frozen=True, slots=True)
class RunResult:
    folder: Path
    num_requests: int
    output_tokens_per_s: float | None  # rough, for the display; the analysis computes the real one from the records
    idle_power_w: dict[str, float | None] | None = None


def base_manifest(context: RunContext) -> dict[str, Any]:
    """The manifest as it is before the first request."""
    spec = context.cell.spec
    origin = "simulated" if spec.engine.kind in ("simulated", "null") else "measured"
    return {
        "tokenyield_version": __version__,
        "created_utc": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
        "experiment": context.experiment.name,
        "cell_id": context.cell.cell_id,
        "axes": context.cell.axes_dict(),
        "cell": spec.model_dump(mode="json"),
        "repeat": context.repeat,
        "run_number": context.run_number,
        "seed": context.seed,
        "origin": origin,
        "weights": spec.weights,
        "engine": asdict(context.info),
        "idle_gpu": context.idle_gpu,
        "fingerprint": context.fingerprint,
        "provenance": context.provenance,
    }


def record_failure(context: RunContext, reason: str, log_tail: str, log: Path) -> Path:
    """A run folder for a failure before the run began (the engine did not start). Returns the folder."""
    folder = context.cell_folder / run_folder_name(context.run_number)
    writer = RunWriter(folder, base_manifest(context))
    _keep_log(log, folder)
    writer.finish("failed", error={"reason": reason, "code": "engine-start", "log_tail": log_tail}, duration_s=0.0)
    return folder


def _keep_log(log: Path, folder: Path) -> None:
    try:
        if log.is_file() and not (folder / ENGINE_LOG).exists():
            (folder / ENGINE_LOG).write_bytes(log.read_bytes())
    except OSError:
        pass  # the reason and the end of the log are in the manifest


def execute(context: RunContext, engine: EngineProcess, report: Callable[[int, float], None]) -> RunResult:
    """Run once and store it.

    Raises:
        FailedRun: the run was recorded as failed.
        StoreError: the disk is full or not writable; nothing more can be recorded.
    """
    spec = context.cell.spec
    base = context.base if isinstance(spec.load, TraceLoad) else None
    schedule = build_schedule(spec, seed=context.seed, vocab_size=context.vocab_size, base=base)
    folder = context.cell_folder / run_folder_name(context.run_number)
    writer = RunWriter(folder, base_manifest(context))
    engine.log_path = folder / ENGINE_LOG
    started = time.monotonic()
    try:
        return _measure(context, engine, schedule, writer, report, started)
    except FailedRun:
        raise  # recorded already
    except EngineDied as e:
        error = {"reason": str(e), "code": e.reason, "log_tail": e.log_tail}
        writer.finish("failed", error=error, duration_s=time.monotonic() - started)
        raise FailedRun(str(e), folder, engine_died=True) from None
    except StoreError:
        _give_up(writer)
        raise
    except BenchError as e:
        error = {"reason": str(e), "code": "bench-error", "log_tail": ""}
        writer.finish("failed", error=error, duration_s=time.monotonic() - started)
        raise FailedRun(str(e), folder, engine_died=False) from None
    except BaseException:
        # interrupted: what is there is flushed, and the folder says that it is not a whole run
        _give_up(writer)
        raise


def _give_up(writer: RunWriter) -> None:
    # on a full disk the folder stays "running" with a dead writer, which reads as interrupted too
    with contextlib.suppress(BenchError, OSError, ValueError):
        writer.finish("interrupted")


def _measure(
    context: RunContext,
    engine: EngineProcess,
    schedule: Schedule,
    writer: RunWriter,
    report: Callable[[int, float], None],
    started: float,
) -> RunResult:
    limits = context.experiment.limits
    warm_up()
    lead_s = IDLE_BASELINE_S if context.first_of_engine and context.info.num_gpus else LEAD_S
    t0 = time.monotonic() + lead_s
    writer.update_manifest(
        t0_monotonic_s=t0,
        t0_utc=datetime.fromtimestamp(time.time() + lead_s, timezone.utc).isoformat(timespec="microseconds"),
        schedule={
            "kind": schedule.kind,
            "digest": schedule.digest(),
            "num_requests": len(schedule.requests),
            "max_in_flight": schedule.max_in_flight,
        },
    )
    tally = Tally(report)
    path = writer.folder / TELEMETRY
    with sampled(context.experiment.telemetry, path, t0, context.info, engine.pids) as telemetry:
        busy_ratio = _busy_until(t0)
        records = engine.run(schedule, writer, t0, run_limit_s=limits.run_s, idle_limit_s=limits.idle_s)
        for record in mark_by_sent(records, schedule.kind, context.cell.spec.warmup):
            writer.append_request(record)
            tally.add(record)
        ended_s = time.monotonic() - t0
    duration_s = time.monotonic() - started
    idle_w = context.idle_power_w
    if lead_s >= IDLE_BASELINE_S:
        # before t0 the engine was loaded and idle: the baseline that net energy is counted from, for all its runs
        idle_w = loaded_idle_power(path, -lead_s, 0.0)
    final = {
        "telemetry": {**telemetry.facts(), "idle_power_w": idle_w or {}},
        "host_busy_before_ratio": busy_ratio,
        "duration_s": duration_s,
        "ended_s": ended_s,
    }
    failure = tally.failure(context.cell.spec.stop)
    if failure:
        error = {"reason": failure, "code": "requests-failed", "log_tail": ""}
        writer.finish("failed", error=error, **final)
        raise FailedRun(failure, writer.folder, engine_died=False)
    writer.finish("complete", **final)
    return RunResult(writer.folder, tally.num_measured, tally.overall_rate(), idle_w)


def _busy_until(t0: float) -> float | None:
    """Sleep until ``t0`` and say how busy other programs kept the host's cores meanwhile, 0-1.

    What this process and its descendants (engine, sampler) used is taken off: ranks of an idle engine spin while they wait.
    None where there was no time left to tell (under 0.1 s).
    """
    start = time.monotonic()
    before, own_before = _cpu_seconds(), _own_cpu_seconds()
    time.sleep(max(0.0, t0 - time.monotonic()))
    after, own_after = _cpu_seconds(), _own_cpu_seconds()
    if time.monotonic() - start < 0.1 or after[1] <= before[1]:
        return None
    others = (after[0] - before[0]) - max(0.0, own_after - own_before)
    return min(1.0, max(0.0, others / (after[1] - before[1])))


def _cpu_seconds() -> tuple[float, float]:
    """(busy, all) seconds of all cores since boot."""
    import psutil

    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0), sum(times)


def _own_cpu_seconds() -> float:
    """CPU seconds of this process and its living descendants so far."""
    import psutil

    total = 0.0
    for process in (me := psutil.Process(), *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            used = process.cpu_times()
            total += used.user + used.system
    return total


__all__ = ["FailedRun", "RunContext", "RunResult", "execute", "record_failure", "utc_now_text"]
