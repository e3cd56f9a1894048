"""The kernels' definitions under the launchers' own signatures: torch.ops.mtpkern.* on a CPU.

They say what an operator computes, in plain torch, and let code that uses the operators run without
a GPU. A row's bits do not depend on how many rows there are. Nothing is tuned here.
"""

import torch
from torch import Tensor

from mtpkern.kernels.gate_up_silu import gate_up_silu_ref
from mtpkern.kernels.linear import PackedWeight, linear_ref
from mtpkern.kernels.qkv_rope_cache import qkv_rope_cache_ref
from mtpkern.kernels.window_slots import StepPlan


def linear(
    x: Tensor, w: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None
) -> Tensor:
    return linear_ref(x, _as_it_is(w, bias), residual=residual)


def gate_up_silu(
    x: Tensor, norm_w: Tensor, eps: float, w: Tensor, bias: Tensor | None = None
) -> Tensor:
    return gate_up_silu_ref(x, norm_w, eps, _as_it_is(w, bias))


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
) -> Tensor:
    R, page_size = len(slots), k_pages.shape[1]
    rows = torch.arange(R)
    cos, sin = cos_table[positions][:, None, None], sin_table[positions][:, None, None]
    plan = StepPlan(rows, cos, sin, [], 0, 0)
    # One row per sequence, into a page of their own; from there to the slots that are written.
    k, v = (pages.new_empty(1, R, *pages.shape[2:]) for pages in (k_pages, v_pages))
    q = qkv_rope_cache_ref(
        x, norm_w, eps, _as_it_is(w, bias), k, v, plan, q_norm=q_norm, k_norm=k_norm
    )
    live = rows[slots >= 0]
    page, offset = slots[live] // page_size, slots[live] % page_size
    k_pages[page, offset], v_pages[page, offset] = k[0, live], v[0, live]
    return q[:, 0].contiguous()


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
) -> Tensor:
    B, T, Hq, D = q.shape
    page_size, Hk = k_pages.shape[1:3]
    scale = D**-0.5 if scale is None else scale
    row = torch.arange(T)
    out = torch.empty_like(q)
    for b, length in enumerate(lengths.tolist()):
        extent = length + T
        pages = page_table[b, : -(-extent // page_size)].long()
        k, v = (p[pages].flatten(0, 1)[:extent].float() for p in (k_pages, v_pages))
        bits = (1 << (row + 1)) - 1 if tree is None else tree[b]
        seen = (bits[:, None] >> row & 1).bool()
        # Positions follow depth: in a chain the row's number, in a tree its ancestors' number.
        depth = (seen.sum(1) - 1).clamp_(min=0)
        visible = torch.cat([torch.ones(T, length, dtype=torch.bool), seen], 1)
        if window:
            position = torch.cat([torch.arange(length), length + depth])
            visible &= position > (length + depth - window)[:, None]
        grouped = q[b].float().view(T, Hk, Hq // Hk, D)
        scores = torch.einsum("thgd,shd->thgs", grouped, k) * scale
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
        # A row that sees nothing is zero, and so is the weight of what a row does not see.
        weights = scores.softmax(-1).masked_fill(~visible[:, None, None], 0.0)
        v = v.masked_fill(~visible.any(0)[:, None, None], 0.0)
        out[b] = torch.einsum("thgs,shd->thgd", weights, v).reshape(T, Hq, D)
    return out


def multi_head_projection(
    hidden: Tensor,
    vocabulary: Tensor,
    *,
    top_k: int = 1,
    given: Tensor | None = None,
    logits_rows: int = 0,
    token_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logits = linear_ref(hidden.float(), _as_it_is(vocabulary.float(), None))
    # Stable: between equal logits the lowest column comes first.
    values, columns = logits.sort(dim=-1, descending=True, stable=True)
    values, columns = values[:, :top_k].contiguous(), columns[:, :top_k].contiguous()
    ids = columns if token_ids is None else token_ids[columns]
    asked = logits.new_empty(len(logits), 0)
    if given is not None:
        by_id = logits
        if token_ids is not None:
            size = 1 + int(torch.cat([token_ids, given.flatten()]).max())
            by_id = logits.new_full((len(logits), size), float("-inf"))
            by_id[:, token_ids] = logits
        lacking = (given < 0) | (given >= by_id.shape[1])
        asked = by_id.gather(1, given.masked_fill(lacking, 0)).masked_fill(lacking, float("-inf"))
    return values, ids, logits.logsumexp(-1), asked, logits[:logits_rows].clone()


def sample(logits: Tensor, token_ids: Tensor | None = None) -> Tensor:
    columns = logits.float().max(-1).indices
    return columns if token_ids is None else token_ids[columns]


def _as_it_is(w: Tensor, bias: Tensor | None) -> PackedWeight:
    """A weight [N, K] that is multiplied by 16 rows at a time, whatever their number."""
    return PackedWeight(w, bias, w.shape[0], w.shape[1], False, (16,))
