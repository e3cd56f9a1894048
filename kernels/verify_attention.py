"""Attention of a few window rows against a long cache: softmax(q k^T / sqrt(D)) v, causal.

Row t of a sequence sees the keys 0..lengths + t. The query heads that share a KV head are packed
with the window rows into tiles of fixed height, and keys are read in whole tiles, so that a row's
bits depend neither on the width of the window nor on where it ends.

Bytes moved: 2 * keys * Hk * D of cache once per row tile, which is once for T * Hq / Hk rows <= 16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .step_plan import StepPlan


def verify_attention_ref(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    plan: StepPlan,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attend: q [B, T, Hq, D], pages [pages, page_size, Hk, D], page_table [B, max_pages] int32.

    -> [B, T, Hq, D]. `scale` is 1 / sqrt(D) unless given.
    """
    batch, rows, heads, head_dim = q.shape
    kv_heads = k_pages.shape[2]
    if heads != kv_heads * plan.group:
        raise ValueError(
            f"q must have Hq = Hk * group = {kv_heads * plan.group} heads, got {heads}"
        )
    tile = plan.row_tile
    outputs = []
    for b in range(batch):
        tiles = plan.masks[b].shape[0]
        packed = q.new_zeros(kv_heads, tiles * tile, head_dim)
        live = packed[:, : rows * plan.group].view(kv_heads, rows, plan.group, head_dim)
        live.copy_(q[b].view(rows, kv_heads, plan.group, head_dim).transpose(0, 1))
        k = _keys(k_pages, page_table[b], plan.extents[b])
        v = _keys(v_pages, page_table[b], plan.extents[b])
        out = F.scaled_dot_product_attention(
            packed.view(kv_heads, tiles, tile, head_dim).transpose(0, 1),
            k.expand(tiles, -1, -1, -1),
            v.expand(tiles, -1, -1, -1),
            attn_mask=plan.masks[b].expand(-1, kv_heads, -1, -1),
            scale=scale,
        )
        out = out.transpose(0, 1).reshape(kv_heads, tiles * tile, head_dim)
        live = out[:, : rows * plan.group].view(kv_heads, rows, plan.group, head_dim)
        outputs.append(live.transpose(0, 1).reshape(rows, heads, head_dim))
    return torch.stack(outputs)


def _keys(pages: Tensor, table: Tensor, extent: int) -> Tensor:
    """One sequence's keys or values [Hk, extent, D]; a view where they lie in one page."""
    page_size = pages.shape[1]
    if extent <= page_size:
        keys = pages[int(table[0])]
    else:
        keys = pages[table[: -(-extent // page_size)].long()].flatten(0, 1)
    return keys[:extent].transpose(0, 1)
