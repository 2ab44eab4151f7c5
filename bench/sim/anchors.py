"""Ratios that published measurements agree on, beside the same ratios predicted: generations, precisions, TP, KV limits.

The published figures are TensorRT-LLM's at full load (medians over equal shapes). Predictions are of vLLM, so ratios
between precisions and TP sizes need not agree: other kernels and collectives. They are shown with that said.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from bench.catalog.hardware import load_hardware
from bench.catalog.memory import fit
from bench.errors import BenchError
from bench.sim.accuracy import run_point
from bench.sim.ground_truth import Point, model_of

_MEMORY_SHARE = 0.95
_SHAPES = ((128, 128), (128, 2048), (2048, 128), (2048, 2048))
#: (name, numerator, denominator, published median, published range); engines are (gpu, model, quantisation, TP).
_RATIOS = (
    ("H100/A100, FP16, 8B", ("h100-sxm", "llama-3.1-8b", "none", 1), ("a100-80-sxm", "llama-3.1-8b", "none", 1), 1.90),
    ("H100/A100, FP16, 70B TP4", ("h100-sxm", "llama-3.1-70b", "none", 4), ("a100-80-sxm", "llama-3.1-70b", "none", 4), 1.94),
    ("H100 FP8/FP16, 8B", ("h100-sxm", "llama-3.1-8b", "fp8", 1), ("h100-sxm", "llama-3.1-8b", "none", 1), 2.00),
    ("H100 FP8/FP16, 70B TP4", ("h100-sxm", "llama-3.1-70b", "fp8", 4), ("h100-sxm", "llama-3.1-70b", "none", 4), 1.86),
    ("H200/H100, FP8, 8B", ("h200-sxm", "llama-3.1-8b", "fp8", 1), ("h100-sxm", "llama-3.1-8b", "fp8", 1), 1.21),
    ("H200/H100, FP8, 70B TP2", ("h200-sxm", "llama-3.1-70b", "fp8", 2), ("h100-sxm", "llama-3.1-70b", "fp8", 2), 1.31),
)  # fmt: skip
_TP_SCALING = {1: 2823.0, 2: 5165.0, 4: 8911.0, 8: 13181.0}  # 70B FP8, H200, 1000/1000
_KV_LIMITED = {1: 912.0, 2: 6170.0}  # 70B FP8, H100, 128/2048
#: vLLM 0.30, Qwen3-8B FP8, H100, 128/1024: concurrency -> output tokens/s.
_QWEN3_8B = {1: 214.0, 16: 3027.0, 64: 8621.0, 128: 12176.0, 256: 15264.0}


def full_load(engine: tuple[str, str, str, int], isl: int, osl: int) -> float:
    """Output tokens/s with everything queued at once, set up as the published TensorRT-LLM runs were.

    8-bit KV cache under FP8, 0.95 of the memory, and as many requests at once as fit at full length: TensorRT-LLM's
    default scheduler never evicts a request. nan where the model does not fit.
    """
    gpu, model, quantization, tp = engine
    kv = "fp8" if quantization == "fp8" else None
    tokens, at_once = 2048, 1024
    for _ in range(2):  # fewer requests at once need less memory beside the cache, which lets more in
        room = fit(
            model_of(model), load_hardware(gpu), tp=tp, quantization=quantization, kv_cache_dtype=kv, max_model_len=isl + osl + 16,
            gpu_memory_utilization=_MEMORY_SHARE, max_num_batched_tokens=tokens, max_num_seqs=max(at_once, 1),
        )  # fmt: skip
        fitting = dataclasses.replace(room, max_num_seqs=1024) if room.fits else None
        at_once = fitting.max_concurrency(isl, osl) if fitting else 0
    if not at_once:
        return math.nan
    num_requests = min(8 * min(at_once, 1024), 4000)
    point = Point(
        "anchor", "anchor", "vllm", (0, 32), gpu, model, quantization, quantization, tp, False, isl, osl, 1.0, "offline",
        num_requests, num_requests, min(at_once, 1024), max(tokens, at_once), kv_cache_dtype=kv, memory_share=_MEMORY_SHARE,
    )  # fmt: skip
    return _rate(point)


def _rate(point: Point) -> float:
    """Output tokens/s in the middle of the run, without its ramp and tail: the published runs are long."""
    try:
        result = run_point(point).result
    except BenchError:
        return math.nan
    low, high = 0.15 * result.end_s, 0.8 * result.end_s
    steps = result.steps
    inside = (steps["end_s"] > low) & (steps["end_s"] <= high)
    return float(steps["decode_requests"][inside].sum() + steps["prefill_requests"][inside].sum()) / (high - low)


def closed_loop(concurrency: int) -> float:
    """Output tokens/s of Qwen3-8B FP8 on an H100 at 128/1024 in a closed loop."""
    engine = ("h100-sxm", "qwen3-8b", "fp8_block", 1)
    gpu, model, quantization, tp = engine
    base = Point(
        "a",
        "a",
        "vllm",
        (0, 30),
        gpu,
        model,
        quantization,
        quantization,
        tp,
        False,
        128,
        1024,
        1.0,
        "closed_loop",
        1,
        1,
        None,
        None,
    )
    return _rate(dataclasses.replace(base, concurrency=concurrency, num_requests=max(4, 6 * concurrency)))


def anchor_lines() -> Iterator[str]:
    """One line an anchor: predicted, published, difference."""
    for c, published in _QWEN3_8B.items():
        found = closed_loop(c)
        yield f"{f'vLLM 0.30, Qwen3-8B FP8, H100, 128/1024, concurrency {c}':62s} {found:8.0f} tok/s   published {published:8.0f}   {found / published - 1:+.0%}"
    for name, above, below, published in _RATIOS:
        found = float(np.nanmedian([full_load(above, i, o) / full_load(below, i, o) for i, o in _SHAPES]))
        yield f"{name:62s} {found:8.2f} x       published {published:8.2f}   {found / published - 1:+.0%}"
    scaling = {tp: full_load(("h200-sxm", "llama-3.1-70b", "fp8", tp), 1000, 1000) for tp in _TP_SCALING}
    for tp, published in _TP_SCALING.items():
        found, wanted = scaling[tp] / scaling[1], published / _TP_SCALING[1]
        if tp > 1:
            yield f"{f'70B FP8 on H200, 1000/1000, TP {tp} over TP 1':62s} {found:8.2f} x       published {wanted:8.2f}   {found / wanted - 1:+.0%}"
    for tp, published in _KV_LIMITED.items():
        found = full_load(("h100-sxm", "llama-3.1-70b", "fp8", tp), 128, 2048)
        yield f"{f'70B FP8 on {tp} H100, 128/2048 (KV cache decides)':62s} {found:8.0f} tok/s   published {published:8.0f}   {found / published - 1:+.0%}"
