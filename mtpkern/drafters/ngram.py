"""Drafts copied from the sequence itself, alone or beside heads."""

import torch
from torch import Tensor

from mtpkern.drafters.base import (
    NGRAM,
    NO_DRAFTER,
    NONE,
    Drafter,
    DraftInput,
    Drafts,
    NoDrafter,
)
from mtpkern.ops.base import Ops


class NgramDrafter(NoDrafter):
    """Copies what followed the last earlier occurrence of the last `size` tokens.

    (Prompt lookup decoding, Saxena 2023.)
    """

    def __init__(self, ops: Ops, size: int = 3):
        self.ops, self.size = ops, size

    def guess(self, step: DraftInput, count: int) -> Drafts:
        drafts, found = self.ops.ngram(step.tokens, step.lengths, count, self.size)
        return Drafts(drafts, found * NGRAM, found * count)


class CompanionDrafter:
    """The n-gram's copy for sequences that have a match, and the heads' drafts for the others.

    Where the host may read values inside a step, the heads do not run at all if every sequence has
    a match, or with `use_heads` off: their passes are what takes time. With `use_ngram` off nothing
    is copied.
    """

    def __init__(self, ngram: NoDrafter, drafter: Drafter, ops: Ops):
        """`ngram` is an NgramDrafter, or a NoDrafter if nothing is to be copied."""
        self.ngram, self.drafter = ngram, drafter
        self.taps, self.lookahead = drafter.taps, drafter.lookahead
        self.parallel_heads = drafter.parallel_heads
        self._host_may_read = ops.host_may_read

    def prefill(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        self.drafter.prefill(sequence, features, tokens)

    def guess(self, step: DraftInput, count: int) -> Drafts:
        copied = (self.ngram if step.use_ngram else NO_DRAFTER).guess(step, count)
        if self._host_may_read and (not step.use_heads or _is_equal(copied.source, NGRAM)):
            self.drafter.observe(step)
            return copied
        if self._host_may_read and _is_equal(copied.source, NONE):
            return self.drafter.guess(step, count)
        source = torch.as_tensor(copied.source, device=step.accepted.device)
        found = (source == NGRAM).expand(len(step.accepted))
        if self._host_may_read and bool((found | (step.advance == 0)).all()):
            self.drafter.observe(step)
            return copied
        guessed = self.drafter.guess(step, count)
        probabilities = guessed.probabilities
        if probabilities is not None:
            probabilities = torch.where(found[:, None], 1.0, probabilities)
        return Drafts(
            torch.where(found[:, None], copied.tokens, guessed.tokens),
            torch.where(found, copied.source, guessed.source),
            torch.where(found, copied.num_proposed, guessed.num_proposed),
            probabilities,
        )

    def observe(self, step: DraftInput) -> None:
        self.drafter.observe(step)

    def mark_gap(self) -> None:
        self.drafter.mark_gap()

    def cached_length(self, sequence: int, length: int) -> int:
        return self.drafter.cached_length(sequence, length)

    def reset(self, sequence: int, length: int = 0) -> None:
        self.drafter.reset(sequence, length)


def _is_equal(source: Tensor | int, one: int) -> bool:
    """Whether it is known, without reading a tensor, that all sequences have this source."""
    return isinstance(source, int) and source == one
