"""Norm, Q, K and V projection, rotation, and K and V appended to the paged cache in place.

    [q k v] = rms_norm(x) w^T + b;  q, k rotated by position (Su et al. 2021);  cache[slot] = k, v

Bytes moved: (Hq + 2 Hk) * D * E weights once; R rows of E read, R rows of q, k and v written.
"""

import torch
from torch import Tensor

from .linear import PackedWeight, linear_ref
from .rms_norm import rms_norm_ref
from .step_plan import StepPlan


def qkv_rope_cache_ref(
    x: Tensor,
    norm_w: Tensor,
    eps: float,
    w: PackedWeight,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: StepPlan,
) -> Tensor:
    """Project, rotate and cache: x [B*T, E] -> q [B, T, Hq, D]; K, V written at the plan's slots.

    norm_w [E]; w [(Hq + 2 Hk) * D, E]; pages [pages, page_size, Hk, D], written in place.
    """
    batch, rows = plan.cos.shape[:2]
    heads, head_dim = k_pages.shape[-2:]
    qkv = linear_ref(rms_norm_ref(x, norm_w, eps), w).view(batch, rows, -1, head_dim)
    rotated = qkv[:, :, :-heads].float()
    turned = torch.roll(rotated, head_dim // 2, -1)
    rotated = torch.addcmul(rotated * plan.cos, turned, plan.sin).to(x.dtype)
    k_pages.view(-1, heads, head_dim).index_copy_(
        0, plan.slots, rotated[:, :, -heads:].reshape(-1, heads, head_dim)
    )
    v_pages.view(-1, heads, head_dim).index_copy_(
        0, plan.slots, qkv[:, :, -heads:].reshape(-1, heads, head_dim)
    )
    return rotated[:, :, :-heads]
