"""Acceptance at given rates, for measuring what a step costs without heads that would earn them.

The drafts of a window are replaced by what the model chose, as far as a drawn count says, and by
what it cannot have chosen behind that. The text then means nothing, and is labelled so.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtpkern.errors import UserError

# Counts are drawn once; a step takes the next one, and sequences stand at different places.
PERIOD, STRIDE = 1024, 37


def draw_counts(rates: Sequence[float], *, seed: int = 0) -> Tensor:
    """Accepted counts [PERIOD] int64: draft i stands at rates[i] where those before it stood."""
    if not rates or any(not 0 <= rate <= 1 for rate in rates):
        raise UserError(f"acceptance rates must be one or more within 0..1, got {list(rates)}")
    generator = torch.Generator().manual_seed(seed)
    stands = torch.rand(PERIOD, len(rates), generator=generator) < torch.tensor(rates)
    return stands.long().cumprod(1).sum(1)


def force_acceptance(window: Tensor, target: Tensor, counts: Tensor, clock: Tensor) -> None:
    """Rewrite window[:, 1:] in place, so that step clock[b] accepts counts[...] of it."""
    batch, rows = window.shape
    place = (clock + STRIDE * torch.arange(batch, device=clock.device)) % len(counts)
    stands = torch.arange(rows - 1, device=clock.device) < counts[place][:, None]
    window[:, 1:] = torch.where(stands, target[:, :-1], -1)
