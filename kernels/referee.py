"""A second opinion on a case: torch's own benchmark times every way in which torch does the same work, in the same process.

The suite's figure is held against the best of them, so a clock, a flush or a call of ours that makes the machine look
slow (or a library that has a better way) shows. The referee shares nothing with the suite's timing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

CLOCK = "torch.utils.benchmark.Timer.blocked_autorange"
#: Least time per way. Its loop repeats a block of calls until then, so the last block may run longer.
MIN_RUN_S = 0.2


def hear(rivals: dict[str, Callable[[], object]], min_run_s: float = MIN_RUN_S) -> dict[str, Any]:
    """Seconds per call of every rival, one value a block of calls: ``{"clock", "seconds": {name: [...]}}``."""
    import torch
    from torch.utils.benchmark import Timer

    seconds = {}
    for name, call in rivals.items():
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        seconds[name] = timer.blocked_autorange(min_run_time=min_run_s).times
    return {"clock": CLOCK, "seconds": seconds}
