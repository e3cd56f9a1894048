"""What all layers of one step share: which slots to write, how to rotate, which keys are visible.

The kernels read lengths and page table themselves; the references, which pay for every small
tensor operation, want slots, rotations and masks made once a step instead of once a layer.

A key past a row's own position must contribute exactly nothing, whatever its slot holds. The mask
gives it weight zero, and zero times NaN is NaN, so the slots behind the window are cleared here,
for all layers at once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Keys are read up to a multiple of this, so that a row's bits do not depend on where the window
# ends; query rows are packed into tiles of ROW_TILE, so that they do not depend on its width.
KEY_TILE = 64
ROW_TILE = 16


class StepPlan(NamedTuple):
    """T window rows of B sequences; see `plan_ref`."""

    slots: Tensor  # [B * T] int64, index into the cache seen as [pages * page_size]
    cos: Tensor  # [B, T, 1, D] float32
    sin: Tensor  # [B, T, 1, D] float32, its first half negated: x cos + roll(x) sin rotates
    extents: list[int]  # [B] keys to read
    masks: list[Tensor]  # [B] of [tiles, 1, row_tile, extent], 0 or -inf
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
    row_tile: int = ROW_TILE,
) -> StepPlan:
    """Plan T = `rows` window rows that start at slot lengths[b] of each sequence.

    lengths [B] int64; k_cache and v_cache [L, pages, page_size, Hk, D], page_size a multiple of
    KEY_TILE; page_table [B, max_pages] int32; tables [positions, D] float32.
    """
    page_size = k_cache.shape[2]
    if page_size % KEY_TILE:
        raise ValueError(f"page_size must be a multiple of {KEY_TILE}, got {page_size}")
    starts = lengths.tolist()
    steps = torch.arange(rows)
    positions = lengths[:, None] + steps
    pages = page_table.gather(1, positions // page_size).long()
    slots = pages * page_size + positions % page_size
    extents = [-(-(start + rows) // KEY_TILE) * KEY_TILE for start in starts]

    tiles = -(-rows * group // row_tile)
    # Packed row r is window row r // group; the padding rows repeat the last one.
    packed = (torch.arange(tiles * row_tile) // group).clamp_(max=rows - 1)
    masks = []
    for b, (start, extent) in enumerate(zip(starts, extents, strict=True)):
        hidden = torch.arange(extent) > (start + packed)[:, None]
        mask = torch.zeros(hidden.shape, dtype=k_cache.dtype).masked_fill_(hidden, float("-inf"))
        masks.append(mask.view(tiles, 1, row_tile, extent))
        _clear(k_cache, v_cache, page_table[b], start + rows, extent)
    return StepPlan(
        slots.view(-1),
        cos_table[positions][:, :, None],
        sin_table[positions][:, :, None],
        extents,
        masks,
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
