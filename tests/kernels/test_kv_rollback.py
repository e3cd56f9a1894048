"""kv_rollback: lengths advance, a tree's path moves together, and nothing else is touched."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from traffic import recorded_traffic

from mtpkern.kernels.kv_rollback import kv_rollback, kv_rollback_ref

LENGTHS = [0, 13, 30, 47]
# One path a sequence: a chain, gaps across a page border, neighbours that change places, a leap.
PATHS = [[0, 1, 2, 3, 4, 5], [0, 2, 3, 5, 9, 9], [0, 2, 1, 9, 9, 9], [0, 5, 9, 9, 9, 9]]
ACCEPTED = [5, 3, 2, 1]


class Cache(NamedTuple):
    """K and V of 3 layers in pages of 16 slots, their strides all different, random pages."""

    k: Tensor
    v: Tensor
    page_table: Tensor

    def slot(self, b: int, place: int) -> tuple[int, int]:
        return int(self.page_table[b, place // 16]), place % 16


def make(device: str, Hk: int = 2, D: int = 24, dtype: torch.dtype = torch.bfloat16) -> Cache:
    torch.manual_seed(0)
    pages = 4 * len(LENGTHS) + 1
    k = torch.randn(3, pages, 16, Hk, D + 8).to(dtype).to(device)[..., :D]
    v = torch.randn(4, pages + 2, Hk, 16, D).to(dtype).to(device)[1:, :-2].transpose(2, 3)
    table = torch.randperm(pages)[: 4 * len(LENGTHS)].view(-1, 4).int()
    return Cache(k, v, table.to(device))


def moved(cache: Cache, accepted: list[int], active: list[int]) -> tuple[Tensor, Tensor]:
    """K and V as they should be afterwards."""
    after = cache.k.clone(), cache.v.clone()
    for b, length in enumerate(LENGTHS):
        for j in range((accepted[b] + 1) * active[b]):
            page, offset = cache.slot(b, length + j)
            of = cache.slot(b, length + PATHS[b][j])
            for new, old in zip(after, (cache.k, cache.v), strict=True):
                new[:, page, offset] = old[:, of[0], of[1]]
    return after


def commit(
    kv_rollback: Callable[..., None], cache: Cache, device: str, active: list[int] | None
) -> Tensor:
    lengths, accepted = torch.tensor(LENGTHS).to(device), torch.tensor(ACCEPTED).to(device)
    live = None if active is None else torch.tensor(active).to(device)
    path = torch.tensor(PATHS).to(device)
    kv_rollback(*cache, lengths, accepted, active=live, path=path)
    return lengths.cpu()


@pytest.mark.parametrize("active", [None, [1, 1, 0, 1]])
def test_the_definition_moves_a_path_together(active: list[int] | None) -> None:
    cache, live = make("cpu"), active or [1] * 4
    expected = moved(cache, ACCEPTED, live)
    lengths = commit(kv_rollback_ref, cache, "cpu", active)
    assert lengths.tolist() == [LENGTHS[b] + (ACCEPTED[b] + 1) * live[b] for b in range(4)]
    for cached, right in zip(cache[:2], expected, strict=True):
        torch.testing.assert_close(cached, right, atol=0, rtol=0)


@pytest.mark.parametrize("active", [None, [1, 1, 0, 1]])
@pytest.mark.parametrize("sizes", [(1, 5), (2, 24), (3, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_moves_a_path_together_and_touches_nothing_else(
    gpu: str, sizes: tuple[int, int], dtype: torch.dtype, active: list[int] | None
) -> None:
    cache, live = make(gpu, *sizes, dtype), active or [1] * 4
    around = [cached._base.clone() for cached in cache[:2]]
    before = [cached.clone() for cached in cache[:2]]
    expected = moved(cache, ACCEPTED, live)
    lengths = commit(kv_rollback, cache, gpu, active)
    assert lengths.tolist() == [LENGTHS[b] + (ACCEPTED[b] + 1) * live[b] for b in range(4)]
    for i, cached in enumerate(cache[:2]):
        torch.testing.assert_close(cached, expected[i], atol=0, rtol=0)
        cached.copy_(before[i])
        torch.testing.assert_close(cached._base, around[i], atol=0, rtol=0)


def test_a_chain_moves_no_byte_of_the_cache(gpu: str) -> None:
    cache, lengths = make(gpu), torch.tensor(LENGTHS * 40).to(gpu)
    table = cache.page_table.repeat(40, 1)
    accepted = torch.arange(160).to(gpu)
    with recorded_traffic() as traffic:
        kv_rollback(cache.k, cache.v, table, lengths, accepted)
    assert lengths.cpu().tolist() == [LENGTHS[b % 4] + b + 1 for b in range(160)]
    assert int(traffic.reads(cache.k).sum() + traffic.writes(cache.v).sum()) == 0
    assert traffic.bytes_touched() == 24 * 160


def test_bytes_moved_are_those_of_the_rows_that_change_their_place(gpu: str) -> None:
    cache = make(gpu)
    with recorded_traffic() as traffic:
        commit(kv_rollback, cache, gpu, None)
    rows = sum(PATHS[b][j] != j for b in range(4) for j in range(ACCEPTED[b] + 1))
    touched = sum(
        int(count.sum()) for kv in cache[:2] for count in (traffic.reads(kv), traffic.writes(kv))
    )
    assert touched == 4 * 3 * 2 * 24 * rows  # elements: L = 3, Hk = 2, D = 24


def test_arguments_that_do_not_fit_are_named() -> None:
    cache, lengths = make("cpu"), torch.tensor(LENGTHS)
    with pytest.raises(ValueError, match=r"k_cache must be \[L, pages, page_size, Hk, D\], got"):
        kv_rollback(cache.k[0], cache.v[0], cache.page_table, lengths, lengths)
    with pytest.raises(ValueError, match=r"accepted must be \[B\]=\[4\], got \[3\]"):
        kv_rollback(*cache, lengths, lengths[:3])
    with pytest.raises(ValueError, match=r"path must be \[B, T\] with T=1..64, got \[4, 65\]"):
        kv_rollback(*cache, lengths, lengths, path=torch.zeros(4, 65, dtype=torch.int64))
    with pytest.raises(ValueError, match="active must be torch.int64, got torch.bool"):
        kv_rollback(*cache, lengths, lengths, active=torch.ones(4, dtype=torch.bool))
