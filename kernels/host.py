"""What the host pays: time per launch, launch and wait, CUDA-graph replay, and per node inside a graph.

The kernel launched adds to 1,024 numbers, so that the device is never the limit. A CPU has no launch; there ``launch`` is
the time of one small torch operation, which is what an engine on a CPU pays per operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kernels import config
from kernels.case import Case, Check, Prepared, Unsupported, Work, make_case
from kernels.checking import TOLERANCE, compare
from kernels.device import Device
from kernels.inputs import generator, random_tensor
from kernels.timing import capture_graph
from kernels.triton_ops import require_triton

if TYPE_CHECKING:
    import torch

FAMILY = "host"
NUM_VALUES = 1024
#: Launches in a row without waiting: fewer than the launch queue holds (1,024), so the host is never blocked by it.
BURST = 256
GRAPH_NODES = 256


def cases(group: config.HostGroup) -> list[Case]:
    """One case per operation."""
    return [
        make_case(FAMILY, op, "triton" if op == "triton_launch" else "torch", "fp32", {"values": NUM_VALUES})
        for op in group.ops
    ]


def prepare(case: Case, device: Device, seed: int) -> Prepared:
    """The launches. Raises Unsupported where there is nothing to launch."""
    import torch

    if device.kind == "cpu" and case.op not in ("launch", "triton_launch"):
        raise Unsupported("a CPU runs torch operations in place: nothing to launch or replay")
    rng = generator(device, seed)
    x = random_tensor([NUM_VALUES], "fp32", device, rng)
    step = random_tensor([NUM_VALUES], "fp32", device, rng, scale=1e-6)
    expected = x.to(torch.float64) + step.to(torch.float64)
    fresh = x.clone()

    def check() -> list[Check]:
        fresh.add_(step)
        return [compare(fresh, expected, TOLERANCE["fp32"])]

    def result(run: Callable[[], object], calls: int, backend: str, timed: bool = True) -> Prepared:
        return Prepared(run, check, Work(num_calls=calls), flush=False, clock="host", backend=backend, timed=timed)

    if case.op == "launch":
        return result(lambda: _burst(x, step), BURST, f"x.add_(y), {BURST} in a row, then wait")
    if case.op == "launch_wait":

        def wait() -> None:
            x.add_(step)
            torch.cuda.synchronize()

        return result(wait, 1, "x.add_(y), wait")
    if case.op == "triton_launch":
        return _triton(case, device, rng)
    # Two ends of one line: a graph of one node is the replay, the rest of a long one are its nodes.
    nodes = 1 if case.op == "graph_replay" else GRAPH_NODES
    replay = capture_graph(lambda: x.add_(step), nodes).replay
    return result(replay, nodes, f"CUDA graph of {nodes} nodes, replay, wait")


def _burst(x: torch.Tensor, step: torch.Tensor) -> None:
    for _ in range(BURST):
        x.add_(step)


def _triton(case: Case, device: Device, rng: torch.Generator) -> Prepared:
    """The launch of a Triton kernel: its own dispatcher costs the host more than torch's."""
    import torch

    timed = require_triton(device)
    from kernels.norm import silu_mul_reference
    from kernels.triton_ops.norm import silu_mul

    gate_up = random_tensor([1, 2 * NUM_VALUES], "fp32", device, rng)
    out = torch.empty(1, NUM_VALUES, device=gate_up.device)

    def burst() -> None:
        for _ in range(BURST):
            silu_mul(gate_up, out)

    def check() -> list[Check]:
        silu_mul(gate_up, out)
        return [compare(out, silu_mul_reference(gate_up), TOLERANCE["fp32"])]

    return Prepared(
        burst,
        check,
        Work(num_calls=BURST),
        flush=False,
        clock="host",
        backend=f"triton, {BURST} in a row, then wait",
        timed=timed,
    )
