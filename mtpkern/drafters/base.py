"""What a drafter is: the interface between a decode step and whatever proposes the next tokens.

A drafter proposes the K tokens that follow a sequence's last known one; the next step of the model
verifies all of them in one pass. A wrong proposal costs time and never changes a token.

    NgramDrafter           ngram.py        what followed the last occurrence of the latest tokens
    MedusaDrafter          medusa.py       residual blocks, all on the same hidden state
    MtpDrafter             mtp.py          one decoder layer, applied to its own drafts again
    ModulesDrafter         mtp_modules.py  one such layer for each depth
    Eagle3Drafter          eagle3.py       the same idea with another input and residual
    LayersDrafter          layers.py       decoder layers in place of the model's last one
    HydraDrafter           hydra.py        small MLPs, each given the drafts before its own
    CompanionDrafter       ngram.py        an n-gram copy where there is one, heads elsewhere

The life of a slot, which serves one sequence at a time:

    reset(slot, n)         a sequence begins, whose first n tokens the drafter's caches hold already
    prefill(slot, ...)     the rest of its prompt, chunk by chunk, without a proposal
    guess(step, K)         after each step: use what was committed and propose K tokens, or
    observe(step)          only remember what was committed, without a proposal, or
    mark_gap()             neither was called for some steps, and the next call is one of the two
    cached_length(slot, n) how many tokens' entries can be kept when the sequence ends

A new family is a file here, its builder in build.py, the shapes of its tensors in shapes.py, and a
row of the table at the end of load.py. A new published layout of a family is a reader in
published.py and a row there.

In all shapes B is sequences, T the rows of a window (K + 1 or fewer), E the hidden size.
"""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from mtpkern.kernels.sample import SamplingRows
from mtpkern.ops.base import Packed, Projected

# Where a step's drafts came from; statistics are kept per source.
SOURCES = ("none", "heads", "ngram")
NONE, HEADS, NGRAM = range(3)

# With a fixed K, sequential heads stop drafting where all drafts are accepted less often than this.
MIN_PROBABILITY = 0.1


class Tensors(Protocol):
    """Tensors by name; matrices as `ops.pack` accepts them."""

    def __getitem__(self, name: str, /) -> Any: ...


class DraftInput(NamedTuple):
    """One committed step, as a drafter sees it; n is the number of layers that it taps."""

    features: Tensor  # [B, T, n*E], the tapped hidden states; overwritten by the next step
    # Logits of the LM head and of parallel heads for those rows; None if no drafter needs them.
    projected: Projected | None
    target: Tensor  # [B, T] int64, the tokens that the model chose after each row
    tokens: Tensor  # [B, max_length + ...] int64, tokens[b, : lengths[b] + 1] are defined
    lengths: Tensor  # [B] int64, after the commit: tokens[b, lengths[b]] is the bonus token
    page_table: (
        Tensor  # [B, max_pages] int32, of the model's cache: a head's keys are in the same pages
    )
    accepted: Tensor  # [B] int64, how many drafts the model agreed with
    advance: Tensor  # [B] int64, accepted + 1, or 0 for a finished sequence
    sampling: SamplingRows
    first: int = 0  # the slot of the first sequence; the others are in the slots after it
    use_heads: bool = True  # whether heads may draft
    use_ngram: bool = True  # whether copies may be drafted
    # Heads stop where the probability that all their drafts are accepted is below this.
    min_probability: float = MIN_PROBABILITY


class Drafts(NamedTuple):
    """Tokens [B, K] int64, of which the first num_proposed[b] are proposals, the rest fillers.
    A drafter's next call may overwrite them.

    A source or num_proposed that is one number applies to all sequences.
    """

    tokens: Tensor
    source: Tensor | int  # [B] int64, an index into SOURCES
    num_proposed: Tensor | int  # [B] int64, 0..K
    # [B, K] float32, the drafter's own estimate that a draft is accepted if those before it are;
    # None where it has none.
    probabilities: Tensor | None = None

    @property
    def empty(self) -> bool:
        """Whether it is known, without reading a tensor, that nothing is proposed."""
        return isinstance(self.num_proposed, int) and self.num_proposed == 0


class Drafter(Protocol):
    """What the decode loop calls; see the module's docstring for the order of calls."""

    # Layers whose output the drafter reads, counted from 1; the last one is read after its norm.
    taps: tuple[int, ...]
    # Heads from `ops.pack_heads` that share the step's one read of the vocabulary matrix, or None.
    parallel_heads: Packed | None
    # A cache entry of the drafter may depend on this many tokens after its own.
    lookahead: int

    def prefill(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        """Add rows of a prompt: features [n, ...], and the token [n] int64 after each."""

    def guess(self, step: DraftInput, count: int) -> Drafts:
        """Add a committed step, and propose the `count` tokens after each bonus token."""

    def observe(self, step: DraftInput) -> None:
        """Add a committed step without proposing."""

    def mark_gap(self) -> None:
        """Note that steps were committed which the drafter was not given."""

    def cached_length(self, sequence: int, length: int) -> int:
        """How many of a sequence's first `length` tokens need no `prefill` if it is resumed."""

    def reset(self, sequence: int, length: int = 0) -> None:
        """Reset a slot: its pages hold `length` tokens, in the drafter's caches too."""


class NoDrafter:
    """Proposes nothing: plain decoding, and the base class of drafters without a cache."""

    taps: tuple[int, ...] = ()
    parallel_heads: Packed | None = None
    lookahead = 0

    def prefill(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        pass

    def guess(self, step: DraftInput, count: int) -> Drafts:
        return Drafts(step.accepted.new_zeros(1, 1).expand(len(step.accepted), count), NONE, 0)

    def observe(self, step: DraftInput) -> None:
        pass

    def mark_gap(self) -> None:
        pass

    def cached_length(self, sequence: int, length: int) -> int:
        return length

    def reset(self, sequence: int, length: int = 0) -> None:
        pass


NO_DRAFTER = NoDrafter()


def rows_at(rows: Tensor, at: Tensor) -> Tensor:
    """Row at[b] of each sequence: rows [B, T, E], at [B] -> [B, E]."""
    return rows.gather(1, at.view(-1, 1, 1).expand(-1, 1, rows.shape[2]))[:, 0]
