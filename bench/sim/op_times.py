"""Seconds of every operation of a step on one GPU, as arrays over token counts, batches and context lengths.

Each operation takes max(compute, memory) at a share of the data-sheet ceiling that depends on its shape
(``bench/sim/efficiency.py``). Operations do not overlap: on measured forward passes their sum is nearer to the truth
than the largest resource. Functions take token counts as float arrays and return seconds of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.catalog.hardware import Hardware
from bench.sim.efficiency import Curve, EfficiencyCurves, nearest_curve
from bench.sim.model_shape import LayerGroup, ModelShape

#: Bytes per weight, scales included (int4: groups of 128; MXFP4: of 32; NVFP4: of 16).
WEIGHT_BYTES: Mapping[str, float] = {
    "fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "int8": 1.0, "int4": 0.53, "mxfp4": 0.53125, "nvfp4": 0.5625,
}  # fmt: skip
#: Weights that are expanded to 16 bits before the multiplication on every device.
WEIGHT_ONLY = ("int4", "mxfp4")
#: Utilisations for a device without curves: the middle of what the known devices reach on large shapes.
_BARE_BANDWIDTH_RATIO, _BARE_FLOPS_RATIO, _BARE_FLOOR_S = 0.70, 0.65, 4e-6
#: A device whose peaks are not known at all (a host CPU): only calibration makes anything of it.
_ASSUMED_FLOPS, _ASSUMED_BYTES_PER_S = 1e12, 5e10
_ELEMENTWISE_BANDWIDTH_RATIO = 0.8
#: FP8 products with more rows than this work in tiles of so many: their time is a staircase in the number of tokens.
FP8_TILE_ROWS = 256
#: Ring all-reduce through the PCIe root: share of the link that it reaches, and the start-up per GPU. The share was chosen on
#: TensorRT-LLM's full-load rows of 70B on 4 and 8 A100 PCIe cards; rows of L40S, not used, agree (-6 to -9 %).
_PCIE_LINK_RATIO, _PCIE_START_S = 0.5, 8e-6
_MIB = 2.0**20
#: vLLM from 0.11 on: compute capability -> GPUs -> all-reduces of fewer bytes take its own kernel, and between that and the second
#: limit multicast (``distributed/device_communicators/{custom_all_reduce,all_reduce_utils,symm_mem}.py``); NCCL does the rest. Two-shot
#: through symmetric memory, which 2 GPUs (on Blackwell also 4) take there instead, is as fast as NCCL where vLLM changes over.
_OWN_MIB, _OWN_MIB_BY_CAPABILITY = 8.0, {
    "9.0": {6: 0.5, 8: 0.25}, "10.0": {2: 2.0, 4: 2.0, 6: 1.0, 8: 1.0}, "10.3": {2: 4.0, 4: 4.0, 8: 4.0},
}  # fmt: skip
_MULTICAST_MIB = {"9.0": {4: 32.0, 6: 64.0, 8: 64.0}, "10.0": {6: 128.0, 8: 128.0}, "10.3": {6: 32.0, 8: 64.0}}


@dataclass(frozen=True, slots=True)
class Overheads:
    """Costs outside the kernels' tables, fitted on measured serving points (``configs/efficiency/overheads.yaml``).

    Attributes:
        small_kernel_s: a norm, rotary embedding, KV write or activation in a CUDA graph, besides its memory traffic.
        small_kernels_per_layer, small_kernels_per_moe_layer: how many of them remain after compilation fused the rest.
        compute_slowdown, memory_slowdown: under load against the locked clocks of the kernel tables.
            ..._before_hopper: on devices below compute capability 9.0, whose clocks hold under load; ..._after_hopper: on
            those from 10.0 on, which borrow Hopper's utilisations and reach less of their higher ceilings.
        weight_only_slowdown: expanding narrow weights, against a 16-bit product of the same traffic.
        host_fixed_s, host_per_running_s: the engine-core process per step, and per running request, where scheduling
            runs ahead of the device (vLLM 0.14 and later); host_per_running_sync_s: before, when the step waits for
            scheduling, input preparation and output processing one after the other.
        gap_s, gap_per_running_s, gap_per_rank_s: device idle per step that nothing hides (per doubling of ranks).
        all_reduce_wait_s: what an all-reduce takes beside its kernel, per doubling of ranks: they do not arrive together.
        piecewise_per_layer_s, eager_per_layer_s: host time of steps outside a full CUDA graph.
        request_before_s, request_after_s: client to queue (HTTP, tokeniser), and engine output to client.
        skew_ratio: how far decode attention of uneven lengths lies between the mean's and the longest's time.
        nvls_start_s, nvls_bytes_per_s: all-reduce by NVLink SHARP, which the kernel tables do not contain.
        fp8_compute_slowdown, fp8_memory_slowdown: FP8 products of another engine against vLLM's;
            decode_attention_slowdown, fp8_decode_attention_slowdown, prefill_attention_slowdown, experts_slowdown,
            elementwise_slowdown (bytes of norms, activations and quantisation): likewise.
            All 1.0 for vLLM, whose kernels the tables hold.
        mxfp4_extra_ratio, mxfp4_extra_tokens: MXFP4 experts on devices without FP4 lose this share more at large
            batches than the kernel tables say (half of it at ``mxfp4_extra_tokens``).
    """

    small_kernel_s: float = 1.85e-6
    small_kernels_per_layer: float = 5.0
    small_kernels_per_moe_layer: float = 7.0
    compute_slowdown: float = 1.06
    compute_slowdown_before_hopper: float = 1.03
    compute_slowdown_after_hopper: float = 1.7
    memory_slowdown: float = 0.96
    memory_slowdown_after_hopper: float = 1.08
    weight_only_slowdown: float = 1.1
    fp8_compute_slowdown: float = 1.0
    fp8_memory_slowdown: float = 1.0
    decode_attention_slowdown: float = 1.0
    fp8_decode_attention_slowdown: float = 1.0
    prefill_attention_slowdown: float = 1.0
    experts_slowdown: float = 1.0
    elementwise_slowdown: float = 1.0
    host_fixed_s: float = 1.0e-3
    host_per_running_s: float = 1.0e-5
    host_per_running_sync_s: float = 2.45e-5
    gap_s: float = 0.0
    gap_per_running_s: float = 7e-7
    gap_per_rank_s: float = 2e-5
    all_reduce_wait_s: float = 0.0
    piecewise_per_layer_s: float = 1.5e-4
    eager_per_layer_s: float = 2.6e-4
    request_before_s: float = 1.1e-2
    request_after_s: float = 1e-3
    skew_ratio: float = 0.1
    nvls_start_s: float = 1.5e-5
    nvls_bytes_per_s: float = 2.0e11
    mxfp4_extra_ratio: float = 1.46
    mxfp4_extra_tokens: float = 4000.0


@dataclass(frozen=True, slots=True)
class Device:
    """Ceilings of the device, the curves that say how near kernels come to them, and the overheads.

    Attributes:
        own_all_reduce_bytes: number of GPUs -> smaller messages the engine reduces with a kernel of its own; NCCL takes larger ones.
            None: vLLM's limits, and multicast between its own kernel and NCCL.
    """

    hardware: Hardware
    curves: EfficiencyCurves
    overheads: Overheads
    own_all_reduce_bytes: Mapping[int, float] | None = None

    def all_reduce_limits(self, ranks: int) -> tuple[float, float]:
        """Bytes below which an all-reduce takes the engine's own kernel, and below which multicast instead of NCCL."""
        if self.own_all_reduce_bytes is not None:
            return self.own_all_reduce_bytes.get(ranks, 0.0), 0.0
        capability = self.hardware.compute_capability or ""
        own = _OWN_MIB_BY_CAPABILITY.get(capability, {}).get(ranks, _OWN_MIB)
        # NVLink SHARP: the switch adds up, so that every GPU sends and receives each byte once.
        switch = self.hardware.link == "nvswitch"
        return own * _MIB, (_MULTICAST_MIB.get(capability, {}).get(ranks, 0.0) if switch else 0.0) * _MIB

    @property
    def bandwidth(self) -> float:
        return self.hardware.memory_bandwidth_bytes_per_s or _ASSUMED_BYTES_PER_S

    def peak(self, dtype: str) -> float:
        """FLOP/s at which a product with weights in ``dtype`` is computed."""
        if not self.hardware.peak_flops:
            return _ASSUMED_FLOPS
        wanted = {"fp8_block": "fp8", "int4": "bf16", "mxfp4": "bf16", "nvfp4": "fp4"}.get(dtype, dtype)
        return self.hardware.peak_flops[self.hardware.compute_dtype(wanted)]

    def multiplies(self, dtype: str) -> bool:
        """Whether tensor cores take ``dtype`` as it is; else weights are expanded to 16 bits first (FP8 on an A100)."""
        key = {"fp8_block": "fp8", "nvfp4": "fp4"}.get(dtype, dtype)
        return dtype not in WEIGHT_ONLY and (key == "bf16" or key in self.hardware.peak_flops)

    def _slowdowns(self) -> tuple[float, float]:
        """(compute, memory) against the kernel tables, by generation."""
        o, capability = self.overheads, float(self.hardware.compute_capability or 0)
        if capability >= 10.0:
            return o.compute_slowdown_after_hopper, o.memory_slowdown_after_hopper
        return (o.compute_slowdown if capability >= 9.0 else o.compute_slowdown_before_hopper), o.memory_slowdown

    def timed(self, curve: Curve | None, moved: np.ndarray, flops: np.ndarray, peak: float, *shape: Any) -> np.ndarray:
        """Seconds of a kernel that moves ``moved`` bytes and computes ``flops``, at the curve's utilisation."""
        memory, compute = moved / self.bandwidth, flops / peak
        if curve is None:
            return np.maximum(memory / _BARE_BANDWIDTH_RATIO, compute / _BARE_FLOPS_RATIO) + _BARE_FLOOR_S
        compute_slow, memory_slow = self._slowdowns()
        slow = np.where(compute > memory, compute_slow, memory_slow)
        return curve.time_s(np.maximum(memory, compute), *shape) * slow


def gemm_s(device: Device, m: np.ndarray, n: float, k: float, dtype: str) -> np.ndarray:
    """An (m, k) x (k, n) product with weights in ``dtype``."""
    n, k = max(n, 1.0), max(k, 1.0)
    native = device.multiplies(dtype)
    if native and dtype in ("fp8", "fp8_block"):
        m = np.where(m > FP8_TILE_ROWS, np.ceil(m / FP8_TILE_ROWS) * FP8_TILE_ROWS, m)
    activation = 1.0 if native and dtype not in ("bf16", "fp32") else 2.0
    moved = WEIGHT_BYTES[dtype] * n * k + activation * m * k + 2 * m * n
    by_dtype = {
        "fp8_block": ("gemm.fp8_block", "gemm.fp8"),
        "fp8": ("gemm.fp8",),
        "int8": ("gemm.fp8",),
        "nvfp4": ("gemm.fp8",),
    }
    curve = device.curves.find(*(by_dtype.get(dtype, ()) if native else ()), "gemm.bf16")
    flops, peak, o = 2 * m * n * k, device.peak(dtype if native else "bf16"), device.overheads
    time = device.timed(curve, moved, flops, peak, m, n, k)
    if native and dtype in ("fp8", "fp8_block"):
        time = time * np.where(flops / peak > moved / device.bandwidth, o.fp8_compute_slowdown, o.fp8_memory_slowdown)
    return time if native else time * o.weight_only_slowdown


def decode_attention_s(
    device: Device, group: LayerGroup, kv_dtype: str, tp: int, batch: np.ndarray, length: np.ndarray
) -> np.ndarray:
    """Decode attention of one layer for ``batch`` requests of ``length`` KV tokens each (broadcast)."""
    width = WEIGHT_BYTES[kv_dtype]
    name = "fp8" if kv_dtype == "fp8" else "bf16"
    heads = max(1.0, group.num_heads / tp)
    seen = np.minimum(length, group.window) if group.window else length
    nothing = np.zeros(np.broadcast(batch, length).shape)
    if group.mla:
        curve = device.curves.find(f"mla_decode.{name}", "mla_decode.bf16")
        moved = batch * seen * group.kv_latent * width
        return device.timed(curve, moved, nothing, 1.0, heads, batch, seen)
    kv = max(1.0, group.num_kv_heads / tp)
    curve = nearest_curve(device.curves, f"decode_attention.{name}", group.head_dim)
    curve = curve or nearest_curve(device.curves, "decode_attention.bf16", group.head_dim)
    moved = batch * group.head_dim * (2 * kv * seen * width + 4 * heads)
    o = device.overheads
    slower = o.fp8_decode_attention_slowdown if kv_dtype == "fp8" else o.decode_attention_slowdown
    return device.timed(curve, moved, nothing, 1.0, batch * kv, seen, heads / kv) * slower


def prefill_attention_s(
    device: Device, group: LayerGroup, kv_dtype: str, tp: int, tokens: np.ndarray, mean: np.ndarray
) -> np.ndarray:
    """Causal attention of one layer for ``tokens`` queries that see ``mean`` KV tokens on average (broadcast)."""
    name = "fp8" if kv_dtype == "fp8" else "bf16"
    heads = max(1.0, group.num_heads / tp)
    seen = np.minimum(mean, group.window) if group.window else mean
    peak = device.peak("bf16")
    if group.mla:
        # scores and values per head, and keys and values expanded from the latent
        expand = 2 * (group.kv_latent - 64) * (group.qk_head_dim - 64 + group.v_head_dim)
        flops = tokens * heads * (2 * seen * (group.qk_head_dim + group.v_head_dim) + expand)
        curve = device.curves.find(f"mla_prefill.{name}", "mla_prefill.bf16")
        return device.timed(curve, np.zeros_like(flops), flops, peak, heads, tokens, seen)
    kv = max(1.0, group.num_kv_heads / tp)
    curve = nearest_curve(device.curves, f"prefill_attention.{name}", group.head_dim)
    curve = curve or nearest_curve(device.curves, "prefill_attention.bf16", group.head_dim)
    flops = 4 * group.head_dim * heads * tokens * seen
    moved = 4 * tokens * group.head_dim * (heads + kv) + np.zeros_like(seen)
    return device.timed(curve, moved, flops, peak, tokens * heads, seen) * device.overheads.prefill_attention_slowdown


def all_reduce_s(device: Device, num_bytes: np.ndarray, ranks: int) -> np.ndarray:
    """An all-reduce of ``num_bytes`` over ``ranks`` GPUs of one node, waiting for the last of them included."""
    if ranks <= 1:
        return np.zeros_like(num_bytes)
    return device.overheads.all_reduce_wait_s * math.log2(ranks) + _all_reduce_kernel_s(device, num_bytes, ranks)


def _all_reduce_kernel_s(device: Device, num_bytes: np.ndarray, ranks: int) -> np.ndarray:
    hw, o = device.hardware, device.overheads
    # a bridge joins two cards; a ring of more goes through PCIe
    through_pcie = hw.link in ("pcie", "none") or (hw.link == "nvlink-bridge" and ranks > 2)
    link = 0.0 if through_pcie else hw.link_bandwidth_bytes_per_s
    link = link or hw.pcie_bandwidth_bytes_per_s or _ASSUMED_BYTES_PER_S
    speed_of_light = 2 * (ranks - 1) / ranks * num_bytes / link
    own, nccl = (device.curves.find(f"all_reduce.{kernel}") for kernel in ("custom", "nccl"))
    if own is None or nccl is None or through_pcie:
        return _PCIE_START_S * ranks + speed_of_light / _PCIE_LINK_RATIO
    below, multicast_below = device.all_reduce_limits(ranks)
    shape = (speed_of_light, float(ranks), num_bytes)
    multicast_s = o.nvls_start_s + num_bytes / (o.nvls_bytes_per_s * link / 450e9)
    larger = np.where(num_bytes < multicast_below, multicast_s, nccl.time_s(*shape))
    return np.where(num_bytes < below, own.time_s(*shape), larger)


def experts_s(
    device: Device, model: ModelShape, group: LayerGroup, ranks: int, expert_parallel: bool, tokens: np.ndarray
) -> np.ndarray:
    """The routed experts of one layer, router included, on one GPU of ``ranks``."""
    dtype, h = model.expert_dtype, float(model.hidden_size)
    experts = max(1.0, group.num_experts / ranks) if expert_parallel else float(group.num_experts)
    width = float(group.expert_width) if expert_parallel else group.expert_width / ranks
    share = group.experts_per_token / group.num_experts
    touched = experts * (1.0 - (1.0 - share) ** tokens)
    rows = tokens * share * experts  # token-expert pairs on this GPU
    native = device.multiplies(dtype)
    moved = touched * 3 * h * width * WEIGHT_BYTES[dtype] + (2 * tokens * h + 4 * rows * width) * 2
    names = {"fp8_block": ("moe.fp8_block", "moe.fp8"), "nvfp4": ("moe.fp8",), "int8": ("moe.fp8",)}
    wanted = names.get(dtype, (f"moe.{dtype}",)) if native or dtype in WEIGHT_ONLY else ()
    if expert_parallel:  # whole experts, and an uneven share of the rows
        wanted = tuple(name + suffix for name in wanted for suffix in (".ep", ""))
    curve = device.curves.find(*wanted, *(("moe.bf16.ep",) if expert_parallel else ()), "moe.bf16")
    peak = device.peak(dtype if native else "bf16")
    time = device.timed(curve, moved, 6 * rows * h * width, peak, tokens * share, width, experts)
    time = time * device.overheads.experts_slowdown
    # FP8 on an A100: no table of experts whose weights are expanded first is known
    if curve is not None and not native and dtype not in WEIGHT_ONLY:
        time = time * device.overheads.weight_only_slowdown
    if dtype == "mxfp4" and device.hardware.peak_flops.get("fp8") and "fp4" not in device.hardware.peak_flops:
        o = device.overheads
        time = time * (1.0 + o.mxfp4_extra_ratio * tokens / (tokens + o.mxfp4_extra_tokens))
    return time + gemm_s(device, tokens, group.num_experts, h, "bf16")


def elementwise_s(device: Device, num_kernels: float, num_bytes: np.ndarray) -> np.ndarray:
    """``num_kernels`` small kernels that move ``num_bytes`` together."""
    o = device.overheads
    moving = o.elementwise_slowdown * num_bytes / (_ELEMENTWISE_BANDWIDTH_RATIO * device.bandwidth)
    return num_kernels * o.small_kernel_s + moving


def layer_tokens_s(
    device: Device, model: ModelShape, group: LayerGroup, tp: int, expert_parallel: bool, m: np.ndarray
) -> np.ndarray:
    """One layer besides attention, against the number of tokens ``m``."""
    h, dtype = float(model.hidden_size), model.dense_dtype
    heads, kv = max(1.0, group.num_heads / tp), max(1.0, group.num_kv_heads / tp)
    total = np.zeros_like(m)
    if group.mla:
        latent = float(group.query_latent or h)
        down = group.kv_latent + group.query_latent
        total += gemm_s(device, m, down, h, dtype)  # every rank holds the down projections whole
        total += gemm_s(device, m, heads * group.qk_head_dim, latent, dtype)
        total += 2 * gemm_s(device, m, heads * group.v_head_dim, group.kv_latent - 64, "bf16")  # absorbed projections
        total += gemm_s(device, m, h, heads * group.v_head_dim, dtype)
        columns = heads * (group.qk_head_dim + group.v_head_dim)
    else:
        total += gemm_s(device, m, (heads + 2 * kv) * group.head_dim, h, dtype)
        total += gemm_s(device, m, h, heads * group.head_dim, dtype)
        columns = (heads + 2 * kv) * group.head_dim
    if group.mlp_width:
        total += gemm_s(device, m, (group.mlp_matrices - 1) * group.mlp_width / tp, h, dtype)
        total += gemm_s(device, m, h, group.mlp_width / tp, dtype)
    o = device.overheads
    kernels = o.small_kernels_per_layer
    if group.num_experts:
        total += experts_s(device, model, group, tp, expert_parallel, m)
        kernels = o.small_kernels_per_moe_layer
    total += elementwise_s(device, kernels, 2 * m * (8 * h + 2 * columns + 3 * group.mlp_width / tp))
    return total + 2 * all_reduce_s(device, 2 * m * h, tp)


def head_rows_s(device: Device, model: ModelShape, tp: int, rows: np.ndarray) -> np.ndarray:
    """LM head and sampler against the number of sampled rows (vLLM samples from float32 logits)."""
    time = gemm_s(device, rows, model.vocab_size / tp, float(model.hidden_size), model.head_dtype)
    time = time + all_reduce_s(device, rows * model.vocab_size, tp)  # the logits are gathered: half an all-reduce
    return time + elementwise_s(device, 8.0, 3 * 4 * rows * model.vocab_size)
