"""Rotation of q and k, and K and V appended to the paged cache in place, after the projection.

    q, k = norm(q), norm(k) per head (Qwen3);  q, k rotated by position (Su et al. 2021);
    cache[slot] = k, v

For prefill, and for engines that project with a library's matmul. The few rows of a decode step go
through `qkv_rope_cache`, which multiplies, too.

Bytes moved: (Hq + 2 Hk) * D of R rows read once and written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launch import (
    ceil_div,
    check_dtype,
    check_shape,
    device,
    jit,
    power_of_two,
    tl,
    wait_for_producer,
)
from .rms_norm import rms_norm_ref


def rope_cache_ref(
    qkv: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Rotate and cache: qkv [R, (Hq + 2 Hk) * D] -> q [R, Hq, D] in qkv's dtype, float32 inside;
    see `rope_cache`."""
    _, page_size, Hk, D = k_pages.shape
    heads = qkv.float().unflatten(1, (-1, D))
    q, k, v = heads.split([heads.shape[1] - 2 * Hk, Hk, Hk], 1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm_ref(q, q_norm, eps), rms_norm_ref(k, k_norm, eps)
    cos, sin = cos_table[positions, None], sin_table[positions, None]
    q, k = (x * cos + x.roll(D // 2, -1) * sin for x in (q, k))
    live = slots >= 0
    page, offset = slots[live] // page_size, slots[live] % page_size
    k_pages[page, offset] = k[live].to(k_pages.dtype)
    v_pages[page, offset] = v[live].to(v_pages.dtype)
    return q.to(qkv.dtype)


@jit("HEADS", "KV_HEADS", "D")
def _rope_cache_kernel(
    qkv_ptr, q_norm_ptr, k_norm_ptr, q_ptr,  # [R, (Hq + 2 Hk) * D] [D] [D] [R, Hq, D]
    k_ptr, v_ptr,  # [pages, page_size, Hk, D]
    slots_ptr, positions_ptr, cos_ptr, sin_ptr,  # [R] [R] [any, D] [any, D]
    eps, page_size,
    stride_xr, stride_qr,
    stride_kp, stride_ks, stride_kh, stride_vp, stride_vs, stride_vh,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_H of a row's heads, first q's, then K's, then V's."""
    if PDL:
        wait_for_producer()
    r = tl.program_id(0).to(tl.int64)
    h, d = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    is_q, is_v = h < HEADS, h >= HEADS + KV_HEADS
    in_d = (d < D // 2)[None, :]
    in_row = (h < HEADS + 2 * KV_HEADS)[:, None] & in_d
    ptrs = qkv_ptr + r * stride_xr + h[:, None] * D + d[None, :]
    low = tl.load(ptrs, mask=in_row, other=0.0).to(tl.float32)
    high = tl.load(ptrs + D // 2, mask=in_row, other=0.0).to(tl.float32)
    turned = (~is_v)[:, None] & in_d
    if q_norm_ptr is not None:
        factor = tl.rsqrt(tl.sum(low * low + high * high, 1) / D + eps)
        gains = tl.where(is_q[:, None], q_norm_ptr + d[None, :], k_norm_ptr + d[None, :])
        gain_low = tl.load(gains, mask=turned, other=0.0).to(tl.float32)
        gain_high = tl.load(gains + D // 2, mask=turned, other=0.0).to(tl.float32)
        low = tl.where(is_v[:, None], low, low * factor[:, None] * gain_low)
        high = tl.where(is_v[:, None], high, high * factor[:, None] * gain_high)
    # The second half of the tables, where sines are not negated.
    index = tl.load(positions_ptr + r) * D + D // 2 + d[None, :]
    cos = tl.load(cos_ptr + index, mask=in_d, other=0.0)
    sin = tl.load(sin_ptr + index, mask=in_d, other=0.0)
    cos, sin = tl.where(is_v[:, None], 1.0, cos), tl.where(is_v[:, None], 0.0, sin)
    new_low, new_high = low * cos - high * sin, high * cos + low * sin

    slot = tl.load(slots_ptr + r)
    page, offset = slot // page_size, slot % page_size
    k_head, v_head = (h - HEADS).to(tl.int64), (h - HEADS - KV_HEADS).to(tl.int64)
    q_rows = q_ptr + r * stride_qr + h * D
    k_rows = k_ptr + page * stride_kp + offset * stride_ks + k_head * stride_kh
    v_rows = v_ptr + page * stride_vp + offset * stride_vs + v_head * stride_vh
    live = (slot >= 0) & in_row
    in_q, in_k, in_v = is_q[:, None] & in_d, (~is_q & ~is_v)[:, None] & live, is_v[:, None] & live
    store_halves(q_rows[:, None] + d[None, :], new_low, new_high, in_q, D)
    store_halves(k_rows[:, None] + d[None, :], new_low, new_high, in_k, D)
    store_halves(v_rows[:, None] + d[None, :], new_low, new_high, in_v, D)


@device
def store_halves(ptrs, low, high, mask, D):
    """Store the first and the second half of heads, whose first halves are at ptrs."""
    tl.store(ptrs, low.to(ptrs.dtype.element_ty), mask=mask)
    tl.store(ptrs + D // 2, high.to(ptrs.dtype.element_ty), mask=mask)


def check_cache(
    R: int,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> None:
    """Raise ValueError unless K and V of R rows can be appended with these arguments."""
    D = k_pages.shape[3]
    check_shape("k_pages", k_pages, "[pages, page_size, Hk, D]", *k_pages.shape)
    check_shape("v_pages", v_pages, "[pages, page_size, Hk, D]", *k_pages.shape)
    for name, index in (("slots", slots), ("positions", positions)):
        check_shape(name, index, "[R]", R)
        check_dtype(name, index, torch.int64)
    for name, table in (("cos_table", cos_table), ("sin_table", sin_table)):
        check_shape(name, table, "[positions, D]", table.shape[0], D)
        if not table.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(table.stride())}")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm go together, got one of them")
    if q_norm is not None and k_norm is not None:
        check_shape("q_norm", q_norm, "[D]", D)
        check_shape("k_norm", k_norm, "[D]", D)


def check_q(out: Tensor, R: int, Hq: int, D: int) -> None:
    """Raise ValueError unless q of R rows can be written to `out`."""
    check_shape("out", out, "[R, Hq, D]", R, Hq, D)
    if out.stride(1) != D:
        raise ValueError(f"out must have strides [any, D, 1], got {list(out.stride())}")


def rope_cache(
    qkv: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Rotate and cache: qkv [R, (Hq + 2 Hk) * D], q above k above v -> q [R, Hq, D]; K and V
    written into pages [pages, page_size, Hk, D], in place.

    slots [R] int64 = page * page_size + offset, distinct, -1 to write no K and V; positions [R]
    int64; tables [any, D] float32 (mtpkern.cache.rotary_tables). q_norm and k_norm [D] with `eps`
    normalise each head before it is rotated (Qwen3). `pdl`: see `linear`.
    """
    (R, N), (_, page_size, Hk, D) = qkv.shape, k_pages.shape
    Hq = N // D - 2 * Hk
    if D % 2 or Hq < 1 or (Hq + 2 * Hk) * D != N:
        raise ValueError(
            f"qkv must be [R, (Hq + 2 Hk) * D] with Hk={Hk} and an even D={D} as in k_pages, "
            f"got {list(qkv.shape)}"
        )
    check_shape("qkv", qkv, "[R, N]", R, N)
    at = (slots, positions, cos_table, sin_table)
    check_cache(R, k_pages, v_pages, *at, q_norm, k_norm)
    out = qkv.new_empty(R, Hq, D) if out is None else out
    check_q(out, R, Hq, D)
    if R:
        block_h = 16
        _rope_cache_kernel[(R, ceil_div(Hq + 2 * Hk, block_h))](
            qkv, q_norm, k_norm, out, k_pages, v_pages, *at, eps, page_size,
            qkv.stride(0), out.stride(0), *k_pages.stride()[:3], *v_pages.stride()[:3],
            HEADS=Hq, KV_HEADS=Hk, D=D, BLOCK_H=block_h, BLOCK_D=power_of_two(D // 2),
            num_warps=4, pdl=pdl,
        )  # fmt: skip
    return out
