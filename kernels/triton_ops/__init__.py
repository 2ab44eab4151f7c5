"""Our own Triton kernels: a readable baseline beside the libraries, one file per family.

On a GPU they are compiled and timed. On a CPU they run in Triton's interpreter, which checks their arithmetic and says
nothing about their speed.
"""

from __future__ import annotations

import importlib.util
import os

from kernels.case import Unsupported
from kernels.device import Device

INTERPRET = "TRITON_INTERPRET"


def require_triton(device: Device) -> bool:
    """Whether Triton kernels are timed here (a GPU) or only checked (the interpreter, asked for by TRITON_INTERPRET=1).

    Raises Unsupported when Triton is absent, or on a CPU without the interpreter.
    """
    if importlib.util.find_spec("triton") is None:
        raise Unsupported("triton is not installed")
    interpreted = os.environ.get(INTERPRET) == "1"
    if device.kind == "cpu" and not interpreted:
        raise Unsupported("Triton compiles for GPUs; on a CPU it is checked in its interpreter (make test), not timed")
    return not interpreted
