"""The kernels' definitions as one `Ops`: an oracle, and the GPU's path on a CPU, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mtpkern.kernels.advance import Progress, advance_ref
from mtpkern.kernels.gate_up_silu import gate_up_silu_ref
from mtpkern.kernels.linear import linear_ref
from mtpkern.kernels.medusa_blocks import medusa_blocks_ref
from mtpkern.kernels.multi_head_projection import multi_head_projection_ref
from mtpkern.kernels.ngram import ngram_ref
from mtpkern.kernels.qkv_rope_cache import qkv_rope_cache_ref
from mtpkern.kernels.rms_norm import rms_norm_ref
from mtpkern.kernels.sample import SamplingRows, gumbel_sample
from mtpkern.kernels.verify_attention import verify_attention_ref
from mtpkern.kernels.window_slots import window_slots_ref
from mtpkern.ops.base import Ops, PackedWeight, Projected, Withheld, positions_of
from mtpkern.ops.gpu import DevicePlan, stacked

if TYPE_CHECKING:
    from mtpkern.cache import KVCache
    from mtpkern.config import ModelConfig


class Logits(NamedTuple):
    """`Projected` that holds all logits."""

    logits: Tensor  # [B * T, 1 + H, V] float32

    def target(
        self,
        shape: tuple[int, int],
        lengths: Tensor,
        sampling: SamplingRows,
        withheld: Withheld | None = None,
    ) -> Tensor:
        own, positions = self.logits[:, 0].view(*shape, -1), positions_of(lengths, shape[1])
        if withheld is not None:
            own = withheld.mask(own, positions)
        return gumbel_sample(own, positions, sampling)

    def largest(self, shape: tuple[int, int]) -> Tensor:
        return self.logits[:, 0].amax(-1).view(shape)

    def drafts(
        self, accepted: Tensor, count: int, lengths: Tensor, sampling: SamplingRows
    ) -> Tensor:
        batch, (rows, _, vocabulary) = len(accepted), self.logits.shape
        heads = self.logits[:, 1:].view(batch, rows // batch, -1, vocabulary)
        row = accepted.view(-1, 1, 1, 1).expand(-1, 1, count, vocabulary)
        logits = heads.gather(1, row)[:, 0]
        return gumbel_sample(logits, positions_of(lengths, count), sampling)

    def logprobs(self, target: Tensor) -> Tensor:
        # Row by row, so that a row's bits do not depend on the number of rows.
        rows = (row[0].log_softmax(-1) for row in self.logits)
        chosen = [row[i] for row, i in zip(rows, target.reshape(-1), strict=True)]
        return torch.stack(chosen).view(target.shape)


class Definitions(Ops):
    """The definitions."""

    host_may_read = True
    takes_quants = False
    row_dtype = None

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
        return rms_norm_ref(x, w, eps, ids=ids, out=out)

    def linear(self, x: Tensor, w: PackedWeight, *, residual: Tensor | None = None) -> Tensor:
        return linear_ref(x, w.data, w.bias, residual=residual)

    def gate_up_silu(self, x: Tensor, norm_w: Tensor, eps: float, w: PackedWeight) -> Tensor:
        return gate_up_silu_ref(x, norm_w, eps, w.data, w.bias)

    def plan(self, cache: KVCache, rows: int, config: ModelConfig) -> DevicePlan:
        page_size, window = cache.k.shape[2], config.sliding_window
        slots, positions = window_slots_ref(cache.lengths, cache.page_table, rows, page_size)
        return DevicePlan(slots, positions, cache.cos, cache.sin, cache.lengths, window)

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
        q = qkv_rope_cache_ref(
            x,
            norm_w,
            eps,
            w.data,
            k_pages,
            v_pages,
            *plan[:4],
            bias=w.bias,
            q_norm=q_norm,
            k_norm=k_norm,
        )
        return q.view(len(plan.lengths), -1, *q.shape[1:])

    def verify_attention(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, plan: DevicePlan
    ) -> Tensor:
        pages = (k_pages, v_pages, page_table)
        return verify_attention_ref(q, *pages, plan.lengths, window=plan.window)

    def project(
        self, hidden: Tensor, norm_w: Tensor, eps: float, vocabulary: PackedWeight, heads: Any
    ) -> tuple[Tensor, Projected]:
        normed = rms_norm_ref(hidden, norm_w, eps)
        rows = normed[:, None] if heads is None else medusa_blocks_ref(normed, *heads)
        flat = rows.flatten(0, 1)
        logits = multi_head_projection_ref(flat, vocabulary.data, logits_rows=len(flat)).logits
        assert logits is not None, "logits_rows asks for them"
        return normed, Logits(logits.view(*rows.shape[:2], -1))

    def parallel_heads(self, rows: Tensor, heads: Any) -> Tensor:
        return medusa_blocks_ref(rows, *heads)[:, 1:]

    def choose(
        self,
        hidden: Tensor,
        vocabulary: PackedWeight,
        token_ids: Tensor,
        lengths: Tensor,
        draft: int,
        sampling: SamplingRows,
    ) -> tuple[Tensor, Tensor]:
        logits = linear_ref(hidden.float(), vocabulary.data, vocabulary.bias)
        token = gumbel_sample(
            logits[:, None], positions_of(lengths + draft, 1), sampling, token_ids
        )
        return token[:, 0], logits.log_softmax(-1).amax(-1).exp()

    def advance(
        self,
        window: Tensor,
        target: Tensor,
        largest: Tensor,
        logprobs: Tensor | None,
        progress: Progress,
    ) -> tuple[Tensor, Tensor]:
        return advance_ref(window, target, largest, logprobs, progress)

    def ngram(
        self, tokens: Tensor, lengths: Tensor, drafts: int, size: int = 3
    ) -> tuple[Tensor, Tensor | bool]:
        copied, found = ngram_ref(tokens, lengths + 1, drafts, size)
        same = bool((found == found[:1]).all())
        return copied, bool(found[0]) if same else found


DEFINITIONS = Definitions()
