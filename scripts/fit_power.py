"""Fit ``configs/efficiency/power.yaml`` to published points with a measured GPU power, and print how well it does.

    python scripts/fit_power.py

Fitted on the H100 points of the ML.ENERGY Leaderboard v3; its B200 points test how it carries over to another device.
"""

from __future__ import annotations

import csv
import dataclasses

import numpy as np
from scipy.optimize import least_squares

from bench.catalog.hardware import load_hardware
from bench.catalog.steps import StepShape, step_coefficients
from bench.errors import BenchError
from bench.sim.ground_truth import GROUND_TRUTH_FOLDER, model_of, points_gpu, points_model, points_quantization
from bench.sim.power import PowerFit, load_power_fit, power_ratio, utilisations

PROMPT_TOKENS = 150.0  # the file has no prompt lengths; decoding dominates these points


def rows() -> list[tuple[str, str, float, float, float, float]]:
    """(gpu, model, u_memory, u_kv, u_flops, share of the power limit) of every usable point."""
    found = []
    with (GROUND_TRUTH_FOLDER / "power.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            gpu, model = points_gpu(row["gpu"]), points_model(row["model"])
            if not row["source"].endswith("v3") or gpu is None or model is None or not row["avg_running_batch"]:
                continue
            quantization, refused = points_quantization(row["precision"], model)
            if refused:
                continue
            arch, hardware, gpus = model_of(model), load_hardware(gpu), int(float(row["n_gpus"]))
            try:
                coefficients = step_coefficients(arch, gpus, 1, quantization, None, 1, 0)
            except BenchError:
                continue  # a layout that tensor parallelism alone does not give
            batch, osl = float(row["avg_running_batch"]), float(row["osl"])
            prompts = batch / osl
            shape = StepShape.from_totals(
                arch, prompts * PROMPT_TOKENS, prompts, batch, batch * (PROMPT_TOKENS + osl / 2)
            )
            period = batch / float(row["output_tok_s_total"])
            u = utilisations(coefficients, hardware, shape.features()[None, :], np.array([period]))
            weights, kv, flops = (float(x[0]) for x in u)
            found.append((gpu, model, weights, kv, flops, float(row["power_w_per_gpu"]) / hardware.tdp_w))
    return found


def main() -> None:
    data = rows()
    start = load_power_fit()
    names = ("busy_floor", "weights", "kv", "flops", "flops_exponent")
    h100 = np.array([r[2:] for r in data if r[0] == "h100-sxm"])

    def at(x: np.ndarray) -> PowerFit:
        return dataclasses.replace(start, **dict(zip(names, map(float, x), strict=True)))  # type: ignore[arg-type]

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.log(power_ratio(at(x), h100[:, 0], h100[:, 1], h100[:, 2]) / h100[:, 3])

    x0 = [getattr(start, n) for n in names]
    bounds = ([0.2, 0, 0, 0, 0.3], [0.45, 2, 4, 8, 1])
    solution = least_squares(residuals, np.clip(x0, bounds[0], bounds[1]), bounds=bounds, loss="soft_l1", f_scale=0.05)
    print({n: round(float(v), 3) for n, v in zip(names, solution.x, strict=True)})
    for gpu in ("h100-sxm", "b200"):
        part = np.array([r[2:] for r in data if r[0] == gpu])
        ratio = part[:, 3] / power_ratio(at(solution.x), part[:, 0], part[:, 1], part[:, 2])
        error = np.median(np.abs(1 / ratio - 1))
        low, high = np.quantile(ratio, [0.05, 0.95])
        print(f"{gpu}: {len(part)} points, median error {error:.1%}, measured/predicted 5-95 %: {low:.2f}-{high:.2f}")


if __name__ == "__main__":
    main()
