"""TensorRT-LLM at full load, to compare with what NVIDIA publishes of it: its memory, its limits, its kernels.

The generation and precision ratios that planners know (H100 over A100, FP8 over FP16, H200 over H100) are TensorRT-LLM's,
with everything queued at once. vLLM need not share them, so they are predicted for the engine that they were measured on:

* the KV cache gets ``kv_cache_free_gpu_mem_fraction`` of what is *free once the engine is loaded*, not of the whole device;
* no request is ever evicted (``GUARANTEED_NO_EVICT``): as many run as fit at their full length;
* ``trtllm-bench`` builds the engine for the lengths of the benchmark (:func:`engine_limits` is its rule); release 0.14 still
  read the limits of a few models from a file, and the C++ decoder takes memory for every request of the limit;
* the published rate is that of a whole run, ramp and tail included, of as many requests as the page says;
* FP8 engines keep an FP8 KV cache;
* small all-reduces take a kernel of its own and larger ones NCCL (:data:`OWN_ALL_REDUCE_BYTES`), none the multicast that vLLM uses;
* all-reduces of release 0.14 take longer than their kernels by a time that grows with the number of GPUs (``all_reduce_wait_s``): its rows
  miss a time a step that is proportional to the layers (32, 56 and 80 of them) and grows with TP; its cause is not known;
* kernels are vLLM's curves, tuned for every shape, times a handful of ratios, fitted on a few published rows (``configs/efficiency/
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
from bench.catalog.memory import CUDA_GRAPH_BYTES_PER_LAYER, NCCL_BYTES, activation_bytes
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
from bench.sim.step_time_kernel import HEADER, NUM_TOKEN_KNOTS

#: ``--kv_cache_free_gpu_mem_fraction 0.95`` of the published commands.
KV_CACHE_FREE_GPU_MEM_FRACTION = 0.95
#: CUDA context and workspaces; an estimate.
_RUNTIME_BYTES = int(0.8 * 2**30)
#: C++ runtime: bytes per request of ``max_batch_size`` and vocabulary entry, 16 in the decoder and 8 in the runtime buffers. Logs
#: in NVIDIA/TensorRT-LLM issues: 5.76 and 2.66 GiB for 2,048 requests, 151,936 entries and 32,768 tokens (1188; the tokens take
#: a sixth of it), 2.45 MiB of decoder for one request of 152,064 entries (2789, release 0.17).
_DECODER_BYTES_PER_LOGIT = 24
#: First release of which the published rows come from the PyTorch backend (the page says so): no such decoder, but CUDA graphs at
#: the sizes that the page lists, taken to cost what vLLM's do.
_PYTORCH_SINCE = (0, 19)
#: Release 0.14 read (max_batch_size, max_num_tokens) from ``tensorrt_llm/bench/build/benchmark_config.yml`` by model and tensor
#: parallel size (state of commit 8fcf9fc); an entry for one ``max_seq_len`` goes first.
_LIMITS_014 = {
    ("llama-3.1-8b", 1): (2048, 8192), ("mistral-7b", 1): (4098, 8192), ("llama-3.1-70b", 1): (2048, 2048),
    ("llama-3.1-70b", 2): (256, 1024), ("llama-3.1-70b", 4): (2048, 1024), ("llama-3.1-70b", 8): (8192, 16384),
    ("mixtral-8x7b", 2): (2048, 3072), ("mixtral-8x7b", 4): (8192, 8192),
}  # fmt: skip
_LIMITS_014_BY_LENGTH = {("llama-3.1-70b", 2, 4096): (2048, 1024)}
#: GPUs -> largest all-reduce in bytes that release 0.14 to 0.20 give to the one-shot kernel; NCCL does the rest (``AllReduceStrategy`` AUTO
#: in ``cpp/tensorrt_llm/plugins/ncclPlugin/allreducePlugin.cpp`` and ``thop/allreduceOp.cpp``; two-shot is disabled there, issue 2575).
OWN_ALL_REDUCE_BYTES = {2: 16e6, 4: 1e6, 8: 5e5}
_GRAPH_TOKENS = 2048  # launches cost no host time here: the runtime is C++, and its steps are captured or short
_BLOCK = 16
MODELS = ("llama-3.1-8b", "mistral-7b", "llama-3.1-70b", "llama-3.1-405b", "mixtral-8x7b", "mixtral-8x22b")
GPUS = ("a100-80-pcie", "a100-80-sxm", "h100-sxm", "h200-sxm")
SOURCE = "NVIDIA TensorRT-LLM perf overview"


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """``configs/efficiency/tensorrt_llm.yaml``: ratios to vLLM's overheads, and a 90 % interval found on rows left out.

    Attributes:
        values: what replaces vLLM's overheads; values_014: what replaces these in release 0.14, whose steps take longer.
        interval: measured / predicted.
    """

    source: str
    values: Mapping[str, float]
    values_014: Mapping[str, float]
    interval: tuple[float, float]

    def overheads(self, version: tuple[int, ...]) -> Overheads:
        """Overheads of a release."""
        later = self.values_014 if version == (0, 14) else {}
        return changed(load_overheads().overheads, **{**self.values, **later})


@functools.lru_cache(maxsize=2)
def load_engine_profile(path: Path = EFFICIENCY_FOLDER / "tensorrt_llm.yaml") -> EngineProfile:
    """Read the profile. Raises BadInput where the file cannot be used."""
    from ruamel.yaml import YAML, YAMLError

    try:
        data = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        low, high = data["interval"]
        values, values_014 = ({k: float(v) for k, v in data[key].items()} for key in ("overheads", "overheads_014"))
        profile = EngineProfile(str(data["source"]), values, values_014, (float(low), float(high)))
        profile.overheads((0, 14))
        return profile
    except (OSError, YAMLError, KeyError, TypeError, ValueError) as e:
        raise BadInput(f"not an engine profile: {e}", where=str(path), next_step="restore the file") from e


def fitted_on(point: Point) -> bool:
    """The published rows that the profile was fitted on: none of Llama-3.1-8B or 405B, of A100 PCIe, or of 0.17.

    Rows of H100 with 70B and of H200 at 20,000/2,000, release 0.14, were carried in after the fit and stay a grade.
    """
    if point.version == (0, 14) and (point.gpu, point.isl) != ("h200-sxm", 20000):
        return (point.model, point.gpu, point.tp) in (
            ("mistral-7b", "h100-sxm", 1), ("llama-3.1-70b", "a100-80-sxm", 4),
            ("llama-3.1-70b", "h200-sxm", 1), ("llama-3.1-70b", "h200-sxm", 4),
        )  # fmt: skip
    return point.version == (0, 20) and (point.model, point.gpu, point.tp) == ("llama-3.1-70b", "h100-sxm", 1)


def published_full_load() -> list[Point]:
    """Published full-load rows of dense and eight-expert models on the GPUs that have curves of their own, and A100 PCIe."""
    points, _ = published_points(engines=("TensorRT-LLM",))
    return [p for p in points if p.source.startswith(SOURCE) and p.model in MODELS and p.gpu in GPUS]


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
    batch, tokens = _limits_014(point) or engine_limits(estimate, point.isl, point.osl)
    free -= activation_bytes(model, tokens, 1, point.tp, 1) + _RUNTIME_BYTES + (NCCL_BYTES if point.tp > 1 else 0)
    if point.version < _PYTORCH_SINCE:
        free -= batch * model.vocab_size * _DECODER_BYTES_PER_LOGIT
    else:
        free -= model.num_layers * CUDA_GRAPH_BYTES_PER_LAYER
    running = min(batch, tokens, int(KV_CACHE_FREE_GPU_MEM_FRACTION * free // per_request))
    return FullLoad(max(running, 0), tokens, kv)


def _limits_014(point: Point) -> tuple[int, int] | None:
    """Limits that release 0.14 had for this engine; None for other releases and models."""
    if point.version != (0, 14):
        return None
    key = (point.model, point.tp)
    return _LIMITS_014_BY_LENGTH.get((*key, int(point.isl + point.osl)), _LIMITS_014.get(key))


def full_load_rate(point: Point, profile: EngineProfile | None = None) -> float:
    """Output tokens/s of TensorRT-LLM over a run of ``point.num_requests`` queued at once, first request to last token.

    nan where the model does not fit.
    """
    setup = full_load(point)
    if setup.num_running < 1:
        return math.nan
    key = (point.gpu, point.model, point.quantization, setup.kv_cache_dtype, point.tp)
    array = _coefficients((profile or load_engine_profile()).overheads(point.version), *key)
    isl, osl, running = int(point.isl), int(point.osl), setup.num_running
    blocks = (-(-(isl + osl) // _BLOCK) + 1) * (running + 1) + 2
    config = SchedulerConfig(
        max_num_seqs=running, max_num_batched_tokens=setup.max_num_tokens, max_model_len=isl + osl,
        num_blocks=blocks, block_size=_BLOCK, enable_prefix_caching=False,
    )  # fmt: skip
    requests = tuple(Request(index=i, osl=osl, isl=isl) for i in range(point.num_requests))
    result = simulate(prepare(offline(requests), Fleet((Replica(config, array),)), record_tokens=False))
    return point.num_requests * osl / result.end_s


@functools.lru_cache(maxsize=512)
def _coefficients(
    overheads: Overheads, gpu: str, model: str, quantization: str | None, kv_cache_dtype: str | None, tp: int
) -> np.ndarray:
    device = dataclasses.replace(
        device_of(load_hardware(gpu)), overheads=overheads, own_all_reduce_bytes=OWN_ALL_REDUCE_BYTES
    )
    found = coefficients(shape_of(model_of(model), quantization, kv_cache_dtype), device, tp, 1, False, _GRAPH_TOKENS)
    # vLLM's FP8 products switch kernels at fixed sizes and are slower at 129 rows than at 256. TensorRT-LLM times several tiles
    # for every shape and takes the best, which never loses by running fewer rows.
    by_tokens = found[HEADER : HEADER + int(found[NUM_TOKEN_KNOTS])]
    by_tokens[:] = np.minimum.accumulate(by_tokens[::-1])[::-1]
    return found
