"""Prefill on a GPU, through the vendor's GEMM and attention: many rows, bound by arithmetic.

A prompt runs without its last token, alone, in chunks cut at absolute multiples of a fixed size, so
that its cache does not depend on its neighbours. The host knows where each chunk begins, so nothing
is read back from the device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.kernels.step_plan import Segment, StepPlan
from mtpkern.ops import TORCH, Ops


def plan_prefill(
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
    head_dim: int,
) -> StepPlan:
    """Plan T = `rows` rows of one sequence behind lengths [1], which lies on the host."""
    begin, page_size, device = int(lengths[0]), k_cache.shape[2], page_table.device
    positions = torch.arange(begin, begin + rows, device=device)
    slots = page_table[0].long()[positions // page_size] * page_size + positions % page_size
    extent = -(-(begin + rows) // page_size) * page_size
    keys = torch.arange(extent, device=device)
    visible = keys <= positions[:, None]
    if window:
        visible &= keys > positions[:, None] - window
    cos, sin = (table[positions][None, :, None] for table in (cos_table, sin_table))
    return StepPlan(slots, cos, sin, [[Segment(0, rows, extent, visible)]], group, rows * group)


def prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    plan: StepPlan,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attend: q [1, T, Hq, D] -> [1, T, Hq, D]; the pages are gathered, since the vendor's
    attention reads none."""
    ((part,),) = plan.segments
    used = page_table[0, : part.extent // k_pages.shape[1]]
    k, v = (pages[used.long()].flatten(0, 1).transpose(0, 1)[None] for pages in (k_pages, v_pages))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=part.mask, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous()


VENDOR = TORCH._replace(plan=plan_prefill, verify_attention=prefill_attention)


def prefill_ops(ops: Ops) -> Ops:
    """What a prompt runs through, given what a step runs through."""
    return ops if ops.branches else VENDOR
