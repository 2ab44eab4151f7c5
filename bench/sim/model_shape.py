"""What step time needs to know of a model: matrix sizes of groups of equal layers, and the dtypes of its parts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from bench.catalog.arch import LayerKind, ModelArch
from bench.catalog.quant import kv_dtype_bytes

_LIKE_BF16 = {"fp16": "bf16", "bf16": "bf16"}


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """``count`` equal layers. Sizes are those of the whole model; tensor parallelism divides them.

    ``window`` is the sliding window or chunk in tokens (0: full attention). ``num_experts`` > 0 makes it a mixture of
    experts; ``mlp_width`` is then the width of all shared experts together.
    """

    count: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0
    mla: bool = False
    mlp_width: int = 0
    mlp_matrices: int = 3  # 3: gate, up and down; 2: no gate
    num_experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    query_latent: int = 0  # MLA: q_lora_rank, 0 without
    kv_latent: int = 0  # MLA: kv_lora_rank + rotary part, what the KV cache holds
    qk_head_dim: int = 0  # MLA: numbers per head in scores
    v_head_dim: int = 0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Layers and dtypes. ``dense_dtype`` is that of projections and MLP, ``head_dtype`` that of the LM head."""

    name: str
    hidden_size: int
    vocab_size: int
    groups: tuple[LayerGroup, ...]
    dense_dtype: str = "bf16"
    expert_dtype: str = "bf16"
    head_dtype: str = "bf16"
    kv_dtype: str = "bf16"

    @property
    def num_layers(self) -> int:
        return sum(g.count for g in self.groups)


def shape_of(model: ModelArch, quantization: str | None = None, kv_cache_dtype: str | None = None) -> ModelShape:
    """The shape of ``model`` with weights in ``quantization`` (None: the checkpoint's own format).

    Raises UnknownName for a format or KV dtype that is not known.
    """
    quant = model.quant(quantization)
    base = _LIKE_BF16.get(model.dtype, model.dtype)
    form = _LIKE_BF16.get(quant.name, quant.name)
    dense = base if quant.experts_only and model.is_moe else form
    kinds: Counter[LayerKind] = Counter(model.layers)
    return ModelShape(
        name=model.name,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        groups=tuple(_group(model, kind, count) for kind, count in kinds.items()),
        dense_dtype=dense,
        expert_dtype=form,
        head_dtype=base,
        kv_dtype="fp8" if kv_dtype_bytes(kv_cache_dtype, model.dtype) == 1.0 else base,
    )


def _group(model: ModelArch, kind: LayerKind, count: int) -> LayerGroup:
    moe = model.moe if kind.moe else None
    mla = model.mla
    return LayerGroup(
        count=count,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        window=0 if kind.attention == "full" else int(kind.window or 0),
        mla=mla is not None,
        mlp_width=moe.shared_intermediate_size if moe else model.intermediate_size,
        mlp_matrices=3 if model.gated_mlp else 2,
        num_experts=moe.num_experts if moe else 0,
        experts_per_token=moe.experts_per_token if moe else 0,
        expert_width=moe.intermediate_size if moe else 0,
        query_latent=(mla.q_lora_rank or 0) if mla else 0,
        kv_latent=mla.cache_dim if mla else 0,
        qk_head_dim=mla.qk_head_dim if mla else 0,
        v_head_dim=mla.v_head_dim if mla else 0,
    )
