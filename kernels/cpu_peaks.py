"""What a CPU could reach at most: cores x clock x operations per cycle, the clock measured here.

Operations per cycle and core (a multiply-add counts as two): AVX-512 with two FMA units 64 in fp32, AVX2 with two 32 (Intel
64 and IA-32 Architectures Optimization Reference Manual); AMX 1,024 in bf16 and 2,048 in int8, AVX-512 VNNI 256 in int8
(Intel, "Accelerate Artificial Intelligence Workloads with Intel AMX", 2022). Only what is written there is used: a type
without an entry has no derived peak.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels.device import Device

#: (feature, type, operations per cycle and core), the best first.
_PER_CYCLE = (
    ("avx512f", "fp32", 64),
    ("avx2", "fp32", 32),
    ("amx_bf16", "bf16", 1024),
    ("amx_int8", "int8", 2048),
    ("avx512_vnni", "int8", 256),
)
#: xorshift64: six dependent one-cycle operations (three shifts, three exclusive-ors) on every x86-64 and arm64 core.
_CYCLES_PER_STEP = 6


def derived_peaks(device: Device) -> dict[str, Any]:
    """Peaks by type. Memory bandwidth is not derivable without root (DIMM speed), so it is None."""
    clock_hz = measured_clock_hz()
    flops: dict[str, float] = {}
    used = []
    for feature, dtype, per_cycle in _PER_CYCLE:
        if feature in device.features and dtype not in flops:
            flops[dtype] = device.num_units * clock_hz * per_cycle
            used.append(f"{dtype} {per_cycle} ({feature})")
    return {
        "kind": "derived",
        "hardware": None,
        "source": f"{device.num_units} cores x {clock_hz / 1e9:.2f} GHz (measured) x operations per cycle: {', '.join(used)}",
        "clock_hz": clock_hz,
        "bandwidth_bytes_per_s": None,
        "flops_per_s": flops,
        "link_bytes_per_s": None,
    }


def measured_clock_hz(steps: int = 500_000, tries: int = 50) -> float:
    """The core's clock, from a chain of dependent one-cycle operations: the fastest of many short tries.

    The fastest, because every disturbance (another program, another virtual machine) only slows a try down.
    """
    import numba
    import numpy as np

    @numba.njit(cache=False)  # type: ignore[untyped-decorator]
    def chain(n: int, x: Any) -> Any:
        for _ in range(n):
            x ^= x << np.uint64(13)
            x ^= x >> np.uint64(7)
            x ^= x << np.uint64(17)
        return x

    seed = np.uint64(88172645463325252)
    chain(10, seed)
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        chain(steps, seed)
        best = min(best, time.perf_counter() - start)
    return _CYCLES_PER_STEP * steps / best
