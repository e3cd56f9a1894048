"""One step: verify a window, keep the agreeing prefix and one corrected token, draft the next.

Speculation is not a mode. Plain decoding is this step with K = 0, a window of one row.
"""

import time
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mtpkern.cache import KVCache
from mtpkern.drafters.base import MIN_PROBABILITY, NONE, Drafter, DraftInput, Drafts
from mtpkern.drafters.synthetic import force_acceptance
from mtpkern.kernels.advance import Progress
from mtpkern.kernels.sample import SamplingRows
from mtpkern.model import Llama
from mtpkern.ops.base import Ops, Withheld


@dataclass(frozen=True)
class DecodeState:
    """Everything a step reads and changes, for B sequences with K drafts each.

    `progress.tokens[b, : lengths[b] + 1]` are known, and entries past them are undefined. The last
    known token is `window[b, 0]`, which has no K and V yet.
    """

    window: Tensor  # [B, K + 1] int64
    progress: Progress  # its lengths are the cache's
    sampling: SamplingRows
    cache: KVCache
    forced: Tensor | None = None  # acceptance counts of drafters/synthetic.py

    @cached_property
    def windows(self) -> list[Tensor]:
        """The first 0, 1, .., K + 1 rows of the window, [B, rows] each: the same views in every
        step, since each call of a tensor library counts on a CPU."""
        return [*(self.window[:, :rows] for rows in range(self.window.shape[1])), self.window]

    @cached_property
    def draft_rows(self) -> Tensor:
        """The window without its first row: [B, K]."""
        return self.window[:, 1:]

    @classmethod
    def empty(
        cls,
        cache: KVCache,
        max_length: int,
        num_speculative_tokens: int,
        *,
        ends: int = 1,
        ring: Tensor | None = None,
        forced: Tensor | None = None,
    ) -> "DecodeState":
        """A state without active sequences, each with room for `ends` end tokens; greedy sampling.

        ring [slots, B, 1 + 2 (K + 1)] int64 is in memory that the host can read.
        """
        batch, k = cache.lengths.shape[0], num_speculative_tokens
        device = cache.lengths.device
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        progress = Progress(
            # A sequence may end K tokens past its limit, and its last window starts there.
            tokens=torch.zeros(batch, max_length + 2 * (k + 1), dtype=torch.int64, device=device),
            lengths=cache.lengths,
            active=zeros.clone(),
            limits=zeros + max_length,
            ends=torch.full((batch, ends), -1, device=device),
            source=torch.full((batch,), NONE, device=device),
            drafted=zeros.clone(),
            clock=zeros.clone(),
            ring=torch.zeros(1, batch, 2 * k + 3, dtype=torch.int64) if ring is None else ring,
        )
        real = torch.zeros(batch, device=device)
        return cls(
            window=torch.zeros(batch, k + 1, dtype=torch.int64, device=device),
            progress=progress,
            sampling=SamplingRows(real, zeros.clone(), real + 1, real.clone(), zeros.clone()),
            cache=cache,
            forced=forced,
        )

    def view(self, batch: int, num_speculative_tokens: int, first: int = 0) -> "DecodeState":
        """A view of `batch` sequences from slot `first` on, with num_speculative_tokens drafts."""
        p, some = self.progress, slice(first, first + batch)
        parts = {name: tensor[some] for name, tensor in zip(p._fields, p, strict=True)}
        progress = p._replace(**parts | {"ring": p.ring[:, some]})
        return DecodeState(
            self.window[some, : num_speculative_tokens + 1],
            progress,
            SamplingRows(*(t[some] for t in self.sampling)),
            self.cache.rows(first, first + batch),
            self.forced,
        )


@dataclass
class StepOutput:
    """What a step decided: sequence b emits target[b, : count[b]]."""

    target: Tensor  # [B, T] int64
    accepted: Tensor  # [B] int64, 0..K
    count: Tensor  # [B] int64, accepted + 1, or 0 for a finished sequence
    drafts: Drafts | None  # those of the next window; None for K = 0
    drafting_seconds: float = 0.0  # what they took, on a CPU


def decode_step(
    state: DecodeState,
    model: Llama,
    drafter: Drafter,
    ops: Ops,
    *,
    logprobs: bool = False,
    withheld: Withheld | None = None,
    rows: int | None = None,
    use_heads: bool = True,
    use_ngram: bool = True,
    min_probability: float = MIN_PROBABILITY,
) -> StepOutput:
    """Advance every active sequence of `state` by 1 to K + 1 tokens, in place.

    The host reads them from the ring. With `logprobs`, their log-probabilities are there too: the
    model's own, whichever tokens are `withheld`.
    Only the first `rows` of the window are verified (None: all K + 1). With a
    `CompanionDrafter`, use_heads and use_ngram tell whether the next window may come from the heads
    and from copies. Heads stop where the probability that all their drafts are accepted is below
    `min_probability`. These three need `ops.host_may_read`.
    """
    progress = state.progress
    window = state.window if rows is None else state.windows[rows]
    batch, rows = window.shape

    heads = drafter.parallel_heads
    features, projected = ops.forward(model, window, state.cache, drafter.taps, heads)
    target = projected.target((batch, rows), progress.lengths, state.sampling, withheld)
    largest = projected.largest((batch, rows))
    target_logprobs = projected.logprobs(target) if logprobs else None
    if state.forced is not None:
        force_acceptance(window, target, state.forced, progress.clock)
    accepted, count = ops.advance(window, target, largest, target_logprobs, progress)
    drafts, seconds = None, 0.0
    if state.window.shape[1] > 1:
        step = DraftInput(
            features=features,
            projected=projected,
            target=target,
            tokens=progress.tokens,
            lengths=progress.lengths,
            page_table=state.cache.page_table,
            accepted=accepted,
            advance=count,
            sampling=state.sampling,
            use_heads=use_heads,
            use_ngram=use_ngram,
            min_probability=min_probability,
        )
        started = time.perf_counter()
        drafts = draft(state, drafter, step)
        seconds = time.perf_counter() - started
    return StepOutput(target, accepted, count, drafts, seconds)


def draft(state: DecodeState, drafter: Drafter, step: DraftInput) -> Drafts:
    """Give the drafter a committed step, and fill the next window with what it proposes."""
    drafts = drafter.guess(step, state.window.shape[1] - 1)
    if drafts.empty and state.forced is None:  # forced drafts may be -1, not a token
        return drafts  # `advance` has set source and drafted to what they are then
    state.draft_rows.copy_(drafts.tokens)
    progress = state.progress
    for tensor, value in (
        (progress.source, drafts.source),
        (progress.drafted, drafts.num_proposed),
    ):
        tensor.fill_(value) if isinstance(value, int) else tensor.copy_(value)
    return drafts
