"""Commit the accepted rows of a window in place; the rejected ones are past the new length.

    lengths[b] += (accepted[b] + 1) * active[b]
    of a tree, before: cache[lengths[b] + j] = cache[lengths[b] + path[b, j]], j = 0..accepted[b]

The next window overwrites rejected rows, so that a chain is rolled back by not advancing. The
accepted path of a tree may have gaps, so its keys and values move together first, for all layers in
one launch. Positions followed depth when keys were rotated, so none is rotated again. Counts are
read on the device.

For engines with trees or with their own lengths; the step of this package drafts chains and commits
in `advance`.

Bytes moved, with s bytes an element: 4 s L Hk D for each row that changes its place (K and V, read
and written); 24 B of counts, and of a path its ids and 4 for each page that it touches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launch import ceil_div, check_dtype, check_shape, jit, power_of_two, tl, wait_for_producer


def kv_rollback_ref(
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    accepted: Tensor,
    *,
    active: Tensor | None = None,
    path: Tensor | None = None,
) -> None:
    """Commit in place; see `kv_rollback`."""
    page_size = k_cache.shape[2]
    advance = (accepted + 1) * (1 if active is None else active)
    for b, nodes in enumerate([] if path is None else path):
        rows = lengths[b] + torch.arange(int(advance[b]), device=lengths.device)
        sources = lengths[b] + nodes[: len(rows)]
        to, of = (
            (page_table[b].long()[slot // page_size], slot % page_size) for slot in (rows, sources)
        )
        for cache in (k_cache, v_cache):
            cache[:, to[0], to[1]] = cache[:, of[0], of[1]]
    lengths.add_(advance)


@jit("KV_HEADS", "D", "BLOCK_T")
def _compact_path_kernel(
    k_ptr, v_ptr,  # [L, pages, page_size, Hk, D]
    page_table_ptr, lengths_ptr, accepted_ptr,  # [B, max_pages] [B] [B]
    active_ptr, path_ptr,  # [B] [B, T]
    T,
    stride_kl, stride_kp, stride_ks, stride_kh, stride_vl, stride_vp, stride_vs, stride_vh,
    stride_pb, stride_tb,
    KV_HEADS: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: a sequence's path, of one layer and one KV head."""
    if PDL:
        wait_for_producer()
    head, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    count = tl.load(accepted_ptr + b) + 1
    if active_ptr is not None:
        count *= tl.load(active_ptr + b)
    j = tl.arange(0, BLOCK_T)
    node = tl.load(path_ptr + b * stride_tb + j, mask=(j < T) & (j < count), other=0)
    moves = (j < T) & (j < count) & (node != j)
    if tl.max(moves.to(tl.int32)) == 0:
        return
    length = tl.load(lengths_ptr + b)
    source, target = length + node, length + j
    page_table_ptr += b * stride_pb
    source_page = tl.load(page_table_ptr + source // PAGE_SIZE, mask=moves, other=0).to(tl.int64)
    target_page = tl.load(page_table_ptr + target // PAGE_SIZE, mask=moves, other=0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = moves[:, None] & (d < D)[None, :]
    k_ptr += layer * stride_kl + head * stride_kh
    v_ptr += layer * stride_vl + head * stride_vh
    k_source = source_page * stride_kp + source % PAGE_SIZE * stride_ks
    v_source = source_page * stride_vp + source % PAGE_SIZE * stride_vs
    k = tl.load(k_ptr + k_source[:, None] + d[None, :], mask=mask, other=0.0)
    v = tl.load(v_ptr + v_source[:, None] + d[None, :], mask=mask, other=0.0)
    # One row's target may be another's source: all are read before any is written.
    tl.debug_barrier()
    k_target = target_page * stride_kp + target % PAGE_SIZE * stride_ks
    v_target = target_page * stride_vp + target % PAGE_SIZE * stride_vs
    tl.store(k_ptr + k_target[:, None] + d[None, :], k, mask=mask)
    tl.store(v_ptr + v_target[:, None] + d[None, :], v, mask=mask)


@jit("BLOCK_B")
def _commit_kernel(
    lengths_ptr, accepted_ptr, active_ptr,  # [B]
    B,
    BLOCK_B: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_B sequences."""
    if PDL:
        wait_for_producer()
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    advance = tl.load(accepted_ptr + b, mask=b < B, other=0) + 1
    if active_ptr is not None:
        advance *= tl.load(active_ptr + b, mask=b < B, other=0)
    tl.store(lengths_ptr + b, tl.load(lengths_ptr + b, mask=b < B, other=0) + advance, mask=b < B)


def kv_rollback(
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    accepted: Tensor,
    *,
    active: Tensor | None = None,
    path: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """Keep accepted[b] + 1 rows of each window, in place: caches [L, pages, page_size, Hk, D] of
    any strides but the last; page_table [B, max_pages] int32; lengths and accepted [B] int64.

    The window's rows are in slots lengths[b] + t. path [B, T] int64, T <= 64, lists the accepted
    rows of a tree, the root path[b, 0] included: row path[b, j] becomes row j; sources and targets
    may overlap in any way. Entries past accepted[b] are not read. active [B] int64 is 1, or 0 for a
    sequence that is left as it is. An engine with a tensor per layer calls it once per layer, with
    a copy of `lengths` in all calls but the last. `pdl`: see `linear`.
    """
    if k_cache.dim() != 5:
        raise ValueError(f"k_cache must be [L, pages, page_size, Hk, D], got {list(k_cache.shape)}")
    (L, _, page_size, Hk, D), (B, max_pages) = k_cache.shape, page_table.shape
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_shape(name, cache, "[L, pages, page_size, Hk, D]", *k_cache.shape)
        check_dtype(name, cache, k_cache.dtype)
    check_shape("page_table", page_table, "[B, max_pages]", B, max_pages)
    check_dtype("page_table", page_table, torch.int32)
    for name, counts in (("lengths", lengths), ("accepted", accepted), ("active", active)):
        if counts is not None:
            check_shape(name, counts, "[B]", B)
            check_dtype(name, counts, torch.int64)
    if path is not None:
        T = path.shape[1]
        check_shape("path", path, "[B, T]", B, T)
        check_dtype("path", path, torch.int64)
        if not 1 <= T <= 64:
            raise ValueError(f"path must be [B, T] with T=1..64, got {list(path.shape)}")
    if B == 0:
        return
    if path is not None:
        _compact_path_kernel[(Hk, L, B)](
            k_cache, v_cache, page_table, lengths, accepted, active, path, path.shape[1],
            *k_cache.stride()[:4], *v_cache.stride()[:4], page_table.stride(0), path.stride(0),
            KV_HEADS=Hk, D=D, PAGE_SIZE=page_size,
            BLOCK_T=power_of_two(path.shape[1]), BLOCK_D=power_of_two(D),
            num_warps=4, pdl=pdl,
        )  # fmt: skip
    _commit_kernel[(ceil_div(B, 128),)](
        lengths, accepted, active, B, BLOCK_B=128, num_warps=4, pdl=pdl
    )
