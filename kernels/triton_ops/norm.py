# mypy: disable-error-code="no-untyped-def"
# Triton reads a kernel's annotations as its own types, so kernel arguments carry none.
"""Fused RMSNorm + residual, SiLU * mul and rotary embedding. One program handles one token (or one tile of it)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rmsnorm_residual_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, new_residual_ptr, hidden, eps, BLOCK: tl.constexpr
):
    """One program per token: the row stays in registers between the sum and the scaling, so memory is touched once."""
    row = tl.program_id(0).to(tl.int64) * hidden
    column = tl.arange(0, BLOCK)
    mask = column < hidden
    x = tl.load(x_ptr + row + column, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row + column, mask=mask, other=0.0).to(tl.float32)
    total = x + residual
    tl.store(new_residual_ptr + row + column, total.to(new_residual_ptr.dtype.element_ty), mask=mask)
    scale = 1.0 / tl.sqrt(tl.sum(total * total, axis=0) / hidden + eps)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row + column, (total * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


def rmsnorm_residual(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    new_residual: torch.Tensor,
) -> None:
    """out = rmsnorm(x + residual) * weight and new_residual = x + residual, for x [tokens, hidden] contiguous."""
    tokens, hidden = x.shape
    block = triton.next_power_of_2(hidden)
    # 16 bytes per thread and load: a row of 4,096 bf16 values fills 8 warps twice.
    warps = min(16, max(1, block // 512))
    _rmsnorm_residual_kernel[(tokens,)](
        x, residual, weight, out, new_residual, hidden, eps, BLOCK=block, num_warps=warps
    )


@triton.jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, inter, BLOCK: tl.constexpr):
    """Program (token, tile): out = gate * sigmoid(gate) * up."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < inter
    gate = tl.load(gate_up_ptr + token * 2 * inter + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + token * 2 * inter + inter + column, mask=mask, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + token * inter + column, value.to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out [tokens, inter] = silu(gate) * up for gate_up [tokens, 2 * inter], both contiguous."""
    tokens, inter = out.shape
    block = min(1024, triton.next_power_of_2(inter))
    _silu_mul_kernel[(tokens, triton.cdiv(inter, block))](gate_up, out, inter, BLOCK=block, num_warps=4)


@triton.jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    num_q_heads,
    num_kv_heads,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Program (token, group of HEADS heads): heads below num_q_heads are q's, the rest k's; rotated in place."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF_BLOCK)
    position = tl.load(positions_ptr + token)
    inside = column < HALF
    c = tl.load(cos_ptr + position * HALF + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin_ptr + position * HALF + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    is_q = head < num_q_heads
    is_k = (head >= num_q_heads) & (head < num_q_heads + num_kv_heads)
    q_offset = (token * num_q_heads + head)[:, None] * (2 * HALF) + column[None, :]
    k_offset = (token * num_kv_heads + head - num_q_heads)[:, None] * (2 * HALF) + column[None, :]
    q_mask = is_q[:, None] & inside[None, :]
    k_mask = is_k[:, None] & inside[None, :]
    a = tl.load(q_ptr + q_offset, mask=q_mask, other=0.0).to(tl.float32)
    b = tl.load(q_ptr + q_offset + HALF, mask=q_mask, other=0.0).to(tl.float32)
    a += tl.load(k_ptr + k_offset, mask=k_mask, other=0.0).to(tl.float32)
    b += tl.load(k_ptr + k_offset + HALF, mask=k_mask, other=0.0).to(tl.float32)
    first = (a * c - b * s).to(q_ptr.dtype.element_ty)
    second = (b * c + a * s).to(q_ptr.dtype.element_ty)
    tl.store(q_ptr + q_offset, first, mask=q_mask)
    tl.store(q_ptr + q_offset + HALF, second, mask=q_mask)
    tl.store(k_ptr + k_offset, first, mask=k_mask)
    tl.store(k_ptr + k_offset + HALF, second, mask=k_mask)


def rope_(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> None:
    """Rotate q [tokens, heads, dim] and k [tokens, kv_heads, dim] in place; cos and sin are [max_position, dim / 2]."""
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = 8
    grid = (tokens, triton.cdiv(heads + kv_heads, group))
    _rope_kernel[grid](
        q,
        k,
        cos,
        sin,
        positions,
        heads,
        kv_heads,
        HALF=dim // 2,
        HALF_BLOCK=triton.next_power_of_2(dim // 2),
        HEADS=group,
        num_warps=4,
    )
