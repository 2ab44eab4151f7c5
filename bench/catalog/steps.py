"""What one engine step asks of one rank: operations with FLOPs, bytes and messages, linear in a few sums over the batch.

A step is described by :data:`FEATURES` (token counts and sums over context lengths, see :class:`StepShape`). For a given
model, parallel layout and weight format, every operation's FLOPs, memory traffic and message bytes are linear in them,
apart from the expert weights read, which follow the number of distinct experts touched. :class:`StepCoefficients` holds
that as matrices, so a simulator's inner loop multiplies and never builds lists; ``roofline.step_ops`` builds the list.

Rules: a multiply-add is two FLOPs; matrix products read their weights once a step and their inputs and outputs once;
attention reads each sequence's keys and values once a step; causal attention counts only the pairs it needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.catalog.arch import LayerKind, ModelArch
from bench.catalog.quant import DTYPE_BYTES, QuantFormat, kv_dtype_bytes
from bench.catalog.step_shape import (
    FEATURES,
    NUM_FEATURES,
    F,
    StepShape,
    decode_rows,
    features_of_totals,
    prefill_pairs,
    prefill_rows,
    request_features,
    window_of,
)
from bench.errors import BadInput

__all__ = [
    "COMM_KINDS",
    "FEATURES",
    "KINDS",
    "NUM_FEATURES",
    "F",
    "StepCoefficients",
    "StepShape",
    "decode_rows",
    "features_of_totals",
    "prefill_pairs",
    "prefill_rows",
    "request_features",
    "step_coefficients",
    "window_of",
]

#: Kinds of operation; their index is ``StepCoefficients.kind_codes``.
KINDS = (
    "gemm",
    "moe_gemm",
    "attention_prefill",
    "attention_decode",
    "norm",
    "rope",
    "kv_write",
    "activation",
    "embedding",
    "sampler",
    "all_reduce",
    "all_gather",
    "all_to_all",
    "p2p",
)
COMM_KINDS = ("all_reduce", "all_gather", "all_to_all", "p2p")


@dataclass(frozen=True, slots=True, eq=False)
class StepCoefficients:
    """Operations of one rank as matrices: row = operation, column = feature.

    ``flops @ x``, ``bytes @ x + expert_bytes * touched(tokens)`` and ``comm_bytes @ x`` are the totals over ``counts``
    calls (layers). ``m_feature`` is the column that holds a product's row count ``m``; ``gemm_n`` and ``gemm_k`` are its
    other sizes (0 for what is no product). Divide totals by ``counts`` for one call.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    dtypes: tuple[str, ...]
    kind_codes: np.ndarray
    counts: np.ndarray
    flops: np.ndarray
    bytes: np.ndarray
    comm_bytes: np.ndarray
    expert_bytes: np.ndarray
    gemm_n: np.ndarray
    gemm_k: np.ndarray
    m_feature: np.ndarray
    m_scale: np.ndarray
    group: np.ndarray
    num_experts: int
    experts_per_token: int
    expert_token_factor: int
    expert_ranks: int

    def experts_touched(self, tokens: float) -> float:
        """Expected distinct experts on this rank that the step reads (0 for a dense model)."""
        if not self.num_experts or tokens <= 0:
            return 0.0
        miss = 1.0 - self.experts_per_token / self.num_experts
        return self.num_experts / self.expert_ranks * (1.0 - miss ** (tokens * self.expert_token_factor))

    def evaluate(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(FLOPs, bytes, message bytes) of every operation for one feature vector."""
        touched = self.experts_touched(float(features[F["tokens"]]))
        return self.flops @ features, self.bytes @ features + self.expert_bytes * touched, self.comm_bytes @ features


class _Builder:
    """Collects operations row by row for one model, layout and stage."""

    def __init__(self, model: ModelArch, quant: QuantFormat, kv_bytes: float, tp: int, ep: int) -> None:
        self.model, self.quant, self.kv_bytes, self.tp, self.ep = model, quant, kv_bytes, tp, ep
        self.act = DTYPE_BYTES[model.dtype]
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, kind: str, count: float, **k: Any) -> None:
        """One operation; ``flops``, ``bytes``, ``comm`` map features to what one call costs."""
        if count > 0:
            self.rows.append(
                {"name": name, "kind": kind, "count": count, "dtype": k.pop("dtype", self.model.dtype), **k}
            )

    def gemm(
        self, name: str, count: float, n: float, k: float, m: str = "tokens", quantised: bool = True, when: str = ""
    ) -> None:
        """A product of ``m`` rows: weights [k, n] read once, inputs and outputs once. ``when``: the flag that runs it."""
        weight = self.model.matrix_bytes(self.quant, experts=False) if quantised else self.act
        low = quantised and weight != self.act
        act_in = self.quant.activation_bytes if low else self.act
        flag = when or "any_tokens"
        self.add(
            name,
            "gemm",
            count,
            dtype=self.quant.compute_dtype if low else self.model.dtype,
            flops={m: 2.0 * n * k},
            bytes={flag: n * k * weight, m: k * act_in + n * self.act},
            n=n,
            k=k,
            m=m,
        )

    def comm(self, name: str, kind: str, count: float, size: float, feature: str, group: int) -> None:
        """A message of ``size`` bytes for each unit of ``feature``; memory traffic: read and written once locally."""
        if group > 1:
            self.add(name, kind, count, comm={feature: size}, bytes={feature: 2 * size}, group=group)

    def attention(self, count: int, windowed: bool) -> None:
        """Prefill and decode attention of ``count`` layers, for grouped queries or latent attention."""
        m, s = self.model, "_windowed" if windowed else ""
        heads = m.num_heads / self.tp
        suffix = "_window" if windowed else ""
        if m.mla is not None:
            a = m.mla
            cache = a.cache_dim * self.kv_bytes
            qk, v, expanded = a.qk_head_dim, a.v_head_dim, heads * (a.qk_head_dim + a.v_head_dim) * self.act
            prefill_kv, decode_kv = expanded, cache
            decode_flops = 2.0 * heads * (a.cache_dim + a.kv_lora_rank)
            decode_io = heads * (a.cache_dim + a.kv_lora_rank) * self.act
        else:
            qk = v = m.head_dim
            prefill_kv = decode_kv = 2.0 * m.kv_heads_per_rank(self.tp) * m.head_dim * self.kv_bytes
            decode_flops = 4.0 * heads * m.head_dim
            decode_io = 2.0 * heads * m.head_dim * self.act
        self.add(
            f"attention_prefill{suffix}",
            "attention_prefill",
            count,
            flops={f"prefill_pairs{s}": 2.0 * heads * (qk + v)},
            bytes={f"prefill_rows{s}": prefill_kv, "prefill_tokens": heads * (qk + v) * self.act},
        )
        self.add(
            f"attention_decode{suffix}",
            "attention_decode",
            count,
            flops={f"decode_rows{s}": decode_flops},
            bytes={f"decode_rows{s}": decode_kv, "decode_requests": decode_io},
        )

    def projections(self, layers: int) -> None:
        """Query, key, value and output products, rotary positions and the cache write of ``layers`` layers."""
        m, tp = self.model, self.tp
        heads, kv_heads = m.num_heads / tp, m.kv_heads_per_rank(tp)
        if m.mla is None:
            width = (heads + 2 * kv_heads) * m.head_dim
            self.gemm("qkv_proj", layers, width, m.hidden_size)
            rotated = (heads + kv_heads) * m.head_dim * self.act * 2
            if m.qk_norm:
                self.add("qk_norm", "norm", layers, bytes={"tokens": rotated})
            self.add("rope", "rope", layers, bytes={"tokens": rotated})
            written = 2 * kv_heads * m.head_dim
            self.add("kv_write", "kv_write", layers, bytes={"tokens": written * (self.act + self.kv_bytes)})
            self.gemm("o_proj", layers, m.hidden_size, heads * m.head_dim)
            return
        a = m.mla
        self.gemm("qkv_a_proj", layers, (a.q_lora_rank or 0) + a.cache_dim, m.hidden_size)
        latent = (a.q_lora_rank or 0) + a.kv_lora_rank
        self.add("qkv_a_norm", "norm", layers, bytes={"tokens": latent * self.act * 2})
        self.gemm("q_b_proj", layers, heads * a.qk_head_dim, a.q_lora_rank or m.hidden_size)
        self.add("rope", "rope", layers, bytes={"tokens": (heads + 1) * a.qk_rope_head_dim * self.act * 2})
        self.add("kv_write", "kv_write", layers, bytes={"tokens": a.cache_dim * (self.act + self.kv_bytes)})
        # Prefill expands the latent vectors to keys and values of every head, those of earlier chunks again each time.
        expand = heads * (a.qk_nope_head_dim + a.v_head_dim)
        self.gemm("kv_b_proj", layers, expand, a.kv_lora_rank, m="prefill_rows", when="has_prefill")
        # Decode folds the same matrices into query and output instead; vLLM keeps those copies in 16 bits.
        for name, dim in (("absorb_q", a.qk_nope_head_dim), ("absorb_v", a.v_head_dim)):
            self.add(
                name,
                "gemm",
                layers,
                flops={"decode_requests": 2.0 * heads * dim * a.kv_lora_rank},
                bytes={
                    "has_decode": heads * dim * a.kv_lora_rank * self.act,
                    "decode_requests": heads * (dim + a.kv_lora_rank) * self.act,
                },
                n=heads * a.kv_lora_rank,
                k=dim,
                m="decode_requests",
            )
        self.gemm("o_proj", layers, m.hidden_size, heads * a.v_head_dim)

    def mlp(self, name: str, layers: int, width: float) -> None:
        """A dense (or shared-expert) MLP of ``width`` columns on this rank."""
        m = self.model
        columns = 2 if m.gated_mlp else 1
        self.gemm(f"{name}gate_up_proj", layers, columns * width, m.hidden_size)
        self.add(f"{name}act", "activation", layers, bytes={"tokens": (columns + 1) * width * self.act})
        self.gemm(f"{name}down_proj", layers, m.hidden_size, width)

    def experts(self, layers: int) -> None:
        """Router and routed experts: every token through k of E experts, weights read once for each expert touched."""
        m = self.model
        moe = m.moe
        if moe is None or layers <= 0:
            return
        dp = self.ep // self.tp if self.ep > 1 else 1
        width = moe.intermediate_size / (1 if self.ep > 1 else self.tp)
        # rows that this rank's experts process for each token of this rank's batch
        share = moe.experts_per_token * dp / (self.ep if self.ep > 1 else 1)
        weight = m.matrix_bytes(self.quant, experts=True)
        low = weight != self.act
        act_in = self.quant.activation_bytes if low else self.act
        columns = 2 if m.gated_mlp else 1
        dtype = self.quant.compute_dtype if low else m.dtype
        h = m.hidden_size
        self.gemm("router", layers, moe.num_experts, h, quantised=False)
        self.comm("moe_dispatch", "all_to_all", layers, share * h * self.act, "tokens", self.ep if dp > 1 else 1)
        for name, n, k in (("moe_gate_up", columns * width, h), ("moe_down", h, width)):
            self.add(
                name,
                "moe_gemm",
                layers,
                dtype=dtype,
                flops={"tokens": 2.0 * share * n * k},
                bytes={"tokens": share * (k * act_in + n * self.act)},
                expert_bytes=n * k * weight * m.expert_padding_ratio(self.quant, self.tp, self.ep),
                n=n,
                k=k,
                m="tokens",
                m_scale=share,
            )
            if name == "moe_gate_up":
                self.add("moe_act", "activation", layers, bytes={"tokens": share * (columns + 1) * width * self.act})
        self.add("moe_combine", "activation", layers, bytes={"tokens": (share + 1) * h * self.act})
        self.comm("moe_collect", "all_to_all", layers, share * h * self.act, "tokens", self.ep if dp > 1 else 1)

    def finish(self) -> StepCoefficients:
        """The rows as matrices."""
        n = len(self.rows)
        flops, size, comm = (np.zeros((n, NUM_FEATURES)) for _ in range(3))
        for i, row in enumerate(self.rows):
            for matrix, key in ((flops, "flops"), (size, "bytes"), (comm, "comm")):
                for feature, per_call in row.get(key, {}).items():
                    matrix[i, F[feature]] += per_call * row["count"]
        moe, dp = self.model.moe, self.ep // self.tp if self.ep > 1 else 1

        def column(key: str, default: float) -> np.ndarray:
            return np.array([float(r.get(key, default)) for r in self.rows])

        return StepCoefficients(
            names=tuple(r["name"] for r in self.rows),
            kinds=tuple(r["kind"] for r in self.rows),
            dtypes=tuple(r["dtype"] for r in self.rows),
            kind_codes=np.array([KINDS.index(r["kind"]) for r in self.rows], dtype=np.int64),
            counts=column("count", 1),
            flops=flops,
            bytes=size,
            comm_bytes=comm,
            expert_bytes=column("expert_bytes", 0) * column("count", 1),
            gemm_n=column("n", 0),
            gemm_k=column("k", 0),
            m_feature=np.array([F[r["m"]] if "m" in r else -1 for r in self.rows], dtype=np.int64),
            m_scale=column("m_scale", 1),
            group=column("group", 1).astype(np.int64),
            num_experts=moe.num_experts if moe else 0,
            experts_per_token=moe.experts_per_token if moe else 0,
            expert_token_factor=dp,
            expert_ranks=self.ep if self.ep > 1 else 1,
        )


def step_coefficients(
    model: ModelArch,
    tp: int = 1,
    pp: int = 1,
    quant: str | None = None,
    kv_cache_dtype: str | None = None,
    ep: int = 1,
    stage: int = 0,
) -> StepCoefficients:
    """The operations of one step on one rank of pipeline ``stage``, in the order they run.

    ``ep`` > 1 divides whole experts over that many ranks (a multiple of ``tp``; above it, attention is data parallel and
    tokens travel by all-to-all). Raises BadInput when the model cannot be divided like that.
    """
    model.check_parallel(tp, pp, ep)
    if ep > 1 and ep % tp:
        raise BadInput(f"expert parallel size {ep} is not a multiple of tensor_parallel_size {tp}")
    if not 0 <= stage < pp:
        raise BadInput(f"stage {stage} of {pp} pipeline stages does not exist")
    form = model.quant(quant)
    b = _Builder(model, form, kv_dtype_bytes(kv_cache_dtype, model.dtype), tp, ep)
    kinds = model.layer_kinds(model.stages(pp)[stage])
    layers = sum(kinds.values())
    h, first, last = model.hidden_size, stage == 0, stage == pp - 1
    message = h * b.act
    if first:
        b.add("embedding", "embedding", 1, bytes={"tokens": 2 * message})
        b.comm("embedding_all_reduce", "all_reduce", 1, message, "tokens", tp)
    # fused residual add and norm: reads two rows, writes two
    b.add("norm", "norm", model.norms_per_layer * layers + (1 if last else 0), bytes={"tokens": 4 * message})
    b.projections(layers)
    b.attention(_number(kinds, windowed=False), windowed=False)
    b.attention(_number(kinds, windowed=True), windowed=True)
    b.comm("attention_all_reduce", "all_reduce", layers, message, "tokens", tp)
    moe_layers = sum(n for k, n in kinds.items() if k.moe)
    b.mlp("", layers - moe_layers, model.intermediate_size / tp)
    b.experts(moe_layers)
    if model.moe is not None and model.moe.shared_intermediate_size:
        b.mlp("shared_", moe_layers, model.moe.shared_intermediate_size / tp)
    b.comm("mlp_all_reduce", "all_reduce", layers, message, "tokens", tp)
    if last:
        rows = model.vocab_rows(tp)
        b.gemm("lm_head", 1, rows, h, m="sampled", quantised=False)
        b.comm("logits_all_gather", "all_gather", 1, model.vocab_size * b.act, "sampled", tp)
        # logits to fp32 (read 16 bits, write 32) and one pass to choose the token
        b.add("sampler", "sampler", 1, bytes={"sampled": model.vocab_size * (b.act + 4 + 4)})
    else:
        # hidden states and residual go to the next stage, each TP rank sending its share
        b.comm("stage_send", "p2p", 1, 2 * message / tp, "tokens", pp)
    return b.finish()


def _number(kinds: dict[LayerKind, int], windowed: bool) -> int:
    return sum(n for k, n in kinds.items() if (k.attention != "full") == windowed)
