"""Norm, gate and up projection, activation: silu(x' w_gate^T) * (x' w_up^T), x' = rms_norm(x).

Bytes moved: 2 * F * E weights once for 256 rows; R * E of x read by each of F / 16 blocks, mostly
from L2; R * F written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import (
    ceil_div,
    check_shape,
    depth_tile,
    device,
    jit,
    prefetch_l2,
    row_tier,
    tl,
    wait_for_producer,
)
from ._tiles import multiply_rows, split_pairs
from .linear import PackedWeight, linear_ref
from .rms_norm import rms_norm, rms_norm_ref


def gate_up_silu_ref(x: Tensor, norm_w: Tensor, eps: float, w: PackedWeight) -> Tensor:
    """Gated hidden rows: x [R, E], norm_w [E], w [2F, E] (gate above up) -> [R, F]."""
    gate, up = linear_ref(rms_norm_ref(x, norm_w, eps), w).chunk(2, dim=-1)
    return _silu(gate).mul_(up)


def _silu(gate: Tensor) -> Tensor:
    """silu of rows [R, F], few at a time: torch cuts more than 32,768 elements among its threads
    wherever that falls, and what is left of a row behind its last whole vector rounds otherwise."""
    rows = max(1, 32768 // gate.shape[1])
    if len(gate) <= rows:
        return F.silu(gate)
    return torch.cat([F.silu(some) for some in gate.split(rows)])


@jit("ROWS", "TAIL", "F", "E")
def _gate_up_silu_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    R,
    stride_xr,
    stride_wn,
    stride_or,
    F: tl.constexpr,
    E: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    # The tile's weights alternate: a gate's row, the row of its up, the next gate's.
    i = tl.arange(0, 2 * BLOCK_F)
    column = tl.program_id(0) * BLOCK_F + i // 2
    n = column + (i % 2) * F
    in_n = column < F
    if PDL:
        prefetch_l2(w_ptr, tl.where(in_n, n, 0), stride_wn, 2 * F, E)
        wait_for_producer()
    r = tl.program_id(1) * (ROWS + TAIL) + tl.arange(0, ROWS)
    tail_r = tl.program_id(1) * (ROWS + TAIL) + ROWS + tl.arange(0, TAIL if TAIL > 0 else 1)
    acc, tail_acc = multiply_rows(
        w_ptr + n.to(tl.int64) * stride_wn,
        in_n,
        x_ptr,
        stride_xr,
        r,
        tail_r,
        R,
        K=E,
        ROWS=ROWS,
        TAIL=TAIL,
        BLOCK_N=2 * BLOCK_F,
        BLOCK_K=BLOCK_K,
    )
    bias = tl.zeros([2 * BLOCK_F], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    _store_gated(acc, bias, r, f, out_ptr, stride_or, R, F)
    if TAIL > 0:
        _store_gated(tail_acc, bias, tail_r, f, out_ptr, stride_or, R, F)


@device
def _store_gated(acc, bias, r, f, out_ptr, stride_or, R, F):
    """Finish acc [2 BLOCK_F, rows] and store it as rows r, columns f."""
    gate, up = split_pairs(acc + bias[:, None])
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
    rows, tail = row_tier(R)
    block_f = 8 if tail else 16  # what the registers hold
    block_k, stages = depth_tile(rows + tail)
    _gate_up_silu_kernel[(ceil_div(F, block_f), ceil_div(R, rows + tail))](
        x,
        w,
        bias,
        out,
        R,
        E,
        w.stride(0),
        out.stride(0),
        F=F,
        E=E,
        HAS_BIAS=bias is not None,
        ROWS=rows,
        TAIL=tail,
        BLOCK_F=block_f,
        BLOCK_K=block_k,
        PDL=pdl,
        num_warps=4 if rows <= 64 else 8,  # of a larger tile's sums, half each
        # Three blocks of four warps: left to itself, ptxas spills a little to fit a fourth.
        maxnreg=168 if 16 < rows <= 64 else None,
        num_stages=stages,
        enable_fp_fusion=True,
        launch_pdl=pdl,
    )
    return out
