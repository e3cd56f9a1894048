"""Random inputs for the end of a step, for the tests of `advance` and of its CPU counterpart."""

from typing import NamedTuple

import torch
from torch import Tensor

from mtpkern.kernels.advance import Progress


class Inputs(NamedTuple):
    window: Tensor
    target: Tensor
    largest: Tensor
    progress: Progress


def make(batch: int, rows: int, seed: int) -> Inputs:
    """A batch at the end of a step: some drafts are right, some sequences are finished, and the
    largest logits of a few rows are not finite."""
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape: int, high: int = 5) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    window, target = ids(batch, rows), ids(batch, rows)
    right = ids(batch, high=rows + 1)
    for b in range(batch):
        window[b, 1 : 1 + right[b]] = target[b, : right[b]][: rows - 1]
    lengths = ids(batch, high=9)
    active = torch.ones(batch, dtype=torch.int64)
    active[batch // 2 :: 3] = 0
    limits = lengths + 2 + ids(batch, high=2 * rows)
    ends = torch.where(ids(batch, 2, high=3) == 0, ids(batch, 2), -1)
    source, drafted = ids(batch, high=3), ids(batch, high=rows)
    clock = torch.full((batch,), 2 * 2**31 - 2 + seed % 3)
    tokens, ring = ids(batch, 9 + 2 * rows + 3), torch.zeros(3, batch, 2 * rows + 3).long()
    progress = (tokens, lengths, active, limits, ends, source, drafted, clock, ring)
    largest = torch.randn(batch, rows, generator=generator)
    no_numbers = torch.tensor([torch.nan, torch.inf, -torch.inf])[ids(batch, rows, high=3)]
    largest = torch.where(ids(batch, rows, high=2 * rows) == 0, no_numbers, largest)
    return Inputs(window, target, largest, Progress(*progress))
