"""Sequential drafters: decoder layers fed with (hidden state, next token), with a K/V cache.

    MTP module   one layer, applied K times to what it drafted
    modules      one layer for each depth
    EAGLE-3      the layer attends with both halves of a pair side by side

Keys and values of committed positions lie in the pages of the trunk's; those of drafted ones are
overwritten when the real ones come.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtpkern.cache import KVCache
from mtpkern.config import ModelConfig
from mtpkern.drafters.base import HEADS, DraftInput, Drafts, rows_at
from mtpkern.model import DecoderLayer, Llama, decoder_layer, plan_window
from mtpkern.ops.base import Ops

# Committed pairs that a sequential head may put off, the next window included.
MAX_PENDING = 64
# How many of them are kept where the heads rest since their drafts do not pay.
LATEST = 16
# Rows that a GPU's attention takes at a time.
ATTENTION_ROWS = 64


class CachedDrafter(ABC):
    """What these drafters share: the cache, and committed positions that it lacks.

    Those wait in `pending` until a pass is wanted, so that a step whose drafts come from elsewhere
    costs next to nothing here: its rows are noted, and written behind the others when those are
    read.
    """

    parallel_heads: Any = None
    lookahead = 1  # a pair's second half

    def __init__(self, taps: Sequence[int], trunk: Llama, cache: KVCache, ops: Ops):
        """`cache` is the drafter's own, in the pages of the trunk's."""
        self.taps, self.ops, self.cache = tuple(taps), ops, cache
        self.embedding = trunk.embedding
        width = len(self.taps) * trunk.config.hidden_size
        # One more, for rows that were not committed.
        waiting = MAX_PENDING + 1 if ops.host_may_read else 0
        self.pending = torch.zeros(
            (cache.lengths.shape[0], waiting, width),
            dtype=ops.row_dtype or trunk.dtype,
            device=cache.lengths.device,
        )
        # Steps whose rows are not yet in `pending`, all of the same slots.
        self._noted: list[DraftInput] = []
        # Sequences of which steps went by that were not observed.
        self._missed: set[int] = set()

    def observe(self, step: DraftInput) -> None:
        if not self.ops.host_may_read:
            return  # every step guesses, and takes in its own pairs
        other = self._noted and (self._noted[0].first, len(self._noted[0].features))
        if other and other != (step.first, len(step.features)):
            self._write_pending()
        # Lengths go on changing, and the next step overwrites these features.
        noted = step._replace(lengths=step.lengths.clone(), features=step.features.clone())
        self._noted.append(noted)

    def _write_pending(self) -> None:
        """Put the committed ones of the noted rows behind the pending ones."""
        if not self._noted:
            return
        noted, self._noted = self._noted, []
        pending = self._pending_of(noted[0])
        index: list[int] = []
        lengths = self._cache_of(noted[0]).lengths
        for b, begin in enumerate(map(int, lengths)):
            if noted[0].first + b in self._missed:
                start = int(noted[0].lengths[b] - noted[0].advance[b])
                self._leave_gap(noted[0].first + b, start - begin)
                self._missed.remove(noted[0].first + b)
                begin = start
            row = b * pending.shape[1] - begin
            for step in noted:
                end, count = int(step.lengths[b]), int(step.advance[b])
                index += range(row + end - count, row + end)
                unwanted = row + begin + MAX_PENDING
                index += [unwanted] * (step.features.shape[1] - count)
        features = torch.cat([step.features for step in noted], 1).flatten(0, 1)
        pending.flatten(0, 1).index_copy_(0, torch.tensor(index), features)

    def keep_up(self, step: DraftInput) -> None:
        # Half of the room is for what is noted: rows of steps below a quarter, and one more step.
        if len(self._noted) * step.features.shape[1] < MAX_PENDING // 4:
            return
        self._write_pending()
        cache = self._cache_of(step)
        waiting = step.lengths - cache.lengths
        if bool(waiting.max() < MAX_PENDING // 2):
            return
        if not step.use_heads:
            for b, count in enumerate(waiting):
                self._give_up(step.first + b, int(count) - LATEST)
            return
        after = tokens_from(step, cache.lengths + 1, int(waiting.max()))
        for b, count in enumerate(waiting):
            if count > 0:
                self._take_in(step.first + b, self._pending_of(step)[b, :count], after[b, :count])

    def _give_up(self, sequence: int, count: int) -> None:
        """Leave a gap of zeros in place of the first `count` of a sequence's pending pairs. While
        heads rest, computing keys and values costs more than the better drafts later bring."""
        if count <= 0:
            return
        self._leave_gap(sequence, count)
        pending = self.pending[sequence]
        pending[:LATEST] = pending[count : count + LATEST].clone()

    def _leave_gap(self, sequence: int, count: int) -> None:
        """Go on behind `count` positions of zeros."""
        cache = self.cache
        begin, page_size = int(cache.lengths[sequence]), cache.k.shape[2]
        at = torch.arange(begin, begin + count)
        slots = cache.page_table[sequence].long()[at // page_size] * page_size + at % page_size
        for pages in (cache.k, cache.v):
            pages.flatten(1, 2).index_fill_(1, slots, 0)
        cache.lengths[sequence] += count

    def forget(self) -> None:
        self._noted.clear()
        self._missed = set(range(len(self.cache.lengths)))

    def _take_in(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        """Take in a sequence's pending pairs as prefill does: K and V alone, no guess."""
        self.prefill(sequence, features.clone(), tokens)

    @abstractmethod
    def prefill(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        """As `Drafter.prefill`."""

    def kept(self, sequence: int, length: int) -> int:
        return min(length, int(self.cache.lengths[sequence]))

    def resume(self, sequence: int, length: int) -> None:
        self._write_pending()
        self._missed.discard(sequence)
        self.cache.lengths[sequence] = length

    def reset(self, sequence: int) -> None:
        self._write_pending()
        self._missed.discard(sequence)
        # The page table is the trunk's.
        self.cache.lengths[sequence].zero_()

    def _cache_of(self, step: DraftInput) -> KVCache:
        """The cache of the sequences in this step, which may be fewer than there are slots."""
        return self.cache.rows(step.first, step.first + len(step.lengths))

    def _pending_of(self, step: DraftInput) -> Tensor:
        return self.pending[step.first : step.first + len(step.lengths)]

    def _committed(self, step: DraftInput) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The committed rows that the cache lacks: features [B, n, ...] and the tokens after them
        [B * n]; the slot of each sequence's first [B], and which of the n is its last [B]."""
        if not self.ops.host_may_read:
            # Steps without drafts leave gaps that nothing fills: poorer drafts, the same tokens.
            begin = step.lengths - step.advance
            return step.features, step.target.reshape(-1), begin, step.accepted
        self._write_pending()
        cache = self._cache_of(step)
        begin = cache.lengths.clone()
        waiting = (step.lengths - begin).clamp_(min=1)
        rows = int(waiting.max())
        after = tokens_from(step, begin + 1, rows)
        cache.lengths.copy_(step.lengths)
        return self._pending_of(step)[:, :rows], after.view(-1), begin, waiting - 1

    def _append(
        self, x: Tensor, layer: DecoderLayer, index: int, cache: KVCache, config: ModelConfig
    ) -> None:
        """Write K and V of one sequence's rows x [n, ...] behind the cache's lengths, no more."""
        plan = plan_window(cache, len(x), config, self.ops)
        norms = {"q_norm": layer.q_norm, "k_norm": layer.k_norm}
        k, v, eps = cache.k[index], cache.v[index], config.rms_norm_eps
        self.ops.qkv_rope_cache(x, layer.input_norm, eps, layer.qkv, k, v, plan, **norms)


def tokens_from(step: DraftInput, begin: Tensor, count: int) -> Tensor:
    """The `count` tokens of each sequence from begin [B] on: [B, count].

    A sequence that waits for fewer than another of its batch may end before: what is read there
    stands for nothing.
    """
    index = begin[:, None] + torch.arange(count, device=begin.device)
    return step.tokens.gather(1, index.clamp_(max=step.tokens.shape[1] - 1))


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
    # Variants of EAGLE-3.
    input_norm: Tensor | None = None  # [n*E], of what fc takes
    norm_before_residual: bool = False


class MtpDrafter(CachedDrafter):
    """Sequential head: row j pairs the features of token j with the embedding of token j + 1.

        x_j = P [norm(h_j), norm(e_{j+1})];  o_j = norm(layer(x_j));  draft = argmax(o_j V^T)

    h_j is a projection of the tapped states for committed rows, and o_{j-1} for drafted ones
    (DeepSeek-V3, section 2.2; features of several layers as in EAGLE-3, Li et al. 2025).
    """

    def __init__(self, weights: MtpWeights, trunk: Llama, cache: KVCache, ops: Ops):
        """`cache` has one layer."""
        super().__init__(weights.taps, trunk, cache, ops)
        self.weights = weights

    def prefill(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        cache = self.cache.rows(sequence, sequence + 1)
        # Only K and V are wanted, and those come from the layer's input.
        index = cache.lengths + torch.arange(len(tokens), device=tokens.device)
        _, x = self._join(self.weights, self._hidden(features), tokens, index)
        self._append(x, self.weights.layer, 0, cache, self.weights.config)
        cache.lengths.add_(len(tokens))

    def guess(self, step: DraftInput, count: int) -> Drafts:
        w, cache = self.weights, self._cache_of(step)
        features, after, begin, last = self._committed(step)
        batch, rows = features.shape[:2]
        index = None
        if w.zero_first:
            index = (begin[:, None] + torch.arange(rows, device=begin.device)).view(-1)
        hidden = self._hidden(features.reshape(batch * rows, -1))
        hidden = self.run_pairs(w, hidden, after, cache.at(begin), 0, rows, index)
        hidden = rows_at(hidden.view(batch, rows, -1), last)
        drafts: list[Tensor] = []
        chances: list[Tensor] = []
        for i in range(count):
            if i > 0:
                # A pass costs more than a draft is worth that hardly ever stands.
                if chances and bool((torch.stack(chances).prod(0) < step.min_probability).all()):
                    break
                ahead = step.lengths if i == 1 else step.lengths + (i - 1)
                hidden = self.run_pairs(w, hidden, drafts[-1], cache.at(ahead), 0, 1)
            token, probability = self.ops.choose(
                self._scored(hidden), w.vocabulary, w.token_ids, step.lengths, i, step.sampling
            )
            drafts.append(token)
            if probability is not None:
                chances.append(probability)
        meant = len(drafts)
        drafts += drafts[-1:] * (count - meant)
        chances += chances[-1:] * (count - meant)
        return Drafts(
            torch.stack(drafts, 1), HEADS, meant, torch.stack(chances, 1) if chances else None
        )

    def _hidden(self, features: Tensor) -> Tensor:
        w = self.weights
        if w.input_norm is not None:
            features = self.ops.rms_norm(features, w.input_norm, w.config.rms_norm_eps)
        return features if w.fc is None else self.ops.linear(features, w.fc)

    def _join(
        self, w: MtpWeights, hidden: Tensor, tokens: Tensor, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Join pairs: hidden [R, E] and tokens [R] -> the layer's x, and what it attends with.

        `index` [R] counts the pairs; None for drafted ones, of which none is the first.
        """
        eps, E = w.config.rms_norm_eps, hidden.shape[1]
        pair = hidden.new_empty(len(hidden), 2 * E)
        self.ops.rms_norm(hidden, w.hidden_norm, eps, out=pair[:, :E])
        self.ops.rms_norm(self.embedding, w.token_norm, eps, ids=tokens, out=pair[:, E:])
        if w.zero_first and index is not None:
            pair[:, E:] *= (index != 0)[:, None]
        x = self.ops.linear(pair, w.input_proj)
        return x, x

    def run_pairs(
        self,
        w: MtpWeights,
        hidden: Tensor,
        tokens: Tensor,
        cache: KVCache,
        index: int,
        rows: int,
        count: Tensor | None = None,
    ) -> Tensor:
        """One pass over `rows` pairs of each sequence, hidden [B*rows, E] and tokens [B*rows], with
        layer `index` of the cache -> what is paired next, where its token is drafted [B*rows, E].

        `count` is `_join`'s index.
        """
        if count is None:
            fused = self.ops.pair_layer(w, self.embedding, hidden, tokens, cache, index, rows)
            if fused is not None:
                return fused
        x, inputs = self._join(w, hidden, tokens, count)
        plan = plan_window(cache, rows, w.config, self.ops)
        eps = w.config.rms_norm_eps
        x = decoder_layer(x, w.layer, eps, cache, index, plan, self.ops, inputs=inputs)
        return self._paired_next(w, x)

    def _paired_next(self, w: MtpWeights, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, w.final_norm, w.config.rms_norm_eps)

    def _scored(self, hidden: Tensor) -> Tensor:
        """What the vocabulary is asked about, given what is paired next."""
        return hidden


class ModulesDrafter(MtpDrafter):
    """Sequential modules of their own for each of D depths (DeepSeek-V3, section 2.2).

        o^d_j = norm_d(layer_d(P_d [norm(o^{d-1}_j), norm(e_{j+1+d})])), o^{-1} = h;
        draft d = argmax(o^d V^T) at the last j

    Module d at pair j wants token j + 1 + d, which for the last D - 1 pairs is a draft: those pairs
    are taken in again in the next step, when their tokens are known.
    """

    def __init__(self, modules: Sequence[MtpWeights], trunk: Llama, cache: KVCache, ops: Ops):
        """`cache` has D layers."""
        super().__init__(modules[0], trunk, cache, ops)
        self.modules, self.open_pairs = modules, len(modules) - 1
        self.lookahead = len(modules)
        # Of each sequence's prompt, the tokens after pairs that are in `pending`.
        self.recent: dict[int, Tensor] = {}
        if not ops.host_may_read:  # nothing but the open pairs is put off
            slots, _, width = self.pending.shape
            self.pending = self.pending.new_zeros(slots, self.open_pairs, width)

    def prefill(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        cache = self.cache.rows(sequence, sequence + 1)
        known = torch.cat([self.recent.pop(sequence, tokens[:0]), tokens])
        features = torch.cat([self.pending[sequence, : len(known) - len(tokens)], features])
        rows = max(0, len(known) - self.open_pairs)
        most = max(1, rows) if self.ops.host_may_read else ATTENTION_ROWS
        for begin in range(0, rows, most):
            some = min(most, rows - begin)
            hidden = self._hidden(features[begin : begin + some])
            for d in range(len(self.modules)):
                after = known[begin + d : begin + d + some]
                hidden = self._run(d, hidden, after, cache, some)
            cache.lengths.add_(some)
        self.recent[sequence] = known[rows:]
        self.pending[sequence, : len(known) - rows] = features[rows:]

    def guess(self, step: DraftInput, count: int) -> Drafts:
        features, _, begin, last = self._committed(step)
        batch, rows = features.shape[:2]
        tokens = tokens_from(step, begin + 1, rows + self.open_pairs)
        hidden = self._hidden(features.reshape(batch * rows, -1))
        drafts: list[Tensor] = []
        for d in range(count):
            after = tokens[:, d : d + rows].reshape(-1)
            hidden = self._run(d, hidden, after, self._cache_of(step).at(begin), rows)
            w = self.modules[d]
            token, _ = self.ops.choose(
                rows_at(hidden.view(batch, rows, -1), last),
                w.vocabulary,
                w.token_ids,
                step.lengths,
                d,
                step.sampling,
            )
            drafts.append(token)
            if d < self.open_pairs:
                tokens.scatter_(1, (last + 1 + d)[:, None], token[:, None])
        # The last pairs stay open: their features move to the front.
        cache = self._cache_of(step)
        cache.lengths.sub_(self.open_pairs).copy_(torch.maximum(cache.lengths, begin))
        places = torch.arange(self.open_pairs, device=begin.device)
        place = (cache.lengths - begin)[:, None] + places
        pending = self._pending_of(step)
        # On a CPU those that were committed may be fewer than stay open.
        source = pending if self.ops.host_may_read else features
        kept = source.gather(1, place[:, :, None].expand(-1, -1, features.shape[2]))
        pending[:, : self.open_pairs] = kept
        return Drafts(torch.stack(drafts, 1), HEADS, count)

    def _committed(self, step: DraftInput) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.ops.host_may_read:
            return super()._committed(step)
        # The open pairs and the step's own, side by side, as many as there may be: what stands
        # behind a sequence's last one counts for nothing. Steps without drafts leave gaps.
        cache, own = self._cache_of(step), step.features
        ahead = step.lengths - step.advance
        begin = torch.maximum(torch.minimum(cache.lengths, ahead), ahead - self.open_pairs)
        waiting = ahead - begin
        place = waiting[:, None] + torch.arange(own.shape[1], device=begin.device)
        features = torch.cat([self._pending_of(step), own], 1)
        features.scatter_(1, place[:, :, None].expand_as(own), own)
        cache.lengths.copy_(step.lengths)
        after = tokens_from(step, begin + 1, features.shape[1])
        return features, after.view(-1), begin, waiting + step.accepted

    def reset(self, sequence: int) -> None:
        super().reset(sequence)
        self.recent.pop(sequence, None)

    def _take_in(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        self.recent.pop(sequence, None)  # those pairs are among the pending ones
        super()._take_in(sequence, features, tokens)

    def _run(self, d: int, hidden: Tensor, after: Tensor, cache: KVCache, rows: int) -> Tensor:
        """Module d over `rows` pairs of each sequence behind the cache's lengths -> o^d."""
        w = self.modules[d]
        count = None
        if w.zero_first:
            ahead = torch.arange(rows, device=after.device)
            count = (cache.lengths[:, None] + ahead).view(-1)
        return self.run_pairs(w, hidden, after, cache, d, rows, count)


class Eagle3Drafter(MtpDrafter):
    """EAGLE-3 (Li et al. 2025): the layer attends with both halves of a pair side by side, and goes
    on from what it makes before the norm.

        x_j = h_j;  inputs_j = [norm(e_{j+1}), norm(h_j)];  o_j = layer(x_j, inputs_j)
        draft = argmax(norm(o_j) V^T)

    x_j is norm(h_j) where the norm comes before the residual.
    """

    def _join(
        self, w: MtpWeights, hidden: Tensor, tokens: Tensor, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        eps, E = w.config.rms_norm_eps, hidden.shape[1]
        pair = hidden.new_empty(len(hidden), 2 * E)
        self.ops.rms_norm(self.embedding, w.token_norm, eps, ids=tokens, out=pair[:, :E])
        self.ops.rms_norm(hidden, w.hidden_norm, eps, out=pair[:, E:])
        return pair[:, E:].contiguous() if w.norm_before_residual else hidden, pair

    def _paired_next(self, w: MtpWeights, x: Tensor) -> Tensor:
        return x

    def _scored(self, hidden: Tensor) -> Tensor:
        w = self.weights
        return self.ops.rms_norm(hidden, w.final_norm, w.config.rms_norm_eps)
