"""Parallel decoder layers (Gloeckle et al. 2024), each in place of the model's last one.

    o_i = norm_i(layer_i(h_{L-1}));  draft_i = argmax(o_i V^T)

All of them read the states that the model's last layer reads, and draft through the model's
vocabulary matrix or some of its rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtpkern.cache import KVCache
from mtpkern.drafters.base import HEADS, DraftInput, Drafts, rows_at
from mtpkern.drafters.cached import CachedDrafter
from mtpkern.kernels.sample import SamplingRows
from mtpkern.model import DecoderLayer, Llama
from mtpkern.ops.base import Ops, Packed


class LayersDrafter(CachedDrafter):
    """H layers, each of which drafts one token."""

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        norms: Sequence[Tensor],
        vocabulary: Packed,
        token_ids: Tensor,
        trunk: Llama,
        cache: KVCache,
        ops: Ops,
    ):
        """A layer and a norm [E] for each head; vocabulary [Vd, E] and its token_ids [Vd] int64;
        `cache` has H layers."""
        super().__init__((trunk.config.num_layers - 1,), trunk, cache, ops)
        self.layers, self.norms, self.config = layers, norms, trunk.config
        self.vocabulary, self.token_ids = vocabulary, token_ids

    def append(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        cache = self.cache.rows(sequence, sequence + 1)
        for i, layer in enumerate(self.layers):
            self.append_rows(features, layer, i, cache, self.config)
        cache.lengths.add_(len(features))

    def guess(self, step: DraftInput, count: int) -> Drafts:
        features, _, begin, last = self.pairs.take(step).tensors()
        batch, rows = features.shape[:2]
        x, eps = features.reshape(batch * rows, -1), self.config.rms_norm_eps
        cache = self.cache_at(step, begin)
        plan = self.ops.plan(cache, rows, self.config)
        outputs = []
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            # All layers run, also beyond `count`: their caches must not have gaps.
            out = self.ops.layer(x, layer, eps, cache, i, plan)
            if i < count:
                out = rows_at(out.view(batch, rows, -1), last)
                outputs.append(self.ops.rms_norm(out, norm, eps))
        # One read of the vocabulary for all heads.
        lengths = step.lengths[:, None] + torch.arange(count, device=begin.device)
        sampling = SamplingRows(*(t.repeat_interleave(count) for t in step.sampling))
        hidden = torch.stack(outputs, 1).view(batch * count, -1)
        drafts, _ = self.ops.choose(
            hidden, self.vocabulary, self.token_ids, lengths.view(-1), 0, sampling
        )
        return Drafts(drafts.view(batch, count), HEADS, count)
