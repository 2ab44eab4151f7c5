"""Fit a utilisation curve (``bench/sim/efficiency.py``) to measured times: robust least squares on a grid of knots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import spsolve

from bench.sim.efficiency import Curve


def hat_matrix(coordinates: list[np.ndarray], knots: list[np.ndarray]) -> sparse.csr_matrix:
    """Rows of multilinear interpolation weights: (points, product of knot counts)."""
    n = len(coordinates[0])
    lower, weight = [], []
    for x, k in zip(coordinates, knots, strict=True):
        x = np.clip(x, k[0], k[-1])
        i = np.clip(np.searchsorted(k, x, side="right") - 1, 0, len(k) - 2)
        lower.append(i)
        weight.append((x - k[i]) / (k[i + 1] - k[i]))
    rows, columns, values = [], [], []
    for corner in range(2 ** len(knots)):
        index, w = np.zeros(n, dtype=int), np.ones(n)
        for d, k in enumerate(knots):
            bit = (corner >> d) & 1
            index = index * len(k) + lower[d] + bit
            w = w * (weight[d] if bit else 1 - weight[d])
        rows.append(np.arange(n))
        columns.append(index)
        values.append(w)
    size = int(np.prod([len(k) for k in knots]))
    return sparse.csr_matrix((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), (n, size))


def smoothness(knots: list[np.ndarray]) -> sparse.csr_matrix:
    """First differences along every axis: fills grid points without data from their neighbours."""
    blocks = []
    for axis in range(len(knots)):
        parts = []
        for d, k in enumerate(knots):
            n = len(k)
            parts.append(sparse.eye(n - 1, n, k=1) - sparse.eye(n - 1, n) if d == axis else sparse.eye(n))
        block = parts[0]
        for p in parts[1:]:
            block = sparse.kron(block, p)
        blocks.append(block)
    return sparse.vstack(blocks).tocsr()


def robust_fit(matrix: sparse.csr_matrix, target: np.ndarray, knots: list[np.ndarray]) -> np.ndarray:
    """Least absolute deviations by reweighting, with a slight pull to smoothness."""
    weight = np.ones(len(target))
    smooth = smoothness(knots)
    penalty = 0.02 * (smooth.T @ smooth) + 1e-6 * sparse.eye(matrix.shape[1])
    values = np.zeros(matrix.shape[1])
    for _ in range(6):
        weighted = sparse.diags(weight)
        values = spsolve((matrix.T @ weighted @ matrix + penalty).tocsc(), matrix.T @ (weight * target))
        weight = 1.0 / np.maximum(np.abs(target - matrix @ values), 0.03)
        weight /= weight.mean()
    return np.asarray(values)


def fit_curve(
    axes: list[str],
    shape: list[np.ndarray],
    knots: Sequence[Sequence[float]],
    sol_s: np.ndarray,
    time_s: np.ndarray,
    groups: np.ndarray,
    floor_s: float,
) -> Curve:
    """Fit utilisation over log2 of the shape numbers; a fifth of the groups is held out to measure the error."""
    grid = [np.asarray(k, dtype=float) for k in knots]
    matrix = hat_matrix([np.log2(s) for s in shape], grid)
    target = np.log(time_s / (sol_s + floor_s))
    names = np.unique(groups)
    held = np.isin(groups, np.random.default_rng(0).choice(names, max(1, len(names) // 5), replace=False))
    trial = robust_fit(matrix[~held], target[~held], grid)
    error = np.abs(np.expm1(matrix[held] @ trial - target[held]))
    values = robust_fit(matrix, target, grid)
    print(
        f"   {len(target):6d} rows, {matrix.shape[1]:4d} coefficients, held out: median {np.median(error):.3f}, p90 {np.quantile(error, 0.9):.3f}"
    )
    log_utilisation = -values.reshape(tuple(len(k) for k in grid))
    return Curve(tuple(axes), tuple(grid), log_utilisation, floor_s, float(np.median(error)))
