"""A kernel made wrong on purpose must be caught, whatever the family and however small the mistake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kernels import attention, child, gemm, memory, moe, norm  # noqa: E402
from kernels.case import Case, make_case  # noqa: E402
from kernels.timing import TimingPlan  # noqa: E402

PLAN = TimingPlan(min_repeats=6, max_repeats=6, budget_s=1e-6, warmup_s=0.0)

GEMM = make_case("gemm", "linear", "torch", "bf16", {"m": 130, "n": 96, "k": 256})
INT8 = make_case("gemm", "linear", "torch", "int8", {"m": 20, "n": 32, "k": 64})
HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 32}
PREFILL = make_case("attention", "prefill", "torch", "fp32", {"batch": 2, "length": 150, **HEADS})
DECODE = make_case(
    "attention", "paged_decode", "torch", "bf16", {"batch": 3, "context": 500, "block_size": 16, **HEADS}
)
RMSNORM = make_case("norm", "rmsnorm_residual", "torch", "bf16", {"tokens": 5, "hidden": 128})
SILU = make_case("norm", "silu_mul", "torch", "bf16", {"tokens": 5, "intermediate": 128})
ROPE = make_case("norm", "rope", "torch", "fp32", {"tokens": 5, **HEADS})
MOE = make_case("moe", "grouped_gemm", "torch", "fp32", {"tokens": 20, "experts": 4, "top_k": 2, "n": 48, "k": 64})
COPY = make_case("memory", "copy", "torch", "fp32", {"bytes": 4096})


def run(case: Case, cpu: Any) -> dict[str, Any]:
    return child.run_case(case, cpu, PLAN, 0, None, 0.0)


@pytest.mark.parametrize("case", [GEMM, INT8, PREFILL, DECODE, RMSNORM, SILU, ROPE, MOE, COPY], ids=lambda c: c.op)
def test_the_right_kernel_passes(case, cpu):
    result = run(case, cpu)
    assert result["status"] == "ok", result["reason"]
    assert len(result["timing"]["seconds"]) == 6


def _around(function: Callable[..., Any], spoil: Callable[[Any], Any]) -> Callable[..., Any]:
    """``function``, whose first result (the call) is made to return ``spoil(answer)``."""

    def replaced(*args: Any, **kwargs: Any) -> Any:
        call, *rest = function(*args, **kwargs)
        return (lambda: spoil(call()), *rest)

    return replaced


def _caught(case: Case, cpu: Any) -> None:
    result = run(case, cpu)
    assert result["status"] == "wrong", result
    assert "timing" not in result and "error max" in result["reason"]


def test_gemm_with_one_wrong_tile(monkeypatch, cpu):
    def spoil(y):
        y = y.clone()
        y[64:128, 32:64] = y[64:128, 0:32]
        return y

    monkeypatch.setattr(gemm, "_call", _around(gemm._call, spoil))
    _caught(GEMM, cpu)


def test_gemm_with_a_wrong_tile_between_checked_rows(monkeypatch, cpu):
    def spoil(y):
        y = y.clone()
        y[64:128] += 0.5
        return y

    monkeypatch.setattr(gemm, "FULL_CHECK_MACS", 0)  # as for a large product: a sample of rows
    monkeypatch.setattr(gemm, "_call", _around(gemm._call, spoil))
    _caught(GEMM, cpu)


def test_gemm_that_stops_before_the_last_block_of_k(monkeypatch, cpu):
    monkeypatch.setattr(gemm, "_call", lambda dtype, x, w, device: (lambda: x[:, :-32] @ w[:, :-32].t(), "short"))
    _caught(GEMM, cpu)


def test_gemm_in_a_coarser_type(monkeypatch, cpu):
    fp8 = torch.float8_e4m3fn
    monkeypatch.setattr(
        gemm, "_call", lambda dtype, x, w, device: (lambda: x.to(fp8).bfloat16() @ w.to(fp8).bfloat16().t(), "fp8")
    )
    _caught(GEMM, cpu)


def test_int8_gemm_off_by_one(monkeypatch, cpu):
    def spoil(y):
        y = y.clone()
        y[-1, -1] += 1
        return y

    monkeypatch.setattr(gemm, "_call", _around(gemm._call, spoil))
    result = run(INT8, cpu)
    assert result["status"] == "wrong"


@pytest.mark.parametrize(
    "mistake", ["sees the next token", "misses itself", "not causal", "wrong scale", "wrong heads"]
)
def test_prefill(monkeypatch, cpu, mistake):
    def wrong(impl, device, q, k, v):
        length = q.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool)
        seen = {
            "sees the next token": seen.tril(1),
            "misses itself": seen.tril(-1) | torch.eye(length, dtype=torch.bool)[0],
            "not causal": seen,
        }.get(mistake, seen.tril())
        scale = 1 / 6.0 if mistake == "wrong scale" else None
        group = q.shape[2] // k.shape[2]
        spread = (
            (lambda t: t.repeat(1, 1, group, 1))
            if mistake == "wrong heads"
            else (lambda t: t.repeat_interleave(group, 2))
        )
        q4, k4, v4 = (t.transpose(1, 2) for t in (q, spread(k), spread(v)))

        def call():
            out = torch.nn.functional.scaled_dot_product_attention(q4, k4, v4, attn_mask=seen, scale=scale)
            return out.transpose(1, 2)

        return call, "wrong", True

    monkeypatch.setattr(attention, "_prefill_call", wrong)
    _caught(PREFILL, cpu)


@pytest.mark.parametrize("mistake", ["last token", "last page", "wrong page", "logical order"])
def test_paged_decode(monkeypatch, cpu, mistake):
    def wrong(q, cache, context):
        table, seen = cache.block_table.clone(), context
        if mistake == "last token":
            seen = context - 1
        elif mistake == "last page":
            seen = context // cache.block_size * cache.block_size
        elif mistake == "wrong page":
            table[0, 3] = table[0, 4]
        else:
            table = torch.arange(table.numel(), dtype=torch.int32).view_as(table)
        spoiled = attention.PagedCache(cache.k, cache.v, table, cache.lengths)
        return right(q, spoiled, seen)

    right = attention._gather_decode
    monkeypatch.setattr(attention, "_gather_decode", wrong)
    _caught(DECODE, cpu)


@pytest.mark.parametrize("mistake", ["no residual", "no weight", "mean of absolutes", "residual not written"])
def test_rmsnorm(monkeypatch, cpu, mistake):
    def wrong(impl, device, x, residual, weight, out, new_residual):
        def call():
            total = x.float() + (0 if mistake == "no residual" else residual.float())
            power = total.abs().mean(-1, keepdim=True).square() if mistake == "mean of absolutes" else None
            power = total.square().mean(-1, keepdim=True) if power is None else power
            normed = total * (power + norm.EPS).rsqrt() * (1.0 if mistake == "no weight" else weight.float())
            kept = residual if mistake == "residual not written" else x.float() + residual.float()
            return normed.bfloat16(), kept.bfloat16()

        return call, True, "wrong"

    monkeypatch.setattr(norm, "_rmsnorm_call", wrong)
    _caught(RMSNORM, cpu)


def test_silu_with_gate_and_up_swapped(monkeypatch, cpu):
    right = norm.silu_mul_reference
    monkeypatch.setattr(norm, "silu_mul_reference", lambda gate_up: right(gate_up.roll(gate_up.shape[-1] // 2, -1)))
    _caught(SILU, cpu)


@pytest.mark.parametrize("mistake", ["turned back", "neighbours paired", "keys forgotten"])
def test_rope(monkeypatch, cpu, mistake):
    def wrong(impl, device, data):
        def apply(q, k):
            sin = -data.sin if mistake == "turned back" else data.sin
            if mistake == "neighbours paired":
                q, k = (torch.cat([t[..., 0::2], t[..., 1::2]], -1) for t in (q, k))
            turned = norm.rope_reference(q, data.cos, sin, data.positions).float()
            keys = k if mistake == "keys forgotten" else norm.rope_reference(k, data.cos, sin, data.positions).float()
            return turned, keys

        return apply, True, "wrong"

    monkeypatch.setattr(norm, "_rope_apply", wrong)
    _caught(ROPE, cpu)


def test_moe_with_two_experts_exchanged(monkeypatch, cpu):
    right = moe._call

    def wrong(impl, device, x, w, counts):
        return right(impl, device, x, w[[1, 0, 2, 3]], counts)

    monkeypatch.setattr(moe, "_call", wrong)
    _caught(MOE, cpu)


def test_copy_that_misses_the_last_value(monkeypatch, cpu):
    right = memory._copy

    def wrong(a, case, device, rng):
        right(a, case, device, rng)
        out = torch.empty_like(a)

        def check():
            out[:-1].copy_(a[:-1])
            out[-1] = a[-1] + 1
            return [memory.compare(out, a, memory.EXACT)]

        return (lambda: out[:-1].copy_(a[:-1])), check, {}

    monkeypatch.setattr(memory, "_copy", wrong)
    assert run(COPY, cpu)["status"] == "wrong"


def test_a_kernel_that_raises_is_failed_and_not_wrong(monkeypatch, cpu):
    def broken(dtype, x, w, device):
        def call():
            raise RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED\nmore")

        return call, "broken"

    monkeypatch.setattr(gemm, "_call", broken)
    result = run(GEMM, cpu)
    assert result["status"] == "failed" and result["reason"] == "RuntimeError: CUBLAS_STATUS_EXECUTION_FAILED"
