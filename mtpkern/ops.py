"""The operations of a step as one value: pass another `Ops` and the same step runs on other code.

TORCH holds the definitions, TRITON the kernels of a GPU; those of a CPU are in cpu_ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.kernels._launch import triton
from mtpkern.kernels.advance import Progress, advance, advance_ref
from mtpkern.kernels.gate_up_silu import gate_up_silu, gate_up_silu_ref
from mtpkern.kernels.linear import PackedWeight, linear, linear_ref, pack_ref
from mtpkern.kernels.medusa_blocks import medusa_blocks
from mtpkern.kernels.multi_head_projection import (
    ONE_READ_ROWS,
    Projection,
    multi_head_projection,
    multi_head_projection_ref,
    residual_blocks_ref,
)
from mtpkern.kernels.ngram import ngram, ngram_ref
from mtpkern.kernels.qkv_rope_cache import qkv_rope_cache, qkv_rope_cache_ref
from mtpkern.kernels.rms_norm import rms_norm, rms_norm_ref
from mtpkern.kernels.sample import SamplingRows, sample_ref, sampling_key
from mtpkern.kernels.step_plan import plan_ref, window_slots
from mtpkern.kernels.verify_attention import verify_attention, verify_attention_ref

__all__ = [
    "HAS_TRITON",
    "TORCH",
    "TRITON",
    "Ops",
    "Progress",
    "SamplingRows",
    "Withheld",
    "sampling_key",
    "with_pdl",
]

HAS_TRITON = triton is not None

# Row counts at which `linear_ref` multiplies a weight that was packed for the kernels.
KERNEL_ROWS = tuple(range(64, 513, 64))


class Withheld(NamedTuple):
    """Tokens that B sequences may not choose yet, since too few have come (min_tokens)."""

    tokens: Tensor  # [B, V] bool
    until: Tensor  # [B] int64, the index of the first token that may be any


class Projected(Protocol):
    """What a window's rows say about the next tokens: of the LM head and of H parallel heads.

    Row t of a sequence with `behind[b]` tokens before the window's first chooses the token at
    index behind[b] + 1 + t.
    """

    def target(
        self,
        shape: tuple[int, int],
        behind: Tensor,
        sampling: SamplingRows,
        withheld: Withheld | None = None,
    ) -> Tensor:
        """The model's own choices [B, T] = shape, int64."""

    def largest(self, shape: tuple[int, int]) -> Tensor:
        """The largest of each row's own logits, [B, T] = shape, float32; NaN if one of them is."""

    def drafts(
        self, accepted: Tensor, count: int, behind: Tensor, sampling: SamplingRows
    ) -> Tensor:
        """The first `count` heads' choices at row accepted[b] of each window: [B, count] int64."""

    def logprobs(self, target: Tensor) -> Tensor:
        """Log-probabilities [B, T] float32 of target under the model itself (temperature 1)."""


class Ops(NamedTuple):
    """One implementation of every operation; the references in kernels/ define what each does."""

    pack: Callable[..., Any]  # (w, bias) -> what linear, project and choose take
    pack_qkv: Callable[..., Any]  # (w, bias, D) -> what qkv_rope_cache takes
    pack_o: Callable[..., Any]  # (w, bias, D) -> what linear takes, after attention
    pack_gate_up: Callable[..., Any]  # (w, bias) -> what gate_up_silu takes
    pack_heads: Callable[..., Any]  # ([H][depth] of (w, bias)) -> what project takes
    # (w) -> what embed takes; where it is `pack`, a matrix that is tied is packed once.
    pack_embedding: Callable[..., Any]
    embed: Callable[..., Tensor]  # (embedding, ids [...]) -> rows [R, E]
    plan: Callable[..., Any]
    rms_norm: Callable[..., Tensor]
    qkv_rope_cache: Callable[..., Tensor]
    verify_attention: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    gate_up_silu: Callable[..., Tensor]
    # (model, window, cache, taps) -> `run_trunk` in one call, where there is such a thing.
    layers: Callable[..., tuple[Tensor, list[Tensor]]] | None
    # (model, window, cache, taps, heads) -> `verify` of decode.py in one call, likewise.
    forward: Callable[..., tuple[Tensor, Projected]] | None
    pair_layer: Callable[..., Tensor] | None  # `MtpDrafter.run_pairs`, likewise
    parallel_heads: Callable[..., Tensor]  # (rows [B, E], packed heads) -> [B, H, E]
    project: Callable[..., tuple[Tensor, Projected]]
    choose: Callable[..., tuple[Tensor, Tensor | None]]
    advance: Callable[..., tuple[Tensor, Tensor]]
    ngram: Callable[..., tuple[Tensor, Tensor]]
    # Whether the host may look at values inside a step: free on a CPU, never under a CUDA graph.
    branches: bool
    padded_dim: Callable[[int], int]  # D -> the head dimension of the cache
    rows: torch.dtype | None  # of rows; None: that of the weights
    # Whether `pack` takes Quants, weights in a file's own bits, as well as tensors.
    takes_quants: bool


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


def positions_of(behind: Tensor, count: int) -> Tensor:
    """Indices [B, count] of the tokens that the rows behind a window's first choose."""
    return behind[:, None] + 1 + torch.arange(count, device=behind.device)


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


def _as_it_is(w: Tensor) -> Tensor:
    return w


def _embed(embedding: Tensor, ids: Tensor) -> Tensor:
    return F.embedding(ids.reshape(-1), embedding)


def _unpadded(D: int) -> int:
    return D


def _pack_of_heads_torch(w: Tensor, bias: Tensor | None, head_dim: int) -> Any:
    return pack_ref(w, bias)


TORCH = Ops(
    pack=pack_ref,
    pack_qkv=_pack_of_heads_torch,
    pack_o=_pack_of_heads_torch,
    pack_gate_up=pack_ref,
    pack_heads=_pack_heads_torch,
    pack_embedding=_as_it_is,
    embed=_embed,
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
    branches=True,
    padded_dim=_unpadded,
    rows=None,
    takes_quants=False,
)


class Likeliest(NamedTuple):
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
        return normed, Likeliest(project(normed), H)
    if R * (1 + H) <= ONE_READ_ROWS:
        rows = medusa_blocks(normed, *heads, pdl=pdl).transpose(0, 1).reshape(-1, E)
        return normed, Likeliest(project(rows), H)

    def later(at: Tensor) -> Projection:
        return project(medusa_blocks(normed[at], *heads, pdl=pdl)[:, 1:].reshape(-1, E))

    return normed, Likeliest(project(normed), H, later)


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
        pack_embedding=_as_it_is,
        embed=_embed,
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
        branches=False,
        padded_dim=_unpadded,
        rows=None,
        takes_quants=False,
    )


TRITON = with_pdl(False)
