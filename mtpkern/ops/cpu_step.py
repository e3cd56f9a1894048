"""A step on a CPU after its last matmul: logits, acceptance and n-gram drafts.

A step has few of these numbers; plain Python handles them faster than one call of a tensor library.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtpkern.kernels.advance import STEP_MASK, Progress
from mtpkern.kernels.sample import GREEDY, SamplingRows, sample_ref
from mtpkern.ops.base import Withheld, positions_of


class CpuLogits(NamedTuple):
    """`Projected` of R = B * T rows; overwritten by the next projection."""

    logits: Tensor  # [R, V] float32
    best: Tensor  # [R] int64, the most likely token of each row
    values: Tensor  # [R] float32, its logit
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
            return self.best.view(shape)
        own, positions = self.logits.view(*shape, -1), positions_of(lengths, shape[1])
        if withheld is not None:
            early = positions < withheld.until[:, None]
            own = own.masked_fill(early[:, :, None] & withheld.tokens[:, None], float("-inf"))
        return sample_ref(own, positions, sampling)

    def largest(self, shape: tuple[int, int]) -> Tensor:
        return self.values.view(shape)

    def drafts(
        self, accepted: Tensor, count: int, lengths: Tensor, sampling: SamplingRows
    ) -> Tensor:
        assert self.heads is not None, "only parallel heads are asked for drafts"
        batch = len(accepted)
        rows = torch.arange(0, len(self.logits), len(self.logits) // batch) + accepted
        return sample_ref(self.heads(rows)[:, :count], positions_of(lengths, count), sampling)

    def logprobs(self, target: Tensor) -> Tensor:
        chosen = self.logits.gather(1, target.reshape(-1, 1))[:, 0] - self.logsumexp
        return chosen.view(target.shape)


class Advance:
    """`advance_ref` number by number, with numpy's views of the last `progress` kept."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._views: Any = None

    def __call__(
        self,
        window: Tensor,
        target: Tensor,
        largest: Tensor,
        logprobs: Tensor | None,
        progress: Progress,
    ) -> tuple[Tensor, Tensor]:
        if self._progress is not progress:
            arrays: list[Any] = [tensor.numpy() for tensor in progress]
            self._progress, self._views = progress, Progress(*arrays)
        p, T = self._views, window.shape[1]
        windows, targets = window.numpy(), target.tolist()
        sound = [[isfinite(value) for value in row] for row in largest.tolist()]
        reported = [[0] * T] * len(targets)
        if logprobs is not None:
            reported = (logprobs.view(torch.int32).long() & 0xFFFFFFFF).tolist()
        made = []
        for b, chosen in enumerate(targets):
            drafts, active, length = windows[b].tolist(), int(p.active[b]), int(p.lengths[b])
            n = 0
            while n + 1 < T and sound[b][n] and drafts[n + 1] == chosen[n]:
                n += 1
            broken = active and not sound[b][n]
            count = (n + 1) * active
            p.clock[b] += 1
            step = int(p.clock[b])
            above = (step & STEP_MASK) << 32
            facts = n | int(p.drafted[b]) << 8 | int(p.source[b]) << 16
            words = [facts | (active + 2 * broken) << 24, *chosen, *reported[b]]
            p.ring[step % len(p.ring), b, : 1 + 2 * T] = [above | word for word in words]
            if active:
                p.tokens[b, length + 1 : length + 1 + T] = chosen
                windows[b, 0] = chosen[n]
                ended = not set(p.ends[b].tolist()).isdisjoint(chosen[:count])
                p.lengths[b] = length + count
                p.active[b] = not (ended or broken or length + count + 1 >= p.limits[b])
            p.drafted[b] = p.source[b] = 0
            made.append((n, count))
        accepted, counts = torch.tensor(made).unbind(1)
        return accepted, counts


def ngram(tokens: Tensor, known: Tensor, drafts: int, size: int = 3) -> tuple[Tensor, Tensor]:
    """`ngram_ref` as a search in bytes."""
    rows = tokens.numpy()
    copied = torch.zeros(len(rows), drafts, dtype=torch.int64)
    found = torch.zeros(len(rows), dtype=torch.bool)
    for b, (row, count) in enumerate(zip(rows, known.tolist(), strict=True)):
        if count <= size:
            continue
        text, pattern = row[: count - 1].tobytes(), row[count - size : count].tobytes()
        at = text.rfind(pattern)
        while at % row.itemsize and at >= 0:  # across two tokens
            at = text.rfind(pattern, 0, at + len(pattern) - 1)
        if at >= 0:
            begin = at // row.itemsize + size
            found[b] = True
            copied[b] = torch.tensor([int(row[begin + i % (count - begin)]) for i in range(drafts)])
    return copied, found


def is_greedy(sampling: SamplingRows) -> bool:
    return max(sampling.temperature.tolist(), default=0.0) < GREEDY
