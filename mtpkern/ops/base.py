"""The operations of a step as one value: the same step runs on whichever `Ops` it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.kernels.sample import SamplingRows


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
    host_may_read: bool
    padded_dim: Callable[[int], int]  # D -> the head dimension of the cache
    rows: torch.dtype | None  # of rows; None: that of the weights
    # Whether `pack` takes Quants, weights in a file's own bits, as well as tensors.
    takes_quants: bool


def positions_of(behind: Tensor, count: int) -> Tensor:
    """Indices [B, count] of the tokens that the rows behind a window's first choose."""
    return behind[:, None] + 1 + torch.arange(count, device=behind.device)


def as_it_is(w: Tensor) -> Tensor:
    return w


def embed_rows(embedding: Tensor, ids: Tensor) -> Tensor:
    return F.embedding(ids.reshape(-1), embedding)


def unpadded(D: int) -> int:
    return D
