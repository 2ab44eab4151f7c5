"""Memory bandwidth: copy, read, write and triad over sizes from the cache to many GB (McCalpin's STREAM, with torch).

``size`` is the bytes of one array. Traffic counted per call, as STREAM counts it (no write-allocate): copy 2 x size, read
size, write size, triad 3 x size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kernels import config
from kernels.case import Case, Check, Prepared, Work, make_case
from kernels.checking import EXACT, TOLERANCE, Tolerance, compare
from kernels.device import Device, element_bytes
from kernels.inputs import generator, random_tensor

if TYPE_CHECKING:
    import torch

FAMILY = "memory"
_ARRAYS = {"copy": 2, "read": 1, "write": 1, "triad": 3}
_SCALE = 1.7  # triad's scalar; STREAM uses 3.0, any value that is not a power of two does


def cases(group: config.MemoryGroup) -> list[Case]:
    """One case per operation and size."""
    return [
        make_case(FAMILY, op, "torch", group.dtype, {"bytes": size}) for op in group.ops for size in group.sizes_bytes
    ]


def prepare(case: Case, device: Device, seed: int) -> Prepared:
    """Arrays of ``size`` bytes and the call. Raises Unsupported when they do not fit."""
    size = case.dim("bytes")
    # The check holds fp64 copies of one array for read, and one more array for the others.
    device.require_memory(size * (_ARRAYS[case.op] + 1.0))
    num = size // element_bytes(case.dtype)
    rng = generator(device, seed)
    a = random_tensor([num], case.dtype, device, rng)
    make = {"copy": _copy, "read": _read, "write": _write, "triad": _triad}[case.op]
    run, check, rivals = make(a, case, device, rng)
    traffic = {"copy": (size, size), "read": (size, 0), "write": (0, size), "triad": (2 * size, size)}[case.op]
    flops = {"copy": 0, "read": num, "write": 0, "triad": 2 * num}[case.op]
    # Sizes that fit the cache are there to show the cache: no flush for them, and none needed above it. A small copy is
    # over before the host has launched the next: a graph of many shows the cache and not the launches.
    return Prepared(run, check, Work(flops, *traffic), flush=False, capturable=True, rivals=rivals)


_Call = Callable[[], object]
_Parts = tuple[_Call, Callable[[], list[Check]], dict[str, _Call]]


def _copy(a: torch.Tensor, case: Case, device: Device, rng: torch.Generator) -> _Parts:
    import torch

    out = torch.empty_like(a)

    def check() -> list[Check]:
        out.copy_(a)
        return [compare(out, a, EXACT)]

    def by_kernel() -> object:
        return torch.mul(a, 1.0, out=out)

    return lambda: out.copy_(a), check, {"copy_": lambda: out.copy_(a), "clone": a.clone, "mul by 1": by_kernel}


def _read(a: torch.Tensor, case: Case, device: Device, rng: torch.Generator) -> _Parts:
    import torch

    # A sum of random signs is near zero and its relative error means nothing: read positive numbers.
    a.abs_()

    def check() -> list[Check]:
        chunks = a.split(2**24)
        want = torch.stack([c.to(torch.float64).sum() for c in chunks]).sum()
        # torch sums in a tree, so the error grows with log2(n) ulp at most, far below this.
        return [compare(a.sum(dtype=torch.float32), want, Tolerance(1e-4, 1e-4), output="sum")]

    return lambda: a.sum(dtype=torch.float32), check, {}


def _write(a: torch.Tensor, case: Case, device: Device, rng: torch.Generator) -> _Parts:
    import torch

    def check() -> list[Check]:
        a.fill_(_SCALE)
        return [compare(a, torch.full_like(a, _SCALE), EXACT)]

    return lambda: a.fill_(_SCALE), check, {}


def _triad(a: torch.Tensor, case: Case, device: Device, rng: torch.Generator) -> _Parts:
    import torch

    b = random_tensor([a.numel()], case.dtype, device, rng)
    out = torch.empty_like(a)

    def check() -> list[Check]:
        torch.add(a, b, alpha=_SCALE, out=out)
        part = slice(0, None, max(1, a.numel() // 2**24))
        want = a[part].to(torch.float64) + _SCALE * b[part].to(torch.float64)
        return [compare(out[part], want, TOLERANCE[case.dtype])]

    return lambda: torch.add(a, b, alpha=_SCALE, out=out), check, {}
