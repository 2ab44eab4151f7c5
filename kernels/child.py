"""The measuring process: ``python -m kernels.child`` reads a job and its cases from stdin and answers in JSON lines on stdout.

It is a process of its own because a kernel that crashes takes its CUDA context, or the whole process, with it: the parent
then notes the failure and starts another for the cases that are left.

Job: {"device", "plan", "seed", "energy_window_s", "case_limit_s"}, answered by {"event": "device"}; then
{"cases"}, answered for each case by {"event": "begin", "index"} and {"event": "result", "index", ...}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from kernels.case import REFEREE, WEIGH, Case, Check, Prepared, Status, Unsupported
from kernels.device import Device, find_device, package_versions
from kernels.referee import hear
from kernels.timing import EventClock, HostClock, Samples, TimingPlan, make_flush, measure

if TYPE_CHECKING:
    from kernels.collectives import RankGroup

Emit = Callable[[dict[str, Any]], None]


def prepare_case(case: Case, device: Device, seed: int) -> Prepared:
    """The case on the device, by its family (all but collectives, which run in ranks of their own)."""
    import importlib

    module = importlib.import_module(f"kernels.{case.family}")
    prepared = module.prepare(case, device, seed)
    assert isinstance(prepared, Prepared)
    return prepared


def run_case(
    case: Case,
    device: Device,
    plan: TimingPlan,
    seed: int,
    flush: tuple[Callable[[], object], int] | None,
    energy_s: float,
) -> dict[str, Any]:
    """Prepare, check, time and, if asked, weigh one case. Never raises for what the machine cannot do."""
    import torch

    result: dict[str, Any] = {"status": "failed", "reason": None}
    try:
        prepared = prepare_case(case, device, seed)
        work = prepared.work
        result["work"] = {
            "flops": work.flops,
            "bytes": work.num_bytes,
            "bytes_read": work.bytes_read,
            "bytes_written": work.bytes_written,
            "link_bytes": work.link_bytes,
        }
        result["backend"], result["notes"] = prepared.backend, prepared.notes
        checks = prepared.check()
        if not _judge(checks, result) or not prepared.timed:
            if result["status"] == "ok":
                result["status"] = "checked"
                result["reason"] = "correct in Triton's interpreter; its speed means nothing"
            return result
        samples = measure(prepared, device, plan, flush)
        result["timing"] = samples.to_dict()
        if REFEREE in dict(case.tags) and prepared.rivals:
            result["referee"] = hear(prepared.rivals)
        if energy_s > 0:
            result["energy"] = _weigh(prepared, device, samples, energy_s)
    except (Unsupported, NotImplementedError) as error:
        result.update(status="n/a", reason=str(error) or "not implemented here")
    except torch.cuda.OutOfMemoryError as error:
        result.update(status="n/a", reason=f"out of memory: {_first_line(error)}")
    except Exception as error:  # whatever a library raises is this case's failure, not the suite's
        result.update(status="failed", reason=f"{type(error).__name__}: {_first_line(error)}")
    return result


def _judge(checks: list[Check], result: dict[str, Any]) -> bool:
    result["checks"] = [c.to_dict() for c in checks]
    bad = [c for c in checks if not c.passed]
    status: Status = "wrong" if bad else "ok"
    result["status"] = status
    if bad:
        c = bad[0]
        result["reason"] = (
            f"{c.output}: error max {c.max_error:.3g} (limit {c.max_tolerance:g}), "
            f"rms {c.rms_error:.3g} (limit {c.rms_tolerance:g}) against {c.reference}"
        )
    return not bad


def _weigh(prepared: Prepared, device: Device, samples: Samples, window_s: float) -> dict[str, Any]:
    from kernels.energy import find_counter, measure_energy

    try:
        counter = find_counter(device)
    except Unsupported as error:
        return {"reason": str(error)}
    clock = EventClock() if device.kind == "cuda" else HostClock(device)
    call_s = sorted(samples.seconds)[len(samples.seconds) // 2] * prepared.work.num_calls
    return measure_energy(prepared.run, clock.wait, counter, window_s, call_s).to_dict()


def run_collective(
    case: Case, device: Device, plan: TimingPlan, seed: int, group_of: Callable[[int, str], RankGroup], limit_s: float
) -> dict[str, Any]:
    """As :func:`run_case` for a collective, on a group of ranks."""
    from kernels import collectives

    result: dict[str, Any] = {
        "status": "failed",
        "reason": None,
        "work": {"link_bytes": collectives.work(case).link_bytes},
    }
    try:
        backend = collectives.require_ranks(case, device)
        result["backend"] = backend
        samples, checks = group_of(case.dim("ranks"), backend).run(case, seed, plan, limit_s)
        if _judge(checks, result):
            result["timing"] = samples.to_dict()
    except Unsupported as error:
        result.update(status="n/a", reason=str(error))
    except (RuntimeError, TimeoutError, EOFError, OSError) as error:
        result.update(status="failed", reason=_first_line(error))
    return result


def poisoned(result: dict[str, Any]) -> bool:
    """Whether this process can go on after ``result``: a CUDA error stays in the context, a failed rank in its group."""
    reason = str(result.get("reason") or "")
    return result["status"] == "failed" and any(w in reason for w in ("CUDA", "AcceleratorError", "cuBLAS", "rank "))


def run_job(job: dict[str, Any], read_cases: Callable[[], list[dict[str, Any]]], emit: Emit) -> None:
    """Say what the device is, then run every case and emit its lines."""
    from kernels.collectives import rank_groups

    device = find_device(job["device"])
    emit({"event": "device", "device": device.to_dict(), "software": software(device)})
    if device.kind == "cuda":
        import torch

        torch.cuda.set_device(device.index)
    plan = TimingPlan(**job["plan"])
    flush = make_flush(device, plan.flush_limit_bytes)
    cases = read_cases()
    with rank_groups() as group_of:
        for index, data in enumerate(cases):
            case = Case.from_dict(data)
            emit({"event": "begin", "index": index})
            if case.family == "collectives":
                result = run_collective(case, device, plan, job["seed"], group_of, job["case_limit_s"])
            else:
                energy_s = job["energy_window_s"] if WEIGH in dict(case.tags) else 0.0
                result = run_case(case, device, plan, job["seed"], flush, energy_s)
            emit({"event": "result", "index": index, **result})
            if poisoned(result):
                return  # the parent starts a fresh process for the rest
            _release(device)


def _release(device: Device) -> None:
    gc.collect()
    if device.kind == "cuda":
        import torch

        torch.cuda.empty_cache()


def software(device: Device) -> dict[str, Any]:
    """Versions, and the driver where there is one."""
    import torch

    found: dict[str, Any] = {**package_versions(), "num_threads": torch.get_num_threads()}
    if device.kind == "cuda":
        found["cuda"] = torch.version.cuda
        found["driver"] = _driver_version()
    return found


def _driver_version() -> str | None:
    """None where NVML is not there or does not say."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def main() -> int:
    """Read the job, answer on a private copy of stdout: libraries print to fd 1, and that goes to stderr here."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())

    def emit(line: dict[str, Any]) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    def read_cases() -> list[dict[str, Any]]:
        line = sys.stdin.readline()
        return json.loads(line)["cases"] if line else []

    try:
        run_job(job, read_cases, emit)
    except BenchError as error:
        emit({"event": "error", "what": error.what, "where": error.where, "next_step": error.next_step})
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
