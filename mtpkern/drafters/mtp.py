"""A sequential MTP head: one decoder layer, applied K times, each time to its own last draft.

    x_j = P [norm(h_j), norm(e_{j+1})];  o_j = norm(layer(x_j));  draft = argmax(o_j V^T)

h_j are the model's hidden states at token j, e_{j+1} is the embedding of the token after it. For
drafted tokens h_j is o_{j-1}. (DeepSeek-V3, section 2.2; states of several layers as in EAGLE-3, Li
et al. 2025.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtpkern.cache import KVCache
from mtpkern.config import ModelConfig
from mtpkern.drafters.base import HEADS, DraftInput, Drafts, rows_at
from mtpkern.drafters.cached import CachedDrafter
from mtpkern.model import DecoderLayer, Llama
from mtpkern.ops.base import Ops, Packed


@dataclass(frozen=True)
class MtpWeights:
    """A sequential module: its weights, and the settings of its one decoder layer.

    n is the number of layers that it taps, Vd the size of the vocabulary that it drafts from.
    """

    taps: tuple[int, ...]
    fc: Packed | None  # [E, n*E]; None if one layer is tapped
    hidden_norm: Tensor  # [E]
    token_norm: Tensor  # [E]
    input_proj: (
        Packed | None
    )  # [E, 2E], for (hidden state, embedding) in this order; None in EAGLE-3
    layer: DecoderLayer
    final_norm: Tensor  # [E]
    vocabulary: Packed  # [Vd, E]
    token_ids: Tensor  # [Vd] int64
    config: ModelConfig  # the trunk's, with the layer's head counts and sizes
    zero_first: bool = False  # the first pair of a sequence has an embedding of zeros (MiMo)
    # Variants of EAGLE-3.
    input_norm: Tensor | None = None  # [n*E], applied before fc
    norm_before_residual: bool = False


class MtpDrafter(CachedDrafter):
    """One module for all depths."""

    def __init__(
        self, weights: MtpWeights, trunk: Llama, cache: KVCache, ops: Ops, *, open_pairs: int = 0
    ):
        """`cache` has one layer."""
        super().__init__(weights.taps, trunk, cache, ops, open_pairs=open_pairs)
        self.weights = weights

    def append(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        cache = self.cache.rows(sequence, sequence + 1)
        # K and V follow from the layer's input alone.
        index = cache.lengths + torch.arange(len(tokens), device=tokens.device)
        _, x = self._join(self.weights, self.project(features), tokens, index)
        self.append_rows(x, self.weights.layer, 0, cache, self.weights.config)
        cache.lengths.add_(len(tokens))

    def guess(self, step: DraftInput, count: int) -> Drafts:
        w = self.weights
        pairs = self.pairs.take(step)
        if not w.zero_first:
            chain = self.ops.draft_chain(w, self.embedding, self.cache, pairs, step, count)
            if chain is not None:
                drafted, num_proposed, estimates = chain
                return Drafts(drafted, HEADS, num_proposed, estimates)
        features, tokens, begin, last = pairs.tensors()
        batch, rows = features.shape[:2]
        index = None
        if w.zero_first:
            index = (begin[:, None] + torch.arange(rows, device=begin.device)).view(-1)
        hidden = self.project(features.reshape(batch * rows, -1))
        cache = self.cache_at(step, begin)
        hidden = self.run_pairs(w, hidden, tokens.reshape(-1), cache, 0, rows, index)
        hidden = rows_at(hidden.view(batch, rows, -1), last)
        drafts: list[Tensor] = []
        probabilities: list[Tensor] = []
        for i in range(count):
            if i > 0:
                # Another pass costs more than a draft that is hardly ever accepted brings.
                if probabilities:
                    joint = torch.stack(probabilities).prod(0)
                    if bool((joint < step.min_probability).all()):
                        break
                at = step.lengths if i == 1 else step.lengths + (i - 1)
                hidden = self.run_pairs(w, hidden, drafts[-1], cache.at(at), 0, 1)
            token, probability = self.ops.choose(
                self._to_score(hidden), w.vocabulary, w.token_ids, step.lengths, i, step.sampling
            )
            drafts.append(token)
            if probability is not None:
                probabilities.append(probability)
        num_proposed = len(drafts)
        drafts += drafts[-1:] * (count - num_proposed)
        probabilities += probabilities[-1:] * (count - num_proposed)
        return Drafts(
            torch.stack(drafts, 1),
            HEADS,
            num_proposed,
            torch.stack(probabilities, 1) if probabilities else None,
        )

    def project(self, features: Tensor) -> Tensor:
        """The tapped hidden states as one: features [R, n*E] -> [R, E]."""
        w = self.weights
        if w.input_norm is not None:
            features = self.ops.rms_norm(features, w.input_norm, w.config.rms_norm_eps)
        return features if w.fc is None else self.ops.linear(features, w.fc)

    def run_pairs(
        self,
        w: MtpWeights,
        hidden: Tensor,
        tokens: Tensor,
        cache: KVCache,
        layer: int,
        rows: int,
        index: Tensor | None = None,
    ) -> Tensor:
        """One pass over `rows` pairs of each sequence, hidden [B*rows, E] and tokens [B*rows], at
        the cache's lengths, in its layer `layer` -> o [B*rows, E], the next pairs' hidden states.

        index [B*rows] is each pair's position, for modules with `zero_first`; None if no pair is a
        sequence's first.
        """
        if index is None:
            fused = self.ops.pair_layer(w, self.embedding, hidden, tokens, cache, layer, rows)
            if fused is not None:
                return fused
        x, inputs = self._join(w, hidden, tokens, index)
        plan = self.ops.plan(cache, rows, w.config)
        eps = w.config.rms_norm_eps
        x = self.ops.layer(x, w.layer, eps, cache, layer, plan, inputs=inputs)
        return self._output(w, x)

    def _join(
        self, w: MtpWeights, hidden: Tensor, tokens: Tensor, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pairs of hidden [R, E] and tokens [R] -> the layer's residual input, and what its Q, K
        and V are made of; index [R] as in `run_pairs`."""
        eps, E = w.config.rms_norm_eps, hidden.shape[1]
        pair = hidden.new_empty(len(hidden), 2 * E)
        self.ops.rms_norm(hidden, w.hidden_norm, eps, out=pair[:, :E])
        self.ops.rms_norm(self.embedding, w.token_norm, eps, ids=tokens, out=pair[:, E:])
        if w.zero_first and index is not None:
            pair[:, E:] *= (index != 0)[:, None]
        x = self.ops.linear(pair, w.input_proj)
        return x, x

    def _output(self, w: MtpWeights, x: Tensor) -> Tensor:
        """The layer's output x [R, E] -> o [R, E]."""
        return self.ops.rms_norm(x, w.final_norm, w.config.rms_norm_eps)

    def _to_score(self, hidden: Tensor) -> Tensor:
        """o [B, E] -> the rows to multiply with the vocabulary matrix."""
        return hidden
