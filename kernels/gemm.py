"""Matrix multiplication y = x W^T at the shapes of a model's linear layers: x [m, k], W [n, k], y [m, n].

``m`` is the number of tokens in the step: the batch size at decode, the chunk at prefill. Work: 2 m n k floating point
operations; x, W and y moved once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from kernels import config
from kernels.case import Case, Check, Prepared, Unsupported, Work, make_case
from kernels.checking import TOLERANCE, compare, stratified_rows
from kernels.device import Device, element_bytes
from kernels.inputs import generator, random_tensor

if TYPE_CHECKING:
    import torch

FAMILY = "gemm"
#: Above this many multiply-adds the check takes a sample of rows (one in each block of 64, all columns).
FULL_CHECK_MACS = 2**31
#: Smallest tile height of the libraries at hand: a wrong tile covers at least one checked row.
ROW_BLOCK = 64


def cases(group: config.GemmGroup) -> list[Case]:
    """One case per data type, layer and number of tokens."""
    out = []
    for dtype in group.dtypes:
        for layer in config.layer_shapes(group):
            tags = {"layer": layer.name} | ({"model": layer.model} if layer.model else {})
            out += [
                make_case(FAMILY, "linear", "torch", dtype, {"m": m, "n": layer.n, "k": layer.k}, tags) for m in group.m
            ]
    return out


def prepare(case: Case, device: Device, seed: int) -> Prepared:
    """Random x and W, and the library call of the data type.

    Raises Unsupported for a type without a unit, a shape that the library refuses, or too little memory.
    """
    device.require_dtype(case.dtype)
    m, n, k = case.dim("m"), case.dim("n"), case.dim("k")
    size = element_bytes(case.dtype)
    out_size = 4 if case.dtype in ("fp32", "tf32", "int8") else 2
    rows = stratified_rows(m, ROW_BLOCK, seed) if m * n * k > FULL_CHECK_MACS else list(range(m))
    device.require_memory(size * (m + n) * k + out_size * m * n + 8 * (len(rows) * (k + 2 * n) + n * k))
    rng = generator(device, seed)
    x = random_tensor([m, k], case.dtype, device, rng)
    # Weights as a trained layer has them (outputs near 1); fp8 keeps its range, as a quantised checkpoint's scale does.
    w = random_tensor([n, k], case.dtype, device, rng, scale=1.0 if case.dtype == "fp8" else 1 / math.sqrt(k))
    call, backend = _call(case.dtype, x, w, device)

    def check() -> list[Check]:
        return [check_linear(call(), x, w, rows, case.dtype)]

    work = Work(2.0 * m * n * k, size * (m + n) * k, out_size * m * n)
    rivals = _rivals(x, w) if case.dtype in ("bf16", "fp16") else {}
    return Prepared(call, check, work, flush=True, capturable=True, backend=backend, rivals=rivals)


def _rivals(x: torch.Tensor, w: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Every way in which torch multiplies the two: two spellings, into a given output, and with W laid out [k, n]."""
    import torch

    out = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device)
    turned = w.t()
    by_rows = turned.contiguous()
    return {
        "matmul": lambda: x @ turned,
        "linear": lambda: torch.nn.functional.linear(x, w),
        "mm, out given": lambda: torch.mm(x, turned, out=out),
        "matmul, W [k, n]": lambda: x @ by_rows,
    }


def check_linear(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, rows: list[int], dtype: str) -> Check:
    """Compare rows of ``y`` [m, n] with x W^T in fp64 (exactly, in fp64 integers, for int8: sums stay below 2**53)."""
    import torch

    index = torch.tensor(rows, device=y.device)
    want = x[index].to(torch.float64) @ w.to(torch.float64).t()
    got = y[index]
    if dtype == "int8":
        want = want.to(torch.int64)
        got = got.to(torch.int64)
    return compare(got, want, TOLERANCE[dtype], output="y")


def _call(dtype: str, x: torch.Tensor, w: torch.Tensor, device: Device) -> tuple[Callable[[], torch.Tensor], str]:
    """The call that multiplies, and what serves it."""
    import torch

    library = "cuBLAS" if device.kind == "cuda" else "oneDNN/MKL"
    if dtype == "int8":
        if device.kind == "cuda" and x.shape[0] <= 16:
            raise Unsupported("torch._int_mm takes more than 16 rows on a GPU")
        return lambda: torch._int_mm(x, w.t()), f"torch._int_mm ({library})"
    if dtype == "fp8":
        one = torch.ones((), device=x.device, dtype=torch.float32)
        if x.shape[1] % 16 or w.shape[0] % 16:
            raise Unsupported("torch._scaled_mm takes n and k in multiples of 16")

        def scaled() -> torch.Tensor:
            return torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

        return scaled, "torch._scaled_mm (cuBLASLt, fast accumulation)"
    if dtype in ("fp32", "tf32") and device.kind == "cuda":
        precision = "tf32" if dtype == "tf32" else "ieee"

        def linear_fp32() -> torch.Tensor:
            # The switch is process-wide and cheap: set it at every call, so that no case inherits another's.
            set_fp32_matmul(precision)
            return x @ w.t()

        return linear_fp32, f"{library}, {precision}"
    return lambda: x @ w.t(), library


def set_fp32_matmul(precision: str) -> None:
    """``ieee`` or ``tf32`` for fp32 products on a GPU (torch 2.9 renamed the switch)."""
    import torch

    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        matmul.fp32_precision = precision
    else:
        matmul.allow_tf32 = precision == "tf32"
