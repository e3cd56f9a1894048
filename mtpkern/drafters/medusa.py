"""Medusa (Cai et al. 2024): head i predicts token i + 1 from the final hidden state alone.

    x = h;  x += silu(W_d x + b_d) for each block d;  draft_i = argmax(x V^T)

V is the model's own vocabulary matrix, or as published one for each head.
"""

from collections.abc import Mapping
from typing import Any

import torch

from mtpkern.drafters.base import HEADS, DraftInput, Drafts, NoDrafter, Tensors, rows_at
from mtpkern.ops.base import Ops


class MedusaDrafter(NoDrafter):
    """Heads that share the LM head's vocabulary matrix, and the step's one read of it."""

    def __init__(self, tensors: Tensors, config: Mapping[str, Any], ops: Ops):
        """`tensors` has {head}.{block}.linear.weight [E, E] and .bias [E], for `num_heads` heads of
        `num_layers` blocks."""
        heads, depth = config["num_heads"], config["num_layers"]
        self.parallel_heads = ops.pack_heads(
            [
                [
                    (tensors[f"{h}.{d}.linear.weight"], tensors[f"{h}.{d}.linear.bias"])
                    for d in range(depth)
                ]
                for h in range(heads)
            ]
        )

    def guess(self, step: DraftInput, count: int) -> Drafts:
        assert step.projected is not None, "parallel heads share the LM head's pass"
        drafts = step.projected.drafts(step.accepted, count, step.lengths, step.sampling)
        return Drafts(drafts, HEADS, count)


class OwnVocabularyDrafter(NoDrafter):
    """Heads with vocabulary matrices of their own, as Medusa was published.

    Each is read once per step, for the last accepted row of each sequence.
    """

    def __init__(self, tensors: Tensors, config: Mapping[str, Any], layers: int, ops: Ops):
        """`tensors` also has {head}.vocabulary.weight [V, E]; the model has `layers` layers, and
        the heads read the output of its final norm."""
        self.ops, self.taps = ops, (layers,)
        self.blocks = MedusaDrafter(tensors, config, ops).parallel_heads
        self.vocabularies = [
            ops.pack(tensors[f"{h}.vocabulary.weight"]) for h in range(config["num_heads"])
        ]
        rows = self.vocabularies[0].out_features
        self.token_ids = torch.arange(rows, device=tensors["0.0.linear.bias"].device)

    def guess(self, step: DraftInput, count: int) -> Drafts:
        hidden = self.ops.parallel_heads(rows_at(step.features, step.accepted), self.blocks)
        drafts = [
            self.ops.choose(
                hidden[:, h],
                self.vocabularies[h],
                self.token_ids,
                step.lengths,
                h,
                step.sampling,
            )[0]
            for h in range(count)
        ]
        return Drafts(torch.stack(drafts, 1), HEADS, count)
