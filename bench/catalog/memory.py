"""What fits: weights, activations and KV cache of a model on a GPU, by vLLM's rules.

vLLM asks for ``ceil(gpu_memory_utilization * total)`` bytes, subtracts what a profiling run at
``max_num_batched_tokens`` leaves it with (weights, the peak of activations, what CUDA and NCCL take) and an estimate of
its CUDA graphs, and cuts the rest into blocks of ``block_size`` tokens. Weights and bytes per block are exact here; the
other three are estimates with their source at :data:`ACTIVATION_FACTOR` and below, so a capacity carries their sum as
``uncertain_bytes``. A measured capacity (the engine's log) should replace it where there is one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from bench.catalog.arch import KvGroup, ModelArch
from bench.catalog.hardware import Hardware
from bench.catalog.quant import DTYPE_BYTES
from bench.errors import BadInput
from bench.units import GIB, MIB, bytes_text

#: vLLM's default since 0.22 (0.90 before).
GPU_MEMORY_UTILIZATION = 0.92
#: Live activations of a profile run over the sum of hidden state, residual and the widest pair of intermediates. From
#: public vLLM start logs ("PyTorch activation peak memory takes"): Qwen2.5-1.5B at 32,768 tokens 2.02 GiB, sum 1.83.
ACTIVATION_FACTOR = 1.1
#: Bytes per logit while sampling: 16-bit logits, their fp32 copy, one fp32 working copy (vLLM's V2 runner profiles
#: without top-k/top-p). The V1 runner sorts as well and took 40: logs of Llama-3.1-8B (1.19 to 1.26 GiB at 256 sequences
#: of 128,256 logits), Qwen3-8B (1.45 at 151,936) and Qwen2.5-7B (1.42 at 152,064) agree within 4 %.
SAMPLER_BYTES_PER_LOGIT = 10.0
SAMPLER_BYTES_PER_LOGIT_V1 = 40.0
#: What CUDA and libraries take beyond PyTorch: 0.05 to 0.26 GiB in the same logs on one GPU; NCCL adds about 0.4.
NON_TORCH_BYTES = int(0.15 * GIB)
NCCL_BYTES = int(0.4 * GIB)
#: CUDA graphs (FULL_AND_PIECEWISE, default sizes): about 0.5 GiB for 32 layers in public logs.
CUDA_GRAPH_BYTES_PER_LAYER = 16 * MIB
#: The estimates above are good to about this share of their sum.
_ESTIMATE_UNCERTAINTY_RATIO = 0.5

Usage = Literal["llm", "server"]


def engine_defaults(hardware: Hardware, usage: Usage = "llm") -> tuple[int, int]:
    """vLLM 0.32's defaults (max_num_batched_tokens, max_num_seqs) for the offline class or the API server.

    From 160 GiB: 16384 and 1024; from 70 GiB and not an A100: 16384 (server 8192) and 1024; everything else, A100 80 GB
    included: 8192 (server 2048) and 256. Memory is what the device reports.
    """
    total = hardware.usable_memory_bytes
    if total >= 160 * GIB:
        return 16384, 1024
    if total >= 70 * GIB and "a100" not in hardware.name.lower():
        return (16384 if usage == "llm" else 8192), 1024
    return (8192 if usage == "llm" else 2048), 256


def default_block_size(model: ModelArch, hardware: Hardware) -> int:
    """Tokens of a KV block: 16; latent attention takes its kernel's 64 (Hopper) or 128 (Blackwell); CPU backend 128."""
    if hardware.kind == "cpu":
        return 16 if model.mla is not None else 128
    major = int((hardware.compute_capability or "0").split(".")[0])
    if model.mla is not None and major >= 9:
        return 128 if major >= 10 else 64
    return 16


def bytes_per_block(groups: list[KvGroup], block_size: int) -> int:
    """Bytes that one block takes in the pool of one rank: a page for every layer slot of a group."""
    return max(g.num_slots * g.page_bytes_per_token * block_size for g in groups)


def blocks_per_request(groups: list[KvGroup], num_tokens: int, block_size: int) -> int:
    """Blocks that a sequence holds once it is ``num_tokens`` long: one table a group, all drawn from one pool.

    A sliding window keeps the blocks that its last ``window`` tokens touch (one more than fits exactly, as it may start
    inside a block); a chunked layer keeps those of the current chunk, at most a whole chunk.
    """
    total = 0
    for g in groups:
        whole = math.ceil(num_tokens / block_size)
        if g.attention == "sliding" and g.window:
            whole = min(whole, math.ceil(g.window / block_size) + 1)
        elif g.attention == "chunked" and g.window:
            whole = min(whole, math.ceil(g.window / block_size))
        total += whole
    return total


def _admission_blocks(groups: list[KvGroup], num_tokens: int, in_flight: int, block_size: int) -> int:
    """Blocks that vLLM reckons with for one request of ``num_tokens`` when it prints its capacity."""
    total = 0
    for g in groups:
        held, extra = num_tokens, 0
        if g.attention == "sliding" and g.window:
            held, extra = min(g.window - 1 + in_flight, num_tokens), 1
        elif g.attention == "chunked" and g.window:
            held = min(g.window + in_flight, num_tokens)
        total += math.ceil(held / block_size) + extra
    return total


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """The memory of one GPU (the fullest rank) when it serves a model. Bytes unless the name says otherwise.

    Attributes:
        total_bytes: what CUDA reports; requested_bytes: the share that vLLM asks for.
        kv_cache_bytes: left for the cache (negative when nothing is); num_blocks: of ``block_size`` tokens.
        kv_capacity_tokens: as vLLM prints it ("GPU KV cache size"): sequences of max_model_len that fit, times that.
        uncertain_bytes: how far kv_cache_bytes may be off either way, from the three estimated parts.
        fits: weights and at least one block; ``reason`` says what is wrong otherwise.
    """

    model: str
    hardware: str
    tp: int
    pp: int
    ep: int
    quantization: str
    kv_cache_dtype: str
    gpu_memory_utilization: float
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    total_bytes: int
    requested_bytes: int
    weight_bytes: float
    activation_bytes: float
    cuda_graph_bytes: float
    non_torch_bytes: float
    kv_cache_bytes: float
    uncertain_bytes: float
    block_size: int
    bytes_per_block: int
    num_blocks: int
    kv_bytes_per_token: int
    kv_capacity_tokens: int
    groups: tuple[KvGroup, ...]
    fits: bool
    reason: str | None = None

    @property
    def num_gpus(self) -> int:
        return self.tp * self.pp

    @property
    def usable_blocks(self) -> int:
        """Blocks for requests: one is vLLM's null block."""
        return max(0, self.num_blocks - 1)

    def equivalent_blocks(self, num_tokens: int) -> int:
        """Blocks of a single table that would hold as many requests of ``num_tokens`` as the groups do.

        For a simulator that keeps one block table: the same for a model without windows, more for one with them.
        """
        if not self.groups or num_tokens < 1:
            return 0
        need = blocks_per_request(list(self.groups), num_tokens, self.block_size)
        return self.usable_blocks * math.ceil(num_tokens / self.block_size) // need + 1

    @property
    def longest_request_tokens(self) -> int:
        """The longest request that the empty cache holds, by vLLM's start-up check; it refuses a longer max_model_len."""
        low, high = 0, self.max_model_len
        if not self.groups:
            return 0
        in_flight = 2 * self.max_num_batched_tokens
        while low < high:
            middle = (low + high + 1) // 2
            enough = _admission_blocks(list(self.groups), middle, in_flight, self.block_size) <= self.num_blocks
            low, high = (middle, high) if enough else (low, middle - 1)
        return low

    def max_concurrency(self, isl: int, osl: int) -> int:
        """Requests of ``isl`` + ``osl`` tokens that the cache holds at full length at once, at most max_num_seqs.

        The last output token is never written to the cache, so a request holds isl + osl - 1 positions.
        """
        if isl < 1 or osl < 1:
            raise BadInput(f"ISL and OSL must be at least 1, got {isl} and {osl}")
        if isl + osl > self.max_model_len:
            return 0
        need = blocks_per_request(list(self.groups), isl + osl - 1, self.block_size)
        return min(self.usable_blocks // need, self.max_num_seqs)


def activation_bytes(
    model: ModelArch,
    tokens: int,
    num_seqs: int,
    tp: int = 1,
    ep: int = 1,
    sampler_bytes: float = SAMPLER_BYTES_PER_LOGIT,
) -> float:
    """Peak of activations in vLLM's profile run on one rank: the larger of the widest layer and the sampler."""
    act = DTYPE_BYTES[model.dtype]
    factor = 3 if model.gated_mlp else 2
    widths = []
    if any(not k.moe for k in model.layers):
        widths.append(factor * model.intermediate_size / tp)
    if model.moe is not None:
        wide = model.moe.intermediate_size / (1 if ep > 1 else tp)
        k = model.moe.experts_per_token / (ep if ep > 1 else 1)
        widths.append(k * (max((factor - 1) * wide, model.hidden_size) + wide))
    head_dim = model.mla.qk_head_dim + model.mla.v_head_dim if model.mla else 2 * model.head_dim
    widths.append(2 * model.num_heads / tp * head_dim)
    layer = ACTIVATION_FACTOR * tokens * (2 * model.hidden_size + max(widths)) * act
    return max(layer, sampler_bytes * num_seqs * model.vocab_size)


def _absorbed_bytes(model: ModelArch, tp: int, num_layers: int) -> float:
    """16-bit copies of the latent up-projections that vLLM makes for decoding (W_UK transposed and W_UV)."""
    if model.mla is None:
        return 0.0
    a = model.mla
    per_layer = a.kv_lora_rank * model.num_heads / tp * (a.qk_nope_head_dim + a.v_head_dim)
    return per_layer * num_layers * DTYPE_BYTES[model.dtype]


@dataclass(frozen=True, slots=True)
class _Taken:
    """What the worst rank holds besides its KV cache, in bytes."""

    weight_bytes: float = 0.0
    activation_bytes: float = 0.0
    cuda_graph_bytes: float = 0.0
    non_torch_bytes: float = 0.0

    @property
    def total_bytes(self) -> float:
        return self.weight_bytes + self.activation_bytes + self.cuda_graph_bytes + self.non_torch_bytes


def _taken(
    model: ModelArch,
    hardware: Hardware,
    tp: int,
    pp: int,
    ep: int,
    quantization: str | None,
    num_batched_tokens: int,
    num_seqs: int,
    enforce_eager: bool,
) -> _Taken:
    stages = model.stages(pp)
    sizes = model.stage_weight_bytes(quantization, tp, pp, ep)
    weights = max(w + _absorbed_bytes(model, tp, b - a) for w, (a, b) in zip(sizes, stages, strict=True))
    most_layers = max(b - a for a, b in stages)
    no_graphs = enforce_eager or hardware.kind == "cpu"
    return _Taken(
        weights,
        activation_bytes(model, num_batched_tokens, num_seqs, tp, ep),
        0.0 if no_graphs else float(CUDA_GRAPH_BYTES_PER_LAYER * most_layers),
        float(NON_TORCH_BYTES + (NCCL_BYTES if tp * pp > 1 else 0)),
    )


def fit(
    model: ModelArch,
    hardware: Hardware,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    quantization: str | None = None,
    kv_cache_dtype: str | None = None,
    gpu_memory_utilization: float | None = None,
    max_model_len: int | None = None,
    max_num_batched_tokens: int | None = None,
    max_num_seqs: int | None = None,
    block_size: int | None = None,
    enforce_eager: bool = False,
    usage: Usage = "llm",
    kv_cache_memory_bytes: int | None = None,
) -> MemoryFit:
    """What vLLM would have left for its KV cache. Options are vLLM's own; None is its default.

    ``kv_cache_memory_bytes`` sets the cache's bytes outright (as vLLM's option does). Raises BadInput for values out of
    range; a model that cannot be divided or does not fit is an answer (``fits`` False), not an error.
    """
    share = GPU_MEMORY_UTILIZATION if gpu_memory_utilization is None else gpu_memory_utilization
    if not 0 < share <= 1:
        raise BadInput(f"gpu_memory_utilization: expected a share in (0, 1], got {share}")
    batched, seqs = engine_defaults(hardware, usage)
    batched = max_num_batched_tokens or batched
    seqs = min(max_num_seqs or seqs, batched)
    length = max_model_len or model.max_position
    block = block_size or default_block_size(model, hardware)
    if block < 1 or length < 1 or batched < 1:
        raise BadInput("block_size, max_model_len and max_num_batched_tokens must be at least 1")
    requested = math.ceil(share * hardware.usable_memory_bytes)
    problem = model.parallel_problem(tp, pp, ep)
    taken, groups, left = _Taken(), list[KvGroup](), 0.0
    if problem is None:
        taken = _taken(model, hardware, tp, pp, ep, quantization, batched, seqs, enforce_eager)
        left = requested - taken.total_bytes
        # the group layout of the stage with most layers: it has the largest blocks, and vLLM takes the least count
        groups = model.kv_groups(kv_cache_dtype, tp, max(model.stages(pp), key=lambda s: s[1] - s[0]))
    if kv_cache_memory_bytes is not None:
        left = float(kv_cache_memory_bytes)
    per_block = bytes_per_block(groups, block) if groups else 0
    num_blocks = max(0, int(left // per_block)) if per_block else 0
    in_flight = 2 * batched if hardware.kind == "gpu" else batched
    capacity = num_blocks / _admission_blocks(groups, length, in_flight, block) * length if num_blocks and groups else 0
    reason = problem
    if reason is None and num_blocks < 2:
        missing = bytes_text(max(per_block * 2 - left, 0))
        reason = f"{missing} short: weights take {bytes_text(taken.weight_bytes)} of {bytes_text(requested)}"
    doubt = 0.0 if kv_cache_memory_bytes is not None else taken.total_bytes - taken.weight_bytes
    return MemoryFit(
        model=model.name, hardware=hardware.name, tp=tp, pp=pp, ep=ep, quantization=model.quant(quantization).name,
        kv_cache_dtype=str(kv_cache_dtype or "auto"), gpu_memory_utilization=share, max_model_len=length,
        max_num_batched_tokens=batched, max_num_seqs=seqs, total_bytes=hardware.usable_memory_bytes, requested_bytes=requested,
        weight_bytes=taken.weight_bytes, activation_bytes=taken.activation_bytes, cuda_graph_bytes=taken.cuda_graph_bytes,
        non_torch_bytes=taken.non_torch_bytes, kv_cache_bytes=left, uncertain_bytes=_ESTIMATE_UNCERTAINTY_RATIO * doubt,
        block_size=block, bytes_per_block=per_block, num_blocks=num_blocks,
        kv_bytes_per_token=sum(g.num_layers * g.page_bytes_per_token for g in groups), kv_capacity_tokens=int(capacity),
        groups=tuple(groups), fits=reason is None, reason=reason,
    )  # fmt: skip


def layouts(max_gpus: int = 16, gpus_per_node: int = 8) -> list[tuple[int, int]]:
    """(TP, PP) pairs in the order they are tried: tensor parallel inside a node, pipeline stages across nodes."""
    found = []
    n = 1
    while n <= max_gpus:
        found.append((min(n, gpus_per_node), max(1, n // gpus_per_node)))
        n *= 2
    return found


def smallest(
    model: ModelArch,
    hardware: Hardware,
    isl: int = 1024,
    osl: int = 1024,
    concurrency: int = 1,
    max_gpus: int = 64,
    **options: Any,
) -> MemoryFit | None:
    """The layout with the fewest GPUs that holds ``concurrency`` requests of ISL/OSL at once, or None.

    ``options`` are those of :func:`fit`. Layouts are tried by :func:`layouts`.
    """
    for tp, pp in layouts(max_gpus):
        found = fit(model, hardware, tp=tp, pp=pp, **options)
        if found.fits and found.max_concurrency(isl, osl) >= concurrency:
            return found
    return None
