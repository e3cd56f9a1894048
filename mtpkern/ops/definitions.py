"""The definitions of the kernels as one `Ops`, which tests compare the others with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mtpkern.kernels.advance import Progress, advance_ref
from mtpkern.kernels.gate_up_silu import gate_up_silu_ref
from mtpkern.kernels.linear import PackedWeight, linear_ref, pack_ref
from mtpkern.kernels.multi_head_projection import multi_head_projection_ref, residual_blocks_ref
from mtpkern.kernels.ngram import ngram_ref
from mtpkern.kernels.qkv_rope_cache import qkv_rope_cache_ref
from mtpkern.kernels.rms_norm import rms_norm_ref
from mtpkern.kernels.sample import SamplingRows, sample_ref
from mtpkern.kernels.verify_attention import verify_attention_ref
from mtpkern.kernels.window_slots import plan_ref
from mtpkern.ops.base import Ops, Projected, Withheld, positions_of

if TYPE_CHECKING:
    from mtpkern.cache import KVCache
    from mtpkern.config import ModelConfig


class Logits(NamedTuple):
    """`Projected` that holds everything."""

    logits: Tensor  # [B * T, 1 + H, V]

    def target(
        self,
        shape: tuple[int, int],
        lengths: Tensor,
        sampling: SamplingRows,
        withheld: Withheld | None = None,
    ) -> Tensor:
        own, positions = self.logits[:, 0].view(*shape, -1), positions_of(lengths, shape[1])
        if withheld is not None:
            early = positions < withheld.until[:, None]
            own = own.masked_fill(early[:, :, None] & withheld.tokens[:, None], float("-inf"))
        return sample_ref(own, positions, sampling)

    def largest(self, shape: tuple[int, int]) -> Tensor:
        return self.logits[:, 0].amax(-1).float().view(shape)

    def drafts(
        self, accepted: Tensor, count: int, lengths: Tensor, sampling: SamplingRows
    ) -> Tensor:
        batch, (rows, _, vocabulary) = len(accepted), self.logits.shape
        heads = self.logits[:, 1:].view(batch, rows // batch, -1, vocabulary)
        row = accepted.view(-1, 1, 1, 1).expand(-1, 1, count, vocabulary)
        logits = heads.gather(1, row)[:, 0]
        return sample_ref(logits, positions_of(lengths, count), sampling)

    def logprobs(self, target: Tensor) -> Tensor:
        # Row by row: a row's bits must not depend on how many rows stand beside it.
        rows = (row[0].float().log_softmax(-1) for row in self.logits)
        chosen = [row[i] for row, i in zip(rows, target.reshape(-1), strict=True)]
        return torch.stack(chosen).view(target.shape)


class Definitions(Ops):
    """The definitions."""

    host_may_read = True
    takes_quants = False
    row_dtype = None

    def pack(self, w: Tensor, bias: Tensor | None = None) -> PackedWeight:
        return pack_ref(w, bias)

    def pack_heads(self, heads: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> Any:
        return [[pack_ref(*block) for block in stack] for stack in heads]

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
        return linear_ref(x, w, residual=residual)

    def gate_up_silu(self, x: Tensor, norm_w: Tensor, eps: float, w: PackedWeight) -> Tensor:
        return gate_up_silu_ref(x, norm_w, eps, w)

    def plan(self, cache: KVCache, rows: int, config: ModelConfig) -> Any:
        return plan_ref(
            cache.lengths,
            rows,
            k_cache=cache.k,
            v_cache=cache.v,
            page_table=cache.page_table,
            cos_table=cache.cos,
            sin_table=cache.sin,
            group=config.num_heads // config.num_kv_heads,
            window=config.sliding_window,
        )

    def qkv_rope_cache(
        self,
        x: Tensor,
        norm_w: Tensor | None,
        eps: float,
        w: PackedWeight,
        k_pages: Tensor,
        v_pages: Tensor,
        plan: Any,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
    ) -> Tensor:
        norms = {"q_norm": q_norm, "k_norm": k_norm}
        return qkv_rope_cache_ref(x, norm_w, eps, w, k_pages, v_pages, plan, **norms)

    def verify_attention(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, plan: Any
    ) -> Tensor:
        return verify_attention_ref(q, k_pages, v_pages, page_table, plan)

    def project(
        self, hidden: Tensor, norm_w: Tensor, eps: float, vocabulary: PackedWeight, heads: Any
    ) -> tuple[Tensor, Projected]:
        normed, logits = multi_head_projection_ref(hidden, norm_w, eps, vocabulary, heads or ())
        return normed, Logits(logits)

    def parallel_heads(self, rows: Tensor, heads: Any) -> Tensor:
        return torch.stack([residual_blocks_ref(rows, stack) for stack in heads], 1)

    def choose(
        self,
        hidden: Tensor,
        vocabulary: PackedWeight,
        token_ids: Tensor,
        lengths: Tensor,
        draft: int,
        sampling: SamplingRows,
    ) -> tuple[Tensor, Tensor]:
        logits = linear_ref(hidden, vocabulary)
        token = sample_ref(logits[:, None], positions_of(lengths + draft, 1), sampling, token_ids)
        return token[:, 0], logits.float().log_softmax(-1).amax(-1).exp()

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
        self, tokens: Tensor, known: Tensor, drafts: int, size: int = 3
    ) -> tuple[Tensor, Tensor]:
        return ngram_ref(tokens, known, drafts, size)


DEFINITIONS = Definitions()
