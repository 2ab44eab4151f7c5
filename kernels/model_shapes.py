"""The weight matrices of catalogue models, as one GPU of a tensor-parallel group multiplies them.

Only dense matrices: experts are the family ``moe``. Matrices that vLLM merges are merged here (q, k and v; gate and up).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.config import LayerShape

if TYPE_CHECKING:
    from bench.catalog.arch import ModelArch


def linear_layers(model: str, tensor_parallel_size: int = 1) -> list[LayerShape]:
    """qkv, attention output, gate_up and down projection and the head of a catalogue model on one rank.

    Raises UnknownName for a model that is not in the catalogue and BadInput when its heads do not divide.
    """
    from bench.catalog.model import load_model

    arch = load_model(model)
    arch.check_parallel(tensor_parallel_size)
    return shapes_of(arch, tensor_parallel_size)


def shapes_of(arch: ModelArch, tp: int) -> list[LayerShape]:
    """As :func:`linear_layers`, from an architecture. Column-parallel layers divide n, row-parallel ones k."""
    hidden = arch.hidden_size
    shapes = []
    if arch.mla is None:
        q_columns = arch.num_heads // tp * arch.head_dim
        kv_columns = 2 * arch.kv_heads_per_rank(tp) * arch.head_dim
        shapes += [("qkv_proj", q_columns + kv_columns, hidden), ("o_proj", hidden, q_columns)]
    else:
        mla, heads = arch.mla, arch.num_heads // tp
        shapes += [
            ("fused_qkv_a_proj", (mla.q_lora_rank or 0) + mla.cache_dim, hidden),
            ("q_b_proj", heads * mla.qk_head_dim, mla.q_lora_rank or hidden),
            ("kv_b_proj", heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank),
            ("o_proj", hidden, heads * mla.v_head_dim),
        ]
    if any(not kind.moe for kind in arch.layers):
        inter = arch.intermediate_size // tp
        shapes += [
            ("gate_up_proj" if arch.gated_mlp else "up_proj", (2 if arch.gated_mlp else 1) * inter, hidden),
            ("down_proj", hidden, inter),
        ]
    shapes.append(("lm_head", arch.vocab_rows(tp), hidden))
    return [LayerShape(name, n, k, arch.name) for name, n, k in shapes]
