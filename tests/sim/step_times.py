"""Step times for tests: the real kernel with the coefficients of real engines."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from bench.catalog.hardware import load_hardware
from bench.catalog.model import load_model
from bench.sim.step_time import build_step_time
from bench.sim.step_time_kernel import step_time_s

__all__ = ["coefficients", "step_time_s"]

_ENGINES = (("llama-3.1-8b", "H100-SXM", 1), ("llama-3.1-70b", "A100-80-SXM", 4), ("llama-3.1-8b", "H200-SXM", 2))


@lru_cache
def coefficients(number: int) -> np.ndarray:
    model, gpu, tp = _ENGINES[number]
    step_time = build_step_time(load_model(model), load_hardware(gpu), tensor_parallel_size=tp)
    return step_time.coefficients()
