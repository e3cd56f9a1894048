"""The definitions of the operations as one `Ops`, which tests compare the others with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtpkern.kernels.advance import advance_ref
from mtpkern.kernels.gate_up_silu import gate_up_silu_ref
from mtpkern.kernels.linear import linear_ref, pack_ref
from mtpkern.kernels.multi_head_projection import (
    multi_head_projection_ref,
    residual_blocks_ref,
)
from mtpkern.kernels.ngram import ngram_ref
from mtpkern.kernels.qkv_rope_cache import qkv_rope_cache_ref
from mtpkern.kernels.rms_norm import rms_norm_ref
from mtpkern.kernels.sample import sample_ref
from mtpkern.kernels.verify_attention import verify_attention_ref
from mtpkern.kernels.window_slots import plan_ref
from mtpkern.ops.base import (
    Ops,
    Projected,
    SamplingRows,
    Withheld,
    as_it_is,
    embed_rows,
    positions_of,
    unpadded,
)


class Logits(NamedTuple):
    """`Projected` that holds everything."""

    logits: Tensor  # [B * T, 1 + H, V]

    def target(
        self,
        shape: tuple[int, int],
        behind: Tensor,
        sampling: SamplingRows,
        withheld: Withheld | None = None,
    ) -> Tensor:
        own, positions = self.logits[:, 0].view(*shape, -1), positions_of(behind, shape[1])
        if withheld is not None:
            early = positions < withheld.until[:, None]
            own = own.masked_fill(early[:, :, None] & withheld.tokens[:, None], float("-inf"))
        return sample_ref(own, positions, sampling)

    def largest(self, shape: tuple[int, int]) -> Tensor:
        return self.logits[:, 0].amax(-1).float().view(shape)

    def drafts(
        self, accepted: Tensor, count: int, behind: Tensor, sampling: SamplingRows
    ) -> Tensor:
        batch, (rows, _, vocabulary) = len(accepted), self.logits.shape
        heads = self.logits[:, 1:].view(batch, rows // batch, -1, vocabulary)
        row = accepted.view(-1, 1, 1, 1).expand(-1, 1, count, vocabulary)
        logits = heads.gather(1, row)[:, 0]
        return sample_ref(logits, positions_of(behind, count), sampling)

    def logprobs(self, target: Tensor) -> Tensor:
        # Row by row: a row's bits must not depend on how many rows stand beside it.
        rows = (row[0].float().log_softmax(-1) for row in self.logits)
        chosen = [row[i] for row, i in zip(rows, target.reshape(-1), strict=True)]
        return torch.stack(chosen).view(target.shape)


def _project_torch(
    hidden: Tensor, norm_w: Tensor, eps: float, vocabulary: Any, heads: Any
) -> tuple[Tensor, Projected]:
    normed, logits = multi_head_projection_ref(hidden, norm_w, eps, vocabulary, heads or ())
    return normed, Logits(logits)


def _choose_torch(
    hidden: Tensor,
    vocabulary: Any,
    token_ids: Tensor,
    behind: Tensor,
    draft: int,
    sampling: SamplingRows,
) -> tuple[Tensor, Tensor]:
    """Rows [B, E] through a head's own vocabulary -> draft number `draft`, counted from 0, of each
    sequence [B], and the probability of the likeliest token there [B]."""
    logits = linear_ref(hidden, vocabulary)
    token = sample_ref(logits[:, None], positions_of(behind + draft, 1), sampling, token_ids)
    return token[:, 0], logits.float().log_softmax(-1).amax(-1).exp()


def _parallel_heads_torch(rows: Tensor, heads: Any) -> Tensor:
    return torch.stack([residual_blocks_ref(rows, stack) for stack in heads], 1)


def _pack_heads_torch(heads: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> Any:
    return [[pack_ref(*block) for block in stack] for stack in heads]


def _plan_torch(lengths: Tensor, rows: int, *, head_dim: int, **options: Any) -> Any:
    return plan_ref(lengths, rows, **options)


def _pack_of_heads_torch(w: Tensor, bias: Tensor | None, head_dim: int) -> Any:
    return pack_ref(w, bias)


TORCH = Ops(
    pack=pack_ref,
    pack_qkv=_pack_of_heads_torch,
    pack_o=_pack_of_heads_torch,
    pack_gate_up=pack_ref,
    pack_heads=_pack_heads_torch,
    pack_embedding=as_it_is,
    embed=embed_rows,
    plan=_plan_torch,
    rms_norm=rms_norm_ref,
    qkv_rope_cache=qkv_rope_cache_ref,
    verify_attention=verify_attention_ref,
    linear=linear_ref,
    gate_up_silu=gate_up_silu_ref,
    layers=None,
    forward=None,
    pair_layer=None,
    parallel_heads=_parallel_heads_torch,
    project=_project_torch,
    choose=_choose_torch,
    advance=advance_ref,
    ngram=ngram_ref,
    host_may_read=True,
    padded_dim=unpadded,
    rows=None,
    takes_quants=False,
)
