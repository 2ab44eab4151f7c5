"""The expert GEMM of a mixture of experts, as a step of T tokens runs it: T x top_k rows spread over E experts.

Routing is uniform and random (a trained router is not; say so where it matters). An expert that no row chose is not
read, so the bytes depend on the batch as they do in an engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kernels import config
from kernels.case import Case, Check, Prepared, Unsupported, Work, make_case
from kernels.checking import TOLERANCE, compare
from kernels.device import Device, element_bytes
from kernels.inputs import generator, random_tensor
from kernels.triton_ops import require_triton

if TYPE_CHECKING:
    import torch

FAMILY = "moe"


def cases(group: config.MoeGroup) -> list[Case]:
    """One case per number of tokens and implementation."""
    shape = {"experts": group.num_experts, "top_k": group.top_k, "n": group.n, "k": group.k}
    return [
        make_case(FAMILY, "grouped_gemm", impl, group.dtype, {"tokens": tokens, **shape}, {"layer": group.layer})
        for tokens in group.tokens
        for impl in group.impls
    ]


def route(tokens: int, experts: int, top_k: int, seed: int) -> list[int]:
    """Rows per expert when every token picks ``top_k`` different experts at random."""
    import numpy as np

    rng = np.random.default_rng(seed)
    chosen = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k]
    return [int(c) for c in np.bincount(chosen.ravel(), minlength=experts)]


def prepare(case: Case, device: Device, seed: int) -> Prepared:
    """Sorted rows, expert weights and the call. Raises Unsupported with the reason."""
    device.require_dtype(case.dtype)
    tokens, experts, top_k = case.dim("tokens"), case.dim("experts"), case.dim("top_k")
    n, k, size = case.dim("n"), case.dim("k"), element_bytes(case.dtype)
    rows = tokens * top_k
    device.require_memory(size * (experts * n * k + rows * (k + 2 * n)) + 8 * (n * k + rows * (k + 2 * n)))
    counts = route(tokens, experts, top_k, seed)
    rng = generator(device, seed)
    x = random_tensor([rows, k], case.dtype, device, rng)
    w = random_tensor([experts, n, k], case.dtype, device, rng, scale=1 / math.sqrt(k))
    call, backend, timed = _call(case.impl, device, x, w, counts)
    touched = sum(1 for c in counts if c)

    def check() -> list[Check]:
        return [compare(call(), grouped_reference(x, w, counts), TOLERANCE[case.dtype])]

    work = Work(2.0 * rows * n * k, size * (touched * n * k + rows * k), size * rows * n)
    return Prepared(
        call,
        check,
        work,
        flush=True,
        capturable=case.impl != "torch",
        backend=backend,
        timed=timed,
        notes={"experts_touched": touched},
    )


def grouped_reference(x: torch.Tensor, w: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """[rows, n] in fp64, one expert after the other."""
    import torch

    parts = []
    for expert, rows in enumerate(x.split(counts)):
        if len(rows):
            parts.append(rows.to(torch.float64) @ w[expert].to(torch.float64).t())
    return torch.cat(parts)


def _call(
    impl: str, device: Device, x: torch.Tensor, w: torch.Tensor, counts: list[int]
) -> tuple[Callable[[], Any], str, bool]:
    import torch

    if impl == "triton":
        timed = require_triton(device)
        from kernels.triton_ops.moe import grouped_gemm, tile_map

        tiles = torch.tensor(tile_map(counts), dtype=torch.int32, device=x.device)
        out = torch.empty(x.shape[0], w.shape[1], dtype=x.dtype, device=x.device)

        def triton_call() -> torch.Tensor:
            grouped_gemm(x, w, tiles, out)
            return out

        return triton_call, "triton", timed
    if impl == "grouped_mm":
        return _grouped_mm(device, x, w, counts), "torch grouped_mm", True
    groups = [(e, rows) for e, rows in enumerate(x.split(counts)) if len(rows)]

    def loop() -> torch.Tensor:
        return torch.cat([rows @ w[e].t() for e, rows in groups])

    return loop, "torch, a loop over experts", True


def _grouped_mm(device: Device, x: torch.Tensor, w: torch.Tensor, counts: list[int]) -> Callable[[], Any]:
    import torch

    function: Any = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if function is None:
        raise Unsupported(f"torch {torch.__version__} has no grouped_mm")
    if x.dtype != torch.bfloat16:
        raise Unsupported("torch's grouped_mm takes bf16")
    if device.kind == "cuda" and (device.compute_capability or (0, 0)) < (8, 0):
        raise Unsupported("torch's grouped_mm needs compute capability 8.0")
    ends = torch.tensor(counts, device=x.device).cumsum(0).to(torch.int32)
    weights = w.transpose(1, 2)
    return lambda: function(x, weights, offs=ends)
