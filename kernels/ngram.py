"""N-gram drafting: what followed the last earlier occurrence of the sequence's own end.

Prompt lookup (Saxena 2023): no weights, and strong wherever an answer repeats its prompt or itself.

Bytes moved: B * length ids, read once per token of the pattern.
"""

import torch
from torch import Tensor


def ngram_ref(tokens: Tensor, known: Tensor, drafts: int, size: int = 3) -> tuple[Tensor, Tensor]:
    """Draft by copying: tokens [B, max_length] int64, of which known [B] count.

    -> (drafts [B, K], found [B] bool). The copy starts behind the most recent match of the last
    `size` tokens that ends before the sequence's end; where it reaches the end it goes on
    periodically. Where nothing matches, found is False and the drafts are the filler 0.
    """
    batch, length = tokens.shape
    starts = torch.arange(length - size + 1)
    ends = (known[:, None] - size + torch.arange(size)).clamp_(min=0)
    pattern = tokens.gather(1, ends)
    match = starts < (known[:, None] - size)
    for i in range(size):
        match &= tokens[:, i : length - size + 1 + i] == pattern[:, i : i + 1]
    latest = torch.where(match, starts, -1).amax(1)
    found = latest >= 0
    period = (known - size - latest).clamp_(min=1)
    copied = (latest + size)[:, None] + torch.arange(drafts) % period[:, None]
    drafted = tokens.gather(1, copied.clamp_(0, length - 1))
    return torch.where(found[:, None], drafted, 0), found
