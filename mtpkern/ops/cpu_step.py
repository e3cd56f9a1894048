"""A step on a CPU: the trunk's results, logits, acceptance and n-gram drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from operator import is_not
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtpkern.kernels.advance import Progress
from mtpkern.kernels.cpu._layout import ACCEPTED, END_WORDS, LOGPROBS, NGRAM_WORDS, TOKENS
from mtpkern.kernels.sample import GREEDY, SamplingRows, gumbel_sample
from mtpkern.ops.base import Withheld, positions_of
from mtpkern.ops.cpu_programs import MAX_ROWS, Unit, kernels

if TYPE_CHECKING:
    from mtpkern.cache import KVCache
    from mtpkern.model import Llama


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


class Forward:
    """A unit of `forward_unit` and what it is for. Views of its results are kept by their shape."""

    def __init__(self, model: Llama, k: Tensor, taps: Sequence[int], unit: Unit):
        """`k` are the keys of the cache."""
        self.model, self.k, self.taps, self.unit = model, k, taps, unit
        self._views: dict[tuple[int, int], tuple[Tensor, Tensor, CpuLogits]] = {}

    def run(self, window: Tensor, cache: KVCache) -> tuple[Tensor, Tensor, CpuLogits]:
        """Run window [B, T] -> features [B, T, n*E], normed rows [B * T, E], and logits."""
        (batch, T), where = window.shape, (cache.lengths, cache.page_table)
        if batch * T <= MAX_ROWS:
            self.unit.run_window(window, *where)
            if (batch, T) not in self._views:
                self._views[batch, T] = self._shaped(self.unit.results(batch * T), batch, T)
            features, normed, logits = self._views[batch, T]
        else:
            runs = self.unit.run_windows(None, window.reshape(-1), *where, T)
            features, normed, logits = self._shaped(self.unit.copies(runs), batch, T)
        if features.dim() == 4:
            features = features.flatten(2)
        return features, normed, logits

    def _shaped(
        self, results: Sequence[Tensor], batch: int, T: int
    ) -> tuple[Tensor, Tensor, CpuLogits]:
        """Views as `run` returns them, but of features [B, T, n, E] where E is padded."""
        features, normed, logits, best, values, sums = results
        features = features.view(batch, T, max(1, len(self.taps)), -1)[..., : normed.shape[1]]
        if features.is_contiguous():
            features = features.flatten(2)
        best, values = best.view(batch, T), values.view(batch, T)
        return features, normed, CpuLogits(logits, best, values, sums, None)


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
    ) -> tuple[Tensor, Tensor | bool]:
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
        same = matches in (0, self._batch)
        return self._copied, matches > 0 if same else self._found


def viewed(rows: Tensor, shape: tuple[int, int]) -> Tensor:
    return rows if rows.shape == shape else rows.view(shape)


def is_greedy(sampling: SamplingRows) -> bool:
    return max(sampling.temperature.tolist(), default=0.0) < GREEDY
