"""Drafters: what guesses the next K tokens. A wrong guess costs time, never a token.

    parallel     Medusa: head i guesses token i + 1 from the same hidden state as the LM head,
                 through the LM head's vocabulary matrix or one of its own
    sequential   MTP modules, EAGLE-3 (mtp.py)
    layers       transformer layers, Hydra (layers.py)
    n-gram       what followed the last occurrence of the sequence's own end
    both         the n-gram's copy where there is a match, else the heads

Every drafter is told of each step after it was committed, through one `DraftInput`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mtpkern.ops.base import Ops, Projected

# Where a step's drafts came from; statistics are kept per source.
SOURCES = ("none", "heads", "ngram")
NONE, HEADS, NGRAM = range(3)

# Where K is fixed, sequential heads draft on down to this chance that all their drafts stand.
MIN_PROBABILITY = 0.1


class Tensors(Protocol):
    """Tensors by name; matrices as `ops.pack` takes them."""

    def __getitem__(self, name: str, /) -> Any: ...


class DraftInput(NamedTuple):
    """One committed step, as a drafter sees it. n is the number of taps."""

    features: Tensor  # [B, T, n*E], the tapped hidden states of the window's rows
    projected: Projected  # what the LM head and the parallel heads say of those rows
    target: Tensor  # [B, T] int64, the model's choices: the tokens after those rows, as accepted
    tokens: Tensor  # [B, max_length + ...] int64, committed ones, then garbage
    lengths: Tensor  # [B] int64, after the commit: tokens[b, lengths[b]] is the bonus token
    accepted: Tensor  # [B] int64
    advance: Tensor  # [B] int64, accepted + 1, or 0 for a finished sequence
    sampling: Any  # SamplingRows
    first: int = 0  # the slot of the first of the B sequences; the others follow
    use_heads: bool = True  # False: only drafts that cost nothing are wanted
    # Heads stop drafting where the chance that all their drafts stand is below this.
    min_probability: float = MIN_PROBABILITY


class Drafts(NamedTuple):
    """Guesses: tokens [B, K] int64, of which num_proposed[b] are proposals and the rest fillers."""

    tokens: Tensor
    source: Tensor | int  # [B] int64, an index into SOURCES; one number: the same in all
    num_proposed: Tensor | int  # [B] int64, 0..K
    # [B, K] float32: the drafter's own estimate that a draft stands where those before it stand;
    # None where it has none.
    probabilities: Tensor | None = None


class Drafter(Protocol):
    """What a decode step needs of a drafter. `taps` are layers counted from 1; L is post-norm.

    `parallel_heads` are heads as `ops.pack_heads` made them, or None: they share the step's one
    read of the vocabulary. What the caches of a drafter hold for a token may depend on `lookahead`
    tokens behind it.
    """

    taps: tuple[int, ...]
    parallel_heads: Any
    lookahead: int

    def prefill(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        """Take in the next pairs of a prompt: features [n, ...] and the tokens [n] after them."""

    def observe(self, step: DraftInput) -> None:
        """Take in a committed step, whether or not a guess is wanted after it."""

    def keep_up(self, step: DraftInput) -> None:
        """Make room for further steps, where no guess is wanted after this one."""

    def forget(self) -> None:
        """Steps went by that were not observed: what was noted before them counts for nothing."""

    def guess(self, step: DraftInput, count: int) -> Drafts:
        """Guess the `count` tokens after the bonus token of each sequence."""

    def kept(self, sequence: int, length: int) -> int:
        """How many of a sequence's first `length` tokens need no `prefill` again."""

    def resume(self, sequence: int, length: int) -> None:
        """Take a sequence whose pages hold, in this drafter's caches too, `length` tokens."""

    def reset(self, sequence: int) -> None:
        """Forget a sequence, so that its slot can serve another."""


class NoDrafter:
    """Drafts nothing: plain decoding is K = 0, and fillers before there is anything better."""

    taps: tuple[int, ...] = ()
    parallel_heads: Any = None
    lookahead = 0

    def prefill(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        pass

    def observe(self, step: DraftInput) -> None:
        pass

    def keep_up(self, step: DraftInput) -> None:
        pass

    def forget(self) -> None:
        pass

    def guess(self, step: DraftInput, count: int) -> Drafts:
        return Drafts(step.accepted.new_zeros(1, 1).expand(len(step.accepted), count), NONE, 0)

    def kept(self, sequence: int, length: int) -> int:
        return length

    def resume(self, sequence: int, length: int) -> None:
        pass

    def reset(self, sequence: int) -> None:
        pass


class NgramDrafter(NoDrafter):
    """Copies what followed the last earlier occurrence of the last `size` tokens."""

    def __init__(self, ops: Ops, size: int = 3):
        self.ops, self.size = ops, size

    def guess(self, step: DraftInput, count: int) -> Drafts:
        drafts, found = self.ops.ngram(step.tokens, step.lengths + 1, count, self.size)
        if self.ops.host_may_read and not bool(found.any()):
            return Drafts(drafts, NONE, 0)
        return Drafts(drafts, found * NGRAM, found * count)


class MedusaDrafter(NoDrafter):
    """Parallel heads: residual blocks on the final hidden state, through the model's own LM head.

    Their logits come with the step's one read of the vocabulary matrix. Cai et al. 2024.
    """

    def __init__(self, tensors: Tensors, config: Mapping[str, Any], ops: Ops):
        heads, depth = config["num_heads"], config["num_layers"]
        self.parallel_heads = ops.pack_heads(
            [
                [
                    (tensors[f"{h}.{d}.linear.weight"], tensors[f"{h}.{d}.linear.bias"])
                    for d in range(depth)
                ]
                for h in range(heads)
            ]
        )

    def guess(self, step: DraftInput, count: int) -> Drafts:
        drafts = step.projected.drafts(step.accepted, count, step.lengths, step.sampling)
        return Drafts(drafts, HEADS, count)


def rows_at(rows: Tensor, at: Tensor) -> Tensor:
    """Row at[b] of each sequence: rows [B, T, E], at [B] -> [B, E]."""
    return rows.gather(1, at.view(-1, 1, 1).expand(-1, 1, rows.shape[2]))[:, 0]


class OwnVocabularyDrafter(NoDrafter):
    """Parallel heads with vocabulary matrices of their own, as Medusa was published.

    Each is read once a step, for the row behind which drafts are wanted. Cai et al. 2024.
    """

    def __init__(self, tensors: Tensors, config: Mapping[str, Any], layers: int, ops: Ops):
        """`layers` is how many the trunk has: the heads take what comes out of its final norm."""
        self.ops, self.taps = ops, (layers,)
        self.blocks = MedusaDrafter(tensors, config, ops).parallel_heads
        self.vocabularies = [
            ops.pack(tensors[f"{h}.vocabulary.weight"]) for h in range(config["num_heads"])
        ]
        first = self.vocabularies[0]
        self.token_ids = torch.arange(first.out_features, device=tensors["0.0.linear.bias"].device)

    def guess(self, step: DraftInput, count: int) -> Drafts:
        hidden = self.ops.parallel_heads(rows_at(step.features, step.accepted), self.blocks)
        drafts = [
            self.ops.choose(
                hidden[:, h],
                self.vocabularies[h],
                self.token_ids,
                step.lengths,
                h,
                step.sampling,
            )[0]
            for h in range(count)
        ]
        return Drafts(torch.stack(drafts, 1), HEADS, count)


class CompanionDrafter:
    """The copy of `ngram` for sequences that have a match, the heads' guesses for the others.

    Where every sequence has a match, or heads are not wanted, they are skipped, which is where the
    time is.
    """

    def __init__(self, ngram: NoDrafter, drafter: Drafter, ops: Ops):
        """`ngram` is an NgramDrafter, or a NoDrafter where nothing is to be copied."""
        self.ngram, self.drafter, self.ops = ngram, drafter, ops
        self.taps, self.lookahead = drafter.taps, drafter.lookahead
        self.parallel_heads = drafter.parallel_heads

    def prefill(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        self.drafter.prefill(sequence, features, tokens)

    def observe(self, step: DraftInput) -> None:
        self.drafter.observe(step)

    def keep_up(self, step: DraftInput) -> None:
        self.drafter.keep_up(step)

    def forget(self) -> None:
        self.drafter.forget()

    def guess(self, step: DraftInput, count: int) -> Drafts:
        copied = self.ngram.guess(step, count)
        if self.ops.host_may_read and not step.use_heads:
            self.drafter.keep_up(step)
            return copied
        source = torch.as_tensor(copied.source, device=step.accepted.device)
        found = (source == NGRAM).expand(len(step.accepted))
        if self.ops.host_may_read and bool((found | (step.advance == 0)).all()):
            self.drafter.keep_up(step)
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

    def kept(self, sequence: int, length: int) -> int:
        return self.drafter.kept(sequence, length)

    def resume(self, sequence: int, length: int) -> None:
        self.drafter.resume(sequence, length)

    def reset(self, sequence: int) -> None:
        self.drafter.reset(sequence)
