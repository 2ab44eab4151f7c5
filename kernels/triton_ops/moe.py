# mypy: disable-error-code="no-untyped-def"
# Triton reads a kernel's annotations as its own types, so kernel arguments carry none.
"""Grouped GEMM of a mixture of experts: rows sorted by expert, each tile of rows multiplied by its expert's weights.

The caller cuts the sorted rows into tiles that never straddle two experts (``tile_map``), so that the kernel itself is an
ordinary GEMM with one table look-up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE_ROWS = 64


def tile_map(rows_per_expert: list[int], tile_rows: int = TILE_ROWS) -> list[tuple[int, int, int]]:
    """(expert, first row, end row) for every tile of at most ``tile_rows`` sorted rows; experts without rows have none."""
    tiles = []
    start = 0
    for expert, count in enumerate(rows_per_expert):
        end = start + count
        tiles += [(expert, first, min(first + tile_rows, end)) for first in range(start, end, tile_rows)]
        start = end
    return tiles


@triton.jit
def _grouped_gemm_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    tiles_ptr,  # [num_tiles, 3] int32: expert, first row, end row
    n,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (tile of rows, block of columns): out[rows] = x[rows] @ w[expert].T, fp32 accumulation."""
    tile = tl.program_id(0)
    expert = tl.load(tiles_ptr + tile * 3).to(tl.int64)
    first = tl.load(tiles_ptr + tile * 3 + 1)
    end = tl.load(tiles_ptr + tile * 3 + 2)
    rows = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    row_mask = rows < end
    column_mask = columns < n
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        depth = start + inner
        depth_mask = depth < k
        x = tl.load(x_ptr + rows[:, None] * k + depth[None, :], mask=row_mask[:, None] & depth_mask[None, :], other=0.0)
        w = tl.load(
            w_ptr + (expert * n + columns)[None, :] * k + depth[:, None],
            mask=column_mask[None, :] & depth_mask[:, None],
            other=0.0,
        )
        acc = tl.dot(x, w, acc)
    tl.store(
        out_ptr + rows[:, None] * n + columns[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=row_mask[:, None] & column_mask[None, :],
    )


def grouped_gemm(x: torch.Tensor, w: torch.Tensor, tiles: torch.Tensor, out: torch.Tensor) -> None:
    """out [rows, n] = x [rows, k] @ w[expert of the row] [n, k].T; ``tiles`` [num_tiles, 3] int32 from :func:`tile_map`."""
    n, k = w.shape[1], w.shape[2]
    grid = (tiles.shape[0], triton.cdiv(n, 128))
    _grouped_gemm_kernel[grid](
        x, w, out, tiles, n, k, BLOCK_M=TILE_ROWS, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3
    )
