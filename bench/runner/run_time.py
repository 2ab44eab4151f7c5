"""How long a cell's run will take, roughly. Figures here serve the estimate shown before a run, never a result."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.config.experiment import CellSpec, OpenLoopLoad, RampLoad, TraceLoad, mean_length_tokens
from bench.config.loading import trace_path
from bench.config.sweep import Cell
from bench.runner.feasible import Machine
from bench.runner.schedules import num_measured, num_warmup
from bench.store import RunReader

if TYPE_CHECKING:
    from bench.catalog.arch import ModelArch
    from bench.workload.trace import TraceFormat

ENGINE_START_S = {"cpu": 50.0, "gpu": 90.0}
RUN_OVERHEAD_S = 1.5
CPU_FLOPS_PER_CORE = 20e9
CPU_BYTES_PER_S = 10e9
CPU_STEP_S = 0.004
GPU_FLOPS = 200e12
GPU_STEP_S = 0.002
#: Share of a data-sheet peak that a rough estimate takes as reached.
ROUGH_EFFICIENCY = 0.5
#: Requests that are taken to run together where the load does not say how many.
ROUGH_BATCH = 8
#: Size and rates of a model that is not known here: an 8B-class one.
UNKNOWN_WEIGHT_BYTES, UNKNOWN_PARAMS = 16e9, 8e9


def rough_run_s(
    cell: Cell,
    machine: Machine,
    arch: ModelArch | None,
    past: tuple[RunReader, ...] = (),
    base: Path | None = None,
) -> float:
    """A rough guess of one run's seconds: from past runs of the cell where there are some, else from the arithmetic.

    Args:
        base: the folder of the experiment file, from which a trace's path may count.

    Raises:
        BadInput: the cell's trace cannot be used.
    """
    durations = [float(r.manifest["duration_s"]) for r in past if r.manifest.get("duration_s")]
    if durations:
        return sorted(durations)[len(durations) // 2] + RUN_OVERHEAD_S
    served_s = _served_s(cell.spec, machine, arch, base)
    return RUN_OVERHEAD_S if cell.spec.engine.kind == "simulated" else served_s  # virtual seconds take none


def _served_s(spec: CellSpec, machine: Machine, arch: ModelArch | None, base: Path | None) -> float:
    """The guess from the arithmetic of a real engine here."""
    if isinstance(spec.load, RampLoad):
        return sum(s.duration_s for s in spec.load.segments)
    pace = _pace(spec, machine, arch)
    if isinstance(spec.load, TraceLoad):
        return _trace_s(spec, spec.load, pace, base)
    isl, osl = mean_length_tokens(spec.workload.isl), mean_length_tokens(spec.workload.osl)
    per_round = pace.round_s(isl, osl)
    warm = per_round * min(1.0, num_warmup(spec) / pace.batch)
    if isinstance(spec.load, OpenLoopLoad):
        # the last request is due near the end of the arrivals, and is then served
        busy = num_measured(spec) / spec.load.rate_per_s + pace.request_s(isl, osl)
    elif spec.stop.min_duration_s and spec.stop.max_requests is None:
        return max(spec.stop.min_duration_s, spec.stop.max_duration_s or 0) + RUN_OVERHEAD_S
    else:
        # with a minimum duration the run ends once both minima are met; the pool of requests is larger than what is used
        counted = spec.stop.min_requests or pace.batch if spec.stop.min_duration_s else num_measured(spec)
        busy = max(1.0, counted / pace.batch) * per_round
    return warm + _stopped(spec, busy) + RUN_OVERHEAD_S


def _stopped(spec: CellSpec, busy_s: float) -> float:
    return max(spec.stop.min_duration_s, min(busy_s, spec.stop.max_duration_s or busy_s))


@dataclass(frozen=True, slots=True)
class _Pace:
    """``step_s`` a decode step of ``batch`` requests takes, ``prefill_s_per_token`` a prompt token."""

    batch: int
    step_s: float
    prefill_s_per_token: float

    def request_s(self, isl: float, osl: float) -> float:
        return osl * self.step_s + isl * self.prefill_s_per_token

    def round_s(self, isl: float, osl: float) -> float:
        """One batch from its prompts to its last tokens."""
        return osl * self.step_s + self.batch * isl * self.prefill_s_per_token


def _pace(spec: CellSpec, machine: Machine, arch: ModelArch | None) -> _Pace:
    load = spec.load
    batch = int(getattr(load, "batch_size", None) or getattr(load, "concurrency", None) or ROUGH_BATCH)
    tp = spec.tensor_parallel_size
    weights = arch.weight_bytes(spec.engine_args.get("quantization"), tp) if arch is not None else UNKNOWN_WEIGHT_BYTES
    flops = 2 * (arch.num_active_params if arch is not None else UNKNOWN_PARAMS)
    if machine.num_gpus:
        peak = machine.hardware.memory_bandwidth_bytes_per_s if machine.hardware else 1e12
        return _Pace(batch, weights / (peak * ROUGH_EFFICIENCY) + GPU_STEP_S, flops / (GPU_FLOPS * tp))
    rate = CPU_FLOPS_PER_CORE * machine.num_cores
    return _Pace(batch, weights / CPU_BYTES_PER_S + CPU_STEP_S + flops * batch / rate, flops / rate)


def _trace_s(spec: CellSpec, load: TraceLoad, pace: _Pace, base: Path | None) -> float:
    """Until the trace's last request is due and served, or until all its tokens are, whichever takes longer."""
    last_due_s, num, isl, osl = _trace_facts(trace_path(load.path, base), load.format, spec.stop.max_requests)
    batches = num / pace.batch
    busy = max(last_due_s * load.time_scale + pace.request_s(isl, osl), batches * pace.round_s(isl, osl))
    warm = pace.round_s(isl, osl) * min(1.0, num_warmup(spec) / pace.batch)
    return warm + _stopped(spec, busy) + RUN_OVERHEAD_S


@functools.lru_cache(maxsize=32)
def _trace_facts(path: Path, fmt: TraceFormat | None, limit: int | None) -> tuple[float, int, float, float]:
    """(when its last request is due in s, number of requests, mean ISL, mean OSL) of a trace."""
    from bench.workload.trace import read_trace

    rows = read_trace(path, fmt=fmt, limit=limit).rows
    n = len(rows)
    return rows[-1].t_s, n, sum(r.isl for r in rows) / n, sum(r.osl for r in rows) / n
