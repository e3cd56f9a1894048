"""RMS norm of rows: y = x / sqrt(mean(x^2) + eps) * w  (Zhang and Sennrich 2019, equation 4).

Bytes moved: R * E read and written once, E weights read by every row, mostly from L2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launch import check_shape, jit, power_of_two, tl, wait_for_producer


def rms_norm_ref(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """RMS-normalise rows: x [..., E], w [E] -> [..., E] in x's dtype, float32 inside."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * inverse).mul_(w).to(x.dtype)


@jit("E")
def _rms_norm_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    eps,
    stride_xr,
    stride_or,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    w = tl.load(w_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    if PDL:
        wait_for_producer()
    x = tl.load(x_ptr + r * stride_xr + e, mask=e < E, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x) / E + eps) * w
    tl.store(out_ptr + r * stride_or + e, y.to(out_ptr.dtype.element_ty), mask=e < E)


def rms_norm(
    x: Tensor, w: Tensor, eps: float, *, out: Tensor | None = None, pdl: bool = False
) -> Tensor:
    """RMS-normalise rows: x [R, E], w [E] -> [R, E], float32 inside. `out` may be x.

    `pdl`: see `linear`.
    """
    R, E = x.shape
    check_shape("x", x, "[R, E]", R, E)
    check_shape("w", w, "[E]", E)
    out = torch.empty_like(x) if out is None else out
    check_shape("out", out, "[R, E]", R, E)
    if R:
        _rms_norm_kernel[(R,)](
            x,
            w,
            out,
            eps,
            x.stride(0),
            out.stride(0),
            E=E,
            BLOCK_E=power_of_two(E),
            PDL=pdl,
            num_warps=4 if E <= 4096 else 8,
            enable_fp_fusion=True,
            launch_pdl=pdl,
        )
    return out
