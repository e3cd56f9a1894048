"""The paged KV cache: what was computed for committed tokens, and how it forgets the rest.

A step writes K and V for its whole window behind the committed length, and then commits a part of
it by advancing `lengths`. Rejected rows stay where they are and count for nothing: rolling back is
not advancing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KVCache:
    """K and V of L layers for B sequences, in pages.

    `lengths[b]` counts the committed tokens; slots behind it are free to write and never read as
    they are. One long page per sequence is a contiguous cache.
    """

    k: Tensor  # [L, pages, page_size, Hk, D]
    v: Tensor  # [L, pages, page_size, Hk, D]
    page_table: Tensor  # [B, max_pages] int32
    lengths: Tensor  # [B] int64
    cos: Tensor  # [capacity, D] float32
    sin: Tensor  # [capacity, D] float32, first half negated

    @classmethod
    def contiguous(
        cls,
        *,
        layers: int,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        inverse_frequencies: Tensor,
        rope_scaling: float,
        dtype: torch.dtype,
    ) -> "KVCache":
        """One page of `capacity` slots, a multiple of 64, for each of `batch` sequences.

        inverse_frequencies [D/2] are radians per position; rope_scaling multiplies cos and sin.
        """
        if capacity % 64:
            raise ValueError(f"capacity must be a multiple of 64, got {capacity}")
        shape = (layers, batch, capacity, kv_heads, head_dim)
        cos, sin = rotary_tables(inverse_frequencies, rope_scaling, capacity)
        return cls(
            k=torch.empty(shape, dtype=dtype),
            v=torch.empty(shape, dtype=dtype),
            page_table=torch.arange(batch, dtype=torch.int32)[:, None],
            lengths=torch.zeros(batch, dtype=torch.int64),
            cos=cos,
            sin=sin,
        )

    def rows(self, begin: int, end: int) -> "KVCache":
        """The same storage seen for the sequences begin..end-1 only."""
        return KVCache(
            self.k,
            self.v,
            self.page_table[begin:end],
            self.lengths[begin:end],
            self.cos,
            self.sin,
        )

    def at(self, lengths: Tensor) -> "KVCache":
        """The same storage seen at other lengths [B]; committing through this view is lost."""
        return KVCache(self.k, self.v, self.page_table, lengths, self.cos, self.sin)

    def commit(self, count: Tensor) -> None:
        """Keep the next count[b] written slots of each sequence; the others are rolled back."""
        self.lengths.add_(count)

    def reset(self, sequence: int) -> None:
        """Forget one sequence, so that its slots can serve another."""
        self.lengths[sequence] = 0


def rotary_tables(inverse_frequencies: Tensor, scaling: float, count: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [count, D] float32 of positions 0..count-1 (Su et al. 2021).

    The sines' first half is negated: x * cos + roll(x, D/2) * sin rotates the pairs (i, i + D/2).
    """
    angles = torch.arange(count, dtype=torch.float32)[:, None] * inverse_frequencies
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
