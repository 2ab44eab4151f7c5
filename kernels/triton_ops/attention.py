# mypy: disable-error-code="no-untyped-def"
# Triton reads a kernel's annotations as its own types, so kernel arguments carry none.
"""Attention in Triton: causal GQA prefill, and decode over a paged cache. Readable first; the libraries are faster.

Both walk over the keys once with the running maximum and sum of the online softmax (Milakov & Gimelshein 2018; Dao et
al. 2022). Decode cuts each context into parts (flash-decoding) and merges them in a second small kernel, because a small
batch alone does not fill a GPU.

Triton's interpreter multiplies bf16 wrongly (it treats the bits as integers), so there these kernels are checked in fp16
and fp32; compiled they take bf16 as well.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    length,
    scale,  # log2(e) / sqrt(head_dim): exp2 is what the hardware has
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (block of queries, sequence x head). Layout [sequence, token, head, dim]."""
    block = tl.program_id(0)
    sequence = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    d = tl.arange(0, DIM)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < length
    q_offset = ((sequence * length + rows) * HEADS + head)[:, None] * DIM + d[None, :]
    q = tl.load(q_ptr + q_offset, mask=row_mask[:, None], other=0.0)
    best = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    stop = tl.minimum((block + 1) * BLOCK_M, length)
    for start in range(0, stop, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        column_mask = columns < length
        kv_offset = ((sequence * length + columns) * KV_HEADS + kv_head)[:, None] * DIM + d[None, :]
        k = tl.load(k_ptr + kv_offset, mask=column_mask[:, None], other=0.0)
        v = tl.load(v_ptr + kv_offset, mask=column_mask[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        seen = (rows[:, None] >= columns[None, :]) & column_mask[None, :]
        scores = tl.where(seen, scores, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
        best = new_best
    out = acc / total[:, None]
    tl.store(out_ptr + q_offset, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None])


def prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention; q [batch, length, heads, dim], k and v [batch, length, kv_heads, dim], dim a power of two >= 16."""
    batch, length, heads, dim = q.shape
    out = torch.empty_like(q)
    block_m = 128 if q.element_size() == 2 else 64
    grid = (triton.cdiv(length, block_m), batch * heads)
    _prefill_kernel[grid](
        q,
        k,
        v,
        out,
        length,
        LOG2_E / math.sqrt(dim),
        HEADS=heads,
        KV_HEADS=k.shape[2],
        DIM=dim,
        BLOCK_M=block_m,
        BLOCK_N=64,
        num_warps=8 if block_m == 128 else 4,
        num_stages=2,
    )
    return out


@triton.jit
def _paged_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    length_ptr,
    part_ptr,  # [batch, heads, splits, DIM] fp32: softmax-weighted sum of one part
    best_ptr,  # [batch, heads, splits] fp32: maximum score of the part, in log2 units
    total_ptr,  # [batch, heads, splits] fp32: sum of weights of the part
    table_stride,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (sequence, KV head, part): all query heads of one KV head read its keys and values once."""
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    length = tl.load(length_ptr + sequence)
    part_length = tl.cdiv(tl.cdiv(length, SPLITS), TILE) * TILE
    begin = part * part_length
    end = tl.minimum(begin + part_length, length)
    d = tl.arange(0, DIM)
    member = tl.arange(0, GROUP_BLOCK)  # tl.dot wants 16 rows or more: the group is padded
    head = kv_head * GROUP + member
    head_mask = member < GROUP
    q = tl.load(q_ptr + (sequence * HEADS + head)[:, None] * DIM + d[None, :], mask=head_mask[:, None], other=0.0)
    best = tl.full([GROUP_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    acc = tl.zeros([GROUP_BLOCK, DIM], tl.float32)
    for start in range(begin, end, TILE):
        token = start + tl.arange(0, TILE)
        inside = token < end
        page = tl.load(table_ptr + sequence * table_stride + token // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        slot = page * BLOCK_SIZE + token % BLOCK_SIZE
        offset = (slot * KV_HEADS + kv_head)[:, None] * DIM + d[None, :]
        k = tl.load(k_ptr + offset, mask=inside[:, None], other=0.0)
        v = tl.load(v_ptr + offset, mask=inside[:, None], other=0.0)
        scores = tl.where(inside[None, :], tl.dot(q, tl.trans(k)) * scale, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
        best = new_best
    index = (sequence * HEADS + head) * SPLITS + part
    tl.store(best_ptr + index, best, mask=head_mask)
    tl.store(total_ptr + index, total, mask=head_mask)
    tl.store(part_ptr + index[:, None] * DIM + d[None, :], acc, mask=head_mask[:, None])


@triton.jit
def _merge_kernel(
    part_ptr, best_ptr, total_ptr, out_ptr, DIM: tl.constexpr, SPLITS: tl.constexpr, SPLIT_BLOCK: tl.constexpr
):
    """Program (sequence x head): weigh the parts by their own maximum and sum. A part without tokens weighs nothing."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLIT_BLOCK)
    d = tl.arange(0, DIM)
    mask = split < SPLITS
    best = tl.load(best_ptr + row * SPLITS + split, mask=mask, other=-float("inf"))
    total = tl.load(total_ptr + row * SPLITS + split, mask=mask, other=0.0)
    part = tl.load(part_ptr + (row * SPLITS + split)[:, None] * DIM + d[None, :], mask=mask[:, None], other=0.0)
    weight = tl.exp2(best - tl.max(best, axis=0))
    out = tl.sum(part * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
    tl.store(out_ptr + row * DIM + d, out.to(out_ptr.dtype.element_ty))


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    splits: int,
) -> torch.Tensor:
    """One query per sequence over a paged cache.

    q [batch, heads, dim]; caches [num_blocks, block_size, kv_heads, dim]; block_table [batch, blocks] int32; lengths
    [batch] int32. ``splits`` parts per context, merged at the end.
    """
    batch, heads, dim = q.shape
    block_size, kv_heads = k_cache.shape[1], k_cache.shape[2]
    out = torch.empty_like(q)
    part = torch.empty(batch, heads, splits, dim, dtype=torch.float32, device=q.device)
    best = torch.empty(batch, heads, splits, dtype=torch.float32, device=q.device)
    total = torch.empty_like(best)
    _paged_decode_kernel[(batch, kv_heads, splits)](
        q,
        k_cache,
        v_cache,
        block_table,
        lengths,
        part,
        best,
        total,
        block_table.stride(0),
        LOG2_E / math.sqrt(dim),
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        BLOCK_SIZE=block_size,
        SPLITS=splits,
        GROUP_BLOCK=max(16, triton.next_power_of_2(heads // kv_heads)),
        TILE=64,
        num_warps=4,
        num_stages=3,
    )
    _merge_kernel[(batch * heads,)](
        part, best, total, out, DIM=dim, SPLITS=splits, SPLIT_BLOCK=triton.next_power_of_2(splits), num_warps=4
    )
    return out
