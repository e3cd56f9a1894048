"""Attention of a few window rows against a long paged cache: softmax(q k^T / sqrt(D)) v.

Row t of a sequence sees its committed keys and those of the window's rows up to its own, or, in a
tree, those of its ancestors. The query heads that share a KV head are packed with the window rows
into tiles of a fixed height, and keys are read in whole tiles, so that a row's bits depend neither
on the width of the window nor on where it ends.

The keys of a sequence are split between blocks, and a second launch merges the parts (`_split_kv`).

With s bytes an element, G = Hq / Hk, `tiles` = ceil(T G / ROWS), W = ceil(FILL / 2 / (B Hk tiles))
and n keys of a sequence in splits of S, in brackets for Llama-3.1-8B at B = 1, T = 5 (W = 9):

blocks: Hk tiles ceil(n / S) that work (72 for 1029 keys, 128 for 32k), of Hk tiles
    max(FAN W + 1, ceil(capacity / (FAN^2 KEYS))) that are launched, the latter factor rounded up to
    a multiple of four (320 for a capacity of 32k, 512 for 131k)
bytes of the cache: 2 s n Hk D tiles, from DRAM once, since the tiles over the same keys run side
    by side and share them in the L2
bytes of partial results: 4 (D + 2) T Hq for each split, written and read, which is
    4 T G (D + 2) / (s D S) of the cache's (32 % up to 4.5k keys, where they stay in the L2; 7.9 %
    up to 18k, then 2.0 %; at most 3.2 % for any T)
bytes of q and the output: 2 s T Hq D
instructions of a warp (sm_90, bf16, D = 128, Triton 3.9): at most 1164 for a granule, those that
    follow FAN granules included (4 warps share 64 KB of keys and values); 46 for a split in the
    merge, which has no barriers
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._launch import (
    FILL,
    ceil_div,
    check_dtype,
    check_shape,
    device,
    jit,
    power_of_two,
    shared_kilobytes,
    tl,
    wait_for_producer,
)
from ._split_kv import FAN, granule, merge_splits, merged, nothing, split_layout
from .window_slots import node_depth

# Packed query rows per tile, the same for every T. Too few for wgmma, so that every architecture
# multiplies with mma.sync m16n8k16.
ROWS = 32


def verify_attention_ref(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    tree: Tensor | None = None,
    window: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Attend to a paged cache: q [B, T, Hq, D] -> [B, T, Hq, D] in q's dtype, float32 inside; see
    `verify_attention`.

    One row at a time, over the keys that it sees, so that its bits depend on nothing else.
    """
    (_, T, Hq, D), (_, page_size, Hk, _) = q.shape, k_pages.shape
    if Hq % Hk:
        raise ValueError(f"q must have a multiple of Hk={Hk} heads, got {Hq}")
    out, node = torch.empty_like(q), torch.arange(T)
    for b, length in enumerate(lengths.tolist()):
        for t in range(T):
            ancestors = node[node <= t] if tree is None else node[tree[b, t] >> node & 1 != 0]
            # Positions follow depth, so that the i-th key that is seen is at position i.
            seen = torch.cat([torch.arange(length), length + ancestors])
            if window:
                seen = seen[max(0, length + max(len(ancestors), 1) - window) :]
            at = page_table[b].long()[seen // page_size], seen % page_size
            k, v = (p[at].float().repeat_interleave(Hq // Hk, 1) for p in (k_pages, v_pages))
            scores = (k * q[b, t].float()).sum(-1) * (D**-0.5 if scale is None else scale)
            out[b, t] = (v * scores.softmax(0)[:, :, None]).sum(0)  # zero where nothing is seen
    return out


@jit("HEADS", "KV_HEADS", "D", "WINDOW", do_not_specialize=("T", "splits", "fill"))
def _verify_attention_kernel(
    q_ptr, k_ptr, v_ptr,  # [B, T, Hq, D], [pages, page_size, Hk, D] twice
    page_table_ptr, lengths_ptr, tree_ptr,  # [B, max_pages] [B] [B, T]
    acc_ptr, m_ptr, z_ptr,  # [B, T, Hq, splits, D] [B, T, Hq, splits] [B, T, Hq, splits]
    T, splits, fill, scale,
    stride_qb, stride_qt, stride_qh,
    stride_kp, stride_ks, stride_kh, stride_vp, stride_vs, stride_vh,
    stride_pb, stride_tb,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, HAS_TREE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, FAN: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: a tile of ROWS packed rows of a KV head over a split of its sequence's keys."""
    if PDL:
        wait_for_producer()
    GROUP: tl.constexpr = HEADS // KV_HEADS
    tiles = tl.cdiv(T * GROUP, ROWS)
    tile, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    kv_head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    r = tile * ROWS + tl.arange(0, ROWS)
    t, h = r // GROUP, kv_head * GROUP + r % GROUP
    in_window = t < T

    # Keys first..end-1 are those that some row of this tile sees.
    length = tl.load(lengths_ptr + b).to(tl.int32)
    last_t = T - 1 if HAS_TREE else tl.minimum((tile * ROWS + ROWS - 1) // GROUP, T - 1)
    end = length + last_t + 1
    first, split_size = split_layout(length, T, fill, WINDOW, KEYS, FAN)
    begin_of_split = (first // split_size + split) * split_size
    begin = tl.maximum(begin_of_split, first // KEYS * KEYS)
    end_of_split = tl.minimum(begin_of_split + split_size, end)
    if begin >= end_of_split:
        return

    position = length + t
    if HAS_TREE:
        ancestors = tl.load(tree_ptr + b * stride_tb + t, mask=in_window, other=0)
        seen = tl.reduce(ancestors, 0, _either)
        if WINDOW:
            position = length + node_depth(ancestors)

    d = tl.arange(0, BLOCK_D)
    q_rows = b * stride_qb + t.to(tl.int64) * stride_qt + h * stride_qh
    in_q = in_window[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + q_rows[:, None] + d[None, :], mask=in_q, other=0.0)
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh
    page_table_ptr += b * stride_pb

    m_few, z_few, acc_few = nothing(ROWS, BLOCK_D)  # of the last FAN granules or fewer
    m_all, z_all, acc_all = nothing(ROWS, BLOCK_D)  # of all granules before those
    for start in range(begin, end_of_split, KEYS):
        n = start + tl.arange(0, KEYS)
        # A key that no row sees is not read: it may be NaN, and 0 * NaN is NaN.
        in_reach = (n >= first) & (n < end)
        if HAS_TREE:
            node = tl.minimum(tl.maximum(n - length, 0), 63)
            in_reach &= (n < length) | ((seen >> node) & 1 != 0)
            sees = (n < length)[None, :] | ((ancestors[:, None] >> node[None, :]) & 1 != 0)
        else:
            sees = n[None, :] <= position[:, None]
        if WINDOW:
            sees &= n[None, :] > position[:, None] - WINDOW
        sees &= in_reach[None, :]
        page = tl.load(page_table_ptr + n // PAGE_SIZE, mask=in_reach, other=0).to(tl.int64)
        slot = n % PAGE_SIZE
        k_rows = page * stride_kp + slot * stride_ks
        v_rows = page * stride_vp + slot * stride_vs
        in_k = (d < D)[:, None] & in_reach[None, :]
        k = tl.load(k_ptr + k_rows[None, :] + d[:, None], mask=in_k, other=0.0)
        s = tl.where(sees, tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
        m = tl.max(s, 1)
        p = tl.exp2(s - tl.where(m == float("-inf"), 0.0, m)[:, None])
        in_v = in_reach[:, None] & (d < D)[None, :]
        v = tl.load(v_ptr + v_rows[:, None] + d[None, :], mask=in_v, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m_few, z_few, acc_few = merged(m_few, z_few, acc_few, m, tl.sum(p, 1), acc)
        if (start + KEYS) % (FAN * KEYS) == 0:
            m_all, z_all, acc_all = merged(m_all, z_all, acc_all, m_few, z_few, acc_few)
            m_few, z_few, acc_few = nothing(ROWS, BLOCK_D)
    m, z, acc = merged(m_all, z_all, acc_all, m_few, z_few, acc_few)

    partial = ((b * T + t) * HEADS + h) * splits + split
    tl.store(m_ptr + partial, m, mask=in_window)
    tl.store(z_ptr + partial, z, mask=in_window)
    tl.store(acc_ptr + partial[:, None] * D + d[None, :], acc, mask=in_q)


@device
def _either(a, b):
    return a | b


def split_size(
    B: int, T: int, Hq: int, Hk: int, D: int, keys: int, *, element_size: int = 2
) -> int:
    """Keys of a split of a sequence with `keys` keys, as `split_layout` decides on the device."""
    few, fill = granule(D, element_size), _fill(B, T, Hq, Hk)
    granules = ceil_div(keys, few)
    return few * (FAN**2 if granules >= FAN**2 * fill else FAN if granules >= FAN * fill else 1)


def split_count(
    B: int, T: int, Hq: int, Hk: int, D: int, keys: int, *, element_size: int = 2
) -> int:
    """The most splits of a sequence, if its cache holds `keys` keys: a multiple of 4, so that every
    part of the workspace is aligned to 16 bytes.
    """
    granules = ceil_div(keys, granule(D, element_size))
    few = min(FAN * _fill(B, T, Hq, Hk) + 1, granules)
    return 4 * ceil_div(max(few, ceil_div(granules, FAN * FAN)), 4)


def _fill(B: int, T: int, Hq: int, Hk: int) -> int:
    """How many splits per sequence saturate the device, times B sequences, Hk heads, all tiles."""
    return ceil_div(FILL // 2, B * Hk * ceil_div(T * Hq // Hk, ROWS))


def workspace_size(
    B: int,
    T: int,
    Hq: int,
    Hk: int,
    D: int,
    max_pages: int,
    page_size: int,
    *,
    element_size: int = 2,
) -> int:
    """How many float32 of workspace `verify_attention` needs for these shapes."""
    if B == 0:
        return 0
    splits = split_count(B, T, Hq, Hk, D, max_pages * page_size, element_size=element_size)
    return B * T * Hq * splits * (D + 2)


def _stages(bytes_of_granule: int, granules: int) -> int:
    """Stages of the pipeline, for splits of so many granules: two of every three wait for the page
    table, so that 5 stages have two granules in flight, 3 have one. For one there is nothing to
    pipeline.
    """
    if granules == 1:
        return 2
    return 5 if 2 * bytes_of_granule <= 1024 * shared_kilobytes() else 3


def _warps(block_d: int, element_size: int) -> int:
    """Four, or eight if the sums of a tile do not fit into the registers of four."""
    return 4 if block_d * element_size**2 <= 512 else 8


def verify_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    tree: Tensor | None = None,
    window: int = 0,
    scale: float | None = None,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Attend to a paged cache: q [B, T, Hq, D] -> [B, T, Hq, D], for T <= 64 and D <= 256.

    Pages [pages, page_size, Hk, D] with any strides but the last, which is 1; page_table
    [B, max_pages] int32; lengths [B] int64. The window's own keys are in the cache already, at
    slots lengths[b] + t, so that lengths[b] + T <= max_pages * page_size. Other slots, and entries
    of the page table for keys that no row sees, are never read.

    Row t sees the committed keys and the window's rows up to itself, or, with tree [B, T] int64,
    the rows whose bit is set in tree[b, t]: its ancestors and itself. The output of a row that sees
    nothing is zero. The K of a window row is arbitrary to the rows that do not see it, but its V
    must be finite, since rows that see it and rows that do not share a product.

    `window` > 0 limits a row to the last `window` positions, its own included (sliding window). In
    a tree, positions follow depth: a row's is lengths[b] + its number of ancestors, and the window
    must cover a whole path: window >= T.

    `scale` is 1 / sqrt(D) by default; workspace is float32, of `workspace_size` elements or more.
    Blocks for which a sequence has no split return at once. `pdl`: see `linear`.
    """
    if q.dim() != 4 or k_pages.dim() != 4 or page_table.dim() != 2:
        raise ValueError(
            "q must be [B, T, Hq, D], k_pages [pages, page_size, Hk, D], page_table [B, max_pages],"
            f" got {list(q.shape)}, {list(k_pages.shape)}, {list(page_table.shape)}"
        )
    (B, T, Hq, D), (pages, page_size, Hk, _) = q.shape, k_pages.shape
    max_pages = page_table.shape[1]
    if not 1 <= T <= 64 or not 1 <= D <= 256 or Hq % Hk:
        raise ValueError(
            f"q must be [B, T, Hq, D] with T=1..64, Hq a multiple of Hk={Hk} and D=1..256, "
            f"got {list(q.shape)}"
        )
    out = torch.empty_like(q) if out is None else out
    for name, tensor in (("q", q), ("out", out)):
        check_shape(name, tensor, "[B, T, Hq, D]", B, T, Hq, D)
    for name, tensor in (("k_pages", k_pages), ("v_pages", v_pages)):
        check_shape(name, tensor, "[pages, page_size, Hk, D]", pages, page_size, Hk, D)
        check_dtype(name, tensor, q.dtype)
    check_shape("page_table", page_table, "[B, max_pages]", B, max_pages)
    check_dtype("page_table", page_table, torch.int32)
    check_shape("lengths", lengths, "[B]", B)
    check_dtype("lengths", lengths, torch.int64)
    if tree is not None:
        check_shape("tree", tree, "[B, T]", B, T)
        check_dtype("tree", tree, torch.int64)
    if window < 0 or (tree is not None and 0 < window < T):
        least = "0" if tree is None else f"0, or T={T} or more with a tree"
        raise ValueError(f"window must be {least}, got {window}")
    element_size = q.element_size()
    size = workspace_size(B, T, Hq, Hk, D, max_pages, page_size, element_size=element_size)
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.float32, device=q.device)
    check_dtype("workspace", workspace, torch.float32)
    if workspace.numel() < size or not workspace.is_contiguous():
        raise ValueError(
            f"workspace must be contiguous, of {size} elements or more, "
            f"got {list(workspace.shape)} of strides {list(workspace.stride())}"
        )
    if B == 0:
        return out
    keys, fill, rows = granule(D, element_size), _fill(B, T, Hq, Hk), B * T * Hq
    splits = split_count(B, T, Hq, Hk, D, max_pages * page_size, element_size=element_size)
    acc, m, z = workspace.view(-1)[:size].split([rows * splits * D, rows * splits, rows * splits])
    stride_tb = 0 if tree is None else tree.stride(0)
    block_d, capacity = power_of_two(D), max_pages * page_size
    granules = split_size(B, T, Hq, Hk, D, capacity, element_size=element_size) // keys
    tiles = ceil_div(T * Hq // Hk, ROWS)
    _verify_attention_kernel[(tiles * splits, Hk, B)](
        q, k_pages, v_pages, page_table, lengths, tree, acc, m, z, T, splits, fill,
        # exp2 is one instruction: the scores are in units of log 2.
        (D**-0.5 if scale is None else scale) / math.log(2),
        *q.stride()[:3], *k_pages.stride()[:3], *v_pages.stride()[:3],
        page_table.stride(0), stride_tb,
        HEADS=Hq, KV_HEADS=Hk, D=D, PAGE_SIZE=page_size,
        WINDOW=window, HAS_TREE=tree is not None,
        ROWS=ROWS, KEYS=keys, FAN=FAN, BLOCK_D=block_d,
        num_warps=_warps(block_d, element_size),
        num_stages=_stages(2 * keys * block_d * element_size, granules),
        pdl=pdl,
    )  # fmt: skip
    merge_splits(acc, m, z, lengths, tree, out, splits, fill, window, keys, pdl=pdl)
    return out
