"""A transformer's architecture and the arithmetic that needs nothing else: parameters, weight and KV-cache bytes.

Counts are exact: they equal the number of elements in the published checkpoint, without multi-token-prediction layers
(they are not loaded for ordinary serving). Everything is for the text model; a vision tower is counted apart.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from bench.catalog.quant import DTYPE_BYTES, QuantFormat, kv_dtype_bytes, quant_format
from bench.errors import BadInput

AttentionKind = Literal["full", "sliding", "chunked"]
#: vLLM pads the vocabulary to a multiple of this per rank (DEFAULT_VOCAB_PADDING_SIZE).
VOCAB_PADDING = 64


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What tells layers of one model apart: how far back they attend, and whether they hold experts.

    ``window`` is the number of keys a query may see in a sliding layer, or the chunk length of a chunked one.
    """

    attention: AttentionKind = "full"
    window: int | None = None
    moe: bool = False


@dataclass(frozen=True, slots=True)
class Mla:
    """Multi-head latent attention: keys and values live as one latent vector of kv_lora_rank + qk_rope_head_dim."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_dim(self) -> int:
        """Elements that one token takes in the cache of one layer (a single vector; there is no separate value)."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True, slots=True)
class Moe:
    """Mixture of experts: every token goes through ``experts_per_token`` of ``num_experts`` and all shared ones."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int = 0  # all shared experts together
    shared_gate: bool = False  # a learned gate on the shared expert (Qwen2-MoE)
    router_bias: bool = False
    expert_bias: bool = False

    def experts_touched(self, num_tokens: float) -> float:
        """Expected number of distinct experts that ``num_tokens`` tokens reach, with balanced routing.

        E * (1 - (1 - k/E)^n): a token misses a given expert with probability 1 - k/E, tokens are independent.
        """
        if num_tokens <= 0:
            return 0.0
        miss = 1.0 - self.experts_per_token / self.num_experts
        return self.num_experts * (1.0 - miss**num_tokens)


@dataclass(frozen=True, slots=True)
class LayerParams:
    """Elements of one layer by how they are stored and divided. See :meth:`ModelArch.layer_params`."""

    qkv: int  # query, key and value matrices, divided by heads
    qkv_replicated: int  # MLA's down projections: every TP rank holds them whole
    attention_out: int
    mlp: int  # dense MLP and shared experts
    experts: int  # routed experts
    router: int
    small: int  # norms, biases, sinks: never quantised

    @property
    def total(self) -> int:
        parts = (self.qkv, self.qkv_replicated, self.attention_out, self.mlp, self.experts, self.router, self.small)
        return sum(parts)


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Layers of one rank that share a block table, as vLLM's hybrid KV-cache manager groups them.

    ``page_bytes_per_token`` is one layer's KV bytes for one token; ``num_slots`` is how many layers a block holds
    memory for (the same for every group; a group with fewer layers wastes the rest).
    """

    attention: AttentionKind
    window: int | None
    num_layers: int
    num_slots: int
    page_bytes_per_token: int


@dataclass(frozen=True, slots=True)
class ModelArch:
    """A model as its ``config.json`` describes it. Build with :meth:`from_hf_config` or ``model.load_model``."""

    name: str
    model_type: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    layers: tuple[LayerKind, ...]
    tie_word_embeddings: bool = False
    gated_mlp: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    attention_sinks: bool = False
    norms_per_layer: int = 2
    norm_has_bias: bool = False
    mla: Mla | None = None
    moe: Moe | None = None
    num_vision_params: int = 0
    dtype: str = "bf16"
    native_quant: str | None = None
    hub_id: str | None = None
    config: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    facts: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    notes: tuple[str, ...] = ()

    @classmethod
    def from_hf_config(cls, config: dict[str, Any], name: str) -> ModelArch:
        """Read a Hugging Face ``config.json``. Raises BadInput for what is missing or not a decoder-only model."""
        from bench.catalog.hf_config import read_config

        return read_config(config, name)

    # --- parameters ---

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def is_moe(self) -> bool:
        return self.moe is not None

    def layer_kinds(self, stage: tuple[int, int] | None = None) -> dict[LayerKind, int]:
        """Kind -> number of layers, over all layers or the half-open range ``stage``."""
        first, last = stage or (0, self.num_layers)
        return dict(Counter(self.layers[first:last]))

    def layer_params(self, kind: LayerKind) -> LayerParams:
        """Elements of one layer of ``kind``."""
        h = self.hidden_size
        qkv, replicated, out, small = self._attention_params()
        small += self.norms_per_layer * h * (2 if self.norm_has_bias else 1)
        factor = 3 if self.gated_mlp else 2
        mlp = experts = router = 0
        if kind.moe and self.moe is not None:
            m = self.moe
            experts = m.num_experts * factor * h * m.intermediate_size
            router = h * m.num_experts
            mlp = factor * h * m.shared_intermediate_size
            small += h if m.shared_gate else 0
            small += m.num_experts if m.router_bias else 0
            small += m.num_experts * ((factor - 1) * m.intermediate_size + h) if m.expert_bias else 0
        else:
            mlp = factor * h * self.intermediate_size
            small += (factor - 1) * self.intermediate_size + h if self.mlp_bias else 0
        return LayerParams(qkv, replicated, out, mlp, experts, router, small)

    def _attention_params(self) -> tuple[int, int, int, int]:
        """(divided input matrices, replicated input matrices, output matrix, small) of one layer's attention."""
        h, heads = self.hidden_size, self.num_heads
        if self.mla is not None:
            a = self.mla
            down = h * (a.kv_lora_rank + a.qk_rope_head_dim) + (h * a.q_lora_rank if a.q_lora_rank else 0)
            up = a.kv_lora_rank * heads * (a.qk_nope_head_dim + a.v_head_dim)
            up += (a.q_lora_rank or h) * heads * a.qk_head_dim
            return up, down, heads * a.v_head_dim * h, a.kv_lora_rank + (a.q_lora_rank or 0)
        q, kv = heads * self.head_dim, self.num_kv_heads * self.head_dim
        small = 2 * self.head_dim if self.qk_norm else 0
        small += heads if self.attention_sinks else 0
        small += (q + 2 * kv if self.qkv_bias else 0) + (h if self.out_bias else 0)
        return h * (q + 2 * kv), 0, q * h, small

    @property
    def num_embedding_params(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def num_head_params(self) -> int:
        """Elements of the output head that are its own: none when it is tied to the embedding."""
        return 0 if self.tie_word_embeddings else self.num_embedding_params + (self.vocab_size if self.head_bias else 0)

    @property
    def num_params(self) -> int:
        """All elements: text model plus vision tower, without multi-token-prediction layers."""
        body = sum(self.layer_params(k).total * n for k, n in self.layer_kinds().items())
        final_norm = self.hidden_size * (2 if self.norm_has_bias else 1)
        return body + self.num_embedding_params + self.num_head_params + final_norm + self.num_vision_params

    @property
    def num_active_params(self) -> int:
        """Elements that one token meets: all of the text model but the experts that its router does not choose."""
        active = self.num_params - self.num_vision_params
        for kind, n in self.layer_kinds().items():
            if kind.moe and self.moe is not None:
                unused = 1.0 - self.moe.experts_per_token / self.moe.num_experts
                biases = self.moe.num_experts * (2 * self.moe.intermediate_size + self.hidden_size)
                per_layer = self.layer_params(kind).experts + (biases if self.moe.expert_bias else 0)
                active -= round(n * per_layer * unused)
        return active

    @property
    def num_matmul_params_active(self) -> int:
        """Active elements that take part in matrix products: without the embedding table (a lookup)."""
        tied = self.num_embedding_params if self.tie_word_embeddings else 0
        return self.num_active_params - self.num_embedding_params + tied

    # --- parallelism ---

    def parallel_problem(self, tp: int = 1, pp: int = 1, ep: int = 1) -> str | None:
        """Why vLLM cannot divide this model like that, or None. One clause for the user."""
        if tp < 1 or pp < 1 or ep < 1:
            return "tensor, pipeline and expert parallel sizes must be at least 1"
        if self.num_heads % tp:
            return f"{self.num_heads} attention heads are not divisible by tensor_parallel_size {tp}"
        if self.mla is None and self.num_kv_heads % tp and tp % self.num_kv_heads:
            return f"{self.num_kv_heads} KV heads neither divide nor are divided by tensor_parallel_size {tp}"
        if any(not k.moe for k in self.layers) and self.intermediate_size % tp:
            return f"intermediate_size {self.intermediate_size} is not divisible by tensor_parallel_size {tp}"
        if self.moe is not None and ep == 1 and self.moe.intermediate_size % tp:
            return f"expert width {self.moe.intermediate_size} is not divisible by tensor_parallel_size {tp}"
        if ep > 1 and self.moe is None:
            return "expert parallelism needs a mixture-of-experts model"
        if pp > self.num_layers:
            return f"{self.num_layers} layers cannot fill pipeline_parallel_size {pp}"
        return None

    def check_parallel(self, tp: int = 1, pp: int = 1, ep: int = 1) -> None:
        """Raise BadInput when :meth:`parallel_problem` has something to say."""
        problem = self.parallel_problem(tp, pp, ep)
        if problem:
            raise BadInput(f"{self.name}: {problem}", next_step="choose another size")

    def stages(self, pp: int = 1) -> list[tuple[int, int]]:
        """Half-open layer ranges of the pipeline stages, divided as vLLM does (``get_pp_indices``).

        What is left over goes one layer each to the last stages but one, counted backwards: the last stage also holds
        the head.
        """
        sizes = [self.num_layers // pp] * pp
        for i in range(2, self.num_layers % pp + 2):
            sizes[-i] += 1
        ends = [sum(sizes[: i + 1]) for i in range(pp)]
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def kv_heads_per_rank(self, tp: int = 1) -> int:
        """KV heads on a rank: divided by TP, and replicated once TP exceeds their number."""
        return max(1, self.num_kv_heads // tp)

    # --- weight bytes ---

    def quant(self, name: str | None = None) -> QuantFormat:
        """The weight format ``name``; None or "auto" is the checkpoint's own."""
        if name is None or str(name).lower() == "auto":
            return quant_format(self.native_quant or self.dtype)
        if str(name).lower() == "none":
            return quant_format(self.dtype)
        return quant_format(name)

    def matrix_bytes(self, quant: QuantFormat, experts: bool) -> float:
        """Bytes per element of an expert or of an attention/dense matrix under ``quant``."""
        if quant.experts_only and self.moe is not None and not experts:
            return DTYPE_BYTES[self.dtype]
        return quant.bytes_per_weight

    def expert_padding_ratio(self, quant: QuantFormat, tp: int = 1, ep: int = 1) -> float:
        """How much larger the experts are in memory than their weights, from alignment of both dimensions."""
        if quant.expert_alignment is None or self.moe is None:
            return 1.0
        hidden_step, width_step = quant.expert_alignment
        width = self.moe.intermediate_size / (1 if ep > 1 else tp)
        padded = math.ceil(self.hidden_size / hidden_step) * hidden_step * math.ceil(width / width_step) * width_step
        return padded / (self.hidden_size * width)

    def layer_bytes(self, kind: LayerKind, quant: QuantFormat, tp: int = 1, ep: int = 1) -> float:
        """Weight bytes of one layer on one rank."""
        p, small_bytes = self.layer_params(kind), DTYPE_BYTES[self.dtype]
        linear, expert = self.matrix_bytes(quant, experts=False), self.matrix_bytes(quant, experts=True)
        qkv = p.qkv / tp
        if self.mla is None:  # replicated KV heads take their full share on every rank
            kv_columns = 2 * self.kv_heads_per_rank(tp) * self.head_dim
            qkv = self.hidden_size * (self.num_heads // tp * self.head_dim + kv_columns)
        divided = (qkv + p.qkv_replicated + (p.attention_out + p.mlp) / tp) * linear
        experts = p.experts / (ep if ep > 1 else tp) * expert * self.expert_padding_ratio(quant, tp, ep)
        return divided + experts + (p.router + p.small) * small_bytes

    def vocab_rows(self, tp: int = 1) -> int:
        """Rows of the embedding table and head on one rank, padded as vLLM pads them."""
        return math.ceil(self.vocab_size / (VOCAB_PADDING * tp)) * VOCAB_PADDING

    def stage_weight_bytes(self, quant: str | None = None, tp: int = 1, pp: int = 1, ep: int = 1) -> list[float]:
        """Weight bytes on one rank of every pipeline stage. ``ep`` > 1: that many ranks share the experts."""
        self.check_parallel(tp, pp, ep)
        form, small = self.quant(quant), DTYPE_BYTES[self.dtype]
        table = self.vocab_rows(tp) * self.hidden_size * small
        result = []
        for i, stage in enumerate(self.stages(pp)):
            size = sum(self.layer_bytes(k, form, tp, ep) * n for k, n in self.layer_kinds(stage).items())
            first, last = i == 0, i == pp - 1
            size += table if first or (last and self.tie_word_embeddings) else 0
            size += table if last and not self.tie_word_embeddings else 0
            size += self.hidden_size * small if last else 0
            size += self.num_vision_params * small / tp if first else 0
            result.append(size)
        return result

    def weight_bytes(self, quant: str | None = None, tp: int = 1, pp: int = 1, ep: int = 1) -> float:
        """Weight bytes on the fullest rank. ``quant`` None or "auto": the checkpoint's own format."""
        return max(self.stage_weight_bytes(quant, tp, pp, ep))

    # --- KV cache ---

    def kv_bytes_per_token_per_layer(self, kv_cache_dtype: str | None = None, tp: int = 1) -> int:
        """KV bytes of one token in one layer on one rank: 2 x heads x head_dim, or MLA's latent vector (never divided)."""
        size = kv_dtype_bytes(kv_cache_dtype, self.dtype)
        if self.mla is not None:
            return int(self.mla.cache_dim * size)
        return int(2 * self.kv_heads_per_rank(tp) * self.head_dim * size)

    def kv_bytes_per_token(self, kv_cache_dtype: str | None = None, tp: int = 1, pp: int = 1) -> int:
        """KV bytes of one token over all layers of the fullest rank (a token that no window has left behind)."""
        most = max(last - first for first, last in self.stages(pp))
        return most * self.kv_bytes_per_token_per_layer(kv_cache_dtype, tp)

    def kv_bytes_at(self, context_tokens: int, kv_cache_dtype: str | None = None, tp: int = 1) -> int:
        """KV bytes that a sequence of ``context_tokens`` needs on one rank (PP 1): windowed layers keep the window only."""
        per_layer = self.kv_bytes_per_token_per_layer(kv_cache_dtype, tp)
        held = 0
        for kind, n in self.layer_kinds().items():
            kept = context_tokens
            if kind.attention == "sliding" and kind.window:
                kept = min(context_tokens, kind.window)
            elif kind.attention == "chunked" and kind.window:
                kept = min(context_tokens, (context_tokens - 1) % kind.window + 1 if context_tokens else 0)
            held += n * kept
        return held * per_layer

    def kv_groups(
        self, kv_cache_dtype: str | None = None, tp: int = 1, stage: tuple[int, int] | None = None
    ) -> list[KvGroup]:
        """How vLLM's hybrid manager groups the layers of one stage.

        Layers of one kind share a block table. With several kinds the groups are cut to equal size: the smallest kind's
        number of layers, or the largest's when that is below 1.5 times the smallest
        (``_get_kv_cache_groups_uniform_page_size``); a group that comes out short is padded.
        """
        counts: Counter[tuple[AttentionKind, int | None]] = Counter()
        for kind, n in self.layer_kinds(stage).items():
            counts[(kind.attention, kind.window)] += n
        page = self.kv_bytes_per_token_per_layer(kv_cache_dtype, tp)
        low, high = min(counts.values()), max(counts.values())
        size = high if high < 1.5 * low else low
        groups: list[KvGroup] = []
        for (attention, window), n in counts.items():
            num_groups = math.ceil(n / size)
            sizes = [len(range(i, n, num_groups)) for i in range(num_groups)]
            groups += [KvGroup(attention, window, layers, size, page) for layers in sizes]
        return groups
