"""Hydra (Ankner et al. 2024): small MLPs, each given all tokens drafted before its own.

    z = [h, e_{t+1}, ..., e_{t+i}];  x = R z + b + silu(W z + c), then x += silu(W' x + c');
    draft_i = argmax(V_i x + d_i)

h is the final hidden state, or in Hydra++ the output of one more decoder layer on it, the `prefix`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.cache import KVCache
from mtpkern.drafters.base import HEADS, DraftInput, Drafts, rows_at
from mtpkern.drafters.cached import CachedDrafter
from mtpkern.model import DecoderLayer, Llama
from mtpkern.ops.base import Ops, Packed


@dataclass(frozen=True)
class HydraHead:
    """Head i, counted from 0, whose input is the hidden state and i + 1 embeddings."""

    residual: Packed  # [E, (i + 2) * E], beside the first block
    blocks: Sequence[Packed]  # [E, (i + 2) * E], then [E, E] each
    vocabulary: Packed  # [V, E]


class HydraDrafter(CachedDrafter):
    """H heads, each of which drafts one token."""

    def __init__(
        self,
        heads: Sequence[HydraHead],
        token_ids: Tensor,
        prefix: tuple[DecoderLayer, Tensor] | None,
        trunk: Llama,
        cache: KVCache,
        ops: Ops,
    ):
        """token_ids [V] int64 are those of the vocabularies' rows; `prefix` is a layer and the norm
        [E] after it; `cache` has one layer."""
        super().__init__((trunk.config.num_layers,), trunk, cache, ops)
        self.hydra_heads, self.prefix, self.config = heads, prefix, trunk.config
        self.token_ids = token_ids

    def append(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        cache = self.cache.rows(sequence, sequence + 1)
        if self.prefix is not None:
            self.append_rows(features, self.prefix[0], 0, cache, self.config)
        cache.lengths.add_(len(features))

    def guess(self, step: DraftInput, count: int) -> Drafts:
        features, tokens, begin, last = self.pairs.take(step).tensors()
        batch, rows = features.shape[:2]
        if self.prefix is not None:
            (layer, norm), eps = self.prefix, self.config.rms_norm_eps
            cache = self.cache_at(step, begin)
            plan = self.ops.plan(cache, rows, self.config)
            x = features.reshape(batch * rows, -1)
            x = self.ops.layer(x, layer, eps, cache, 0, plan)
            features = self.ops.rms_norm(x, norm, eps).view(batch, rows, -1)
        bonus = tokens.gather(1, last[:, None])[:, 0]
        inputs = [rows_at(features, last), self.ops.embed(self.embedding, bonus)]
        drafts: list[Tensor] = []
        for i, head in enumerate(self.hydra_heads[:count]):
            z = torch.cat(inputs, -1)
            x = self.ops.linear(z, head.residual) + F.silu(self.ops.linear(z, head.blocks[0]))
            for block in head.blocks[1:]:
                x = x + F.silu(self.ops.linear(x, block))
            token, _ = self.ops.choose(
                x, head.vocabulary, self.token_ids, step.lengths, i, step.sampling
            )
            drafts.append(token)
            inputs.append(self.ops.embed(self.embedding, token))
        return Drafts(torch.stack(drafts, 1), HEADS, count)
