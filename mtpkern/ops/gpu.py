"""The Triton kernels as one `Ops`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtpkern.kernels._launch import triton
from mtpkern.kernels.advance import advance
from mtpkern.kernels.gate_up_silu import gate_up_silu
from mtpkern.kernels.linear import PackedWeight, linear
from mtpkern.kernels.medusa_blocks import medusa_blocks
from mtpkern.kernels.multi_head_projection import (
    ONE_READ_ROWS,
    Projection,
    multi_head_projection,
)
from mtpkern.kernels.ngram import ngram
from mtpkern.kernels.qkv_rope_cache import qkv_rope_cache
from mtpkern.kernels.rms_norm import rms_norm
from mtpkern.kernels.verify_attention import verify_attention
from mtpkern.kernels.window_slots import window_slots
from mtpkern.ops.base import Ops, Projected, SamplingRows, Withheld, as_it_is, embed_rows, unpadded

HAS_TRITON = triton is not None

# Row counts at which `linear_ref` multiplies a weight that was packed for the kernels.
KERNEL_ROWS = tuple(range(64, 513, 64))


class GreedyProjection(NamedTuple):
    """`Projected` that holds what a greedy step needs: no logits were written.

    The heads' rows stand behind the LM head's, or are projected by `later` once it is known which
    are wanted.
    """

    kept: Projection  # of (1 + H) * B * T rows, the LM head's first, then each head's; or of B * T
    heads: int  # H
    later: Callable[[Tensor], Projection] | None = None  # rows [B] -> of B * H rows

    def target(
        self,
        shape: tuple[int, int],
        behind: Tensor,
        sampling: SamplingRows,
        withheld: Withheld | None = None,
    ) -> Tensor:
        if withheld is not None:
            raise ValueError("withheld needs logits, which are not kept here")
        return self.kept.ids[: shape[0] * shape[1], 0].view(shape)

    def largest(self, shape: tuple[int, int]) -> Tensor:
        return self.kept.values[: shape[0] * shape[1], 0].view(shape)

    def drafts(
        self, accepted: Tensor, count: int, behind: Tensor, sampling: SamplingRows
    ) -> Tensor:
        batch = len(accepted)
        if self.later is not None:
            T = self.kept.ids.shape[0] // batch
            chosen = self.later(torch.arange(0, batch * T, T, device=accepted.device) + accepted)
            return chosen.ids[:, 0].view(batch, self.heads)[:, :count]
        # ids[h, b, accepted[b]] of [1 + H, B, T], without a row of its own for each head.
        ids = self.kept.ids[:, 0].view(1 + self.heads, batch, -1)[1 : 1 + count]
        row = accepted[None, :, None].expand(count, batch, 1)
        return ids.gather(2, row)[:, :, 0].t()

    def logprobs(self, target: Tensor) -> Tensor:
        rows = target.numel()
        chosen = self.kept.values[:rows, 0] - self.kept.logsumexp[:rows]
        return chosen.view(target.shape)


class DevicePlan(NamedTuple):
    """What the kernels share for a window; they read lengths and page table themselves."""

    slots: Tensor  # [B * T] int64
    positions: Tensor  # [B * T] int64
    cos: Tensor  # [capacity, D] float32
    sin: Tensor
    lengths: Tensor  # [B] int64
    window: int  # positions that a row sees; 0: all


def _plan_triton(
    lengths: Tensor,
    rows: int,
    *,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    group: int,
    window: int = 0,
    head_dim: int,
    pdl: bool = False,
) -> DevicePlan:
    slots, positions = window_slots(lengths, page_table, rows, k_cache.shape[2], pdl=pdl)
    return DevicePlan(slots, positions, cos_table, sin_table, lengths, window)


def _qkv_triton(
    x: Tensor,
    norm_w: Tensor,
    eps: float,
    w: PackedWeight,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: DevicePlan,
    **options: Any,
) -> Tensor:
    pages = (k_pages, v_pages)
    q = qkv_rope_cache(x, norm_w, eps, w.data, *pages, *plan[:4], bias=w.bias, **options)
    return q.view(len(plan.lengths), -1, *q.shape[1:])


def _attention_triton(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    plan: DevicePlan,
    **options: Any,
) -> Tensor:
    options["window"] = plan.window
    return verify_attention(q, k_pages, v_pages, page_table, plan.lengths, **options)


def _linear_triton(
    x: Tensor, w: PackedWeight, *, residual: Tensor | None = None, pdl: bool = False
) -> Tensor:
    return linear(x, w.data, w.bias, residual=residual, pdl=pdl)


def _gate_up_triton(
    x: Tensor, norm_w: Tensor, eps: float, w: PackedWeight, *, pdl: bool = False
) -> Tensor:
    return gate_up_silu(x, norm_w, eps, w.data, w.bias, pdl=pdl)


def _project_triton(
    hidden: Tensor, norm_w: Tensor, eps: float, vocabulary: PackedWeight, heads: Any, pdl: bool
) -> tuple[Tensor, Projected]:
    normed = rms_norm(hidden, norm_w, eps, pdl=pdl)
    (R, E), H = normed.shape, 0 if heads is None else len(heads[0])
    project = partial(multi_head_projection, vocabulary=vocabulary.data, pdl=pdl)
    if H == 0:
        return normed, GreedyProjection(project(normed), H)
    if R * (1 + H) <= ONE_READ_ROWS:
        rows = medusa_blocks(normed, *heads, pdl=pdl).transpose(0, 1).reshape(-1, E)
        return normed, GreedyProjection(project(rows), H)

    def later(at: Tensor) -> Projection:
        return project(medusa_blocks(normed[at], *heads, pdl=pdl)[:, 1:].reshape(-1, E))

    return normed, GreedyProjection(project(normed), H, later)


def _choose_triton(
    hidden: Tensor,
    vocabulary: PackedWeight,
    token_ids: Tensor,
    behind: Tensor,
    draft: int,
    sampling: SamplingRows,
    pdl: bool = False,
) -> tuple[Tensor, None]:
    # Nobody may branch on a probability here, so there is none.
    if vocabulary.bias is not None:
        return token_ids[linear(hidden, vocabulary.data, vocabulary.bias, pdl=pdl).argmax(-1)], None
    kept = multi_head_projection(hidden, vocabulary.data, token_ids=token_ids, pdl=pdl)
    return kept.ids[:, 0], None


def _parallel_heads_triton(rows: Tensor, heads: Any, pdl: bool = False) -> Tensor:
    return medusa_blocks(rows, *heads, pdl=pdl)[:, 1:]


def _pack_triton(w: Tensor, bias: Tensor | None = None) -> PackedWeight:
    """As it is, without the probes of `pack_ref`."""
    return PackedWeight(w, bias, w.shape[0], w.shape[1], False, KERNEL_ROWS)


def _pack_of_heads_triton(w: Tensor, bias: Tensor | None, head_dim: int) -> PackedWeight:
    return _pack_triton(w, bias)


def _pack_heads_triton(heads: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> Any:
    """(w [H, depth, E, E], bias [H, depth, E])"""
    stacked = ([torch.stack([block[i] for block in stack]) for stack in heads] for i in (0, 1))
    return tuple(torch.stack(tensors) for tensors in stacked)


def with_pdl(pdl: bool) -> Ops:
    """The kernels; `pdl` makes each a programmatic dependent launch (sm_90 and newer)."""
    return Ops(
        pack=_pack_triton,
        pack_qkv=_pack_of_heads_triton,
        pack_o=_pack_of_heads_triton,
        pack_gate_up=_pack_triton,
        pack_heads=_pack_heads_triton,
        pack_embedding=as_it_is,
        embed=embed_rows,
        plan=partial(_plan_triton, pdl=pdl),
        rms_norm=partial(rms_norm, pdl=pdl),
        qkv_rope_cache=partial(_qkv_triton, pdl=pdl),
        verify_attention=partial(_attention_triton, pdl=pdl),
        linear=partial(_linear_triton, pdl=pdl),
        gate_up_silu=partial(_gate_up_triton, pdl=pdl),
        layers=None,
        forward=None,
        pair_layer=None,
        parallel_heads=partial(_parallel_heads_triton, pdl=pdl),
        project=partial(_project_triton, pdl=pdl),
        choose=partial(_choose_triton, pdl=pdl),
        advance=partial(advance, pdl=pdl),
        ngram=partial(ngram, pdl=pdl),
        host_may_read=False,
        padded_dim=unpadded,
        rows=None,
        takes_quants=False,
    )


TRITON = with_pdl(False)
