"""Sequential MTP modules, one for each of D depths (DeepSeek-V3, section 2.2).

    o^d_j = norm_d(layer_d(P_d [norm(o^{d-1}_j), norm(e_{j+1+d})])),  o^{-1} = h
    draft d = argmax(o^d V^T) at the last j

At pair j module d reads token j + 1 + d. For a sequence's last D - 1 pairs that is a draft, so
these pairs stay open: the next step runs them again, with the tokens that were committed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtpkern.cache import KVCache
from mtpkern.drafters.base import HEADS, DraftInput, Drafts, rows_at
from mtpkern.drafters.mtp import MtpDrafter, MtpWeights
from mtpkern.model import Llama
from mtpkern.ops.base import Ops

# Rows that a GPU's attention takes at a time.
ATTENTION_ROWS = 64


class ModulesDrafter(MtpDrafter):
    """D modules, each of which drafts one token."""

    def __init__(self, modules: Sequence[MtpWeights], trunk: Llama, cache: KVCache, ops: Ops):
        """`cache` has D layers."""
        super().__init__(modules[0], trunk, cache, ops, open_pairs=len(modules) - 1)
        self.modules, self.open_pairs = modules, len(modules) - 1
        self.lookahead = len(modules)
        self._max_rows = None if ops.host_may_read else ATTENTION_ROWS
        # The tokens of each prompt's open pairs, between its chunks.
        self._open_tokens: dict[int, Tensor] = {}

    def prefill(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        before = self._open_tokens.pop(sequence, tokens[:0])
        tokens = torch.cat([before, tokens])
        features = torch.cat([self.pairs.pending[sequence, : len(before)], features])
        self.append(sequence, features, tokens)
        self._open_tokens[sequence] = tokens[max(0, len(tokens) - self.open_pairs) :]

    def append(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        """Write all pairs but the last D - 1, which become the open ones."""
        cache = self.cache.rows(sequence, sequence + 1)
        count = max(0, len(tokens) - self.open_pairs)
        most = self._max_rows or max(1, count)
        for begin in range(0, count, most):
            rows = min(most, count - begin)
            hidden = self.project(features[begin : begin + rows])
            for d in range(len(self.modules)):
                after = tokens[begin + d : begin + d + rows]
                hidden = self._run(d, hidden, after, cache, rows)
            cache.lengths.add_(rows)
        self.pairs.pending[sequence, : len(tokens) - count] = features[count:]

    def guess(self, step: DraftInput, count: int) -> Drafts:
        features, tokens, begin, last = self.pairs.take(step).tensors()
        batch, rows = features.shape[:2]
        cache = self.cache_at(step, begin)
        hidden = self.project(features.reshape(batch * rows, -1))
        drafts: list[Tensor] = []
        for d in range(count):
            hidden = self._run(d, hidden, tokens[:, d : d + rows].reshape(-1), cache, rows)
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
        return Drafts(torch.stack(drafts, 1), HEADS, count)

    def reset(self, sequence: int, length: int = 0) -> None:
        super().reset(sequence, length)
        self._open_tokens.pop(sequence, None)

    def _run(self, d: int, hidden: Tensor, tokens: Tensor, cache: KVCache, rows: int) -> Tensor:
        """Module d over `rows` pairs of each sequence at the cache's lengths -> o^d [B*rows, E]."""
        w = self.modules[d]
        index = None
        if w.zero_first:
            positions = torch.arange(rows, device=tokens.device)
            index = (cache.lengths[:, None] + positions).view(-1)
        return self.run_pairs(w, hidden, tokens, cache, d, rows, index)
