"""TensorRT-LLM at full load, to compare with what NVIDIA publishes of it: its memory, its limits, its kernels.

The generation and precision ratios that planners know (H100 over A100, FP8 over FP16, H200 over H100) are TensorRT-LLM's,
with everything queued at once. vLLM need not share them, so they are predicted for the engine that they were measured on:

* the KV cache gets ``kv_cache_free_gpu_mem_fraction`` of what is *free once the engine is loaded*, not of the whole device;
* no request is ever evicted (``GUARANTEED_NO_EVICT``): as many run as fit at their full length;
* ``trtllm-bench`` builds the engine for the lengths of the benchmark: :func:`engine_limits` is its rule;
* FP8 engines keep an FP8 KV cache;
* kernels are vLLM's curves times a handful of ratios, fitted on a few published rows (``configs/efficiency/
  tensorrt_llm.yaml``, ``scripts/fit_tensorrt_llm.py``) and graded on all others.

A step is decided by the same scheduler as everywhere else: where nothing is evicted and the queue is never empty,
in-flight batching and vLLM's scheduling do the same.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.catalog.hardware import load_hardware
from bench.catalog.memory import NCCL_BYTES, activation_bytes
from bench.errors import BadInput
from bench.load.schedule import offline
from bench.records import Request
from bench.sim.compiled import simulate
from bench.sim.efficiency import EFFICIENCY_FOLDER
from bench.sim.ground_truth import Point, model_of, published_points
from bench.sim.inputs import Fleet, Replica, prepare
from bench.sim.model_shape import shape_of
from bench.sim.op_times import Overheads
from bench.sim.scheduler import SchedulerConfig
from bench.sim.step_time import changed, coefficients, device_of, load_overheads

#: ``--kv_cache_free_gpu_mem_fraction 0.95`` of the published commands.
KV_CACHE_FREE_GPU_MEM_FRACTION = 0.95
#: CUDA context, workspace and decoder buffers of the C++ runtime; an estimate.
_RUNTIME_BYTES = int(0.8 * 2**30)
_GRAPH_TOKENS = 2048  # launches cost no host time here: the runtime is C++, and its steps are captured or short
_BLOCK = 16
_ROUNDS, _MOST_REQUESTS = 2.2, 6000
DENSE = ("llama-3.1-8b", "mistral-7b", "llama-3.1-70b", "llama-3.1-405b")
GPUS = ("a100-80-pcie", "a100-80-sxm", "h100-sxm", "h200-sxm")
SOURCE = "NVIDIA TensorRT-LLM perf overview"


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """``configs/efficiency/tensorrt_llm.yaml``: ratios to vLLM's overheads, and a 90 % interval found on rows left out."""

    source: str
    values: Mapping[str, float]
    interval: tuple[float, float]

    def overheads(self) -> Overheads:
        return changed(load_overheads().overheads, **self.values)


@functools.lru_cache(maxsize=2)
def load_engine_profile(path: Path = EFFICIENCY_FOLDER / "tensorrt_llm.yaml") -> EngineProfile:
    """Read the profile. Raises BadInput where the file cannot be used."""
    from ruamel.yaml import YAML, YAMLError

    try:
        data = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        low, high = data["interval"]
        values = {k: float(v) for k, v in data["overheads"].items()}
        profile = EngineProfile(str(data["source"]), values, (float(low), float(high)))
        profile.overheads()
        return profile
    except (OSError, YAMLError, KeyError, TypeError, ValueError) as e:
        raise BadInput(f"not an engine profile: {e}", where=str(path), next_step="restore the file") from e


def fitted_on(point: Point) -> bool:
    """The published rows that the profile was fitted on: none of Llama-3.1-8B or 405B, of A100 PCIe, or of 0.17."""
    if point.version == (0, 14):
        return (point.model, point.gpu, point.tp) in (
            ("mistral-7b", "h100-sxm", 1), ("llama-3.1-70b", "a100-80-sxm", 4),
            ("llama-3.1-70b", "h200-sxm", 1), ("llama-3.1-70b", "h200-sxm", 4),
        )  # fmt: skip
    return point.version == (0, 20) and (point.model, point.gpu, point.tp) == ("llama-3.1-70b", "h100-sxm", 1)


def published_full_load() -> list[Point]:
    """Published full-load rows of dense models on the GPUs that have curves of their own, and A100 PCIe."""
    points, _ = published_points(engines=("TensorRT-LLM",))
    return [p for p in points if p.source.startswith(SOURCE) and p.model in DENSE and p.gpu in GPUS]


def engine_limits(requests_in_cache: float, isl: float, osl: float) -> tuple[int, int]:
    """(max_batch_size, max_num_tokens) that ``trtllm-bench`` builds an engine with for prompts of ``isl`` and outputs of ``osl``.

    Room for every request that the cache holds and for the prompts that replace finished ones meanwhile, rounded up; at
    least 2,048 tokens (TensorRT-LLM, ``tensorrt_llm/bench/build/tuning.py``).
    """
    batch = min(requests_in_cache, 4096.0)
    tokens = min(batch * (1 + isl / osl), 32768.0)
    step = 32 if batch < 256 else 128 if batch < 1024 else 256
    token_step = 256 if tokens < 4096 else 512 if tokens < 8192 else 1024
    return max(64, step * math.ceil(batch / step)), max(2048, token_step * math.ceil(tokens / token_step))


@dataclass(frozen=True, slots=True)
class FullLoad:
    """How a row runs: requests at once, tokens a step, and the KV cache's dtype."""

    num_running: int
    max_num_tokens: int
    kv_cache_dtype: str | None


def full_load(point: Point) -> FullLoad:
    """Limits of ``point``'s engine; ``num_running`` is 0 where the model does not fit."""
    model, hardware = model_of(point.model), load_hardware(point.gpu)
    kv = point.kv_cache_dtype or ("fp8" if point.quantization in ("fp8", "fp8_block") else None)
    weights = max(model.stage_weight_bytes(point.quantization, point.tp, 1, 1))
    groups = model.kv_groups(kv, point.tp, (0, model.num_layers))
    per_request = sum(g.num_layers * g.page_bytes_per_token for g in groups) * (point.isl + point.osl)
    free = hardware.usable_memory_bytes - weights
    estimate = KV_CACHE_FREE_GPU_MEM_FRACTION * free / per_request
    if estimate < 1:
        return FullLoad(0, 0, kv)
    batch, tokens = engine_limits(estimate, point.isl, point.osl)
    free -= activation_bytes(model, tokens, 1, point.tp, 1) + _RUNTIME_BYTES + (NCCL_BYTES if point.tp > 1 else 0)
    running = min(batch, int(KV_CACHE_FREE_GPU_MEM_FRACTION * free // per_request))
    return FullLoad(max(running, 0), tokens, kv)


def full_load_rate(point: Point, overheads: Overheads | None = None) -> float:
    """Output tokens/s of TensorRT-LLM with everything queued, in the middle half of the run: published runs are long.

    nan where the model does not fit.
    """
    setup = full_load(point)
    if setup.num_running < 1:
        return math.nan
    key = (point.gpu, point.model, point.quantization, setup.kv_cache_dtype, point.tp)
    array = _coefficients(overheads or load_engine_profile().overheads(), *key)
    isl, osl, running = int(point.isl), int(point.osl), setup.num_running
    blocks = (-(-(isl + osl) // _BLOCK) + 1) * (running + 1) + 2
    config = SchedulerConfig(
        max_num_seqs=running, max_num_batched_tokens=max(setup.max_num_tokens, running), max_model_len=isl + osl,
        num_blocks=blocks, block_size=_BLOCK, enable_prefix_caching=False,
    )  # fmt: skip
    count = min(max(int(_ROUNDS * running), running + 8), _MOST_REQUESTS)
    requests = tuple(Request(index=i, osl=osl, isl=isl) for i in range(count))
    result = simulate(prepare(offline(requests), Fleet((Replica(config, array),)), record_tokens=False))
    low, high = 0.25 * result.end_s, 0.75 * result.end_s
    inside = (result.steps["end_s"] > low) & (result.steps["end_s"] <= high)
    produced = result.steps["decode_requests"][inside].sum() + result.steps["prefill_requests"][inside].sum()
    return float(produced) / (high - low)


@functools.lru_cache(maxsize=512)
def _coefficients(
    overheads: Overheads, gpu: str, model: str, quantization: str | None, kv_cache_dtype: str | None, tp: int
) -> np.ndarray:
    device = dataclasses.replace(device_of(load_hardware(gpu)), overheads=overheads)
    return coefficients(shape_of(model_of(model), quantization, kv_cache_dtype), device, tp, 1, False, _GRAPH_TOKENS)
