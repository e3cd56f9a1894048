"""The Triton kernels as one `Ops`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mtpkern.kernels.advance import Progress, advance
from mtpkern.kernels.gate_up_silu import gate_up_silu
from mtpkern.kernels.linear import linear
from mtpkern.kernels.medusa_blocks import medusa_blocks
from mtpkern.kernels.multi_head_projection import (
    ONE_READ_ROWS,
    Projection,
    multi_head_projection,
)
from mtpkern.kernels.ngram import ngram
from mtpkern.kernels.qkv_rope_cache import qkv_rope_cache
from mtpkern.kernels.rms_norm import rms_norm
from mtpkern.kernels.sample import SamplingRows
from mtpkern.kernels.verify_attention import verify_attention
from mtpkern.kernels.window_slots import window_slots
from mtpkern.ops.base import Ops, PackedWeight, Projected, Withheld
from mtpkern.ops.prefill import run_chunk

if TYPE_CHECKING:
    from mtpkern.cache import KVCache
    from mtpkern.config import ModelConfig
    from mtpkern.model import Llama


class GreedyProjection(NamedTuple):
    """`Projected` of a greedy step, in which no logits are written.

    The heads' rows follow the LM head's, or are projected by `later` once acceptance has decided
    which of them are needed.
    """

    kept: Projection  # of (1 + H) * B * T rows, the LM head's first, then each head's; or of B * T
    heads: int  # H
    later: Callable[[Tensor], Projection] | None = None  # rows [B] -> of B * H rows

    def target(
        self,
        shape: tuple[int, int],
        lengths: Tensor,
        sampling: SamplingRows,
        withheld: Withheld | None = None,
    ) -> Tensor:
        if withheld is not None:
            raise ValueError("withheld needs logits, and a greedy projection has none")
        return self.kept.ids[: shape[0] * shape[1], 0].view(shape)

    def largest(self, shape: tuple[int, int]) -> Tensor:
        return self.kept.values[: shape[0] * shape[1], 0].view(shape)

    def drafts(
        self, accepted: Tensor, count: int, lengths: Tensor, sampling: SamplingRows
    ) -> Tensor:
        batch = len(accepted)
        if self.later is not None:
            T = self.kept.ids.shape[0] // batch
            chosen = self.later(torch.arange(0, batch * T, T, device=accepted.device) + accepted)
            return chosen.ids[:, 0].view(batch, self.heads)[:, :count]
        # ids[h, b, accepted[b]] of [1 + H, B, T], without a copy of the row per head.
        ids = self.kept.ids[:, 0].view(1 + self.heads, batch, -1)[1 : 1 + count]
        row = accepted[None, :, None].expand(count, batch, 1)
        return ids.gather(2, row)[:, :, 0].t()

    def logprobs(self, target: Tensor) -> Tensor:
        rows = target.numel()
        chosen = self.kept.values[:rows, 0] - self.kept.logsumexp[:rows]
        return chosen.view(target.shape)


class DevicePlan(NamedTuple):
    """What the kernels share for one window; they read lengths and the page table themselves."""

    slots: Tensor  # [B * T] int64
    positions: Tensor  # [B * T] int64
    cos: Tensor  # [capacity, D] float32
    sin: Tensor
    lengths: Tensor  # [B] int64
    window: int  # positions that a row sees; 0: all


class GpuOps(Ops):
    """The kernels; `pdl` makes each a programmatic dependent launch (sm_90 and newer)."""

    host_may_read = False
    takes_quants = False
    row_dtype = None

    def __init__(self, pdl: bool = False):
        self.pdl = pdl

    def pack(self, w: Tensor, bias: Tensor | None = None) -> PackedWeight:
        return PackedWeight(w, bias)

    def pack_heads(self, heads: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor]:
        return stacked(heads)

    def rms_norm(
        self,
        x: Tensor,
        w: Tensor,
        eps: float,
        *,
        ids: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        return rms_norm(x, w, eps, ids=ids, out=out, pdl=self.pdl)

    def linear(self, x: Tensor, w: PackedWeight, *, residual: Tensor | None = None) -> Tensor:
        return linear(x, w.data, w.bias, residual=residual, pdl=self.pdl)

    def gate_up_silu(self, x: Tensor, norm_w: Tensor, eps: float, w: PackedWeight) -> Tensor:
        return gate_up_silu(x, norm_w, eps, w.data, w.bias, pdl=self.pdl)

    def plan(self, cache: KVCache, rows: int, config: ModelConfig) -> DevicePlan:
        page_size = cache.k.shape[2]
        slots, positions = window_slots(
            cache.lengths, cache.page_table, rows, page_size, pdl=self.pdl
        )
        tables = (cache.cos, cache.sin)
        return DevicePlan(slots, positions, *tables, cache.lengths, config.sliding_window)

    def qkv_rope_cache(
        self,
        x: Tensor,
        norm_w: Tensor | None,
        eps: float,
        w: PackedWeight,
        k_pages: Tensor,
        v_pages: Tensor,
        plan: DevicePlan,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
    ) -> Tensor:
        q = qkv_rope_cache(
            x,
            norm_w,
            eps,
            w.data,
            k_pages,
            v_pages,
            plan.slots,
            plan.positions,
            plan.cos,
            plan.sin,
            bias=w.bias,
            q_norm=q_norm,
            k_norm=k_norm,
            pdl=self.pdl,
        )
        return q.view(len(plan.lengths), -1, *q.shape[1:])

    def verify_attention(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        page_table: Tensor,
        plan: DevicePlan,
    ) -> Tensor:
        pages = (k_pages, v_pages, page_table)
        return verify_attention(q, *pages, plan.lengths, window=plan.window, pdl=self.pdl)

    def prefill(
        self, model: Llama, chunk: Tensor, cache: KVCache, taps: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        return run_chunk(model, chunk, cache, taps, self)

    def project(
        self, hidden: Tensor, norm_w: Tensor, eps: float, vocabulary: PackedWeight, heads: Any
    ) -> tuple[Tensor, Projected]:
        normed = self.rms_norm(hidden, norm_w, eps)
        (R, E), H = normed.shape, 0 if heads is None else len(heads[0])
        project = partial(multi_head_projection, vocabulary=vocabulary.data, pdl=self.pdl)
        if H == 0:
            return normed, GreedyProjection(project(normed), H)
        if R * (1 + H) <= ONE_READ_ROWS:
            rows = medusa_blocks(normed, *heads, pdl=self.pdl).transpose(0, 1).reshape(-1, E)
            return normed, GreedyProjection(project(rows), H)

        def later(at: Tensor) -> Projection:
            return project(self.parallel_heads(normed[at], heads).reshape(-1, E))

        return normed, GreedyProjection(project(normed), H, later)

    def parallel_heads(self, rows: Tensor, heads: Any) -> Tensor:
        return medusa_blocks(rows, *heads, pdl=self.pdl)[:, 1:]

    def choose(
        self,
        hidden: Tensor,
        vocabulary: PackedWeight,
        token_ids: Tensor,
        lengths: Tensor,
        draft: int,
        sampling: SamplingRows,
    ) -> tuple[Tensor, None]:
        if vocabulary.bias is not None:
            return token_ids[self.linear(hidden, vocabulary).argmax(-1)], None
        data = vocabulary.data
        kept = multi_head_projection(hidden, data, token_ids=token_ids, pdl=self.pdl)
        return kept.ids[:, 0], None

    def advance(
        self,
        window: Tensor,
        target: Tensor,
        largest: Tensor,
        logprobs: Tensor | None,
        progress: Progress,
    ) -> tuple[Tensor, Tensor]:
        return advance(window, target, largest, logprobs, progress, pdl=self.pdl)

    def ngram(
        self, tokens: Tensor, lengths: Tensor, drafts: int, size: int = 3
    ) -> tuple[Tensor, Tensor | bool]:
        return ngram(tokens, lengths + 1, drafts, size, pdl=self.pdl)


def stacked(heads: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor]:
    """H heads of `depth` blocks (w [E, E], bias [E]) -> (w [H, depth, E, E], bias [H, depth, E])"""
    w, bias = (
        torch.stack([torch.stack([block[i] for block in head]) for head in heads]) for i in (0, 1)
    )
    return w, bias


TRITON = GpuOps()
