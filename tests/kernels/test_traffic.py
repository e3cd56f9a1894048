"""What is read only once: a cached key by each tile of rows, the vocabulary for 160 rows."""

import pytest
import torch
from traffic import recorded_traffic

from mtpkern.kernels.medusa_blocks import medusa_blocks
from mtpkern.kernels.multi_head_projection import multi_head_projection
from mtpkern.kernels.verify_attention import ROWS, verify_attention


def test_every_access_is_counted_at_its_element(gpu: str) -> None:
    x, w = torch.randn(3, 40).to(gpu), torch.randn(2, 1, 40, 40).to(gpu)
    bias = torch.randn(2, 1, 40).to(gpu)
    with recorded_traffic() as traffic:
        out = medusa_blocks(x, w, bias)
    assert bool((traffic.writes(out)[:, 1:] == 1).all())
    assert bool((traffic.writes(out)[:, 0] == 0).all())  # copied by torch
    assert bool((traffic.reads(w) == 1).all() and (traffic.reads(bias) == 1).all())
    assert int(traffic.reads(w[0]).sum()) == w[0].numel()


@pytest.mark.parametrize(("T", "group"), [(1, 4), (5, 4), (8, 4), (9, 4), (20, 4), (33, 1)])
def test_a_cached_key_is_read_once_by_each_tile_of_rows(gpu: str, T: int, group: int) -> None:
    page_size, pages, Hk, D, committed = 16, 20, 2, 16, 261
    q = torch.randn(1, T, Hk * group, D).to(gpu)
    k_pages, v_pages = (torch.randn(pages, page_size, Hk, D).to(gpu) for _ in range(2))
    table = torch.arange(pages, dtype=torch.int32)[None].to(gpu)
    with recorded_traffic() as traffic:
        out = verify_attention(q, k_pages, v_pages, table, torch.tensor([committed]).to(gpu))
    tiles = -(-T * group // ROWS)
    for cached in (k_pages, v_pages):
        reads = traffic.reads(cached).flatten(0, 1)
        assert bool((reads[:committed] == tiles).all())
        assert bool((reads[committed + T :] == 0).all())
        # Rows of the last tile see the whole window, those before it less.
        assert bool((reads[committed : committed + T] <= tiles).all())
        assert bool((reads[committed : committed + T] >= 1).all())
    assert bool((traffic.writes(out) == 1).all())


@pytest.mark.parametrize(("rows", "passes"), [(1, 1), (160, 1), (161, 2)])
def test_the_vocabulary_is_read_once_for_160_rows(gpu: str, rows: int, passes: int) -> None:
    V, E = 131, 40
    hidden, vocabulary = (torch.randn(n, E).bfloat16().to(gpu) for n in (rows, V))
    with recorded_traffic() as traffic:
        multi_head_projection(hidden, vocabulary, top_k=2)
    assert bool((traffic.reads(vocabulary) == passes).all())
