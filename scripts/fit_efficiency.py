"""Fit the efficiency curves of ``configs/efficiency`` to a folder of measured kernel times.

    python -m scripts.fit_efficiency TABLES_DIR [--out configs/efficiency]

TABLES_DIR holds one folder per device (``h100_sxm``, ``h200_sxm``, ``a100_sxm``) with the Parquet op tables of NVIDIA
AIConfigurator 0.12.0 (Apache-2.0): GEMM, context and generation attention, MoE, MLA, all-reduce. Only the fitted curves
are kept: utilisations on a grid of a few hundred points per kind of kernel (see ``bench/sim/efficiency.py``). Each fit
is robust least squares in the logarithm of time and is checked on shapes held out whole; the median error on those goes
into the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from bench.sim.efficiency import Curve
from bench.sim.op_times import FP8_TILE_ROWS
from scripts.curve_fit import fit_curve

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

#: Experts in FP8 with a scale per tensor come from vLLM 0.19's Triton kernel on H200, for every device that multiplies FP8: 0.24's table
#: times FlashInfer's CUTLASS kernel as it is before it was tuned for its shapes, which takes two to four times as long as BF16.
FP8_EXPERTS_DEVICE, FP8_EXPERTS_VERSION = "h200_sxm", "0.19.0"

#: log2 of the widths of an expert on one GPU. vLLM's tuned tiles exist for some widths and not for their neighbours, so that times jump
#: between them: knots where models lie, at 2^k, 3 x 2^k (1,536 split) and 7 x 2^k (14,336 split). Held-out errors are no larger.
EXPERT_WIDTH_KNOTS = (6, 7.58, 8.58, 8.81, 9, 9.58, 9.81, 10, 10.58, 10.81, 11, 11.81, 12, 12.81, 13, 13.81, 14)


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


def moe_curves(table: pd.DataFrame, sheet: Sheet, dtypes: Collection[str]) -> dict[str, Curve]:
    """Experts split by tensor parallelism (``moe.<dtype>``) and whole experts of expert parallelism (``moe.<dtype>.ep``).

    Tokens per expert, expert width per GPU, number of experts; tokens fall on experts by a mild power law. The two are fitted
    apart: under expert parallelism a GPU's share of the rows is uneven, which its times hold. Together, rows of 4 and 8 experts
    out of 128 bent the curve of eight-expert models (Mixtral, TP 8) to four times the measured time.
    """
    curves = {}
    # Experts without a gate have two matrices, not three: other arithmetic.
    left_out = table.inter_size.isin([1856, 2688]) | ((table.hidden_size == 2048) & (table.inter_size == 5120))
    if (table.distribution == "power_law_1.01").any():
        left_out |= table.distribution != "power_law_1.01"
    table = table[~(left_out | table.kernel_source.str.contains("situ"))]
    for dtype, name in MOE_NAMES.items():
        rows = table[table.moe_dtype == dtype]
        if dtype not in dtypes or not len(rows):
            continue
        parts = {"": rows[rows.moe_ep_size == 1], ".ep": rows[rows.moe_ep_size > 1]}
        if dtype == "w4a16_mxfp4":
            del parts[".ep"]  # MXFP4 kernels refuse it in most vLLM releases; the rows follow another path
        elif rows.num_experts.nunique() == 1:
            parts = {"": rows}  # one model: only its shares tell what fewer experts do
        for suffix, chosen in parts.items():
            print("  moe", name + suffix)
            curves[f"moe.{name}{suffix}"] = experts_curve(chosen, sheet, dtype)
    return curves


def experts_curve(rows: pd.DataFrame, sheet: Sheet, dtype: str) -> Curve:
    """One curve of experts from table rows of one dtype."""
    keys = ["num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size"]
    rows = rows.groupby(keys).latency.min().reset_index()
    rows = rows[(rows.inter_size / rows.moe_tp_size >= 64) & (rows.num_experts / rows.moe_ep_size >= 4)]
    t, h, i, k, e, tp, ep = (rows[c].to_numpy(float) for c in keys)
    k, e = k / ep, e / ep  # expert parallelism: each GPU holds a share of the experts and sees that share of rows
    touched = e * (1 - (1 - k / e) ** t)
    moved = touched * 3 * h * i / tp * MOE_BYTES_PER_WEIGHT[dtype] + t * (2 * h + 4 * k * i / tp) * 2
    peak = sheet.fp8 if dtype.startswith("fp8") else sheet.bf16
    sol = np.maximum(moved / sheet.bandwidth, 6 * t * k * h * i / tp / peak)
    experts = [2, 3, 4, 5, 7, 8, 9]
    knots: list[list[float]] = [
        [-9, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12],
        list(EXPERT_WIDTH_KNOTS),
        [n for n in experts if n >= np.floor(np.log2(e.min()))],
    ]
    groups = (h * 1e7 + i * 1000 + e).astype(np.int64)
    return fit_curve(
        ["tokens_per_expert", "expert_width", "num_experts"], [t * k / e, i / tp, e], knots, sol,
        rows.latency.to_numpy() * 1e-3, groups, 30e-6)  # fmt: skip


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
    """Number of GPUs and bytes: vLLM's custom kernel (in a CUDA graph), and NCCL.

    The tables count a message in *elements of two bytes* (AIConfigurator's ``collector/network/collect_nccl.py`` writes ``size //
    bytes_per_element``).
    """
    custom = custom[custom.backend == "vllm_graph"]
    nccl = nccl[(nccl.op_name == "all_reduce") & (nccl.nccl_dtype == "half")]
    curves = {}
    for key, rows in (("all_reduce.custom", custom), ("all_reduce.nccl", nccl)):
        print(f"  {key}")
        fastest = rows.groupby(["num_gpus", "message_size"]).latency.min().reset_index()
        gpus, size = fastest.num_gpus.to_numpy(float), 2 * fastest.message_size.to_numpy(float)
        knots = [8, 13, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 27, 29]
        curves[key] = fit_curve(
            ["num_gpus", "bytes"], [gpus, size], [[1, 2, 3], knots], 2 * (gpus - 1) / gpus * size / link_bytes_per_s,
            fastest.latency.to_numpy() * 1e-3, np.log2(size).astype(int), 4e-6,
        )  # fmt: skip
    return curves


def fit_device(folder: Path) -> tuple[str, dict[str, Curve]]:
    """All curves of one device, and the software versions that the tables name."""
    sheet = SHEETS[folder.name]

    def table(pattern: str, folder: Path = folder) -> pd.DataFrame | None:
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
    curves |= moe_curves(needed["moe_perf"], sheet, MOE_NAMES.keys() - {"fp8"})
    by_tensor = table(f"moe_perf-vllm-{FP8_EXPERTS_VERSION}", folder.parent / FP8_EXPERTS_DEVICE)
    if by_tensor is not None and sheet.fp8 > sheet.bf16:
        curves |= moe_curves(by_tensor, SHEETS[FP8_EXPERTS_DEVICE], ("fp8",))
    if "mla_context" in needed:
        curves |= mla_curves(needed["mla_context"], needed["mla_generation"], sheet, curves["gemm.bf16"])
    curves |= all_reduce_curves(needed["custom_allreduce"], needed["nccl"], NVLINK_BYTES_PER_S[folder.name])
    source = f"{SOURCE}, vLLM {needed['gemm_perf'].version.iloc[0]} on {needed['gemm_perf'].device.iloc[0]}"
    if "moe.fp8" in curves:
        source += f"; FP8 experts vLLM {FP8_EXPERTS_VERSION} on H200"
    return source, curves


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
