"""What heads that attend share: a key/value cache of their own, and the pairs that it lacks.

The cache has the pages of the model's own. A head writes K and V for committed pairs and for its
own drafts after them; the next call overwrites the latter.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from mtpkern.cache import KVCache
from mtpkern.config import ModelConfig
from mtpkern.drafters.base import DraftInput, Drafts
from mtpkern.drafters.pairs import PendingPairs, StepPairs
from mtpkern.model import DecoderLayer, Llama
from mtpkern.ops.base import Ops, Packed


class CachedDrafter(ABC):
    """A drafter that appends pairs to a cache, and takes those that are missing when it drafts."""

    parallel_heads: Packed | None = None
    lookahead = 1  # a pair has the token after its own

    def __init__(
        self, taps: Sequence[int], trunk: Llama, cache: KVCache, ops: Ops, *, open_pairs: int = 0
    ):
        """`cache` is the drafter's own, with the pages of the trunk's; for `open_pairs` see
        pairs.py."""
        self.taps, self.ops, self.cache = tuple(taps), ops, cache
        self.embedding = trunk.embedding
        width, dtype = len(self.taps) * trunk.config.hidden_size, ops.row_dtype or trunk.dtype
        kind = PendingPairs if ops.host_may_read else StepPairs
        self.pairs: PendingPairs | StepPairs = kind(cache, width, dtype, open_pairs)

    @abstractmethod
    def append(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        """Write K and V of one sequence's next pairs, features [n, W] and tokens [n] int64, and
        advance the cache's length."""

    @abstractmethod
    def guess(self, step: DraftInput, count: int) -> Drafts:
        """As `Drafter.guess`."""

    def prefill(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        self.append(sequence, features, tokens)

    def observe(self, step: DraftInput) -> None:
        for sequence, features, tokens in self.pairs.observe(step):
            self.append(sequence, features, tokens)

    def mark_gap(self) -> None:
        self.pairs.mark_gap()

    def cached_length(self, sequence: int, length: int) -> int:
        return min(length, int(self.cache.lengths[sequence]))

    def reset(self, sequence: int, length: int = 0) -> None:
        self.pairs.reset(sequence, length)

    def cache_at(self, step: DraftInput, lengths: Tensor) -> KVCache:
        """The cache of this step's sequences, at other lengths [B]: its page table is the step's,
        which may have fewer rows and columns than the drafter's own."""
        return replace(self.cache, page_table=step.page_table, lengths=lengths)

    def append_rows(
        self, x: Tensor, layer: DecoderLayer, index: int, cache: KVCache, config: ModelConfig
    ) -> None:
        """Write K and V of one sequence's rows x [n, ...] at the cache's length, layer `index`,
        and compute nothing else."""
        plan = self.ops.plan(cache, len(x), config)
        norms = {"q_norm": layer.q_norm, "k_norm": layer.k_norm}
        k, v, eps = cache.k[index], cache.v[index], config.rms_norm_eps
        self.ops.qkv_rope_cache(x, layer.input_norm, eps, layer.qkv, k, v, plan, **norms)
