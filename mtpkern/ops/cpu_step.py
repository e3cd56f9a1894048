"""A step on a CPU after its last matmul: logits, acceptance and n-gram drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from operator import is_not
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtpkern.kernels.advance import Progress
from mtpkern.kernels.cpu._layout import ACCEPTED, END_WORDS, LOGPROBS, NGRAM_WORDS, TOKENS
from mtpkern.kernels.sample import GREEDY, SamplingRows, gumbel_sample
from mtpkern.ops.base import Withheld, positions_of
from mtpkern.ops.cpu_programs import kernels


class CpuLogits(NamedTuple):
    """`Projected` of R = B * T rows; overwritten by the next projection."""

    logits: Tensor  # [R, V] float32
    best: Tensor  # [R] or [B, T] int64, the most likely token of each row
    values: Tensor  # of the same shape, float32, its logit
    logsumexp: Tensor  # [R] float32
    heads: Callable[[Tensor], Tensor] | None  # rows [B] -> logits [B, H, V] of the parallel heads

    def target(
        self,
        shape: tuple[int, int],
        lengths: Tensor,
        sampling: SamplingRows,
        withheld: Withheld | None = None,
    ) -> Tensor:
        if withheld is None and is_greedy(sampling):
            return viewed(self.best, shape)
        own, positions = self.logits.view(*shape, -1), positions_of(lengths, shape[1])
        if withheld is not None:
            own = withheld.mask(own, positions)
        return gumbel_sample(own, positions, sampling)

    def largest(self, shape: tuple[int, int]) -> Tensor:
        return viewed(self.values, shape)

    def drafts(
        self, accepted: Tensor, count: int, lengths: Tensor, sampling: SamplingRows
    ) -> Tensor:
        assert self.heads is not None, "only parallel heads are asked for drafts"
        batch = len(accepted)
        rows = torch.arange(0, len(self.logits), len(self.logits) // batch) + accepted
        return gumbel_sample(self.heads(rows)[:, :count], positions_of(lengths, count), sampling)

    def logprobs(self, target: Tensor) -> Tensor:
        chosen = self.logits.gather(1, target.reshape(-1, 1))[:, 0] - self.logsumexp
        return chosen.view(target.shape)


def trunk_results(
    columns: Sequence[Tensor], taps: int, shape: tuple[int, int]
) -> tuple[Tensor, Tensor, CpuLogits]:
    """Views of the results of `forward_unit`, shape = (B, T) -> features [B, T, n*E], or [B, T, n,
    E] where they are padded; normed rows [B * T, E]; logits."""
    features, normed, logits, best, values, sums = columns
    features = features.view(*shape, max(1, taps), -1)[..., : normed.shape[1]]
    if features.is_contiguous():
        features = features.flatten(2)
    return features, normed, CpuLogits(logits, best.view(shape), values.view(shape), sums, None)


class StepEnd:
    """`advance` and `ngram`, compiled: see kernels/cpu/_step_end.py.

    Their results are overwritten by the next call. Addresses of tensors that are those of the call
    before are not looked up again.
    """

    def __init__(self) -> None:
        self._kernels = kernels()
        self._words, self._ngram_words = (
            np.zeros(count, np.int64) for count in (END_WORDS, NGRAM_WORDS)
        )
        self._at, self._ngram_at = self._words.ctypes.data, self._ngram_words.ctypes.data
        self._progress: Progress | None = None
        self._rows: tuple[Tensor, ...] = ()
        # Of the last search: its arguments, and what it read and wrote.
        self._searched: tuple[Tensor, Tensor, int, int] | None = None

    @cached_property
    def _advance(self) -> Callable[[int, int, int], int]:
        return self._kernels.entry("end_step")

    @cached_property
    def _ngram(self) -> Callable[[int, int, int], int]:
        return self._kernels.entry("draft_ngram")

    def advance(
        self,
        window: Tensor,
        target: Tensor,
        largest: Tensor,
        logprobs: Tensor | None,
        progress: Progress,
    ) -> tuple[Tensor, Tensor]:
        batch, rows = window.shape
        words = self._words
        if self._progress is not progress:
            self._progress = progress
            p = progress
            words[TOKENS:] = [
                *(p.tokens.data_ptr(), p.tokens.stride(0), p.lengths.data_ptr()),
                *(p.active.data_ptr(), p.limits.data_ptr()),
                *(p.ends.data_ptr(), p.ends.stride(0), p.ends.shape[1]),
                *(p.source.data_ptr(), p.drafted.data_ptr(), p.clock.data_ptr()),
                *(p.ring.data_ptr(), p.ring.shape[0], p.ring.stride(0), p.ring.stride(1)),
            ]
            self._counts = (torch.empty_like(p.lengths), torch.empty_like(p.lengths))
            words[ACCEPTED:TOKENS] = [counts.data_ptr() for counts in self._counts]
        given = (window, target, largest)
        if any(map(is_not, given, self._rows)) or not self._rows:
            self._rows = given
            words[:LOGPROBS] = [
                *(window.data_ptr(), window.stride(0)),
                *(target.data_ptr(), *target.stride()),
                *(largest.data_ptr(), *largest.stride()),
            ]
        if logprobs is not None:
            logprobs = logprobs.contiguous()
        words[LOGPROBS] = 0 if logprobs is None else logprobs.data_ptr()
        self._advance(self._at, batch, rows)
        return self._counts

    def ngram(
        self, tokens: Tensor, lengths: Tensor, drafts: int, size: int
    ) -> tuple[Tensor, Tensor | None]:
        last = self._searched
        if (
            last is None
            or tokens is not last[0]
            or lengths is not last[1]
            or (drafts, size) != last[2:]
        ):
            self._searched = (tokens, lengths, drafts, size)
            self._batch = batch = len(tokens)
            self._copied = torch.empty(batch, drafts, dtype=torch.int64)
            self._found = torch.empty(batch, dtype=torch.bool)
            self._ngram_words[:] = [
                *(tokens.data_ptr(), tokens.stride(0), lengths.data_ptr(), size),
                *(self._copied.data_ptr(), self._found.data_ptr()),
            ]
        matches = self._ngram(self._ngram_at, self._batch, drafts)
        return self._copied, self._found if matches else None


def viewed(rows: Tensor, shape: tuple[int, int]) -> Tensor:
    return rows if rows.shape == shape else rows.view(shape)


def is_greedy(sampling: SamplingRows) -> bool:
    return max(sampling.temperature.tolist(), default=0.0) < GREEDY
