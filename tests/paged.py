"""A paged KV cache in random page order, filled with NaN, for the attention tests."""

from typing import NamedTuple

import torch
from torch import Tensor

from mtpkern.cache import rotary_tables
from mtpkern.kernels.window_slots import window_slots_ref


class Paged(NamedTuple):
    """`k`, `v` [1, pages, page_size, Hk, D]; every sequence has max_pages pages of its own."""

    k: Tensor
    v: Tensor
    page_table: Tensor
    cos: Tensor
    sin: Tensor

    def placed(self, lengths: list[int], rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Slots and positions of a window's rows, and the tables, as `qkv_rope_cache` takes them"""
        page_size = self.k.shape[2]
        at = window_slots_ref(torch.tensor(lengths), self.page_table, rows, page_size)
        return *at, self.cos, self.sin

    def slot(self, sequence: int, position: int) -> tuple[int, int]:
        page, offset = divmod(position, self.k.shape[2])
        return int(self.page_table[sequence, page]), offset


def make_paged(
    batch: int, max_pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> Paged:
    generator = torch.Generator().manual_seed(batch * 1000 + max_pages)
    pages = batch * max_pages + 2  # two that no sequence owns
    order = torch.randperm(pages, generator=generator)[: batch * max_pages]
    shape = (1, pages, page_size, kv_heads, head_dim)
    frequencies = 1 / 100.0 ** (torch.arange(0, head_dim, 2) / head_dim)
    cos, sin = rotary_tables(frequencies, 1.0, max_pages * page_size)
    return Paged(
        torch.full(shape, float("nan"), dtype=dtype),
        torch.full(shape, float("nan"), dtype=dtype),
        order.view(batch, max_pages).int(),
        cos,
        sin,
    )


def fill(paged: Paged, lengths: list[int]) -> None:
    """Random keys and values for the committed tokens of each sequence."""
    generator = torch.Generator().manual_seed(7)
    for b, length in enumerate(lengths):
        for position in range(length):
            page, offset = paged.slot(b, position)
            for cache in (paged.k, paged.v):
                row = torch.randn(cache.shape[3:], generator=generator)
                cache[0, page, offset] = row.to(cache.dtype)


def gathered(paged: Paged, cache: Tensor, sequence: int, count: int) -> Tensor:
    """The first `count` rows [count, Hk, D] of one sequence, in float64."""
    slots = [paged.slot(sequence, position) for position in range(count)]
    return torch.stack([cache[0, page, offset] for page, offset in slots]).double()
