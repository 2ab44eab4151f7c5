"""Fit the kernel ratios of ``configs/efficiency/tensorrt_llm.yaml`` on a few published full-load rows of TensorRT-LLM.

    python scripts/fit_tensorrt_llm.py [--evaluations 8]

Fits on the rows that ``bench.sim.tensorrt_llm.fitted_on`` names, prints the values and the errors of all rows by group, rows
left out apart. Some minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections import defaultdict

import numpy as np
from scipy.optimize import least_squares

from bench.sim.ground_truth import Point
from bench.sim.op_times import Overheads
from bench.sim.step_time import load_overheads
from bench.sim.tensorrt_llm import EngineProfile, fitted_on, full_load_rate, load_engine_profile, published_full_load

#: Name -> bounds. Streaming weights is at least as fast as in vLLM's kernels; nothing is more than twice as fast.
BOUNDS = {
    "elementwise_slowdown": (0.2, 1.5),
    "compute_slowdown": (0.9, 1.5),
    "compute_slowdown_before_hopper": (0.9, 1.5),
    "memory_slowdown": (0.88, 1.0),
    "fp8_compute_slowdown": (0.5, 1.2),
    "fp8_memory_slowdown": (0.6, 1.05),
    "decode_attention_slowdown": (0.5, 1.5),
    "fp8_decode_attention_slowdown": (0.4, 1.5),
    "gap_s": (0.0, 4e-3),
    "gap_per_running_s": (0.0, 1e-5),
    "small_kernel_s": (0.5e-6, 4e-6),
}
#: Release 0.14 alone: on several GPUs its steps are longer than later ones by a time an all-reduce that grows with TP.
BOUNDS_014 = {"gap_s": (0.0, 1e-2), "all_reduce_wait_s": (0.0, 1e-4)}
#: A C++ runtime: nothing is launched from Python, and scheduling hides behind the device.
FIXED = {"eager_per_layer_s": 0.0, "piecewise_per_layer_s": 0.0, "host_per_running_s": 0.0}
RIDGE = 0.2


def log_ratios(points: list[Point], profile: EngineProfile) -> np.ndarray:
    """(len(points),): log of predicted over published output rate; nan where the model does not fit."""
    return np.array([math.log(full_load_rate(p, profile) / p.output_tokens_per_s) for p in points])


def fit(points: list[Point], evaluations: int) -> EngineProfile:
    """Bounded least squares with a ridge to vLLM's values, from the shipped ones; every (model, GPU, precision) weighs the same."""
    shipped, vllm = load_engine_profile(), dataclasses.replace(load_overheads().overheads, **FIXED)
    bounds = (*BOUNDS.values(), *BOUNDS_014.values())
    low, high = (np.array([b[i] for b in bounds]) for i in (0, 1))

    def scaled(later: Overheads, first: Overheads) -> np.ndarray:
        values = [getattr(later, n) for n in BOUNDS] + [getattr(first, n) for n in BOUNDS_014]
        return np.clip((np.array(values) - low) / (high - low), 0.02, 0.98)

    groups = [(p.model, p.gpu, p.precision) for p in points]
    weight = np.array([1 / math.sqrt(groups.count(g)) for g in groups])
    weight *= math.sqrt(len(points)) / math.sqrt((weight**2).sum())
    z0 = scaled(vllm, vllm)

    def profile_at(z: np.ndarray) -> EngineProfile:
        values = [float(f"{v:.3g}") for v in low + (high - low) * z]
        later = FIXED | dict(zip(BOUNDS, values, strict=False))
        first = dict(zip(BOUNDS_014, values[len(BOUNDS) :], strict=True))
        return dataclasses.replace(shipped, values=later, values_014=first)

    def residuals(z: np.ndarray) -> np.ndarray:
        misses = np.clip(np.nan_to_num(log_ratios(points, profile_at(z))), -0.7, 0.7) * weight
        return np.concatenate([misses, RIDGE * (z - z0)])

    solution = least_squares(
        residuals, scaled(shipped.overheads((0, 20)), shipped.overheads((0, 14))), bounds=(0, 1), loss="soft_l1",
        f_scale=0.1, diff_step=0.02, max_nfev=evaluations,
    )  # fmt: skip
    return profile_at(solution.x)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit TensorRT-LLM's kernel ratios to published rows.")
    parser.add_argument("--evaluations", type=int, default=8)
    arguments = parser.parse_args()
    points = published_full_load()
    found = fit([p for p in points if fitted_on(p)], arguments.evaluations)
    for title, values in (("overheads", found.values), ("overheads_014", found.values_014)):
        print(f"{title}:", *(f"  {name}: {value:.3g}" for name, value in values.items()), sep="\n", flush=True)
    groups: dict[tuple[object, ...], list[float]] = defaultdict(list)
    left_out = []
    for p, e in zip(points, log_ratios(points, found), strict=True):
        if math.isfinite(e):
            groups[(not fitted_on(p), p.version, p.gpu, p.model, p.precision, p.tp)].append(math.expm1(e))
            if not fitted_on(p):
                left_out.append(-e)
    for key, errors in sorted(groups.items(), key=str):
        held = "held out" if key[0] else "fitted on"
        print(
            f"{held:10s} {key[1:]}: n {len(errors)}  median {np.median(errors):+.3f}  {min(errors):+.2f} .. {max(errors):+.2f}"
        )
    low, high = np.exp(np.quantile(left_out, [0.05, 0.95]))
    print(f"measured / predicted of {len(left_out)} rows left out, 5-95 %: {low:.2f} .. {high:.2f}")


if __name__ == "__main__":
    main()
