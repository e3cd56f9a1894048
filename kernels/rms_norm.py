"""RMS norm of rows: y = x / sqrt(mean(x^2) + eps) * w  (Zhang and Sennrich 2019, equation 4).

With ids, row r is x[ids_r]: an embedding's rows and their norm in one launch.

Bytes moved: R * E read and written once; E weights read by every row, mostly from the L2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import check_dtype, check_shape, jit, power_of_two, tl, wait_for_producer


def rms_norm_ref(
    x: Tensor, w: Tensor, eps: float, *, ids: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """RMS-normalise rows: x [..., E], w [E] -> [..., E] in x's dtype, float32 inside; see
    `rms_norm`."""
    wide = (x if ids is None else F.embedding(ids, x)).float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    normed = (wide * inverse).mul_(w)
    return normed.to(x.dtype) if out is None else out.copy_(normed)


@jit("E")
def _rms_norm_kernel(
    x_ptr, w_ptr, ids_ptr, out_ptr,  # [R, E] or [V, E], [E] [R] [R, E]
    eps,
    stride_xr, stride_or,
    E: tl.constexpr, BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: a row."""
    r = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    w = tl.load(w_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    if PDL:
        wait_for_producer()
    row = r
    if ids_ptr is not None:
        row = tl.load(ids_ptr + r)
    x = tl.load(x_ptr + row * stride_xr + e, mask=e < E, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x) / E + eps) * w
    tl.store(out_ptr + r * stride_or + e, y.to(out_ptr.dtype.element_ty), mask=e < E)


def rms_norm(
    x: Tensor,
    w: Tensor,
    eps: float,
    *,
    ids: Tensor | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """RMS-normalise rows: x [R, E], w [E] -> [R, E], float32 inside; `out` may be x.

    With ids [R] int64, row r is x[ids[r]] of x [V, E]; ids must be in 0..V-1. `pdl`: see `linear`.
    """
    rows, E = x.shape
    R = rows if ids is None else ids.shape[0]
    check_shape("x", x, "[R, E]", rows, E)
    check_shape("w", w, "[E]", E)
    if ids is not None:
        check_shape("ids", ids, "[R]", R)
        check_dtype("ids", ids, torch.int64)
    out = x.new_empty(R, E) if out is None else out
    check_shape("out", out, "[R, E]", R, E)
    if R:
        _rms_norm_kernel[(R,)](
            x, w, ids, out, eps, x.stride(0), out.stride(0),
            E=E, BLOCK_E=power_of_two(E),
            num_warps=4 if E <= 4096 else 8, pdl=pdl,
        )  # fmt: skip
    return out
