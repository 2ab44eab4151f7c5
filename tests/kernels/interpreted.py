"""Our Triton kernels against their definitions, in Triton's interpreter: odd sizes, padding, masks, every split.

``test_triton.py`` runs this file in a process of its own: Triton decides between compiler and interpreter when it is first
imported, and another test may have imported it by then.
"""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kernels.checking import TOLERANCE, compare  # noqa: E402


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (3, 96), (2, 1000), (5, 128)])
def test_rmsnorm_residual(tokens, hidden, dtype):
    if dtype == torch.bfloat16 and hidden == 1:
        pytest.skip("the interpreter cuts bf16 instead of rounding: one value alone may be off by a whole unit")
    from kernels.norm import EPS, rmsnorm_residual_reference
    from kernels.triton_ops.norm import rmsnorm_residual

    x, residual = _random(tokens, hidden, dtype=dtype), _random(tokens, hidden, seed=1, dtype=dtype)
    weight = _random(hidden, seed=2, dtype=dtype)
    out, total = torch.empty_like(x), torch.empty_like(x)
    rmsnorm_residual(x, residual, weight, EPS, out, total)
    want, want_total = rmsnorm_residual_reference(x, residual, weight)
    limit = TOLERANCE["bf16" if dtype == torch.bfloat16 else "fp16" if dtype == torch.float16 else "fp32"]
    assert compare(out, want, limit).passed and compare(total, want_total, limit).passed


@pytest.mark.parametrize(("tokens", "inter"), [(1, 16), (3, 80), (2, 1500)])
def test_silu_mul(tokens, inter):
    from kernels.norm import silu_mul_reference
    from kernels.triton_ops.norm import silu_mul

    gate_up = _random(tokens, 2 * inter) * 3
    out = torch.empty(tokens, inter)
    silu_mul(gate_up, out)
    assert compare(out, silu_mul_reference(gate_up), TOLERANCE["fp32"]).passed


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (7, 1, 64), (8, 8, 96), (32, 8, 128)])
def test_rope_rotates_queries_and_keys_in_place(heads, kv_heads, dim):
    from kernels.norm import rope_reference
    from kernels.triton_ops.norm import rope_

    tokens = 3
    q, k = _random(tokens, heads, dim), _random(tokens, kv_heads, dim, seed=1)
    angle = _random(50, dim // 2, seed=2)
    cos, sin, positions = angle.cos(), angle.sin(), torch.tensor([0, 49, 7])
    want = [rope_reference(x, cos, sin, positions) for x in (q, k)]
    rope_(q, k, cos, sin, positions)
    assert compare(q, want[0], TOLERANCE["fp32"]).passed and compare(k, want[1], TOLERANCE["fp32"]).passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "kv_heads", "dim"),
    [(1, 1, 2, 1, 32), (2, 63, 4, 2, 32), (1, 65, 3, 3, 64), (1, 200, 4, 1, 32)],
)
def test_prefill_is_causal_and_shares_heads(batch, length, heads, kv_heads, dim, dtype):
    from kernels.attention import prefill_reference
    from kernels.triton_ops.attention import prefill

    q = _random(batch, length, heads, dim, dtype=dtype)
    k, v = (_random(batch, length, kv_heads, dim, seed=s, dtype=dtype) for s in (1, 2))
    rows = torch.arange(length)
    want = torch.stack([prefill_reference(q[b], k[b], v[b], rows) for b in range(batch)])
    limit = TOLERANCE["fp16" if dtype == torch.float16 else "fp32"]
    assert compare(prefill(q, k, v), want, limit).passed


@pytest.mark.parametrize("splits", [1, 2, 5, 16])
@pytest.mark.parametrize("lengths", [[1, 200], [64, 65], [130, 16]])
def test_paged_decode_with_unequal_lengths_and_empty_parts(lengths, splits):
    from kernels.attention import PagedCache, decode_reference
    from kernels.triton_ops.attention import paged_decode

    heads, kv_heads, dim, block = 6, 2, 32, 16
    per_sequence = math.ceil(max(lengths) / block)
    blocks = per_sequence * len(lengths)
    cache = PagedCache(
        _random(blocks, block, kv_heads, dim, seed=1),
        _random(blocks, block, kv_heads, dim, seed=2),
        torch.randperm(blocks, generator=torch.Generator().manual_seed(3)).to(torch.int32).view(len(lengths), -1),
        torch.tensor(lengths, dtype=torch.int32),
    )
    q = _random(len(lengths), heads, dim)
    got = paged_decode(q, cache.k, cache.v, cache.block_table, cache.lengths, splits)
    want = torch.stack([decode_reference(q, cache, i) for i in range(len(lengths))])
    assert compare(got, want, TOLERANCE["fp32"]).passed


@pytest.mark.parametrize("counts", [[5], [0, 3, 70, 0, 64, 1], [64, 64], [1] * 5])
def test_grouped_gemm_gives_every_row_its_expert(counts):
    from kernels.moe import grouped_reference
    from kernels.triton_ops.moe import grouped_gemm, tile_map

    n, k = 150, 72
    x, w = _random(sum(counts), k), _random(len(counts), n, k, seed=1) / math.sqrt(k)
    out = torch.full((sum(counts), n), float("nan"))
    grouped_gemm(x, w, torch.tensor(tile_map(counts), dtype=torch.int32), out)
    assert compare(out, grouped_reference(x, w, counts), TOLERANCE["fp32"]).passed


def test_tiles_cover_every_row_once_and_never_two_experts():
    from kernels.triton_ops.moe import tile_map

    counts = [0, 3, 130, 0, 64]
    tiles = tile_map(counts, 64)
    rows = [r for _, first, end in tiles for r in range(first, end)]
    assert rows == list(range(197))
    owner = [e for e, c in enumerate(counts) for _ in range(c)]
    assert all(owner[r] == e for e, first, end in tiles for r in range(first, end))
    assert all(end - first <= 64 for _, first, end in tiles)
