"""What all layers of one step share: which slots to write, how to rotate, which keys are visible.

The kernels read lengths and page table themselves; the references, which pay for every small
tensor operation, want slots, rotations and masks made once a step instead of once a layer.

A key past a row's own position must contribute exactly nothing, whatever its slot holds. The mask
gives it weight zero, and zero times NaN is NaN, so the slots behind the window are cleared here,
for all layers at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import ceil_div, check_dtype, check_shape, device, jit, tl, wait_for_producer

# A row's keys are read up to the multiple of this behind its own, so that its bits do not depend on
# where the window ends; query rows are packed into tiles of ROW_TILE, so that they do not depend on
# its width.
KEY_TILE = 64
ROW_TILE = 16


class Segment(NamedTuple):
    """Window rows begin..end-1 of one sequence, whose own keys lie in one tile of keys."""

    begin: int
    end: int
    extent: int  # keys to read
    mask: Tensor  # [tiles, 1, row_tile, extent], 0 or -inf


class StepPlan(NamedTuple):
    """T window rows of B sequences; see `plan_ref`."""

    slots: Tensor  # [B * T] int64, index into the cache seen as [pages * page_size]
    cos: Tensor  # [B, T, 1, D] float32
    sin: Tensor  # [B, T, 1, D] float32, its first half negated: x cos + roll(x) sin rotates
    segments: list[list[Segment]]  # [B], each covering the T rows in order
    group: int  # query heads per KV head
    row_tile: int


def plan_ref(
    lengths: Tensor,
    rows: int,
    *,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    group: int,
    window: int = 0,
    row_tile: int = ROW_TILE,
) -> StepPlan:
    """Plan T = `rows` window rows that start at slot lengths[b] of each sequence.

    lengths [B] int64; k_cache and v_cache [L, pages, page_size, Hk, D], page_size a multiple of
    KEY_TILE; page_table [B, max_pages] int32; tables [positions, D] float32. `window` > 0 limits a
    row to the last `window` positions, its own included.
    """
    page_size = k_cache.shape[2]
    if page_size % KEY_TILE:
        raise ValueError(f"page_size must be a multiple of {KEY_TILE}, got {page_size}")
    starts = lengths.tolist()
    steps = torch.arange(rows)
    positions = lengths[:, None] + steps
    pages = page_table.gather(1, positions // page_size).long()
    slots = pages * page_size + positions % page_size

    segments = []
    for b, start in enumerate(starts):
        parts, begin = [], 0
        while begin < rows:
            # Libraries sum over a tile's keys in an order that follows how many keys there are.
            extent = ((start + begin) // KEY_TILE + 1) * KEY_TILE
            end = min(rows, extent - start)
            tiles = -(-(end - begin) * group // row_tile)
            # Packed row r is row r // group of these; the padding rows repeat the last one.
            packed = (torch.arange(tiles * row_tile) // group).clamp_(max=end - begin - 1)
            position, keys = (start + begin + packed)[:, None], torch.arange(extent)
            hidden = keys > position
            if window:
                hidden |= keys <= position - window
            mask = torch.zeros(hidden.shape, dtype=k_cache.dtype)
            mask.masked_fill_(hidden, float("-inf"))
            parts.append(Segment(begin, end, extent, mask.view(tiles, 1, row_tile, extent)))
            begin = end
        segments.append(parts)
        _clear(k_cache, v_cache, page_table[b], start + rows, extent)
    return StepPlan(
        slots.view(-1),
        cos_table[positions][:, :, None],
        sin_table[positions][:, :, None],
        segments,
        group,
        row_tile,
    )


def _clear(k_cache: Tensor, v_cache: Tensor, pages: Tensor, begin: int, end: int) -> None:
    """Zero slots begin..end-1 of one sequence; page_size is a multiple of KEY_TILE."""
    if begin < end:
        page, offset = divmod(begin, k_cache.shape[2])
        index = int(pages[page])
        for cache in (k_cache, v_cache):
            cache[:, index, offset : offset + end - begin] = 0


def window_slots_ref(
    lengths: Tensor,
    page_table: Tensor,
    rows: int,
    page_size: int,
    *,
    active: Tensor | None = None,
    tree: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Say where window rows go -> (slots [B * T], positions [B * T]); see `window_slots`."""
    place = lengths[:, None] + torch.arange(rows, device=lengths.device)
    # Entries of finished sequences may be anything.
    live = torch.ones_like(lengths) if active is None else active
    pages = page_table.gather(1, torch.where(live[:, None] != 0, place // page_size, 0))
    slots = torch.where(live[:, None] != 0, pages.long() * page_size + place % page_size, -1)
    positions = place
    if tree is not None:
        nodes = torch.arange(64, device=tree.device)
        ancestors = (tree[:, :, None] >> nodes & 1).sum(-1) - 1
        positions = lengths[:, None] + ancestors.clamp_(min=0)
    return slots.view(-1), positions.reshape(-1)


@device
def node_depth(ancestors):
    """How many ancestors a node of a tree has: the bits of its mask [...] int64, less its own.

    A filler, whose mask is empty, is as deep as the root.
    """
    # Bits are counted in pairs, in fours, in bytes, and those added up in the highest one.
    x = ancestors - ((ancestors >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    bits = (x * 0x0101010101010101) >> 56
    return tl.maximum(bits.to(tl.int32) - 1, 0)


@jit("BLOCK", definition="window_slots_ref")
def _window_slots_kernel(
    lengths_ptr,
    page_table_ptr,
    active_ptr,
    tree_ptr,
    slots_ptr,
    positions_ptr,
    B,
    T,
    page_size,
    stride_pb,
    stride_tb,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait_for_producer()
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_rows = r < B * T
    b, t = (r // T).to(tl.int64), r % T
    length = tl.load(lengths_ptr + b, mask=in_rows, other=0)
    live = in_rows
    if active_ptr is not None:
        live &= tl.load(active_ptr + b, mask=in_rows, other=0) != 0
    place = length + t
    page = tl.load(page_table_ptr + b * stride_pb + place // page_size, mask=live, other=0)
    slot = tl.where(live, page.to(tl.int64) * page_size + place % page_size, -1)
    tl.store(slots_ptr + r, slot, mask=in_rows)
    position = place
    if tree_ptr is not None:
        ancestors = tl.load(tree_ptr + b * stride_tb + t, mask=in_rows, other=1)
        position = length + node_depth(ancestors)
    tl.store(positions_ptr + r, position, mask=in_rows)


def window_slots(
    lengths: Tensor,
    page_table: Tensor,
    rows: int,
    page_size: int,
    *,
    active: Tensor | None = None,
    tree: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """Say where T = `rows` window rows go: lengths [B] int64, page_table [B, max_pages] int32 ->
    (slots [B * T], positions [B * T]), int64, as `qkv_rope_cache` takes them.

    Row t of a sequence goes to slot lengths[b] + t of its pages, or, where active [B] int64 is 0,
    nowhere: -1. Positions count on from lengths[b], or, with tree [B, T] int64 (see
    `verify_attention`), follow depth. `pdl`: see `linear`.
    """
    B, max_pages = page_table.shape
    check_shape("page_table", page_table, "[B, max_pages]", B, max_pages)
    check_dtype("page_table", page_table, torch.int32)
    for name, counts in (("lengths", lengths), ("active", active)):
        if counts is not None:
            check_shape(name, counts, "[B]", B)
            check_dtype(name, counts, torch.int64)
    if tree is not None:
        check_shape("tree", tree, "[B, T]", B, rows)
        check_dtype("tree", tree, torch.int64)
    slots, positions = (lengths.new_empty(B * rows) for _ in range(2)) if out is None else out
    for name, tensor in (("slots", slots), ("positions", positions)):
        check_shape(name, tensor, "[B * T]", B * rows)
        check_dtype(name, tensor, torch.int64)
    if B * rows:
        _window_slots_kernel[(ceil_div(B * rows, 64),)](
            lengths,
            page_table,
            active,
            tree,
            slots,
            positions,
            B,
            rows,
            page_size,
            page_table.stride(0),
            0 if tree is None else tree.stride(0),
            BLOCK=64,
            PDL=pdl,
            num_warps=4,
            enable_fp_fusion=True,
            launch_pdl=pdl,
        )
    return slots, positions
