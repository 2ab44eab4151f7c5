"""The arithmetic of a step: against brute force, against the parameter count, and against conservation laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.catalog.arch import AttentionKind
from bench.catalog.model import list_models, load_model
from bench.catalog.steps import (
    COMM_KINDS,
    FEATURES,
    NUM_FEATURES,
    F,
    StepShape,
    decode_rows,
    features_of_totals,
    prefill_pairs,
    prefill_rows,
    request_features,
    step_coefficients,
    window_of,
)
from bench.errors import BadInput

MODELS = {m.name: m for m in list_models()}
KINDS: list[tuple[AttentionKind, int | None]] = [("full", None), ("sliding", 5), ("chunked", 4)]


def seen(position: int, kind: AttentionKind, window: int | None) -> set[int]:
    """Keys that the query at ``position`` attends to, from the definition."""
    if kind == "sliding" and window:
        return set(range(max(0, position - window + 1), position + 1))
    if kind == "chunked" and window:
        return set(range(position // window * window, position + 1))
    return set(range(position + 1))


@given(n=st.integers(0, 25), c=st.integers(0, 25), which=st.sampled_from(KINDS))
def test_pairs_and_rows_are_those_of_the_definition(n: int, c: int, which: tuple[AttentionKind, int | None]) -> None:
    kind, window = which
    keys = [seen(p, kind, window) for p in range(c, c + n)]
    assert prefill_pairs(n, c, kind, window) == sum(len(k) for k in keys)
    if n:
        assert prefill_rows(n, c, kind, window) == len(set().union(*keys))
        assert decode_rows(c + n, kind, window) == len(keys[-1])


@pytest.mark.parametrize("name", MODELS)
def test_one_decode_token_multiplies_every_active_weight_once(name: str) -> None:
    """FLOPs of the matrix products = 2 x active parameters, but for tables, norms, biases and what MLA replaces."""
    m = MODELS[name]
    c = step_coefficients(m)
    x = StepShape.of(m, decode=[1]).features()
    flops, _, _ = c.evaluate(x)
    products = sum(f for f, k in zip(flops, c.kinds, strict=True) if k in ("gemm", "moe_gemm"))
    small = sum(m.layer_params(k).small * n for k, n in m.layer_kinds().items())
    if m.moe is not None and m.moe.expert_bias:
        moe_layers = sum(n for k, n in m.layer_kinds().items() if k.moe)
        unused = 1 - m.moe.experts_per_token / m.moe.num_experts
        small -= moe_layers * round(m.moe.num_experts * (2 * m.moe.intermediate_size + m.hidden_size) * unused)
    expected = m.num_matmul_params_active - small - m.hidden_size * (2 if m.norm_has_bias else 1)
    expected += (m.vocab_rows() - m.vocab_size) * m.hidden_size - (m.vocab_size if m.head_bias else 0)
    assert products == pytest.approx(2 * expected, rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_decode_step_reads_the_weights_once(name: str) -> None:
    """With every expert touched, bytes at batch 1 are the weights but the embedding table, plus little else."""
    m = MODELS[name]
    c = step_coefficients(m, quant="bf16")
    x = StepShape.of(m, decode=[1]).features()
    constant = float((c.bytes[:, F["any_tokens"]] + c.bytes[:, F["has_decode"]]).sum())
    experts = float(c.expert_bytes.sum() * (c.num_experts or 1)) if c.num_experts else 0.0
    weights = m.weight_bytes("bf16") - 2 * m.vocab_rows() * m.hidden_size * (0 if m.tie_word_embeddings else 1)
    if m.num_vision_params:
        weights -= 2 * m.num_vision_params
    assert constant + experts == pytest.approx(weights, rel=2e-2)
    assert c.evaluate(x)[1].sum() < weights * 1.25 + 1e8


@pytest.mark.parametrize("name", MODELS)
def test_ranks_share_the_work(name: str) -> None:
    """TP divides FLOPs but for what is replicated; PP divides layers and loses nothing."""
    m = MODELS[name]
    x = StepShape.of(m, [(256, 0), (64, 512)], [300, 4000]).features()
    whole = step_coefficients(m).evaluate(x)[0].sum()
    for tp in (2, 4, 8):
        if m.parallel_problem(tp):
            continue
        c = step_coefficients(m, tp)
        assert whole <= c.evaluate(x)[0].sum() * tp * (1 + 1e-9)
        assert c.evaluate(x)[0].sum() * tp < whole * (1.6 if m.num_kv_heads < tp or m.mla else 1.03)
        assert {k for k in c.kinds if k in COMM_KINDS} == {"all_reduce", "all_gather"}
    stages = [step_coefficients(m, pp=2, stage=s) for s in (0, 1)]
    assert sum(s.evaluate(x)[0].sum() for s in stages) == pytest.approx(whole)
    assert "p2p" in stages[0].kinds and "p2p" not in stages[1].kinds


def test_all_reduces_are_two_a_layer_of_the_hidden_state() -> None:
    m = MODELS["llama-3.1-70b"]
    c = step_coefficients(m, tp=8)
    x = StepShape.of(m, decode=[100] * 64).features()
    comm = {n: v for n, v in zip(c.names, c.evaluate(x)[2], strict=True) if v}
    assert comm["attention_all_reduce"] == comm["mlp_all_reduce"] == 80 * 64 * 8192 * 2
    assert comm["embedding_all_reduce"] == 64 * 8192 * 2


def test_expert_weights_follow_the_experts_touched() -> None:
    m = MODELS["mixtral-8x7b"]
    c = step_coefficients(m)

    def read(batch: int) -> float:
        x = StepShape.of(m, decode=[1] * batch).features()
        size = c.evaluate(x)[1]
        return float(sum(v for v, k in zip(size, c.kinds, strict=True) if k == "moe_gemm"))

    per_expert = 3 * 4096 * 14336 * 2 * 32
    assert read(1) == pytest.approx(2 * per_expert, rel=0.01)
    assert read(64) == pytest.approx(8 * per_expert, rel=0.02)
    assert c.experts_touched(4) == pytest.approx(8 * (1 - 0.75**4))
    assert c.experts_touched(0) == 0.0


def test_expert_parallel_ranks_hold_and_read_whole_experts() -> None:
    m = MODELS["qwen3-30b-a3b"]
    x = StepShape.of(m, decode=[100] * 512).features()
    tp, ep = step_coefficients(m, tp=4), step_coefficients(m, tp=4, ep=4)
    work = [sum(v for v, k in zip(c.evaluate(x)[0], c.kinds, strict=True) if k == "moe_gemm") for c in (tp, ep)]
    assert work[0] == pytest.approx(work[1])  # the same FLOPs a rank when routing is balanced
    assert m.weight_bytes(tp=4, ep=4) == pytest.approx(m.weight_bytes(tp=4))
    wide = step_coefficients(m, tp=1, ep=8)  # attention data parallel: tokens travel
    assert "all_to_all" in wide.kinds
    assert wide.experts_touched(1) == pytest.approx(128 / 8 * (1 - (1 - 8 / 128) ** 8))
    with pytest.raises(BadInput, match="not a multiple"):
        step_coefficients(m, tp=4, ep=6)


def test_latent_attention_decodes_in_the_latent_space() -> None:
    m = MODELS["deepseek-v3"]
    c = step_coefficients(m, tp=8)
    base, long = (StepShape.of(m, decode=[n]).features() for n in (1, 1001))
    d_flops, d_bytes, _ = (b - a for a, b in zip(c.evaluate(base), c.evaluate(long), strict=True))
    i = c.names.index("attention_decode")
    assert d_bytes[i] == 1000 * 576 * 2 * 61
    assert d_flops[i] == 1000 * 16 * 2 * (576 + 512) * 61
    assert d_flops.sum() == d_flops[i]  # nothing else grows with the context
    prefill = c.evaluate(StepShape.of(m, [(10, 1000)]).features())[0]
    assert prefill[c.names.index("kv_b_proj")] == 2 * 1010 * 512 * 16 * 256 * 61  # old chunks are expanded again
    assert prefill[c.names.index("absorb_q")] == 0


def test_windowed_layers_stop_growing() -> None:
    m = MODELS["gpt-oss-20b"]
    assert window_of(m) == ("sliding", 128)
    c = step_coefficients(m)

    def rows(context: int) -> tuple[float, float]:
        size = c.evaluate(StepShape.of(m, decode=[context]).features())[1]
        return float(size[c.names.index("attention_decode")]), float(size[c.names.index("attention_decode_window")])

    (full_a, window_a), (full_b, window_b) = rows(1000), rows(2000)
    assert window_a == window_b and full_b > 1.9 * full_a


@settings(max_examples=40, deadline=None)
@given(
    chunks=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 2000)), max_size=4),
    lengths=st.lists(st.integers(1, 5000), max_size=6),
    name=st.sampled_from(["llama-3.1-8b", "gpt-oss-20b", "deepseek-v3", "llama-4-scout"]),
)
def test_features_are_sums_over_requests(chunks: list[tuple[int, int]], lengths: list[int], name: str) -> None:
    m = MODELS[name]
    whole = StepShape.of(m, chunks, lengths).features()
    assert len(whole) == NUM_FEATURES == len(FEATURES)
    parts = [StepShape.of(m, [c]).features() for c in chunks] + [
        StepShape.of(m, decode=[x]).features() for x in lengths
    ]
    if parts:
        total = np.sum(parts, axis=0)
        assert whole[3:] == pytest.approx(total[3:])
        assert list(whole[:3]) == [float(bool(chunks or lengths)), float(bool(chunks)), float(bool(lengths))]


def test_totals_agree_with_lengths_where_they_can() -> None:
    m = MODELS["gpt-oss-20b"]
    exact = StepShape.of(m, decode=[501] * 8)
    assert StepShape.from_totals(m, 0, 0, 8, 8 * 500).features() == pytest.approx(exact.features())
    fresh = StepShape.of(m, [(200, 0)] * 3)
    assert StepShape.from_totals(m, 600, 3, 0, 0).features() == pytest.approx(fresh.features())
    mixed = StepShape.of(m, [(200, 0)], [501] * 8)
    assert StepShape.from_totals(m, 200, 1, 8, 8 * 500).features() == pytest.approx(mixed.features())


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gpt-oss-20b", "llama-4-scout"])  # full, sliding, chunked
def test_many_steps_at_once_are_the_same_steps(name: str) -> None:
    m = MODELS[name]
    rows = [([(200, 0)] * 3, []), ([], [9001] * 8), ([(300, 0)], [77, 77]), ([(8000, 600)], [])]
    each = [StepShape.of(m, chunks, lengths).features() for chunks, lengths in rows]
    totals = [(sum(n for n, _ in c), len(c), len(x), sum(before for _, before in c) + sum(x) - len(x)) for c, x in rows]
    assert features_of_totals(m, *np.array(totals).T) == pytest.approx(np.array(each))


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gpt-oss-20b", "llama-4-scout"])
def test_a_request_is_the_sum_of_its_steps(name: str) -> None:
    m = MODELS[name]
    isl, osl = 130, 40
    steps = [StepShape.of(m, [(isl, 0)])] + [StepShape.of(m, decode=[isl + i]) for i in range(1, osl)]
    total = np.sum([s.features() for s in steps], axis=0)
    assert request_features(m, [isl], [osl])[3:] == pytest.approx(total[3:])


def test_impossible_layouts() -> None:
    m = load_model("llama-3.1-8b")
    for k in ({"tp": 3}, {"tp": 64}, {"pp": 33}, {"ep": 2}, {"stage": 1}):
        with pytest.raises(BadInput):
            step_coefficients(m, **k)  # type: ignore[arg-type]
