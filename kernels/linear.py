"""Skinny matmul: y = x @ w^T + b (+ residual), for the few rows of a decode step.

Bytes moved: N * K weights once for 192 rows; R * K of x read by each of N / BLOCK_N blocks, mostly
from the L2; R * N of y written, and of the residual read. Above 16 rows the blocks' sums, 4 bytes
for each of N * R and each segment of K (`_tiles`), are written and read by a further launch.

A row's bits must not depend on how many rows share the launch. Matmul libraries choose their
blocking by the row count, so `pack_ref` asks this machine's library, once per weight shape, for
which row counts a row keeps its bits; `linear_ref` pads or splits the rows to stay among those.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import (
    BLOCK_END,
    ceil_div,
    check_shape,
    column_tile,
    depth_tile,
    device,
    jit,
    prefetch_l2,
    row_tier,
    segment,
    tl,
    wait_for_producer,
)
from ._skinny_matmul import add_segments, multiply_rows, partial_sums

# Row counts that a probe tries; other counts are padded up to the next one. Each costs a library
# some megabytes of generated code per shape, so they are few.
_TRIED = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 32, 64, 128)


class PackedWeight(NamedTuple):
    """A weight in the layout in which `linear_ref` reads it, with its bias.

    `rows` lists the row counts, ascending, for which a row's bits are all the same.
    """

    data: Tensor
    bias: Tensor | None
    out_features: int
    in_features: int
    blocked: bool
    rows: tuple[int, ...]


def pack_ref(w: Tensor, bias: Tensor | None = None) -> PackedWeight:
    """Bring a weight w [N, K], with bias [N] or None, into the layout that reads fastest.

    bfloat16 on a CPU that multiplies it natively is blocked by oneDNN (a third faster here than
    row-major); everything else stays as it is, without a copy, but for rows that are no whole cache
    lines: a library's order of summing may follow where a row begins.
    """
    if w.dim() != 2 or (bias is not None and bias.shape != w.shape[:1]):
        raise ValueError(
            f"w must be [N, K] and bias [N], got {list(w.shape)} and "
            f"{None if bias is None else list(bias.shape)}"
        )
    blocked = _blockable(w)
    # The second argument is the row count to block for: one fits every small row count.
    data = torch.ops.mkldnn._reorder_linear_weight(w, 1) if blocked else _whole_lines(w)
    packed = PackedWeight(data, bias, w.shape[0], w.shape[1], blocked, (1,))
    start = 0 if blocked else data.data_ptr() % 64
    key = (*w.shape, w.dtype, w.device, bias is None, start, torch.get_num_threads())
    if key not in _probed:
        _probed[key] = _stable_rows(packed)
    return packed._replace(rows=_probed[key])


def linear_ref(x: Tensor, w: PackedWeight, *, residual: Tensor | None = None) -> Tensor:
    """Multiply rows: x [R, K], w [N, K], residual [R, N] or None -> [R, N] in x's dtype."""
    if x.dim() != 2 or x.shape[1] != w.in_features:
        raise ValueError(f"x must be [R, K]=[R, {w.in_features}] to match w, got {list(x.shape)}")
    most = w.rows[-1]
    if x.shape[0] <= most:
        y = _at_stable_rows(x, w)
    else:
        y = torch.cat([_at_stable_rows(part, w) for part in x.split(most)])
    return y if residual is None else y.add_(residual)


def _at_stable_rows(x: Tensor, w: PackedWeight) -> Tensor:
    count = x.shape[0]
    if count in w.rows:
        return _multiply(x, w)
    padded = next(rows for rows in w.rows if rows > count)
    return _multiply(F.pad(x, (0, 0, 0, padded - count)), w)[:count]


def _multiply(x: Tensor, w: PackedWeight) -> Tensor:
    if w.blocked:
        return torch.ops.mkldnn._linear_pointwise(x, w.data, w.bias, "none", [], "")
    missing = w.data.shape[1] - x.shape[1]
    return F.linear(F.pad(x, (0, missing)) if missing else x, w.data, w.bias)


def _whole_lines(w: Tensor) -> Tensor:
    """Rows w [N, K] with zeros behind them up to a multiple of 64 bytes."""
    missing = -w.shape[1] % (64 // w.element_size())
    return F.pad(w, (0, missing)) if missing else w


def _blockable(w: Tensor) -> bool:
    return (
        w.dtype == torch.bfloat16
        and w.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


# What probes found: every weight of a shape that begins alike in a cache line is read by the same
# code, so one probe serves them all.
_probed: dict[tuple[object, ...], tuple[int, ...]] = {}


def _stable_rows(w: PackedWeight) -> tuple[int, ...]:
    """The tried row counts at which a row has the bits that it has among 16 rows.

    Another order of summing shows in few elements, one in some thousands, since a row is rounded to
    its dtype at the end: so many rows are tried, at changing places.
    """
    generator = torch.Generator().manual_seed(0)
    most = max(_TRIED[-1], _PROBED_ELEMENTS // w.out_features // 16 * 16)
    x = torch.empty(min(most, 2048), w.in_features, dtype=w.data.dtype)
    x = x.normal_(generator=generator).to(w.data.device)

    def stable(count: int) -> bool:
        some = x[: max(count, _PROBED_ELEMENTS // w.out_features)]
        parts = zip(some.split(count), expected.split(count), strict=False)
        return all(torch.equal(_multiply(part, w), y) for part, y in parts if len(part) == count)

    expected = torch.cat([_multiply(part, w) for part in x.split(16)])
    rows = tuple(count for count in _TRIED if stable(count))
    # At least one width is always right: 16 rows agree with themselves.
    return rows or (16,)


_PROBED_ELEMENTS = 2**19


@jit("N", "K")
def _linear_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    R,
    stride_xr,
    stride_wn,
    stride_rr,
    stride_or,
    N: tl.constexpr,
    K: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if PDL:
        prefetch_l2(w_ptr, n, stride_wn, N, K)
        wait_for_producer()
    r = tl.arange(0, 16)
    w_ptrs = w_ptr + n.to(tl.int64) * stride_wn
    acc = multiply_rows(w_ptrs, n < N, x_ptr, stride_xr, r, R, K, SEGMENT, BLOCK_N, BLOCK_K)
    _store_rows(acc, r, n, bias_ptr, residual_ptr, out_ptr, R, stride_rr, stride_or, N)


@jit("N", "SEGMENTS")
def _linear_end_kernel(
    partial_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    R,
    stride_ps,
    stride_pr,
    stride_rr,
    stride_or,
    N: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
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
    """Finish acc [columns, rows] and store it as rows r, columns n."""
    in_out = (n < N)[:, None] & (r < R)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        ptrs = residual_ptr + r.to(tl.int64)[None, :] * stride_rr + n[:, None]
        acc += tl.load(ptrs, mask=in_out, other=0.0).to(tl.float32)
    ptrs = out_ptr + r.to(tl.int64)[None, :] * stride_or + n[:, None]
    tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=in_out)


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

    bfloat16, float16 or float32, all alike; float32 sums. `out` may be `residual`. `pdl` makes it a
    programmatic dependent launch (sm_90 and newer), for kernels that all wait for their producers.
    """
    (R, K), N = x.shape, w.shape[0]
    check_shape("w", w, "[N, K]", N, K)
    check_shape("x", x, "[R, K]", R, K)
    out = x.new_empty(R, N) if out is None else out
    check_shape("out", out, "[R, N]", R, N)
    if bias is not None:
        check_shape("bias", bias, "[N]", N)
    if residual is not None:
        check_shape("residual", residual, "[R, N]", R, N)
    if R == 0:
        return out
    _linear_kernel.check(x=x, w=w)
    given = (bias, residual, out, R)
    stride_rr = residual.stride(0) if residual is not None else 0
    if row_tier(R) > 16:
        partial = partial_sums(x, w[None], pdl=pdl)
        _linear_end_kernel[(ceil_div(N, BLOCK_END), R)](
            partial,
            *given,
            *partial.stride()[:2],
            stride_rr,
            out.stride(0),
            N=N,
            SEGMENTS=len(partial),
            BLOCK_N=BLOCK_END,
            PDL=pdl,
            num_warps=4,
            enable_fp_fusion=True,
            launch_pdl=pdl,
        )
        return out
    block_n, (depth, stages) = column_tile(N, K, 16), depth_tile(16)
    _linear_kernel[(ceil_div(N, block_n),)](
        x,
        w,
        *given,
        x.stride(0),
        w.stride(0),
        stride_rr,
        out.stride(0),
        N=N,
        K=K,
        SEGMENT=segment(N, K),
        BLOCK_N=block_n,
        BLOCK_K=depth // w.element_size(),
        PDL=pdl,
        num_warps=4,
        num_stages=stages,
        enable_fp_fusion=True,
        launch_pdl=pdl,
    )
    return out
