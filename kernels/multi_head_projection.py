"""Final norm, then one read of the vocabulary matrix for the LM head and all parallel heads.

    h_0 = rms_norm(x);  h_i = h_0 + silu(h_0 w_i^T + b_i)  (Medusa, Cai et al. 2024, section 2.1)
    logits_i = h_i w_vocabulary^T

Bytes moved: V * E once for 1 + H heads, H * E * E of head blocks; R * (1 + H) * V logits written.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import PackedWeight, linear_ref
from .rms_norm import rms_norm_ref


def multi_head_projection_ref(
    x: Tensor,
    norm_w: Tensor,
    eps: float,
    vocabulary: PackedWeight,
    blocks: Sequence[Sequence[PackedWeight]] = (),
) -> tuple[Tensor, Tensor]:
    """Project rows: x [R, E], norm_w [E], vocabulary [V, E] -> (normed [R, E], logits [R, 1+H, V]).

    blocks[h] is head h's stack of residual blocks, each [E, E] with a bias. logits[:, 0] are the
    language model's own.
    """
    normed = rms_norm_ref(x, norm_w, eps)
    heads = [normed]
    for stack in blocks:
        hidden = normed
        for block in stack:
            hidden = hidden + F.silu(linear_ref(hidden, block))
        heads.append(hidden)
    rows = torch.stack(heads, 1)
    logits = linear_ref(rows.flatten(0, 1), vocabulary)
    return normed, logits.view(x.shape[0], len(heads), -1)
