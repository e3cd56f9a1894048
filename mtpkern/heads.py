"""Drafters: what guesses the next K tokens. A wrong guess costs time, never a token.

    parallel     Medusa: head i guesses token i + 1 from the same hidden state as the LM head,
                 through the LM head's vocabulary matrix or one of its own
    sequential   MTP module: one decoder layer fed with (hidden state, next token), applied K times
    n-gram       what followed the last occurrence of the sequence's own end
    both         the n-gram's copy where there is a match, else the heads

Every drafter is told of each step after it was committed, through one `DraftInput`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mtpkern.cache import KVCache
from mtpkern.config import ModelConfig
from mtpkern.model import DecoderLayer, Llama, decoder_layer, plan_window
from mtpkern.ops import Ops, Projected

# Where a step's drafts came from; statistics are kept per source.
SOURCES = ("none", "heads", "ngram")
NONE, HEADS, NGRAM = range(3)


class DraftInput(NamedTuple):
    """One committed step, as a drafter sees it. n is the number of taps."""

    features: Tensor  # [B, T, n*E], the tapped hidden states of the window's rows
    projected: Projected  # what the LM head and the parallel heads say of those rows
    target: Tensor  # [B, T] int64, the model's choices: the tokens after those rows, as accepted
    tokens: Tensor  # [B, max_length + ...] int64, committed ones, then garbage
    lengths: Tensor  # [B] int64, after the commit: tokens[b, lengths[b]] is the bonus token
    accepted: Tensor  # [B] int64
    advance: Tensor  # [B] int64, accepted + 1, or 0 for a finished sequence
    sampling: Any  # SamplingRows


class Drafts(NamedTuple):
    """Guesses: tokens [B, K] int64, of which the first length[b] are meant, the others fillers."""

    tokens: Tensor
    source: Tensor | int  # [B] int64, an index into SOURCES; one number: the same in all
    length: Tensor | int  # [B] int64, 0..K


class Drafter(Protocol):
    """What a decode step needs of a drafter. `taps` are layers counted from 1; L is post-norm.

    `heads` are parallel heads as `ops.pack_heads` made them, or None: they share the step's one
    read of the vocabulary.
    """

    taps: tuple[int, ...]
    heads: Any

    def prefill(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        """Take in the next pairs of a prompt: features [n, ...] and the tokens [n] after them."""

    def observe(self, step: DraftInput) -> None:
        """Take in a committed step, whether or not a guess is wanted after it."""

    def is_due(self, step: DraftInput) -> bool:
        """Whether `guess` must run now, since no further step could be taken in before it."""

    def guess(self, step: DraftInput, count: int) -> Drafts:
        """Guess the `count` tokens after the bonus token of each sequence."""

    def reset(self, sequence: int) -> None:
        """Forget a sequence, so that its slot can serve another."""


class NoDrafter:
    """Drafts nothing: plain decoding is K = 0, and fillers before there is anything better."""

    taps: tuple[int, ...] = ()
    heads: Any = None

    def prefill(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        pass

    def observe(self, step: DraftInput) -> None:
        pass

    def is_due(self, step: DraftInput) -> bool:
        return False

    def guess(self, step: DraftInput, count: int) -> Drafts:
        return Drafts(step.accepted.new_zeros(1, 1).expand(len(step.accepted), count), NONE, 0)

    def reset(self, sequence: int) -> None:
        pass


class NgramDrafter(NoDrafter):
    """Copies what followed the last earlier occurrence of the last `size` tokens."""

    def __init__(self, ops: Ops, size: int = 3):
        self.ops, self.size = ops, size

    def guess(self, step: DraftInput, count: int) -> Drafts:
        drafts, found = self.ops.ngram(step.tokens, step.lengths + 1, count, self.size)
        return Drafts(drafts, found * NGRAM, found * count)


class MedusaDrafter(NoDrafter):
    """Parallel heads: residual blocks on the final hidden state, through the model's own LM head.

    Their logits come with the step's one read of the vocabulary matrix. Cai et al. 2024.
    """

    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], ops: Ops):
        heads, depth = config["num_heads"], config["num_layers"]
        self.heads = ops.pack_heads(
            [
                [
                    (tensors[f"{h}.{d}.linear.weight"], tensors[f"{h}.{d}.linear.bias"])
                    for d in range(depth)
                ]
                for h in range(heads)
            ]
        )

    def guess(self, step: DraftInput, count: int) -> Drafts:
        drafts = step.projected.drafts(step.accepted, count, step.lengths, step.sampling)
        return Drafts(drafts, HEADS, count)


class OwnVocabularyDrafter(NoDrafter):
    """Parallel heads with vocabulary matrices of their own, as Medusa was published.

    Each is read once a step, for the row behind which drafts are wanted. Cai et al. 2024.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], layers: int, ops: Ops
    ):
        """`layers` is how many the trunk has: the heads take what comes out of its final norm."""
        self.ops, self.taps = ops, (layers,)
        self.blocks = MedusaDrafter(tensors, config, ops).heads
        self.vocabularies = [
            ops.pack(tensors[f"{h}.vocabulary.weight"]) for h in range(config["num_heads"])
        ]
        first = self.vocabularies[0]
        self.token_ids = torch.arange(first.out_features, device=tensors["0.0.linear.bias"].device)

    def guess(self, step: DraftInput, count: int) -> Drafts:
        hidden = self.ops.parallel_heads(_rows_at(step.features, step.accepted), self.blocks)
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


def _rows_at(rows: Tensor, at: Tensor) -> Tensor:
    """Row at[b] of each sequence: rows [B, T, E], at [B] -> [B, E]."""
    return rows.gather(1, at.view(-1, 1, 1).expand(-1, 1, rows.shape[2]))[:, 0]


@dataclass(frozen=True)
class MtpWeights:
    """A sequential MTP module: its weights, and the settings of its one decoder layer."""

    taps: tuple[int, ...]
    fc: Any | None  # [E, n*E]; None where one layer is tapped
    hidden_norm: Tensor  # [E]
    token_norm: Tensor  # [E]
    input_proj: Any | None  # [E, 2E], input order (hidden, embedding); None in EAGLE-3
    layer: DecoderLayer
    final_norm: Tensor  # [E]
    vocabulary: Any  # [Vd, E]
    token_ids: Tensor  # [Vd] int64
    config: ModelConfig  # the trunk's, with the layer's head counts and sizes
    zero_first: bool = False  # the first pair of a sequence has an embedding of zeros (MiMo)


class MtpDrafter:
    """Sequential head: row j pairs the features of token j with the embedding of token j + 1.

        x_j = P [norm(h_j), norm(e_{j+1})];  o_j = norm(layer(x_j));  draft = argmax(o_j V^T)

    h_j is a projection of the tapped states for committed rows, and o_{j-1} for drafted ones
    (DeepSeek-V3, section 2.2; features of several layers as in EAGLE-3, Li et al. 2025). Its own
    K/V cache holds the committed pairs; drafted ones are overwritten when the real ones come.
    Committed pairs wait in `pending` until a pass is wanted, so that a step whose drafts come from
    elsewhere costs nothing here.
    """

    heads: Any = None

    def __init__(self, weights: MtpWeights, trunk: Llama, cache: KVCache, ops: Ops):
        """`cache` is the head's own, of one layer, in the pages of the trunk's."""
        self.weights, self.ops, self.cache = weights, ops, cache
        self.embedding, self.taps = trunk.embedding, weights.taps
        width = len(weights.taps) * trunk.config.hidden_size
        batch, embedding = cache.lengths.shape[0], trunk.embedding
        waiting = MAX_PENDING if ops.branches else 0
        self.pending = embedding.new_zeros(batch, waiting, width)

    def prefill(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        cache = self.cache.rows(sequence, sequence + 1)
        plan = plan_window(cache, features.shape[0], self.weights.config, self.ops)
        # Only K and V are wanted, and those come from the layer's input.
        index = cache.lengths + torch.arange(len(tokens), device=tokens.device)
        _, x = self._join(self._hidden(features), tokens, index)
        layer, eps = self.weights.layer, self.weights.config.rms_norm_eps
        pages, norms = (cache.k[0], cache.v[0]), (layer.q_norm, layer.k_norm)
        self.ops.qkv_rope_cache(
            x, layer.input_norm, eps, layer.qkv, *pages, plan, q_norm=norms[0], k_norm=norms[1]
        )
        cache.lengths.add_(features.shape[0])

    def observe(self, step: DraftInput) -> None:
        if not self.ops.branches:
            return  # every step guesses, and takes in its own pairs
        # Behind the pending rows; those that were not committed do not count.
        begin = step.lengths - step.advance - self._cache_of(step).lengths
        index = begin[:, None] + torch.arange(step.features.shape[1])
        pending = self.pending[: len(begin)]
        pending.scatter_(1, index[:, :, None].expand_as(step.features), step.features)

    def is_due(self, step: DraftInput) -> bool:
        if not self.ops.branches:
            return True
        waiting = (step.lengths - self._cache_of(step).lengths).max()
        return bool(waiting > MAX_PENDING - step.features.shape[1])

    def guess(self, step: DraftInput, count: int) -> Drafts:
        w, cache = self.weights, self._cache_of(step)
        features, after, begin, last = self._committed(step)
        batch, rows = features.shape[:2]
        index = None
        if w.zero_first:
            index = (begin[:, None] + torch.arange(rows, device=begin.device)).view(-1)
        pairs = self._join(self._hidden(features.reshape(batch * rows, -1)), after, index)
        hidden = self._layer(*pairs, cache.at(begin), rows)
        hidden = _rows_at(hidden.view(batch, rows, -1), last)
        drafts: list[Tensor] = []
        confidence: Tensor | None = None
        for i in range(count):
            if i > 0:
                # A pass costs more than a draft is worth that hardly ever stands.
                if confidence is not None and bool((confidence < MIN_CONFIDENCE).all()):
                    break
                ahead = step.lengths if i == 1 else step.lengths + (i - 1)
                hidden = self._layer(*self._join(hidden, drafts[-1]), cache.at(ahead), 1)
            token, probability = self.ops.choose(
                self._scored(hidden), w.vocabulary, w.token_ids, step.lengths, i, step.sampling
            )
            drafts.append(token)
            if probability is not None:
                confidence = probability if confidence is None else confidence * probability
        meant = len(drafts)
        drafts += drafts[-1:] * (count - meant)
        return Drafts(torch.stack(drafts, 1), HEADS, meant)

    def _committed(self, step: DraftInput) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The committed pairs that the cache lacks: features [B, n, ...] and the tokens after them
        [B * n]; the slot of each sequence's first [B], and which of the n is its last [B]."""
        if not self.ops.branches:
            # Steps without drafts leave gaps that nothing fills: poorer drafts, the same tokens.
            begin = step.lengths - step.advance
            return step.features, step.target.reshape(-1), begin, step.accepted
        cache = self._cache_of(step)
        begin = cache.lengths.clone()
        waiting = (step.lengths - begin).clamp_(min=1)
        rows = int(waiting.max())
        after = step.tokens.gather(1, begin[:, None] + 1 + torch.arange(rows))
        cache.lengths.copy_(step.lengths)
        return self.pending[: len(waiting), :rows], after.view(-1), begin, waiting - 1

    def reset(self, sequence: int) -> None:
        # The page table is the trunk's.
        self.cache.lengths[sequence].zero_()

    def _cache_of(self, step: DraftInput) -> KVCache:
        """The cache of the sequences in this step, which may be fewer than there are slots."""
        return self.cache.rows(0, step.lengths.shape[0])

    def _hidden(self, features: Tensor) -> Tensor:
        fc = self.weights.fc
        return features if fc is None else self.ops.linear(features, fc)

    def _join(
        self, hidden: Tensor, tokens: Tensor, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Join pairs: hidden [R, E] and tokens [R] -> the layer's x, and what it attends with.

        `index` [R] counts the pairs; None for drafted ones, of which none is the first.
        """
        w, eps, E = self.weights, self.weights.config.rms_norm_eps, hidden.shape[1]
        pair = hidden.new_empty(len(hidden), 2 * E)
        self.ops.rms_norm(hidden, w.hidden_norm, eps, out=pair[:, :E])
        self.ops.rms_norm(self.embedding, w.token_norm, eps, ids=tokens, out=pair[:, E:])
        if w.zero_first and index is not None:
            pair[:, E:] *= (index != 0)[:, None]
        x = self.ops.linear(pair, w.input_proj)
        return x, x

    def _layer(self, x: Tensor, inputs: Tensor, cache: KVCache, rows: int) -> Tensor:
        """Run joined pairs -> what is paired next, where its token is drafted."""
        x = self._block(x, inputs, cache, rows)
        return self.ops.rms_norm(x, self.weights.final_norm, self.weights.config.rms_norm_eps)

    def _scored(self, hidden: Tensor) -> Tensor:
        """What the vocabulary is asked about, given what is paired next."""
        return hidden

    def _block(self, x: Tensor, inputs: Tensor, cache: KVCache, rows: int) -> Tensor:
        w = self.weights
        plan = plan_window(cache, rows, w.config, self.ops)
        eps = w.config.rms_norm_eps
        return decoder_layer(x, w.layer, eps, cache, 0, plan, self.ops, inputs=inputs)


class Eagle3Drafter(MtpDrafter):
    """EAGLE-3 (Li et al. 2025): the layer attends with both halves of a pair side by side, and goes
    on from what it makes before the norm.

        x_j = h_j;  inputs_j = [norm(e_{j+1}), norm(h_j)];  o_j = layer(x_j, inputs_j)
        draft = argmax(norm(o_j) V^T)
    """

    def _join(
        self, hidden: Tensor, tokens: Tensor, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        w, eps, E = self.weights, self.weights.config.rms_norm_eps, hidden.shape[1]
        pair = hidden.new_empty(len(hidden), 2 * E)
        self.ops.rms_norm(self.embedding, w.token_norm, eps, ids=tokens, out=pair[:, :E])
        self.ops.rms_norm(hidden, w.hidden_norm, eps, out=pair[:, E:])
        return hidden, pair

    def _layer(self, x: Tensor, inputs: Tensor, cache: KVCache, rows: int) -> Tensor:
        return self._block(x, inputs, cache, rows)

    def _scored(self, hidden: Tensor) -> Tensor:
        w = self.weights
        return self.ops.rms_norm(hidden, w.final_norm, w.config.rms_norm_eps)


# A sequential head goes on while the product of its drafts' probabilities is at least this.
MIN_CONFIDENCE = 0.1

# Committed pairs that a sequential head may put off: more are taken in whether needed or not.
MAX_PENDING = 64


class CompanionDrafter:
    """The n-gram's copy for sequences that have a match, the heads' guesses for the others.

    Where every sequence has a match, the heads are skipped, which is where the time is.
    """

    def __init__(self, ngram: NgramDrafter, drafter: Drafter):
        self.ngram, self.drafter, self.ops = ngram, drafter, ngram.ops
        self.taps, self.heads = drafter.taps, drafter.heads

    def prefill(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        self.drafter.prefill(sequence, features, tokens)

    def observe(self, step: DraftInput) -> None:
        self.drafter.observe(step)

    def is_due(self, step: DraftInput) -> bool:
        return self.drafter.is_due(step)

    def guess(self, step: DraftInput, count: int) -> Drafts:
        copied = self.ngram.guess(step, count)
        found = torch.as_tensor(copied.source) == NGRAM
        if self.ops.branches and bool((found | (step.advance == 0)).all()):
            if not self.drafter.is_due(step):
                return copied
        guessed = self.drafter.guess(step, count)
        return Drafts(
            torch.where(found[:, None], copied.tokens, guessed.tokens),
            torch.where(found, copied.source, guessed.source),
            torch.where(found, copied.length, guessed.length),
        )

    def reset(self, sequence: int) -> None:
        self.drafter.reset(sequence)
