"""The paged KV cache, and the pool of its pages.

A step writes K and V for its whole window after the committed length, and then commits part of the
window by advancing `lengths`. Rejected rows stay where they are until they are overwritten: rolling
back is not advancing.

The layout, [pages, page_size, Hk, D] per layer, is also that of the kernels that append, attend or
move rows (qkv_rope_cache, rope_cache, verify_attention, kv_rollback; kernels/cpu/_attention.py and
its phases) and of ops/prefill.py. Slots are numbered page * page_size + offset.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The page of table entries where a sequence has no page. It may be written, and is never read.
SCRATCH = 0


@dataclass(frozen=True)
class KVCache:
    """K and V of L layers for B sequences, in pages; page 0 is a scratch page.

    `lengths[b]` counts the committed tokens. Slots past it are free to be written, and are not read
    before that. One long page per sequence is a contiguous cache.
    """

    k: Tensor  # [L, pages, page_size, Hk, D]
    v: Tensor  # [L, pages, page_size, Hk, D]
    page_table: Tensor  # [B, max_pages] int32
    lengths: Tensor  # [B] int64
    cos: Tensor  # [capacity, D] float32
    sin: Tensor  # [capacity, D] float32, first half negated
    padded_dim: Callable[[int], int]  # see `empty`

    @classmethod
    def empty(
        cls,
        *,
        layers: int,
        pages: int,
        page_size: int,
        page_table: Tensor,
        kv_heads: int,
        head_dim: int,
        inverse_frequencies: Tensor,
        rope_scaling: float,
        dtype: torch.dtype,
        padded_dim: Callable[[int], int] = lambda head_dim: head_dim,
    ) -> "KVCache":
        """A cache of `pages` pages of page_size slots, a multiple of 64, besides the scratch page.

        page_table [B, max_pages] int32 may be shared with another cache: a head's keys are then in
        the same pages as the trunk's. inverse_frequencies [D/2] are radians per position;
        rope_scaling multiplies cos and sin. A head has padded_dim(head_dim) numbers: each half ends
        in zeros, which are not rotated.
        """
        if page_size % 64:
            raise ValueError(f"page_size must be a multiple of 64, got {page_size}")
        device = page_table.device
        shape = (layers, 1 + pages, page_size, kv_heads, padded_dim(head_dim))
        missing = padded_dim(head_dim) // 2 - len(inverse_frequencies)
        inverse_frequencies = F.pad(inverse_frequencies, (0, missing))
        cos, sin = rotary_tables(inverse_frequencies, rope_scaling, page_table.shape[1] * page_size)
        # On a CPU, untouched pages take no memory, and attention skips slots past a row's position.
        # On a GPU, prefill reads whole pages under a mask: what they hold must be finite.
        make = torch.empty if device.type == "cpu" else torch.zeros
        return cls(
            k=make(shape, dtype=dtype, device=device),
            v=make(shape, dtype=dtype, device=device),
            page_table=page_table,
            lengths=torch.zeros(len(page_table), dtype=torch.int64, device=device),
            cos=cos.to(device),
            sin=sin.to(device),
            padded_dim=padded_dim,
        )

    def beside(
        self,
        *,
        kv_heads: int,
        head_dim: int,
        inverse_frequencies: Tensor,
        rope_scaling: float,
        layers: int = 1,
    ) -> "KVCache":
        """A cache for heads that attend: the same page table, with lengths of its own."""
        return KVCache.empty(
            layers=layers,
            pages=self.k.shape[1] - 1,
            page_size=self.k.shape[2],
            page_table=self.page_table,
            kv_heads=kv_heads,
            head_dim=head_dim,
            inverse_frequencies=inverse_frequencies,
            rope_scaling=rope_scaling,
            dtype=self.k.dtype,
            padded_dim=self.padded_dim,
        )

    def rows(self, begin: int, end: int) -> "KVCache":
        """A view of the sequences begin..end-1."""
        return KVCache(
            self.k,
            self.v,
            self.page_table[begin:end],
            self.lengths[begin:end],
            self.cos,
            self.sin,
            self.padded_dim,
        )

    def columns(self, pages: int) -> "KVCache":
        """A view for sequences of at most `pages` pages."""
        return replace(self, page_table=self.page_table[:, :pages])

    def at(self, lengths: Tensor) -> "KVCache":
        """A view with other lengths [B], through which nothing can be committed."""
        return replace(self, lengths=lengths)

    def assign(self, sequence: int, pages: Sequence[int]) -> None:
        """Set one sequence's pages, in order."""
        row = torch.full(self.page_table.shape[1:], SCRATCH, dtype=torch.int32)
        row[: len(pages)] = torch.tensor(pages, dtype=torch.int32)
        self.page_table[sequence].copy_(row)

    def reset(self, sequence: int) -> None:
        """Free one sequence's slot for another; later writes land in the scratch page."""
        self.page_table[sequence].fill_(SCRATCH)
        self.lengths[sequence].zero_()


class Prefix(NamedTuple):
    """A finished sequence's pages, which hold K and V of its tokens."""

    tokens: list[int]
    pages: list[int]
    pairs: int  # of how many of the tokens the drafter's own caches hold K and V


class Claim(NamedTuple):
    """Pages for a sequence, and how many tokens of its prompt they already hold."""

    pages: list[int]
    known: int  # tokens whose K and V they hold
    pairs: int  # see Prefix; may exceed `known`


class PagePool:
    """The pages of a cache, each of which is free, or belongs to a running sequence or a prefix."""

    def __init__(self, pages: int):
        self.free = list(range(pages, 0, -1))
        self.prefixes: list[Prefix] = []  # the least recently used first

    def claim(self, count: int, prompt: Sequence[int] = ()) -> Claim | None:
        """Take `count` pages; None if there are not enough.

        A prompt that begins with at least half of a kept prefix gets that one's pages. Others are
        dropped when pages run out, the least recently used first.
        """
        if count > len(self.free) + sum(len(prefix.pages) for prefix in self.prefixes):
            return None
        claim = Claim([], 0, 0)
        lengths = [_common_length(prefix.tokens, prompt) for prefix in self.prefixes]
        chosen = max(range(len(lengths)), key=lengths.__getitem__, default=None)
        if chosen is not None and 2 * lengths[chosen] < len(self.prefixes[chosen].tokens):
            chosen = 0 if count > len(self.free) else None
        if chosen is not None and lengths[chosen]:
            prefix = self.prefixes.pop(chosen)
            claim = Claim(prefix.pages[:count], lengths[chosen], prefix.pairs)
            self.release(prefix.pages[count:])
        missing = count - len(claim.pages)
        while missing > len(self.free):
            self.release(self.prefixes.pop(0).pages)
        claim.pages.extend(self.free.pop() for _ in range(missing))
        return claim

    def keep(self, prefix: Prefix) -> None:
        """Take back a sequence's pages, and keep their contents for later prompts."""
        self.prefixes.append(prefix)

    def release(self, pages: Sequence[int]) -> None:
        """Take back a sequence's pages."""
        self.free.extend(reversed(pages))


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix of two sequences."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def rotary_tables(inverse_frequencies: Tensor, scaling: float, count: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [count, D] float32 of positions 0..count-1 (Su et al. 2021).

    The sines' first half is negated: x * cos + roll(x, D/2) * sin rotates the pairs (i, i + D/2).
    """
    angles = torch.arange(count, dtype=torch.float32)[:, None] * inverse_frequencies
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
