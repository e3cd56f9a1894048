"""RMS norm of rows: y = x / sqrt(mean(x^2) + eps) * w  (Zhang and Sennrich 2019, equation 4).

Bytes moved: R * E read and written once, E weights.
"""

import torch
from torch import Tensor


def rms_norm_ref(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """RMS-normalise rows: x [..., E], w [E] -> [..., E] in x's dtype, float32 inside."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * inverse).mul_(w).to(x.dtype)
