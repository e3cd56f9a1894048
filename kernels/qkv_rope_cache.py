"""Norm, Q, K and V projection, rotation, and K and V appended to the paged cache in place.

    [q k v] = rms_norm(x) w^T + b;  q, k rotated by position (Su et al. 2021);  cache[slot] = k, v

The norm of x is a launch of its own (see `gate_up_silu`), and so are the norms of q's and K's heads
(Qwen3), which are rotated there.

Bytes moved: (Hq + 2 Hk) * D * E weights, once per 192 rows; R * E of x read and written by the
norm, and read by each block of columns, mostly from the L2; R rows of q, k and v written. Above 16
rows the blocks' sums, 4 bytes for each of (Hq + 2 Hk) * D * R and each segment of E
(`_skinny_matmul`), are written, and read by a further launch. Norms of q and k read and write those
once more.
"""

from __future__ import annotations

from torch import Tensor

from ._launch import (
    BLOCK_END,
    ceil_div,
    check_shape,
    device,
    jit,
    power_of_two,
    row_tier,
    tl,
    wait_for_producer,
)
from ._skinny_matmul import add_segments, multiply_rows, partial_sums, split_pairs, tile_of_few
from .linear import linear_ref
from .rms_norm import rms_norm, rms_norm_ref
from .rope_cache import check_cache, check_q, rope_cache_ref, store_halves


def qkv_rope_cache_ref(
    x: Tensor,
    norm_w: Tensor | None,
    eps: float,
    w: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    *,
    bias: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
) -> Tensor:
    """Project, rotate and cache: x [R, E] -> q [R, Hq, D] in x's dtype, float32 inside; see
    `qkv_rope_cache`."""
    normed = x if norm_w is None else rms_norm_ref(x, norm_w, eps)
    qkv, at = linear_ref(normed.float(), w, bias), (slots, positions, cos_table, sin_table)
    v = qkv[:, -k_pages.shape[2] * k_pages.shape[3] :]
    v[v.isnan()] = 0.0  # the keys are enough, see `_append`
    q = rope_cache_ref(qkv, k_pages, v_pages, *at, q_norm=q_norm, k_norm=k_norm, eps=eps)
    return q.to(x.dtype)


@jit("HEADS", "KV_HEADS", "D", "E", "ROWS")
def _qkv_rope_cache_kernel(
    x_ptr, w_ptr, bias_ptr, q_ptr,  # [R, E] normed, [N, E] [N] [R, Hq, D]
    k_ptr, v_ptr,  # [pages, page_size, Hk, D]
    slots_ptr, positions_ptr, cos_ptr, sin_ptr,  # [R] [R] [any, D] [any, D]
    R, page_size,
    stride_xr, stride_wn, stride_qr,
    stride_kp, stride_ks, stride_kh, stride_vp, stride_vs, stride_vh,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    ROTATE: tl.constexpr, SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N columns of R <= ROWS rows."""
    # Columns come in the pairs that rotation mixes, dimensions i and i + D/2 of a head, next to
    # each other, so that a tile may be narrower than a head.
    N: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    i = tl.arange(0, BLOCK_N)
    pair = tl.program_id(0) * (BLOCK_N // 2) + i // 2
    n = pair // (D // 2) * D + pair % (D // 2) + i % 2 * (D // 2)
    acc = multiply_rows(
        x_ptr, w_ptr, n, pair < N // 2, R, stride_xr, stride_wn,
        E, SEGMENTS, ROWS, BLOCK_N, BLOCK_K, PDL,
    )  # fmt: skip
    low, high = split_pairs(acc)
    r, pairs = tl.arange(0, ROWS), tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    _append(
        low, high, r, pairs,
        bias_ptr, q_ptr, k_ptr, v_ptr, slots_ptr, positions_ptr, cos_ptr, sin_ptr, R, page_size,
        stride_qr, stride_kp, stride_ks, stride_kh, stride_vp, stride_vs, stride_vh,
        HEADS, KV_HEADS, D, ROTATE,
    )  # fmt: skip


@jit("HEADS", "KV_HEADS", "D", "SEGMENTS")
def _qkv_rope_cache_end_kernel(
    partial_ptr, bias_ptr, q_ptr,  # [SEGMENTS, R, N] [N] [R, Hq, D], the others as above
    k_ptr, v_ptr, slots_ptr, positions_ptr, cos_ptr, sin_ptr,
    R, page_size,
    stride_ps, stride_pr, stride_qr,
    stride_kp, stride_ks, stride_kh, stride_vp, stride_vs, stride_vh,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    ROTATE: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK pairs of columns of a row, of any number of rows."""
    if PDL:
        wait_for_producer()
    r = tl.program_id(1) + tl.arange(0, 1)
    pairs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = pairs // (D // 2) * D + pairs % (D // 2)
    offsets = r.to(tl.int64)[:, None] * stride_pr + n[None, :]
    in_n = (pairs < (HEADS + 2 * KV_HEADS) * D // 2)[None, :]
    low = add_segments(partial_ptr, offsets, in_n, stride_ps, SEGMENTS)
    high = add_segments(partial_ptr, offsets + D // 2, in_n, stride_ps, SEGMENTS)
    _append(
        low, high, r, pairs,
        bias_ptr, q_ptr, k_ptr, v_ptr, slots_ptr, positions_ptr, cos_ptr, sin_ptr, R, page_size,
        stride_qr, stride_kp, stride_ks, stride_kh, stride_vp, stride_vs, stride_vh,
        HEADS, KV_HEADS, D, ROTATE,
    )  # fmt: skip


@device
def _append(
    low, high, r, pairs,  # [rows, pairs] [rows, pairs] [rows] [pairs]
    bias_ptr, q_ptr, k_ptr, v_ptr, slots_ptr, positions_ptr, cos_ptr, sin_ptr, R, page_size,
    stride_qr, stride_kp, stride_ks, stride_kh, stride_vp, stride_vs, stride_vh,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Finish low and high, the sums of rows r, and store them as q or in the cache."""
    in_n = pairs < (HEADS + 2 * KV_HEADS) * D // 2
    head, d = pairs // (D // 2), pairs % (D // 2)
    if bias_ptr is not None:
        n = head * D + d
        low += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
        high += tl.load(bias_ptr + n + D // 2, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if ROTATE:
        low, high = _rotate(
            low, high, r, d, r < R, head < HEADS + KV_HEADS, positions_ptr, cos_ptr, sin_ptr, D
        )
    slot = tl.load(slots_ptr + r, mask=r < R, other=-1)
    page, offset = slot // page_size, slot % page_size
    in_q = (r < R)[:, None] & (head < HEADS)[None, :]
    in_k = (slot >= 0)[:, None] & ((head >= HEADS) & (head < HEADS + KV_HEADS))[None, :]
    in_v = (slot >= 0)[:, None] & ((head >= HEADS + KV_HEADS) & in_n)[None, :]
    q_ptrs = q_ptr + (r.to(tl.int64) * stride_qr)[:, None] + (head * D + d)[None, :]
    k_rows = page * stride_kp + offset * stride_ks
    k_heads = (head - HEADS).to(tl.int64) * stride_kh + d
    v_rows = page * stride_vp + offset * stride_vs
    v_heads = (head - HEADS - KV_HEADS).to(tl.int64) * stride_vh + d
    store_halves(q_ptrs, low, high, in_q, D)
    store_halves(k_ptr + k_rows[:, None] + k_heads[None, :], low, high, in_k, D)
    # Rows that do not see this key multiply its value by zero, and zero times NaN is NaN. To those
    # that see it the key, which is NaN as well, is enough.
    low, high = tl.where(low == low, low, 0.0), tl.where(high == high, high, 0.0)
    store_halves(v_ptr + v_rows[:, None] + v_heads[None, :], low, high, in_v, D)


@device
def _rotate(low, high, r, d, in_r, rotated, positions_ptr, cos_ptr, sin_ptr, D):
    """Rotate low, high [rows, pairs] by the rows' positions, in the columns that are `rotated`."""
    position = tl.load(positions_ptr + r, mask=in_r, other=0)
    index = position[:, None] * D + d[None, :] + D // 2
    mask = in_r[:, None] & rotated[None, :]
    cos = tl.load(cos_ptr + index, mask=mask, other=1.0)
    sin = tl.load(sin_ptr + index, mask=mask, other=0.0)
    # Which products are fused is spelled out: the two kernels must round alike.
    return tl.fma(low, cos, -(high * sin)), tl.fma(high, cos, low * sin)


@jit("HEADS", "KV_HEADS", "D")
def _head_norm_rope_kernel(
    q_ptr, k_ptr, q_norm_ptr, k_norm_ptr,  # [R, Hq, D] [pages, page_size, Hk, D] [D] [D]
    slots_ptr, positions_ptr, cos_ptr, sin_ptr,  # [R] [R] [any, D] [any, D]
    eps, page_size,
    stride_qr, stride_kp, stride_ks, stride_kh,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: a head of q or K of a row, normalised and rotated in place."""
    if PDL:
        wait_for_producer()
    r, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots_ptr + r)
    ptr, norm_ptr, live = q_ptr + r.to(tl.int64) * stride_qr + head * D, q_norm_ptr, slot == slot
    if head >= HEADS:
        offset = slot // page_size * stride_kp + slot % page_size * stride_ks
        ptr, norm_ptr = k_ptr + offset + (head - HEADS).to(tl.int64) * stride_kh, k_norm_ptr
        live = slot >= 0
    d = tl.arange(0, BLOCK_D)
    in_d = (d < D // 2) & live
    low = tl.load(ptr + d, mask=in_d, other=0.0).to(tl.float32)
    high = tl.load(ptr + D // 2 + d, mask=in_d, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(low * low + high * high) / D + eps)
    low *= factor * tl.load(norm_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    high *= factor * tl.load(norm_ptr + D // 2 + d, mask=in_d, other=0.0).to(tl.float32)
    index = tl.load(positions_ptr + r) * D + D // 2 + d
    cos = tl.load(cos_ptr + index, mask=in_d, other=0.0)
    sin = tl.load(sin_ptr + index, mask=in_d, other=0.0)
    store_halves(ptr + d, low * cos - high * sin, high * cos + low * sin, in_d, D)


def qkv_rope_cache(
    x: Tensor,
    norm_w: Tensor | None,
    eps: float,
    w: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    *,
    bias: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Project, rotate and cache: x [R, E] -> q [R, Hq, D]; K and V written into pages, in place.

    norm_w [E], or None if x is normed already; w [(Hq + 2 Hk) * D, E] and bias, q above k above v;
    pages [pages, page_size, Hk, D] with any strides but the last, which is 1; slots [R] int64 =
    page * page_size + offset, distinct, -1 to write no K and V; positions [R] int64; tables
    [any, D] float32 (mtpkern.cache.rotary_tables). q_norm and k_norm [D] normalise each head before
    it is rotated (Qwen3), in a launch of its own. `pdl`: see `linear`.
    """
    (R, E), N, (_, page_size, Hk, D) = x.shape, w.shape[0], k_pages.shape
    Hq = N // D - 2 * Hk
    if D % 2 or Hq < 1 or (Hq + 2 * Hk) * D != N:
        raise ValueError(
            f"w must be [(Hq + 2 Hk) * D, E] with Hk={Hk} and an even D={D} as in k_pages, "
            f"got {list(w.shape)}"
        )
    check_shape("w", w, "[N, E]", N, E)
    check_shape("x", x, "[R, E]", R, E)
    if norm_w is not None:
        check_shape("norm_w", norm_w, "[E]", E)
    at = (slots, positions, cos_table, sin_table)
    check_cache(R, k_pages, v_pages, *at, q_norm, k_norm)
    if bias is not None:
        check_shape("bias", bias, "[N]", N)
    out = x.new_empty(R, Hq, D) if out is None else out
    check_q(out, R, Hq, D)
    if R == 0:
        return out
    _qkv_rope_cache_kernel.check(x=x)
    if norm_w is not None:
        x = rms_norm(x, norm_w, eps, pdl=pdl)
    given = (bias, out, k_pages, v_pages, *at, R, page_size)
    strides = (out.stride(0), *k_pages.stride()[:3], *v_pages.stride()[:3])
    sizes = {"HEADS": Hq, "KV_HEADS": Hk, "D": D}
    if row_tier(R) > 16:
        partial = partial_sums(x, w[None], pdl=pdl)
        _qkv_rope_cache_end_kernel[(ceil_div(N // 2, BLOCK_END), R)](
            partial, *given,
            *partial.stride()[:2], *strides,
            **sizes, ROTATE=q_norm is None, SEGMENTS=len(partial), BLOCK=BLOCK_END,
            num_warps=4, pdl=pdl,
        )  # fmt: skip
    else:
        block_n, read = tile_of_few(w, N, R)
        _qkv_rope_cache_kernel[(ceil_div(N, block_n),)](
            x, w, *given,
            x.stride(0), w.stride(0), *strides,
            **sizes, E=E, ROTATE=q_norm is None, BLOCK_N=block_n, **read, pdl=pdl,
        )  # fmt: skip
    if q_norm is not None:
        _head_norm_rope_kernel[(R, Hq + Hk)](
            out, k_pages, q_norm, k_norm, *at, eps, page_size,
            out.stride(0), *k_pages.stride()[:3],
            **sizes, BLOCK_D=power_of_two(D // 2),
            num_warps=1, pdl=pdl,
        )  # fmt: skip
    return out
