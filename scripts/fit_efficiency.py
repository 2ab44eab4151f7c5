"""Fit the efficiency curves of ``configs/efficiency`` to a folder of measured kernel times.

    python scripts/fit_efficiency.py TABLES_DIR [--out configs/efficiency]

TABLES_DIR holds one folder per device (``h100_sxm``, ``h200_sxm``, ``a100_sxm``) with the Parquet op tables of NVIDIA
AIConfigurator 0.12.0 (Apache-2.0): GEMM, context and generation attention, MoE, MLA, all-reduce. Only the fitted curves
are kept: utilisations on a grid of a few hundred points per kind of kernel (see ``bench/sim/efficiency.py``). Each fit
is robust least squares in the logarithm of time and is checked on shapes held out whole; the median error on those goes
into the file.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse.linalg import spsolve

from bench.sim.efficiency import Curve
from bench.sim.op_times import FP8_TILE_ROWS

SOURCE = "NVIDIA AIConfigurator 0.12.0 op tables (Apache-2.0)"
NVLINK_BYTES_PER_S = {"h100_sxm": 450e9, "h200_sxm": 450e9, "a100_sxm": 300e9}


@dataclass(frozen=True)
class Sheet:
    """Data-sheet ceilings that the utilisations are relative to."""

    bandwidth: float
    bf16: float
    fp8: float


# NVIDIA H100, H200 and A100 data sheets (dense).
SHEETS = {
    "h100_sxm": Sheet(3.35e12, 989.4e12, 1978.9e12),
    "h200_sxm": Sheet(4.8e12, 989.4e12, 1978.9e12),
    "a100_sxm": Sheet(2.039e12, 312e12, 312e12),
}
MOE_BYTES_PER_WEIGHT = {"bfloat16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "w4a16_mxfp4": 0.53125, "int4_wo": 0.5625}
MOE_NAMES = {"bfloat16": "bf16", "fp8": "fp8", "fp8_block": "fp8_block", "w4a16_mxfp4": "mxfp4", "int4_wo": "int4"}


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


def without_launch_bound(block: pd.DataFrame, plain: pd.DataFrame) -> pd.DataFrame:
    """Replace block-scaled FP8 rows that were bound by their launch from Python (57-100 us whatever the shape, no CUDA
    graph) by the plain FP8 kernel's time of the same shape, which was measured under a graph."""
    plain = plain.groupby(["m", "n", "k"]).latency.min().rename("plain").reset_index()
    rows = block.merge(plain, on=["m", "n", "k"])
    bound = rows.latency < 0.13
    return rows.assign(latency=np.where(bound, np.minimum(rows.latency, rows.plain), rows.latency))


def gemm_curves(table: pd.DataFrame, sheet: Sheet) -> dict[str, Curve]:
    """m x n x k per dtype, the fastest of the kernels that vLLM chooses from. FP8 switches kernels at m = 16, 64, 128, 256, hence the close knots there."""
    curves = {}
    for dtype, name in (("bfloat16", "bf16"), ("fp8", "fp8"), ("fp8_block", "fp8_block")):
        rows = table[(table.gemm_dtype == dtype) & (table.n >= 128) & (table.k >= 128)]
        if not len(rows):
            continue
        rows = rows.groupby(["m", "n", "k"]).latency.min().reset_index()
        if dtype == "fp8_block":
            rows = without_launch_bound(rows, table[table.gemm_dtype == "fp8"])
        if dtype != "bfloat16":  # a staircase in m: the curve holds its corners, gemm_s rounds m up to them
            rows = rows[(rows.m <= 256) | (rows.m % FP8_TILE_ROWS == 0)]
        m, n, k = (rows[c].to_numpy(float) for c in "mnk")
        width = 2.0 if dtype == "bfloat16" else 1.0
        peak = sheet.bf16 if dtype == "bfloat16" else sheet.fp8
        sol = np.maximum((width * n * k + width * m * k + 2 * m * n) / sheet.bandwidth, 2 * m * n * k / peak)
        m_knots: list[float] = [0, 2, 4, 5, 6, 6.3, 7, 7.25, 8, 8.25, 9, 10, 11, 13, 15]
        if len(rows) < 20000:
            m_knots = [0, 2, 4, 5, 6, 7, 8, 9, 10, 11, 13]
        knots: list[list[float]] = [m_knots, [7, 9, 10, 11, 12, 13, 14, 16], [7, 9, 10, 11, 12, 13, 14, 16]]
        print("  gemm", name)
        groups = (n * 100003 + k).astype(np.int64)
        curves[f"gemm.{name}"] = fit_curve(
            ["m", "n", "k"], [m, n, k], knots, sol, rows.latency.to_numpy() * 1e-3, groups, 2e-6
        )
    return curves


def plain_rows(table: pd.DataFrame, head: int, dtype: str) -> pd.DataFrame:
    """Rows of one head size and KV dtype without a window."""
    few = table.num_heads >= table.num_key_value_heads
    return table[(table.head_dim == head) & (table.kv_cache_dtype == dtype) & (table.window_size == 0) & few]


def attention_curves(context: pd.DataFrame, generation: pd.DataFrame, sheet: Sheet) -> dict[str, Curve]:
    """Decode: batch x KV heads, KV length, queries per KV head. Prefill: tokens x heads, mean KV length."""
    curves = {}
    for table in (context, generation):
        if "window_size" not in table:
            table["window_size"] = 0
    for head in (64, 128, 256):
        for dtype, name in (("bfloat16", "bf16"), ("fp8", "fp8")):
            width = 2.0 if name == "bf16" else 1.0
            rows = (
                plain_rows(generation, head, dtype)
                .groupby(["batch_size", "step", "num_heads", "num_key_value_heads"])
                .latency.min()
                .reset_index()
            )
            if len(rows):
                batch, length = rows.batch_size.to_numpy(float), rows.step.to_numpy(float) + 1
                heads, kv = rows.num_heads.to_numpy(float), rows.num_key_value_heads.to_numpy(float)
                sol = batch * head * (2 * kv * length * width + 4 * heads) / sheet.bandwidth
                print("  decode attention", name, head)
                curves[f"decode_attention.{name}.{head}"] = fit_curve(
                    ["batch_x_kv_heads", "kv_length", "queries_per_kv_head"], [batch * kv, length, heads / kv],
                    [[0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12], [0, 6, 7, 8, 9, 10, 11, 12, 13, 15, 17], [0, 1, 2, 3, 4, 6]],
                    sol, rows.latency.to_numpy() * 1e-3, (heads * 1000 + kv).astype(int), 8e-6)  # fmt: skip
            rows = plain_rows(context, head, dtype)
            rows = (
                rows[rows.isl > 1]
                .groupby(["batch_size", "isl", "num_heads", "num_key_value_heads"])
                .latency.min()
                .reset_index()
            )
            if len(rows):
                batch, length = rows.batch_size.to_numpy(float), rows.isl.to_numpy(float)
                heads, kv = rows.num_heads.to_numpy(float), rows.num_key_value_heads.to_numpy(float)
                sol = np.maximum(
                    2 * head * heads * batch * length * (length + 1) / sheet.bf16,
                    4 * batch * length * head * (heads + kv) / sheet.bandwidth,
                )
                print("  prefill attention", name, head)
                curves[f"prefill_attention.{name}.{head}"] = fit_curve(
                    ["tokens_x_heads", "mean_kv_length"], [batch * length * heads, (length + 1) / 2],
                    [[5, 8, 10, 12, 13, 14, 15, 16, 17, 18, 20], [3, 5, 6, 7, 8, 9, 10, 11, 13]],
                    sol, rows.latency.to_numpy() * 1e-3, (heads * 1000 + kv).astype(int), 8e-6)  # fmt: skip
    return curves


def moe_curves(table: pd.DataFrame, sheet: Sheet) -> dict[str, Curve]:
    """Tokens per expert, expert width per GPU, number of experts; tokens fall on experts by a mild power law."""
    curves = {}
    # Experts without a gate have two matrices, not three: other arithmetic, left out.
    no_gate = table.inter_size.isin([1856, 2688]) | ((table.hidden_size == 2048) & (table.inter_size == 5120))
    if (table.distribution == "power_law_1.01").any():
        table = table[table.distribution == "power_law_1.01"]
    for dtype, name in MOE_NAMES.items():
        # MXFP4 kernels refuse expert parallelism in most vLLM releases; their rows of it follow another path
        used = (table.moe_ep_size == 1) if dtype == "w4a16_mxfp4" else (table.moe_ep_size > 0)
        rows = table[(table.moe_dtype == dtype) & used & ~no_gate]
        rows = rows[~rows.kernel_source.str.contains("situ")]
        keys = ["num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size"]
        rows = rows.groupby(keys).latency.min().reset_index()
        rows = rows[(rows.inter_size / rows.moe_tp_size >= 64) & (rows.num_experts / rows.moe_ep_size >= 4)]
        if not len(rows):
            continue
        t, h, i, k, e, tp, ep = (rows[c].to_numpy(float) for c in keys)
        k, e = k / ep, e / ep  # expert parallelism: each GPU holds a share of the experts and sees that share of rows
        touched = e * (1 - (1 - k / e) ** t)
        width = MOE_BYTES_PER_WEIGHT[dtype]
        moved = touched * 3 * h * i / tp * width + t * (2 * h + 4 * k * i / tp) * 2
        peak = sheet.fp8 if name.startswith("fp8") else sheet.bf16
        sol = np.maximum(moved / sheet.bandwidth, 6 * t * k * h * i / tp / peak)
        knots: list[list[float]] = [
            [-9, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12],
            [6, 8, 9, 10, 11, 12, 14],
            [2, 3, 5, 7, 8, 9],
        ]
        print("  moe", name)
        groups = (h * 1e7 + i * 1000 + e).astype(np.int64)
        curves[f"moe.{name}"] = fit_curve(
            ["tokens_per_expert", "expert_width", "num_experts"], [t * k / e, i / tp, e], knots, sol,
            rows.latency.to_numpy() * 1e-3, groups, 30e-6)  # fmt: skip
    return curves


def mla_projections_s(gemm: Curve, sheet: Sheet, heads: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Seconds of the projections around MLA (DeepSeek-V3 sizes) by the BF16 GEMM curve; heads of one GPU."""
    total = np.zeros(np.broadcast(heads, tokens).shape)
    for n, k in ((1536 + 576, 7168), (heads * 192, 1536), (7168, heads * 128)):
        n, k = np.broadcast_arrays(np.asarray(n, float), np.asarray(k, float))
        sol = np.maximum((2 * n * k + 2 * tokens * (n + k)) / sheet.bandwidth, 2 * tokens * n * k / sheet.bf16)
        total = total + gemm.time_s(sol, tokens, n, k)
    return total


def mla_curves(context: pd.DataFrame, generation: pd.DataFrame, sheet: Sheet, gemm: Curve) -> dict[str, Curve]:
    """The attention inside DeepSeek-V3's MLA modules: heads per GPU, batch (tokens), KV length.

    The tables time whole modules. Their decode rows are bound by launches (about 95 us whatever the batch), so that only
    what grows with the KV length over the shortest one is taken from them; from prefill rows the projections, by the
    GEMM curve, are subtracted.
    """
    curves = {}
    for kv, name, width in (("bfloat16", "bf16", 2.0), ("fp8", "fp8", 1.0)):
        rows = (
            generation[generation.kv_cache_dtype == kv]
            .groupby(["num_heads", "batch_size", "step"])
            .latency.min()
            .reset_index()
        )
        base = rows[rows.step == 2].set_index(["num_heads", "batch_size"]).latency
        rows = rows.join(base.rename("base"), on=["num_heads", "batch_size"])
        heads, batch, length = (rows[c].to_numpy(float) for c in ("num_heads", "batch_size", "step"))
        sol = batch * length * 576 * width / sheet.bandwidth
        time = np.maximum((rows.latency - rows.base).to_numpy() * 1e-3, 0.0) + 12e-6
        print("  mla decode", name)
        curves[f"mla_decode.{name}"] = fit_curve(
            ["heads", "batch", "kv_length"], [heads, batch, length],
            [[0, 2, 4, 6, 7], [0, 2, 4, 5, 6, 7, 8, 10], [1, 7, 9, 10, 11, 12, 13, 15, 17]],
            sol, time, (batch * 10007 + length).astype(np.int64), 12e-6)  # fmt: skip
        rows = (
            context[context.kv_cache_dtype == kv]
            .groupby(["num_heads", "batch_size", "isl"])
            .latency.min()
            .reset_index()
        )
        rows = rows[rows.batch_size * rows.isl >= 256]
        heads, batch, length = (rows[c].to_numpy(float) for c in ("num_heads", "batch_size", "isl"))
        # scores over 192 and values over 128 numbers per head, causal; keys and values expanded from the latent
        sol = batch * length * heads * ((length + 1) * (192 + 128) + 2 * 512 * 256) / sheet.bf16
        whole = rows.latency.to_numpy() * 1e-3
        time = np.maximum(whole - mla_projections_s(gemm, sheet, heads, batch * length), 0.15 * whole)
        print("  mla prefill", name)
        curves[f"mla_prefill.{name}"] = fit_curve(
            ["heads", "tokens", "mean_kv_length"], [heads, batch * length, (length + 1) / 2],
            [[0, 2, 4, 6, 7], [8, 10, 12, 13, 15, 17], [0, 4, 7, 9, 10, 11, 12, 14]],
            sol, time, (batch * 10007 + length).astype(np.int64), 20e-6)  # fmt: skip
    return curves


def all_reduce_curves(custom: pd.DataFrame, nccl: pd.DataFrame, link_bytes_per_s: float) -> dict[str, Curve]:
    """Number of GPUs and message size: the faster of vLLM's custom kernel (in a CUDA graph) and NCCL, and each of them.

    The tables count a message in elements of two bytes (AIConfigurator's ``collector/network/collect_nccl.py`` writes ``size //
    bytes_per_element``). ``all_reduce``, with which vLLM's overheads were fitted, takes that number for bytes; the other two double it.
    """
    custom = custom[custom.backend == "vllm_graph"]
    nccl = nccl[(nccl.op_name == "all_reduce") & (nccl.nccl_dtype == "half")]
    curves = {}
    for key, rows, width in (
        ("all_reduce", pd.concat([custom, nccl]), 1), ("all_reduce.custom", custom, 2), ("all_reduce.nccl", nccl, 2),
    ):  # fmt: skip
        print(f"  {key}")
        fastest = rows.groupby(["num_gpus", "message_size"]).latency.min().reset_index()
        gpus, size = fastest.num_gpus.to_numpy(float), width * fastest.message_size.to_numpy(float)
        knots = [k + math.log2(width) for k in (7, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 26, 28)]
        curves[key] = fit_curve(
            ["num_gpus", "bytes"], [gpus, size], [[1, 2, 3], knots], 2 * (gpus - 1) / gpus * size / link_bytes_per_s,
            fastest.latency.to_numpy() * 1e-3, np.log2(size).astype(int), 4e-6,
        )  # fmt: skip
    return curves


def fit_device(folder: Path) -> tuple[str, dict[str, Curve]]:
    """All curves of one device, and the software versions that the tables name."""
    sheet = SHEETS[folder.name]

    def table(pattern: str) -> pd.DataFrame | None:
        files = sorted(folder.glob(f"{pattern}*.parquet"))
        return pd.read_parquet(files[-1]) if files else None

    tables = {
        p: table(p)
        for p in (
            "gemm_perf",
            "context_attention",
            "generation_attention",
            "moe_perf",
            "mla_context",
            "mla_generation",
            "custom_allreduce",
            "nccl",
        )
    }
    needed = {p: t for p, t in tables.items() if t is not None}
    curves = gemm_curves(needed["gemm_perf"], sheet)
    curves |= attention_curves(needed["context_attention"], needed["generation_attention"], sheet)
    curves |= moe_curves(needed["moe_perf"], sheet)
    if "mla_context" in needed:
        curves |= mla_curves(needed["mla_context"], needed["mla_generation"], sheet, curves["gemm.bf16"])
    curves |= all_reduce_curves(needed["custom_allreduce"], needed["nccl"], NVLINK_BYTES_PER_S[folder.name])
    return f"{SOURCE}, vLLM {needed['gemm_perf'].version.iloc[0]} on {needed['gemm_perf'].device.iloc[0]}", curves


def write_yaml(path: Path, name: str, source: str, sheet: Sheet, curves: dict[str, Curve]) -> None:
    """One readable file: rows of utilisation run over the last axis of each curve."""
    lines = [
        f"# Share of the data-sheet ceiling that kernels reach on {name}, by shape. Fitted by scripts/fit_efficiency.py;",
        "# time = (max(bytes / bandwidth, FLOPs / peak) + floor) / utilisation, interpolated over log2 of the axes.",
        f"name: {name}", f'source: "{source}"', "as_of: 2026-08",
        f"relative_to: {{memory_bandwidth_bytes_per_s: {sheet.bandwidth:.4g}, bf16_flops: {sheet.bf16:.5g}, fp8_flops: {sheet.fp8:.5g}}}",
        "curves:",
    ]  # fmt: skip
    for key, curve in curves.items():
        data = curve.to_dict()
        lines += [f"  {key}:", f"    axes: [{', '.join(data['axes'])}]", "    log2_knots:"]
        lines += ["      - [" + ", ".join(f"{k:g}" for k in ks) + "]" for ks in data["log2_knots"]]
        lines += [
            f"    floor_us: {data['floor_us']:g}",
            f"    held_out_median_error: {data['held_out_median_error']:g}",
            "    utilisation: |",
        ]
        lines += ["      " + row for row in data["utilisation"].splitlines()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit efficiency curves to measured kernel times.")
    parser.add_argument("tables", type=Path)
    parser.add_argument("--out", type=Path, default=Path("configs/efficiency"))
    arguments = parser.parse_args()
    for name, sheet in SHEETS.items():
        print(name)
        source, curves = fit_device(arguments.tables / name)
        write_yaml(arguments.out / f"{name}.yaml", name, source, sheet, curves)


if __name__ == "__main__":
    main()
