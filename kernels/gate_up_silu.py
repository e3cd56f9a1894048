"""Norm, gate and up projection, activation: silu(x' w_gate^T) * (x' w_up^T), x' = rms_norm(x).

Bytes moved: 2 * F * E weights once; R rows of E read and F written.
"""

import torch.nn.functional as F
from torch import Tensor

from .linear import PackedWeight, linear_ref
from .rms_norm import rms_norm_ref


def gate_up_silu_ref(x: Tensor, norm_w: Tensor, eps: float, w: PackedWeight) -> Tensor:
    """Gated hidden rows: x [R, E], norm_w [E], w [2F, E] (gate above up) -> [R, F]."""
    gate, up = linear_ref(rms_norm_ref(x, norm_w, eps), w).chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
