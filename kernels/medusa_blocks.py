"""Residual blocks of parallel heads: h_i = h + silu(h w_i^T + b_i), one launch per depth.

Medusa, Cai et al. 2024, section 2.1. `multi_head_projection` computes the heads' logits from them.

Bytes moved, per depth: H * E * E weights, once per 192 rows; R * E of x, read by each of H * E /
BLOCK_N blocks, mostly from the L2, and once more to be added; R * H * E written. Above 16 rows the
blocks' sums, 4 bytes for each of H * E * R and each segment of E (`_skinny_matmul`), are written,
and read by a further launch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import (
    BLOCK_END,
    ceil_div,
    check_shape,
    device,
    jit,
    row_tier,
    tl,
    wait_for_producer,
)
from ._skinny_matmul import add_segments, multiply_rows, partial_sums, tile_of_few
from .linear import linear_ref


def medusa_blocks_ref(normed: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """Apply every head's residual blocks: normed [R, E], w [H, depth, E, E], bias [H, depth, E] ->
    [R, 1 + H, E], rounded to normed's dtype after each block; see `medusa_blocks`.
    """
    out = normed.new_empty(1 + len(w), *normed.shape)
    out[:] = normed
    for rows, blocks, biases in zip(out[1:], w, bias, strict=True):
        for w_d, bias_d in zip(blocks, biases, strict=True):
            for row, gate in zip(rows, linear_ref(rows.float(), w_d, bias_d), strict=True):
                row += F.silu(gate)  # one row at a time, as in `linear_ref`
    return out.transpose(0, 1)


@jit("HEADS", "E", "ROWS")
def _medusa_blocks_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr,  # [HEADS, R, E] [HEADS, E, E] [HEADS, E] [HEADS, R, E]
    R,
    stride_xr, stride_xh, stride_wh, stride_wn, stride_bh, stride_or, stride_oh,
    HEADS: tl.constexpr, E: tl.constexpr,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N columns of a head's block, for R <= ROWS rows."""
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_ptr += h * stride_wh
    x_ptr += h * stride_xh
    acc = multiply_rows(
        x_ptr, w_ptr, n, n < E, R, stride_xr, stride_wn, E, SEGMENTS, ROWS, BLOCK_N, BLOCK_K, PDL
    )
    bias_ptr += h * stride_bh
    out_ptr += h * stride_oh
    r = tl.arange(0, ROWS)
    _store_block(acc, r, n, bias_ptr, x_ptr, out_ptr, R, stride_xr, stride_or, E)


@jit("HEADS", "E", "SEGMENTS")
def _medusa_blocks_end_kernel(
    partial_ptr, x_ptr, bias_ptr, out_ptr,  # [SEGMENTS, R, HEADS * E], the others as above
    R,
    stride_ps, stride_pr, stride_xr, stride_xh, stride_bh, stride_or, stride_oh,
    HEADS: tl.constexpr, E: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N columns of a row of a head's block, for any number of rows."""
    if PDL:
        wait_for_producer()
    h = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) + tl.arange(0, 1)
    offsets = r.to(tl.int64)[None, :] * stride_pr + (h * E + n)[:, None]
    acc = add_segments(partial_ptr, offsets, (n < E)[:, None], stride_ps, SEGMENTS)
    x_ptr += h * stride_xh
    bias_ptr += h * stride_bh
    out_ptr += h * stride_oh
    _store_block(acc, r, n, bias_ptr, x_ptr, out_ptr, R, stride_xr, stride_or, E)


@device
def _store_block(acc, r, n, bias_ptr, x_ptr, out_ptr, R, stride_xr, stride_or, E: tl.constexpr):
    """Store x + silu(acc + bias) of acc [columns, rows] as rows r, columns n."""
    mask = (n < E)[:, None] & (r < R)[None, :]
    wide_r = r.to(tl.int64)
    bias = tl.load(bias_ptr + n, mask=n < E, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + (wide_r * stride_xr)[None, :] + n[:, None], mask=mask, other=0.0)
    gate = acc + bias[:, None]
    # Which product is fused is spelled out: the two kernels must round alike.
    y = tl.fma(gate, 1 / (1 + tl.exp(-gate)), x.to(tl.float32))
    ptrs = out_ptr + (wide_r * stride_or)[None, :] + n[:, None]
    tl.store(ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


def medusa_blocks(
    normed: Tensor, w: Tensor, bias: Tensor, *, out: Tensor | None = None, pdl: bool = False
) -> Tensor:
    """Apply every head's residual blocks: normed [R, E], w [H, depth, E, E], bias [H, depth, E] ->
    [R, 1 + H, E]: the LM head's rows, which are `normed`, then each head's.

    The result is a view of memory [1 + H, R, E], so that its transpose can be flattened without a
    copy. `out` may have any strides but the last, which is 1; normed may be out[:, 0], and is
    copied there if it is not. `pdl`: see `linear`.
    """
    (R, E), (H, depth) = normed.shape, w.shape[:2]
    check_shape("normed", normed, "[R, E]", R, E)
    check_shape("w", w, "[H, depth, E, E]", H, depth, E, E)
    check_shape("bias", bias, "[H, depth, E]", H, depth, E)
    out = normed.new_empty(1 + H, R, E).transpose(0, 1) if out is None else out
    check_shape("out", out, "[R, 1 + H, E]", R, 1 + H, E)
    _medusa_blocks_kernel.check(normed=normed)
    if out.data_ptr() != normed.data_ptr() or out.stride(0) != normed.stride(0):
        out[:, 0].copy_(normed)
    if R == 0 or H == 0:
        return out
    heads = out[:, 1:]
    if depth == 0:
        heads.copy_(normed[:, None].expand_as(heads))
        return out
    # A program reads whole rows and writes a part of them, so that depths alternate two buffers.
    other = torch.empty_like(heads) if depth > 1 else heads
    x, stride_xh = normed, 0
    for d in range(depth):
        y = heads if (depth - d) % 2 else other
        if row_tier(R) > 16:
            rows = x if d == 0 else x.transpose(0, 1)
            partial = partial_sums(rows, w[:, d], pdl=pdl)
            _medusa_blocks_end_kernel[(ceil_div(E, BLOCK_END), R, H)](
                partial, x, bias[:, d], y, R,
                *partial.stride()[:2], x.stride(0), stride_xh, bias.stride(0), *y.stride()[:2],
                HEADS=H, E=E, SEGMENTS=len(partial), BLOCK_N=BLOCK_END,
                num_warps=4, pdl=pdl,
            )  # fmt: skip
        else:
            block_n, read = tile_of_few(w, H * E, R)
            _medusa_blocks_kernel[(ceil_div(E, block_n), H)](
                x, w[:, d], bias[:, d], y, R,
                x.stride(0), stride_xh, w.stride(0), w.stride(2), bias.stride(0), *y.stride()[:2],
                HEADS=H, E=E, BLOCK_N=block_n, **read, pdl=pdl,
            )  # fmt: skip
        x, stride_xh = y, y.stride(1)
    return out
