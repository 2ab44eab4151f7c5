"""Correctness: no time is worth printing for a wrong answer.

An output is compared with a reference computed in fp64 from the very inputs that the kernel saw (so the rounding of
the inputs costs nothing). Two limits hold at once:

* the largest error, as a share of the value or of the output's root mean square, whichever is larger; it finds a wrong
  tile, page, mask or row, and small values beside large ones do not count as large errors; and
* the root mean square error over that of the reference, which finds a loss of precision everywhere that no single value
  shows.

The limits come from the output's rounding: to p bits of mantissa a value is off by at most 2**-(p+1) of itself, about
half of that in the mean. Kernels round more than once (attention's probabilities, eager torch between two operations,
Hopper's fp8 accumulation at about 14 bits), so the limits are a few times that bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernels.case import Check

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Limits on the two errors of :class:`kernels.case.Check`. Zero for both means that the answer must be equal."""

    max_error: float
    rms_error: float


EXACT = Tolerance(0.0, 0.0)
#: By the type that rounds the result.
TOLERANCE = {
    "fp32": Tolerance(5e-5, 5e-6),
    "tf32": Tolerance(5e-3, 1e-3),
    "fp16": Tolerance(5e-3, 1e-3),
    "bf16": Tolerance(2e-2, 4e-3),
    "fp8": Tolerance(4e-2, 1e-2),
    "int8": EXACT,
}


def compare(
    got: torch.Tensor, want: torch.Tensor, tolerance: Tolerance, *, output: str = "out", reference: str = "fp64"
) -> Check:
    """Compare ``got`` with ``want`` (same shape, any float or integer types).

    NaN or infinity in ``got`` where ``want`` is finite fails whatever the tolerance, and so does a ``want`` of zeros alone:
    inputs are random, so it means that the reference was never computed and says nothing of ``got``. Raises ValueError when the shapes
    differ: that is a bug of the case, not a property of the machine.
    """
    import torch

    if got.shape != want.shape:
        raise ValueError(f"{output}: got shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if tolerance == EXACT:
        num_wrong = int((got != want).sum().item())
        share = num_wrong / max(1, want.numel())
        return Check(
            num_wrong == 0 and bool(want.any()), output, "exact", float(num_wrong), 0.0, share, 0.0, want.numel()
        )
    want64 = want.to(torch.float64)
    error = (got.to(torch.float64) - want64).abs_()
    scale = float(want64.square().mean().sqrt().item()) or 1.0
    largest = float((error / want64.abs().clamp_(min=scale)).max().item())
    rms = float(error.square_().mean().sqrt().item()) / scale
    # NaN compares false with everything, so a NaN error fails here as it must.
    passed = largest <= tolerance.max_error and rms <= tolerance.rms_error and bool(want64.any())
    return Check(passed, output, reference, largest, tolerance.max_error, rms, tolerance.rms_error, want.numel())


def stratified_rows(num_rows: int, block: int, seed: int) -> list[int]:
    """One row index out of every ``block`` consecutive rows, at a random place in each, first and last row included.

    Checking these rows over all columns finds any wrong tile at least ``block`` rows high, at 1 / ``block`` of the cost.
    """
    import random

    rng = random.Random(seed)
    rows = {0, num_rows - 1}
    for start in range(0, num_rows, block):
        rows.add(rng.randrange(start, min(start + block, num_rows)))
    return sorted(rows)
