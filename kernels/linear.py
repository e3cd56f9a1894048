"""Skinny matmul: y = x @ w^T + b (+ residual), for the few rows of a decode step.

Bytes moved: N * K weights, once per 192 rows; R * K of x, read by each of N / BLOCK_N blocks,
mostly from the L2; R * N of y written, and of the residual read. Above 16 rows the blocks' sums, 4
bytes for each of N * R and each segment of K (`_skinny_matmul`), are written, and read by a second
launch.

A row's bits do not depend on how many rows share the launch.
"""

from __future__ import annotations

import torch
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


def linear_ref(
    x: Tensor, w: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None
) -> Tensor:
    """Multiply rows: x [R, K], w [N, K] -> [R, N] in x's dtype, float32 inside; see `linear`.

    One row at a time, so that its bits do not depend on how many there are.
    """
    _check_shapes(x, w, bias, residual)
    w, y = w.float(), x.new_empty(len(x), len(w), dtype=torch.float32)
    for r, row in enumerate(x.float()):
        y[r] = (w * row).sum(-1)
    for addend in (bias, residual):
        y = y if addend is None else y + addend
    return y.to(x.dtype)


@jit("N", "K", "ROWS")
def _linear_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr,  # [R, K] [N, K] [N] [R, N] [R, N]
    R,
    stride_xr, stride_wn, stride_rr, stride_or,
    N: tl.constexpr, K: tl.constexpr,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N columns of R <= ROWS rows."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = multiply_rows(
        x_ptr, w_ptr, n, n < N, R, stride_xr, stride_wn, K, SEGMENTS, ROWS, BLOCK_N, BLOCK_K, PDL
    )
    r = tl.arange(0, ROWS)
    _store_rows(acc, r, n, bias_ptr, residual_ptr, out_ptr, R, stride_rr, stride_or, N)


@jit("N", "SEGMENTS")
def _linear_end_kernel(
    partial_ptr, bias_ptr, residual_ptr, out_ptr,  # [SEGMENTS, R, N] [N] [R, N] [R, N]
    R,
    stride_ps, stride_pr, stride_rr, stride_or,
    N: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N columns of a row, of any number of rows."""
    if PDL:
        wait_for_producer()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) + tl.arange(0, 1)
    offsets = r.to(tl.int64)[None, :] * stride_pr + n[:, None]
    acc = add_segments(partial_ptr, offsets, (n < N)[:, None], stride_ps, SEGMENTS)
    _store_rows(acc, r, n, bias_ptr, residual_ptr, out_ptr, R, stride_rr, stride_or, N)


@device
def _store_rows(
    acc, r, n, bias_ptr, residual_ptr, out_ptr, R, stride_rr, stride_or, N: tl.constexpr
):
    """Add bias and residual to acc [columns, rows] and store it as rows r, columns n."""
    in_out = (n < N)[:, None] & (r < R)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        ptrs = residual_ptr + r.to(tl.int64)[None, :] * stride_rr + n[:, None]
        acc += tl.load(ptrs, mask=in_out, other=0.0).to(tl.float32)
    ptrs = out_ptr + r.to(tl.int64)[None, :] * stride_or + n[:, None]
    tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=in_out)


def _check_shapes(x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    (R, K), N = x.shape, w.shape[0]
    check_shape("w", w, "[N, K]", N, K)
    check_shape("x", x, "[R, K]", R, K)
    if bias is not None:
        check_shape("bias", bias, "[N]", N)
    if residual is not None:
        check_shape("residual", residual, "[R, N]", R, N)


def linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Multiply rows: x [R, K], w [N, K], bias [N] or None, residual [R, N] or None -> [R, N].

    bfloat16, float16 or float32, the same for all; float32 sums. `out` may be `residual`. `pdl`
    makes it a programmatic dependent launch (sm_90 and newer), in a stream whose kernels are all
    launched so.
    """
    (R, K), N = x.shape, w.shape[0]
    _check_shapes(x, w, bias, residual)
    out = x.new_empty(R, N) if out is None else out
    check_shape("out", out, "[R, N]", R, N)
    if R == 0:
        return out
    _linear_kernel.check(x=x, w=w)
    stride_rr = residual.stride(0) if residual is not None else 0
    given = (bias, residual, out, R)
    if row_tier(R) > 16:
        partial = partial_sums(x, w[None], pdl=pdl)
        _linear_end_kernel[(ceil_div(N, BLOCK_END), R)](
            partial, *given,
            *partial.stride()[:2], stride_rr, out.stride(0),
            N=N, SEGMENTS=len(partial), BLOCK_N=BLOCK_END,
            num_warps=4, pdl=pdl,
        )  # fmt: skip
        return out
    block_n, read = tile_of_few(w, N, R)
    _linear_kernel[(ceil_div(N, block_n),)](
        x, w, *given,
        x.stride(0), w.stride(0), stride_rr, out.stride(0),
        N=N, K=K, BLOCK_N=block_n, **read, pdl=pdl,
    )  # fmt: skip
    return out
