"""The pairs that a head with a key/value cache has yet to write there.

Such a head writes one entry per committed token, made of a pair: the model's hidden states at that
token (its features) and the token after it. A step commits accepted + 1 tokens per sequence, and so
that many pairs. `CachedDrafter` holds them in one of two ways:

    PendingPairs   where the host may read values inside a step (a CPU): pairs wait until the head
                   drafts again, so that a step without its drafts costs next to nothing
    StepPairs      under a CUDA graph, where each step drafts: the step's own pairs

The modules of `ModulesDrafter` also need tokens further ahead, so that a sequence's last pairs are
written from drafts first. These `open_pairs` stay, and are written again once their tokens are
known.
"""

from collections.abc import Iterable
from operator import is_not
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtpkern.cache import KVCache
from mtpkern.drafters.base import DraftInput

# How many pairs of a sequence may wait, those of the next window included.
MAX_PENDING = 64
# How many of them are kept while the heads are not used, since their drafts do not pay.
LATEST = 16


class Pairs(NamedTuple):
    """The pairs to write before drafting, n for each of B sequences; W is the features' width."""

    features: Tensor  # [B, n, W]
    tokens: Tensor  # [B, n + open_pairs] int64, the token after each row, and those after the last
    begin: Tensor  # [B] int64, the cache position of a sequence's first pair
    last: Tensor  # [B] int64, the index of its last pair, 0..n-1; pairs after that are padding

    def tensors(self) -> "Pairs":
        return self


class HostPairs(NamedTuple):
    """`Pairs` of `PendingPairs`, as compiled kernels take them, and each sequence's committed
    length. The features may be those of its buffer, which the next call changes."""

    features: np.ndarray  # the bits of bfloat16 as int16
    tokens: np.ndarray
    begin: list[int]
    last: list[int]
    lengths: list[int]

    def tensors(self) -> Pairs:
        features = torch.from_numpy(self.features)
        if self.features.dtype == np.int16:
            features = features.view(torch.bfloat16)
        rest = (torch.tensor(self.begin), torch.tensor(self.last))
        return Pairs(features, torch.from_numpy(self.tokens), *rest)


class StepPairs:
    """The pairs of the step at hand, and the open ones before them: no value decides a shape.

    After steps without drafts the cache has gaps: drafts are poorer, tokens the same.
    """

    def __init__(self, cache: KVCache, width: int, dtype: torch.dtype, open_pairs: int):
        """`cache` is the head's own; features are [.., width] of `dtype`."""
        self.cache, self.open_pairs = cache, open_pairs
        shape = (len(cache.lengths), open_pairs, width)
        self.pending = torch.zeros(shape, dtype=dtype, device=cache.lengths.device)

    def take(self, step: DraftInput) -> Pairs:
        """The pairs to write at a step, which count as written from now on."""
        begin = step.lengths - step.advance
        if not self.open_pairs:
            return Pairs(step.features, step.target, begin, step.accepted)
        # Open pairs and the step's own, side by side, as many as there may be.
        some = slice(step.first, step.first + len(step.lengths))
        lengths, pending, own = self.cache.lengths[some], self.pending[some], step.features
        before = begin
        begin = torch.maximum(torch.minimum(lengths, before), before - self.open_pairs)
        count = before - begin
        index = count[:, None] + torch.arange(own.shape[1], device=begin.device)
        features = torch.cat([pending, own], 1)
        features.scatter_(1, index[:, :, None].expand_as(own), own)
        tokens = tokens_from(step, begin + 1, features.shape[1] + self.open_pairs)
        lengths.copy_(torch.maximum(step.lengths - self.open_pairs, begin))
        pending.copy_(rows_from(features, lengths - begin, self.open_pairs))
        return Pairs(features, tokens, begin, count + step.accepted)

    def observe(self, step: DraftInput) -> Iterable[tuple[int, Tensor, Tensor]]:
        return ()

    def mark_gap(self) -> None:
        pass

    def reset(self, sequence: int, length: int) -> None:
        self.cache.lengths[sequence] = length


class PendingPairs:
    """Pairs that wait in a buffer, in order, for as long as the head does not draft.

    Rows are copied as each step is observed, mostly without torch: a step whose drafts do not pay
    must cost next to nothing, and after a pass over the weights a call of torch takes some 10 us.
    """

    def __init__(self, cache: KVCache, width: int, dtype: torch.dtype, open_pairs: int):
        """`cache` is the head's own; features are [.., width] of `dtype`."""
        self.cache, self.open_pairs = cache, open_pairs
        shape = (len(cache.lengths), MAX_PENDING, width)
        self.pending = torch.zeros(shape, dtype=dtype, device=cache.lengths.device)
        self._as_int16 = dtype == torch.bfloat16  # which NumPy lacks
        # The same memory.
        self._rows, self._written = self._as_array(self.pending), cache.lengths.numpy()
        # Sequences for which steps were committed that were never observed.
        self._missed: set[int] = set()
        # What is read of the latest step, mostly the tensors of the next one too, as arrays.
        self._seen: tuple[Tensor, ...] = ()
        self._arrays: tuple[np.ndarray, ...] = ()

    def take(self, step: DraftInput) -> HostPairs:
        """The pairs to write at a step, which count as written from now on."""
        waiting, (*_, texts) = self._copy(step), self._arrays
        begin, lengths = (list(column) for column in zip(*waiting, strict=True))
        last = [max(0, length - start - 1) for start, length in waiting]
        rows, open_pairs = max(last) + 1, self.open_pairs
        tokens = np.zeros((len(waiting), rows + open_pairs), np.int64)
        pending = self._rows[step.first : step.first + len(waiting)]
        features = pending[:, :rows]
        if open_pairs:
            features = features.copy()
        for b, (start, length) in enumerate(waiting):
            # Those after a sequence's last are undefined.
            after = texts[b, start + 1 : start + 1 + rows + open_pairs]
            tokens[b, : len(after)] = after
            written = max(length - open_pairs, start)
            self._written[step.first + b] = written
            if open_pairs:
                kept = features[b, written - start : written - start + open_pairs]
                pending[b, : len(kept)] = kept
        return HostPairs(features, tokens, begin, last, lengths)

    def observe(self, step: DraftInput) -> Iterable[tuple[int, Tensor, Tensor]]:
        """Copy a step's rows -> pairs to be written without drafting, since the buffer is half
        full: the slot, features [n, W] and the token [n] after each."""
        waiting = self._copy(step)
        if all(length - begin < MAX_PENDING // 2 for begin, length in waiting):
            return ()
        first, batch = step.first, len(waiting)
        counts = [length - begin for begin, length in waiting]
        if not step.use_heads:
            for b, count in enumerate(counts):
                self._drop_oldest(first + b, count - LATEST)
            return ()
        begin = self.cache.lengths[first : first + batch]
        tokens = tokens_from(step, begin + 1, max(counts))
        return [
            (first + b, self.pending[first + b, :count].clone(), tokens[b, :count])
            for b, count in enumerate(counts)
            if count > 0
        ]

    def mark_gap(self) -> None:
        """Steps were committed that were not observed: drop the pairs that wait from before."""
        self._missed = set(range(len(self.cache.lengths)))

    def reset(self, sequence: int, length: int) -> None:
        self._missed.discard(sequence)
        self.cache.lengths[sequence] = length

    def _copy(self, step: DraftInput) -> list[tuple[int, int]]:
        """Copy the rows that a step committed to the buffer, after those that are there -> of each
        sequence, the positions where its waiting pairs begin and end."""
        given = (step.features, step.lengths, step.advance, step.tokens)
        if not self._seen or any(map(is_not, given, self._seen)):
            self._seen = given
            self._arrays = (self._as_array(step.features), *(t.numpy() for t in given[1:]))
        rows, lengths, advance, _ = self._arrays
        committed, waiting = zip(lengths.tolist(), advance.tolist(), strict=True), []
        for slot, (length, count) in enumerate(committed, step.first):
            start, begin = length - count, int(self._written[slot])
            if slot in self._missed:
                self._missed.remove(slot)
                self._leave_gap(slot, start - begin)
                begin = start
            self._rows[slot, start - begin : length - begin] = rows[slot - step.first, :count]
            waiting.append((begin, length))
        return waiting

    def _as_array(self, rows: Tensor) -> np.ndarray:
        return (rows.view(torch.int16) if self._as_int16 else rows).numpy()

    def _drop_oldest(self, sequence: int, count: int) -> None:
        """Leave zeros in the cache in place of a sequence's first `count` pairs. While the heads
        are not used, writing keys and values costs more than the better drafts later bring."""
        if count <= 0:
            return
        self._leave_gap(sequence, count)
        pending = self.pending[sequence]
        pending[:LATEST] = pending[count : count + LATEST].clone()

    def _leave_gap(self, sequence: int, count: int) -> None:
        """Fill the next `count` positions of a sequence with zeros, and continue after them."""
        cache = self.cache
        begin, page_size = int(cache.lengths[sequence]), cache.k.shape[2]
        at = torch.arange(begin, begin + count)
        slots = cache.page_table[sequence].long()[at // page_size] * page_size + at % page_size
        for pages in (cache.k, cache.v):
            pages.flatten(1, 2).index_fill_(1, slots, 0)
        cache.lengths[sequence] += count


def tokens_from(step: DraftInput, begin: Tensor, count: int) -> Tensor:
    """The `count` tokens of each sequence from position begin [B] on: [B, count].

    Those of sequences with fewer than `count` are undefined after their last.
    """
    index = begin[:, None] + torch.arange(count, device=begin.device)
    return step.tokens.gather(1, index.clamp_(max=step.tokens.shape[1] - 1))


def rows_from(rows: Tensor, begin: Tensor, count: int) -> Tensor:
    """The `count` rows of each sequence from index begin [B] on: [B, n, W] -> [B, count, W]."""
    index = begin[:, None] + torch.arange(count, device=begin.device)
    return rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[2]))
