"""Random inputs, the same for the same seed on the same device kind, and never zeros.

Zeros would flatter a GPU: switching less, it draws less power and holds higher clocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kernels.device import Device, torch_dtype

if TYPE_CHECKING:
    import torch

#: Beyond this many elements a random block is repeated instead of drawn: it has the same bit statistics, and drawing
#: several GiB of normal numbers would take longer than every measurement. A prime, so that a kernel that reads the wrong
#: row or page never meets equal values by accident (a period of 2**23 would repeat every 2,048 rows of 4,096).
DRAWN_ELEMENTS = 2**23 - 15


def generator(device: Device, seed: int) -> torch.Generator:
    """A generator on the device, seeded."""
    import torch

    return torch.Generator(device=device.torch_name).manual_seed(seed)


def random_tensor(
    shape: Sequence[int], dtype: str, device: Device, rng: torch.Generator, scale: float = 1.0
) -> torch.Tensor:
    """Normal values times ``scale`` in ``dtype``; int8 is uniform over [-127, 127] without 0."""
    import torch

    num = math.prod(shape)
    drawn = min(num, DRAWN_ELEMENTS)
    kind = torch_dtype(dtype)
    if dtype == "int8":
        block = torch.randint(1, 128, (drawn,), generator=rng, device=device.torch_name, dtype=torch.int8)
        sign = torch.randint(0, 2, (drawn,), generator=rng, device=device.torch_name, dtype=torch.int8)
        block = block * (2 * sign - 1)
    else:
        block = torch.randn(drawn, generator=rng, device=device.torch_name, dtype=torch.float32).mul_(scale)
        block = block.to(kind)
    if drawn == num:
        return block.view(*shape)
    out = torch.empty(num, device=device.torch_name, dtype=kind)
    for start in range(0, num, drawn):
        stop = min(start + drawn, num)
        out[start:stop].copy_(block[: stop - start])
    return out.view(*shape)
