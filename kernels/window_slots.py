"""Where a window's rows go: their slots in the paged cache, and their positions.

    slot = page_table[b, (lengths[b] + t) // page_size] * page_size + (lengths[b] + t) % page_size

All layers of a step share them, so they are computed once per step.

Bytes moved, per sequence: 8 of its length, 4 per entry of its page table that it needs, 16 T
written; 8 of `active` and 8 T of `tree` where these are given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launch import ceil_div, check_dtype, check_shape, device, jit, tl, wait_for_producer


def window_slots_ref(
    lengths: Tensor,
    page_table: Tensor,
    rows: int,
    page_size: int,
    *,
    active: Tensor | None = None,
    tree: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Place window rows -> (slots [B * T], positions [B * T]) int64; see `window_slots`."""
    place = lengths[:, None] + torch.arange(rows, device=lengths.device)
    # The entries of finished sequences are undefined.
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
    """The depth of a tree's nodes: the number of bits of their masks [...] int64, less their own.

    A filler, whose mask is empty, has the depth of the root.
    """
    # Bits are counted by pairs, by fours and by bytes, and the bytes are summed in the highest one.
    x = ancestors - ((ancestors >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    bits = (x * 0x0101010101010101) >> 56
    return tl.maximum(bits.to(tl.int32) - 1, 0)


@jit("BLOCK")
def _window_slots_kernel(
    lengths_ptr, page_table_ptr, active_ptr, tree_ptr,  # [B] [B, max_pages] [B] [B, T]
    slots_ptr, positions_ptr,  # [B * T]
    B, T, page_size,
    stride_pb, stride_tb,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK rows."""
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
    """Place T = `rows` window rows: lengths [B] int64, page_table [B, max_pages] int32 ->
    (slots [B * T], positions [B * T]), int64, as `qkv_rope_cache` takes them.

    Row t of a sequence has slot lengths[b] + t of its pages, or -1 if active [B] int64 is 0. Its
    position is lengths[b] + t, or, with tree [B, T] int64 (see `verify_attention`), lengths[b] plus
    its depth. `pdl`: see `linear`.
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
            lengths, page_table, active, tree, slots, positions, B, rows, page_size,
            page_table.stride(0), 0 if tree is None else tree.stride(0),
            BLOCK=64,
            num_warps=4, pdl=pdl,
        )  # fmt: skip
    return slots, positions
