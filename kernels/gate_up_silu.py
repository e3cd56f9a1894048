"""Norm, gate and up projection, activation: silu(x' w_gate^T) * (x' w_up^T), x' = rms_norm(x).

The norm is a launch of its own, `rms_norm`, and its rows are rounded to their dtype as in the
definition. In the matmul's loop it would take seven times the instructions and limit a step to
2.9 TB/s of weights at best (8B on an H100). In the previous op's epilogue it would save one of a
layer's twelve launches, and that op would need the gain of the next norm.

Bytes moved: 2 * F * E weights, once per 192 rows; R * E of x read and written by the norm, and read
by each block of columns, mostly from the L2; R * F written. Above 16 rows the blocks' sums, 4 bytes
for each of 2 * F * R and each segment of E (`_skinny_matmul`), are written, and read by a further
launch.
"""

from __future__ import annotations

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
from ._skinny_matmul import add_segments, multiply_rows, partial_sums, split_pairs, tile_of_few
from .linear import linear_ref
from .rms_norm import rms_norm, rms_norm_ref


def gate_up_silu_ref(
    x: Tensor, norm_w: Tensor, eps: float, w: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Gated hidden rows: x [R, E], w [2F, E] -> [R, F] in x's dtype; see `gate_up_silu`."""
    both = linear_ref(rms_norm_ref(x, norm_w, eps).float(), w, bias)
    out = x.new_empty(len(x), len(w) // 2)
    for r, row in enumerate(both):  # one at a time, as in `linear_ref`
        gate, up = row.chunk(2)
        out[r] = F.silu(gate) * up
    return out


@jit("F", "E", "ROWS")
def _gate_up_silu_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr,  # [R, E] normed, [2F, E] [2F] [R, F]
    R,
    stride_xr, stride_wn, stride_or,
    F: tl.constexpr, E: tl.constexpr,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_F columns of R <= ROWS rows."""
    # The tile's rows of weights alternate: a gate, its up, the next gate.
    i = tl.arange(0, 2 * BLOCK_F)
    column = tl.program_id(0) * BLOCK_F + i // 2
    n = column + (i % 2) * F
    acc = multiply_rows(
        x_ptr, w_ptr, n, column < F, R, stride_xr, stride_wn,
        E, SEGMENTS, ROWS, 2 * BLOCK_F, BLOCK_K, PDL,
    )  # fmt: skip
    gate, up = split_pairs(acc)
    r, f = tl.arange(0, ROWS), tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    _store_gated(gate, up, r, f, bias_ptr, out_ptr, R, stride_or, F)


@jit("F", "SEGMENTS")
def _gate_up_silu_end_kernel(
    partial_ptr, bias_ptr, out_ptr,  # [SEGMENTS, R, 2F] [2F] [R, F]
    R,
    stride_ps, stride_pr, stride_or,
    F: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_F: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_F columns of a row, of any number of rows."""
    if PDL:
        wait_for_producer()
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    r = tl.program_id(1) + tl.arange(0, 1)
    offsets = r.to(tl.int64)[:, None] * stride_pr + f[None, :]
    in_f = (f < F)[None, :]
    gate = add_segments(partial_ptr, offsets, in_f, stride_ps, SEGMENTS)
    up = add_segments(partial_ptr, offsets + F, in_f, stride_ps, SEGMENTS)
    _store_gated(gate, up, r, f, bias_ptr, out_ptr, R, stride_or, F)


@device
def _store_gated(gate, up, r, f, bias_ptr, out_ptr, R, stride_or, F: tl.constexpr):
    """Add biases to gate and up [rows, columns] and store silu(gate) * up: rows r, columns f."""
    if bias_ptr is not None:
        gate += tl.load(bias_ptr + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_ptr + F + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    y = gate / (1 + tl.exp(-gate)) * up
    ptrs = out_ptr + r.to(tl.int64)[:, None] * stride_or + f[None, :]
    tl.store(ptrs, y.to(out_ptr.dtype.element_ty), mask=(r < R)[:, None] & (f < F)[None, :])


def gate_up_silu(
    x: Tensor,
    norm_w: Tensor,
    eps: float,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Gated hidden rows: x [R, E], norm_w [E], w [2F, E] and bias [2F] (gate above up) -> [R, F].

    `pdl`: see `linear`.
    """
    (R, E), F = x.shape, w.shape[0] // 2
    check_shape("w", w, "[2F, E]", 2 * F, E)
    check_shape("x", x, "[R, E]", R, E)
    check_shape("norm_w", norm_w, "[E]", E)
    if bias is not None:
        check_shape("bias", bias, "[2F]", 2 * F)
    out = x.new_empty(R, F) if out is None else out
    check_shape("out", out, "[R, F]", R, F)
    if R == 0:
        return out
    _gate_up_silu_kernel.check(x=x)
    x = rms_norm(x, norm_w, eps, pdl=pdl)
    given = (bias, out, R)
    if row_tier(R) > 16:
        partial = partial_sums(x, w[None], pdl=pdl)
        _gate_up_silu_end_kernel[(ceil_div(F, BLOCK_END), R)](
            partial, *given,
            *partial.stride()[:2], out.stride(0),
            F=F, SEGMENTS=len(partial), BLOCK_F=BLOCK_END,
            num_warps=4, pdl=pdl,
        )  # fmt: skip
        return out
    block_n, read = tile_of_few(w, 2 * F, R)
    _gate_up_silu_kernel[(ceil_div(F, block_n // 2),)](
        x, w, *given,
        x.stride(0), w.stride(0), out.stride(0),
        F=F, E=E, BLOCK_F=block_n // 2, **read, pdl=pdl,
    )  # fmt: skip
    return out
