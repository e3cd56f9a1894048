"""Acceptance at given rates, to measure what a step costs without heads that reach them.

A step's drafts are replaced by the model's own choices, as many as a drawn count says, and by -1,
which is never accepted, after those. The text then means nothing, and is labelled so.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtpkern.errors import UserError

# Counts are drawn once; each step takes the next one, STRIDE further on for each slot.
PERIOD, STRIDE = 1024, 37


def draw_counts(rates: Sequence[float], *, seed: int = 0) -> Tensor:
    """Accepted counts [PERIOD] int64: if those before it are accepted, draft i is at rates[i]."""
    if not rates or any(not 0 <= rate <= 1 for rate in rates):
        raise UserError(f"acceptance rates must be one or more within 0..1, got {list(rates)}")
    generator = torch.Generator().manual_seed(seed)
    accepted = torch.rand(PERIOD, len(rates), generator=generator) < torch.tensor(rates)
    return accepted.long().cumprod(1).sum(1)


def force_acceptance(window: Tensor, target: Tensor, counts: Tensor, clock: Tensor) -> None:
    """Rewrite window[:, 1:] in place, so that step clock[b] of sequence b accepts the next of the
    counts [PERIOD]: window and target [B, T] int64, clock [B] int64."""
    batch, rows = window.shape
    at = (clock + STRIDE * torch.arange(batch, device=clock.device)) % len(counts)
    accepted = torch.arange(rows - 1, device=clock.device) < counts[at][:, None]
    window[:, 1:] = torch.where(accepted, target[:, :-1], -1)
