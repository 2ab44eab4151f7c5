"""Collectives over message sizes through torch.distributed: NCCL with one GPU a rank, gloo on a CPU.

``bytes`` is the message as NCCL's own tests count it (nccl-tests, PERFORMANCE.md): the whole buffer for all-reduce, the
gathered output for all-gather, the whole input for reduce-scatter, the message for point-to-point. ``link_bytes`` is what
each rank must send at least, so ``link_bytes / time`` is nccl-tests' "bus bandwidth", comparable with the link's data
sheet: 2 (n-1)/n x bytes for all-reduce, (n-1)/n x bytes for all-gather and reduce-scatter, bytes for point-to-point.

A sample is the slowest rank's time of one call after a barrier: a collective is done when all have it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kernels import config
from kernels.case import Case, Check, Unsupported, Work, make_case
from kernels.checking import TOLERANCE, Tolerance, compare
from kernels.device import Device, element_bytes, torch_dtype
from kernels.timing import Samples, TimingPlan, choose_inner_and_repeats

if TYPE_CHECKING:
    import torch

FAMILY = "collectives"
START_LIMIT_S = 60.0
_WARMUP_CALLS = 3
#: Calls inside one sample. An all-reduce works in place and multiplies its values by the number of ranks at each call:
#: 8**32 still fits bf16, and every sample starts from fresh values.
_MAX_INNER = 32


def cases(group: config.CollectivesGroup) -> list[Case]:
    """One case per number of ranks, operation and size."""
    return [
        make_case(FAMILY, op, "torch", group.dtype, {"bytes": size, "ranks": ranks})
        for ranks in group.num_ranks
        for op in group.ops
        for size in group.sizes_bytes
    ]


def work(case: Case) -> Work:
    """Bytes that each rank sends, see the module's text."""
    ranks, size = case.dim("ranks"), case.dim("bytes")
    share = {"all_reduce": 2 * (ranks - 1) / ranks, "send_recv": 1.0}.get(case.op, (ranks - 1) / ranks)
    return Work(link_bytes=share * size)


def require_ranks(case: Case, device: Device) -> str:
    """The backend for this case. Raises Unsupported when there are not enough devices or torch lacks the backend."""
    import torch.distributed as dist

    ranks = case.dim("ranks")
    if not dist.is_available():
        raise Unsupported("this torch is built without torch.distributed")
    if device.kind == "cuda":
        if device.num_devices < ranks:
            raise Unsupported(f"{ranks} GPUs needed, {device.num_devices} here")
        if not dist.is_nccl_available():
            raise Unsupported("this torch is built without NCCL")
        return "nccl"
    if not dist.is_gloo_available():
        raise Unsupported("this torch is built without gloo")
    return "gloo"


class RankGroup:
    """``num_ranks`` worker processes in one process group, kept for all cases of that size.

    Raises Unsupported when the group does not come up. Workers end when the group is closed, and when their pipe breaks.
    """

    def __init__(self, num_ranks: int, backend: str) -> None:
        import multiprocessing

        context = multiprocessing.get_context("spawn")
        handle, self._store = tempfile.mkstemp(prefix="kernels-ranks-")
        os.close(handle)
        os.unlink(self._store)  # the file store creates it
        self._pipes, self._processes = [], []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(rank, num_ranks, backend, self._store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        try:
            self._receive(START_LIMIT_S)
        except (TimeoutError, RuntimeError, EOFError) as error:
            self.close()
            raise Unsupported(f"the process group did not start: {error}") from error

    def run(self, case: Case, seed: int, plan: TimingPlan, limit_s: float) -> tuple[Samples, list[Check]]:
        """Check and time one case on all ranks. Raises RuntimeError with the first rank's error, TimeoutError on a hang."""
        for pipe in self._pipes:
            pipe.send(("case", case.to_dict(), seed, asdict(plan)))
        answers = self._receive(limit_s)
        slowest = tuple(max(values) for values in zip(*(a["seconds"] for a in answers), strict=True))
        checks = [Check(**c) for answer in answers for c in answer["checks"]]
        first = answers[0]
        return Samples(slowest, first["clock"], first["inner_calls"], 0, first["warmup_calls"]), checks

    def _receive(self, limit_s: float) -> list[dict[str, Any]]:
        deadline = time.monotonic() + limit_s
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"rank {rank} did not answer within {limit_s:.0f} s")
            kind, value = pipe.recv()
            if kind == "error":
                raise RuntimeError(value)
            answers.append(value)
        return answers

    def close(self) -> None:
        """End the workers; one that does not go is killed."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(("stop",))
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        with contextlib.suppress(OSError):
            os.unlink(self._store)


@contextlib.contextmanager
def rank_groups() -> Iterator[Callable[[int, str], RankGroup]]:
    """Yields a function that gives the group of a size, started once; all are closed at the end."""
    open_groups: dict[tuple[int, str], RankGroup] = {}

    def group(num_ranks: int, backend: str) -> RankGroup:
        key = (num_ranks, backend)
        if key not in open_groups:
            open_groups[key] = RankGroup(num_ranks, backend)
        return open_groups[key]

    try:
        yield group
    finally:
        for each in open_groups.values():
            each.close()


# ---- in the workers --------------------------------------------------------------------------------------------------


def _worker(rank: int, num_ranks: int, backend: str, store: str, pipe: Any) -> None:
    import warnings

    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore", FutureWarning)  # torch renames collectives; the old names work in every release
    try:
        torch.set_num_threads(1)
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=num_ranks)
        pipe.send(("up", {}))
        while (message := pipe.recv())[0] == "case":
            _, case, seed, plan = message
            pipe.send(("done", _run_case(Case.from_dict(case), rank, num_ranks, backend, seed, TimingPlan(**plan))))
    except EOFError:
        pass  # the parent is gone
    except Exception as error:
        with contextlib.suppress(OSError):
            last = traceback.extract_tb(error.__traceback__)[-1]
            pipe.send(("error", f"rank {rank}: {type(error).__name__}: {error} ({last.name}:{last.lineno})"))
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()


def _run_case(case: Case, rank: int, num_ranks: int, backend: str, seed: int, plan: TimingPlan) -> dict[str, Any]:
    import torch.distributed as dist

    place = f"cuda:{rank}" if backend == "nccl" else "cpu"
    num = max(num_ranks, case.dim("bytes") // element_bytes(case.dtype) // num_ranks * num_ranks)
    everyone = [_message(num, case.dtype, seed + r, place) for r in range(num_ranks)]
    work_of = _collective(case.op, rank, num_ranks, everyone)
    work_of.reset()
    work_of.call()
    checks = []
    if work_of.expected is not None:
        # Sums are rounded once per addition in the message's own type.
        limit = TOLERANCE[case.dtype]
        limit = Tolerance(limit.max_error * num_ranks, limit.rms_error * num_ranks)
        checks.append(asdict(compare(work_of.output, work_of.expected, limit, output=f"rank {rank}")))

    def once(calls: int) -> float:
        work_of.reset()
        dist.barrier()
        _wait(backend)
        start = time.perf_counter()
        for _ in range(calls):
            work_of.call()
        _wait(backend)
        return time.perf_counter() - start

    warm = min(once(1) for _ in range(_WARMUP_CALLS))
    # All ranks must agree on the counts: rank 0 decides.
    agreed = [choose_inner_and_repeats(warm, 0.0, False, plan) if rank == 0 else None]
    dist.broadcast_object_list(agreed, src=0)
    assert agreed[0] is not None
    inner, repeats = min(agreed[0][0], _MAX_INNER), agreed[0][1]
    return {
        "seconds": [once(inner) / inner for _ in range(repeats)],
        "checks": checks,
        "inner_calls": inner,
        "warmup_calls": _WARMUP_CALLS + 1,
        "clock": "perf_counter, slowest rank",
    }


def _wait(backend: str) -> None:
    if backend == "nccl":
        import torch

        torch.cuda.synchronize()


def _message(num: int, dtype: str, seed: int, place: str) -> torch.Tensor:
    """Every rank can draw every other's message, so each knows the right answer without a collective."""
    import torch

    rng = torch.Generator(device="cpu").manual_seed(seed)
    block = torch.randn(min(num, 2**20), generator=rng)
    repeats = -(-num // block.numel())
    return block.to(torch_dtype(dtype)).to(place).repeat(repeats)[:num]


@dataclass(frozen=True, slots=True, eq=False)
class _RankWork:
    """One rank's part: ``expected`` (fp64) is what ``output`` holds after reset and one call; None where nothing arrives."""

    call: Callable[[], object]
    expected: torch.Tensor | None
    output: torch.Tensor
    reset: Callable[[], object] = lambda: None


def _collective(op: str, rank: int, num_ranks: int, everyone: list[torch.Tensor]) -> _RankWork:
    import torch
    import torch.distributed as dist

    mine = everyone[rank].clone()
    num = mine.numel()
    total = torch.zeros(num, dtype=torch.float64, device=mine.device)
    for message in everyone:  # one after the other: together they would fill a GPU at 1 GiB and eight ranks
        total += message
    part = slice(rank * num // num_ranks, (rank + 1) * num // num_ranks)
    if op == "all_reduce":
        return _RankWork(lambda: dist.all_reduce(mine), total, mine, lambda: mine.copy_(everyone[rank]))
    if op == "all_gather":
        piece = everyone[rank][part].clone()
        gathered = torch.empty_like(mine)
        pieces = [t[r * num // num_ranks : (r + 1) * num // num_ranks] for r, t in enumerate(everyone)]
        expected = torch.cat(pieces).to(torch.float64)
        return _RankWork(lambda: dist.all_gather_into_tensor(gathered, piece), expected, gathered)
    if op == "reduce_scatter":
        out = torch.empty_like(mine[part])
        return _RankWork(lambda: dist.reduce_scatter_tensor(out, mine), total[part], out)
    # Point to point: rank 0 sends to rank 1; the others only keep the barrier.
    received = torch.empty_like(mine)
    if rank == 0:
        return _RankWork(lambda: dist.send(everyone[0], 1), None, received)
    if rank == 1:
        return _RankWork(lambda: dist.recv(received, 0), everyone[0].to(torch.float64), received)
    return _RankWork(lambda: None, None, received)
