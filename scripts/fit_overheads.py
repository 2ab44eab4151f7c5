"""Fit the overheads of ``configs/efficiency/overheads.yaml`` to measured serving points, and see what they miss.

    python scripts/fit_overheads.py                 fit on bench.sim.accuracy.FITTED_MODELS, print the values
    python scripts/fit_overheads.py --leave-out     also fit without each of these models in turn, and print the
                                                    quantiles of measured / predicted on the model left out
    ... --json FILE                                 write the values and every left-out error as they come
    ... --write-left-out                            rewrite configs/efficiency/left_out.csv, which intervals come from

Each point is simulated by the same loop as ``bench predict``. Bounds keep every value physical; the loss is robust, so
that single odd rows do not bend a cost. Takes some minutes a fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from bench.catalog.hardware import load_hardware
from bench.errors import BenchError
from bench.sim.accuracy import FITTED_MODELS, run_point, shape_for, summarise
from bench.sim.ground_truth import Point, serving_points
from bench.sim.intervals import LEFT_OUT_FILE
from bench.sim.op_times import Overheads
from bench.sim.step_time import StepTime, load_overheads, with_overheads
from bench.sim.step_time_kernel import HOST_PER_RUNNING_S

#: Name -> bounds. What cannot be told apart on these points keeps its value from the file: wholly where it is not in this
#: table (the host's time per running request before vLLM 0.14 shows only beyond the sample's 128 running), else by as much
#: as the ridge says.
BOUNDS = {
    "host_fixed_s": (2e-4, 3e-3),
    "small_kernel_s": (0.5e-6, 3e-6),
    "gap_per_running_s": (0.0, 3e-5),
    "gap_per_rank_s": (0.0, 3e-4),
    "all_reduce_wait_s": (0.0, 2e-5),
    "compute_slowdown": (1.0, 1.3),
    "memory_slowdown": (0.92, 1.1),
    "piecewise_per_layer_s": (0.0, 3e-4),
    "eager_per_layer_s": (3e-5, 6e-4),
    "mxfp4_extra_ratio": (0.0, 3.0),
    "request_before_s": (0.0, 2e-2),
}
#: Pull to the values in the file, against the weighted residuals of all points together, per width of the bounds.
RIDGE = 0.3


def fit_points(models: tuple[str, ...], every: int = 1) -> list[Point]:
    """Unsaturated points with outputs up to 1,024 tokens, on H100 and H200; every ``every``-th of each layout."""
    points, _ = serving_points()
    kept = [
        p
        for p in points
        if p.gpu in ("h100-sxm", "h200-sxm")
        and p.model in models
        and p.concurrency <= 128
        and p.osl <= 1024
        and p.ttft_s < 3.5
    ]
    kept.sort(key=lambda p: (p.model, p.gpu, p.tp, p.isl, p.concurrency))
    return kept[::every]


def log_ratios(overheads: Overheads, points: list[Point]) -> np.ndarray:
    """(len(points), 2): log of predicted over measured TPOT and TTFT; nan where the point cannot be run."""
    arrays: dict[tuple[object, ...], np.ndarray] = {}
    rows = []
    for p in points:
        key = (p.gpu, p.model, p.quantization, p.tp, p.ep, p.async_scheduling)
        if key not in arrays:
            built = with_overheads(shape_for(p), load_hardware(p.gpu), overheads, tp=p.tp, expert_parallel=p.ep)
            if not p.async_scheduling:
                built[HOST_PER_RUNNING_S] = overheads.host_per_running_sync_s
            arrays[key] = built
        front_end_s = min(load_overheads().front_end_s, overheads.request_before_s)
        step_time = StepTime("", "", arrays[key], (overheads.request_before_s, overheads.request_after_s), front_end_s)
        try:
            run = run_point(p, step_time)
        except BenchError:
            rows.append((math.nan, math.nan))
            continue
        found = summarise(p, run.result, overheads.request_after_s)
        rows.append((math.log(found["tpot"] / p.tpot_s), math.log(found["ttft"] / p.ttft_s)))
    return np.array(rows)


def fit(points: list[Point], start: Overheads, evaluations: int) -> Overheads:
    """Bounded least squares; every (model, GPU) pair weighs the same, TPOT twice as much as TTFT."""
    low, high = (np.array([b[i] for b in BOUNDS.values()]) for i in (0, 1))
    pairs = [(p.model, p.gpu) for p in points]
    weight = np.array([1 / math.sqrt(pairs.count(pair)) for pair in pairs])
    weight *= math.sqrt(len(points)) / math.sqrt((weight**2).sum())

    def overheads_at(z: np.ndarray) -> Overheads:
        return dataclasses.replace(start, **dict(zip(BOUNDS, map(float, low + (high - low) * z), strict=True)))

    def residuals(z: np.ndarray) -> np.ndarray:
        errors = np.clip(np.nan_to_num(log_ratios(overheads_at(z), points)), -0.7, 0.7)
        misses = (errors * np.array([2.0, 1.0]) * weight[:, None]).ravel()
        return np.concatenate([misses, RIDGE * (z - z0)])

    x0 = np.array([getattr(start, name) for name in BOUNDS])
    z0 = np.clip((x0 - low) / (high - low), 0.01, 0.99)
    solution = least_squares(
        residuals, z0, bounds=(0, 1), loss="soft_l1", f_scale=0.15, diff_step=0.02, max_nfev=evaluations
    )
    return overheads_at(solution.x)


def show(title: str, errors: np.ndarray) -> None:
    """Median and mean absolute error, bias, and the quantiles that a 90 % interval of measured / predicted needs."""
    for i, metric in enumerate(("tpot", "ttft")):
        e = errors[np.isfinite(errors[:, i]), i]
        ratio = np.exp(-e)
        print(
            f"{title:34s} {metric}: n {len(e):3d}  median {np.median(np.abs(np.expm1(e))):.3f}  mean {np.mean(np.abs(np.expm1(e))):.3f}"
            f"  bias {np.median(np.expm1(e)):+.3f}  measured/predicted 5-95 %: {np.quantile(ratio, 0.05):.2f}-{np.quantile(ratio, 0.95):.2f}",
            flush=True,
        )


def error_rows(points: list[Point], errors: np.ndarray) -> list[dict[str, Any]]:
    """One record a point: its id and the natural logarithms of measured over predicted, as --json writes them."""
    return [
        {"id": p.id, "model": p.model, "gpu": p.gpu, "tpot": -float(e[0]), "ttft": -float(e[1])}
        for p, e in zip(points, errors, strict=True)
        if np.isfinite(e).all()
    ]


def write_left_out(rows: list[dict[str, Any]]) -> None:
    """Rewrite the file that ``bench.sim.intervals`` reads; the comment on top stays."""
    comment = [line for line in LEFT_OUT_FILE.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    lines = [f"{r['id']},{r['tpot']:.4f},{r['ttft']:.4f}" for r in rows]
    LEFT_OUT_FILE.write_text("\n".join([*comment, "id,tpot,ttft", *lines]) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit overheads to measured serving points.")
    parser.add_argument("--leave-out", action="store_true", help="leave-one-model-out errors as well")
    parser.add_argument("--evaluations", type=int, default=8)
    parser.add_argument(
        "--every", type=int, default=2, help="use every n-th point in the fit (all are used in the errors)"
    )
    parser.add_argument("--json", type=Path, help="write values and left-out errors here")
    parser.add_argument("--write-left-out", action="store_true", help="rewrite configs/efficiency/left_out.csv")
    arguments = parser.parse_args()
    written: dict[str, Any] = {"left_out": []}

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")

    start = load_overheads().overheads
    began = time.monotonic()
    pooled = []
    if arguments.leave_out:
        for model in FITTED_MODELS:
            others = tuple(m for m in FITTED_MODELS if m != model)
            found = fit(fit_points(others, arguments.every * 2), start, arguments.evaluations)
            mine = fit_points((model,))
            pooled.append(log_ratios(found, mine))
            show(f"left out: {model}", pooled[-1])
            written["left_out"] += error_rows(mine, pooled[-1])
            written[f"without {model}"] = {name: getattr(found, name) for name in BOUNDS}
            save()
        show("all left out", np.concatenate(pooled))
        if arguments.write_left_out:
            write_left_out(written["left_out"])
    found = fit(fit_points(FITTED_MODELS, arguments.every), start, arguments.evaluations)
    written["overheads"] = {name: getattr(found, name) for name in BOUNDS}
    save()
    show("fitted", log_ratios(found, fit_points(FITTED_MODELS)))
    show("never fitted: minimax-m2.5", log_ratios(found, fit_points(("minimax-m2.5",))))
    print("\noverheads:")
    for name in BOUNDS:
        print(f"  {name}: {getattr(found, name):.3g}")
    print(f"({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
