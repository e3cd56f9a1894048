"""Drafters of several heads, each for one token further ahead, with decoder layers or MLPs.

layers   H decoder layers in place of the trunk's last one
Hydra    small MLPs, each fed with the drafts before its own; perhaps one layer below them
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.cache import KVCache
from mtpkern.drafters.base import HEADS, DraftInput, Drafts, rows_at
from mtpkern.drafters.mtp import CachedDrafter
from mtpkern.kernels.sample import SamplingRows
from mtpkern.model import DecoderLayer, Llama, decoder_layer, plan_window
from mtpkern.ops.base import Ops


class LayersDrafter(CachedDrafter):
    """Parallel transformer layers (Gloeckle et al. 2024): head i is a layer in place of the trunk's
    last one, fed with the same states, and drafts through the trunk's vocabulary or a part of it.

        o_i = norm_i(layer_i(h_{L-1}));  draft_i = argmax(o_i V^T)
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        norms: Sequence[Tensor],
        vocabulary: Any,
        token_ids: Tensor,
        trunk: Llama,
        cache: KVCache,
        ops: Ops,
    ):
        """Layers and norms [E] of the heads 1..H; token_ids [Vd] are the vocabulary's rows; `cache`
        has H layers."""
        super().__init__((trunk.config.num_layers - 1,), trunk, cache, ops)
        self.layers, self.norms, self.config = layers, norms, trunk.config
        self.vocabulary, self.token_ids = vocabulary, token_ids

    def prefill(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        cache = self.cache.rows(sequence, sequence + 1)
        for i, layer in enumerate(self.layers):
            self._append(features, layer, i, cache, self.config)
        cache.lengths.add_(len(features))

    def guess(self, step: DraftInput, count: int) -> Drafts:
        features, _, begin, last = self._committed(step)
        batch, rows = features.shape[:2]
        x, eps = features.reshape(batch * rows, -1), self.config.rms_norm_eps
        cache = self._cache_of(step).at(begin)
        plan = plan_window(cache, rows, self.config, self.ops)
        ahead = []
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            # All of them run, whatever is wanted: their caches must not have gaps.
            out = decoder_layer(x, layer, eps, cache, i, plan, self.ops)
            if i < count:
                out = rows_at(out.view(batch, rows, -1), last)
                ahead.append(self.ops.rms_norm(out, norm, eps))
        # One read of the vocabulary for all heads.
        behind = step.lengths[:, None] + torch.arange(count, device=begin.device)
        sampling = SamplingRows(*(t.repeat_interleave(count) for t in step.sampling))
        hidden = torch.stack(ahead, 1).view(batch * count, -1)
        drafts, _ = self.ops.choose(
            hidden, self.vocabulary, self.token_ids, behind.view(-1), 0, sampling
        )
        return Drafts(drafts.view(batch, count), HEADS, count)


@dataclass(frozen=True)
class HydraHead:
    """Head i of Hydra: blocks, the first of which takes i + 1 embeddings beside the hidden state,
    and a vocabulary of its own."""

    residual: Any  # [E, (i + 2) * E], what the first block passes on
    blocks: Sequence[Any]  # of [E, (i + 2) * E], then [E, E]
    vocabulary: Any  # [V, E]


class HydraDrafter(CachedDrafter):
    """Hydra (Ankner et al. 2024): head i sees the hidden state and all tokens drafted before it.

        z = [h, e_{t+1}, ..., e_{t+i}];  x = R z + b + silu(W z + c), then x += silu(W' x + c');
        draft_i = argmax(V_i x + d_i)

    h is the final hidden state, or with a `prefix` layer (Hydra++) what that layer makes of it.
    """

    def __init__(
        self,
        heads: Sequence[HydraHead],
        token_ids: Tensor,
        prefix: tuple[DecoderLayer, Tensor] | None,
        trunk: Llama,
        cache: KVCache,
        ops: Ops,
    ):
        """token_ids [V] are the vocabularies' rows; `prefix` is a layer and the norm behind it;
        `cache` has one layer."""
        super().__init__((trunk.config.num_layers,), trunk, cache, ops)
        self.hydra_heads, self.prefix, self.config = heads, prefix, trunk.config
        self.token_ids = token_ids

    def prefill(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        cache = self.cache.rows(sequence, sequence + 1)
        if self.prefix is not None:
            self._append(features, self.prefix[0], 0, cache, self.config)
        cache.lengths.add_(len(features))

    def guess(self, step: DraftInput, count: int) -> Drafts:
        features, after, begin, last = self._committed(step)
        batch, rows = features.shape[:2]
        if self.prefix is not None:
            (layer, norm), eps = self.prefix, self.config.rms_norm_eps
            cache = self._cache_of(step).at(begin)
            plan = plan_window(cache, rows, self.config, self.ops)
            x = features.reshape(batch * rows, -1)
            x = decoder_layer(x, layer, eps, cache, 0, plan, self.ops)
            features = self.ops.rms_norm(x, norm, eps).view(batch, rows, -1)
        bonus = after.view(batch, rows).gather(1, last[:, None])[:, 0]
        known = [rows_at(features, last), self.ops.embed(self.embedding, bonus)]
        drafts: list[Tensor] = []
        for i, head in enumerate(self.hydra_heads[:count]):
            z = torch.cat(known, -1)
            x = self.ops.linear(z, head.residual) + F.silu(self.ops.linear(z, head.blocks[0]))
            for block in head.blocks[1:]:
                x = x + F.silu(self.ops.linear(x, block))
            token, _ = self.ops.choose(
                x, head.vocabulary, self.token_ids, step.lengths, i, step.sampling
            )
            drafts.append(token)
            known.append(self.ops.embed(self.embedding, token))
        return Drafts(torch.stack(drafts, 1), HEADS, count)
