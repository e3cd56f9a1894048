"""step_plan: slots through the page table, rows by their tile of keys, and nothing else cleared."""

import pytest
import torch
from launches import guarded_output
from paged import fill, make_paged

from mtpkern.kernels.window_slots import window_slots


def test_slots_follow_the_page_table_across_a_page_border() -> None:
    paged = make_paged(2, 3, 64, 1, 4, torch.float32)
    plan = paged.plan([62, 127], rows=4, group=1)
    expected = [
        page * 64 + offset
        for b, start in enumerate((62, 127))
        for page, offset in (paged.slot(b, start + t) for t in range(4))
    ]
    assert plan.slots.tolist() == expected
    # Rows whose own keys lie in different tiles are apart.
    parts = [[part[:3] for part in parts] for parts in plan.segments]
    assert parts == [[(0, 2, 64), (2, 4, 128)], [(0, 1, 128), (1, 4, 192)]]


def test_each_row_sees_its_own_position_and_what_is_before_it() -> None:
    paged = make_paged(1, 2, 64, 1, 4, torch.float32)
    plan = paged.plan([60], rows=7, group=3)
    ((first, second),) = plan.segments
    assert first[:3] == (0, 4, 64) and second[:3] == (4, 7, 128)
    for part in (first, second):
        mask = part.mask.view(16, part.extent)
        for packed in range((part.end - part.begin) * 3):
            visible = (mask[packed] == 0).nonzero().view(-1)
            assert visible.tolist() == list(range(60 + part.begin + packed // 3 + 1))


def test_clearing_touches_only_the_slots_between_the_window_and_the_tile_edge() -> None:
    paged = make_paged(2, 2, 128, 2, 4, torch.float32)
    fill(paged, [128, 128])
    before = paged.k.clone(), paged.v.clone()
    paged.plan([10, 70], rows=5, group=1)
    for old, new in zip(before, (paged.k, paged.v), strict=True):
        for b, (begin, end) in enumerate(((15, 64), (75, 128))):
            for position in range(256):
                page, offset = paged.slot(b, position)
                if begin <= position < end:
                    assert (new[0, page, offset] == 0).all()
                else:
                    assert_same = torch.testing.assert_close
                    assert_same(new[0, page, offset], old[0, page, offset], equal_nan=True)


def test_pages_that_are_no_whole_tiles_are_refused() -> None:
    paged = make_paged(1, 1, 96, 1, 4, torch.float32)
    with pytest.raises(ValueError, match="page_size must be a multiple of 64, got 96"):
        paged.plan([0], rows=1, group=1)


@pytest.mark.parametrize("rows", [1, 4, 33])
def test_the_kernel_follows_the_page_table_and_leaves_out_who_is_finished(
    gpu: str, rows: int
) -> None:
    lengths, active = [0, 15, 16, 62, 100], [1, 1, 0, 1, 5]
    paged = make_paged(5, 9, 16, 1, 4, torch.float32)
    table = paged.page_table.clone()
    for b, length in enumerate(lengths):  # entries that nobody may look at
        table[b, (length + rows - 1) // 16 + 1 :] = -(2**20)
    table[2] = -(2**20)
    tree = torch.tensor([[1 << t | 1 for t in range(rows)]] * 5)
    tree[3, -1] = (1 << rows) - 1
    with (
        guarded_output((5 * rows,), torch.int64, gpu) as slots,
        guarded_output((5 * rows,), torch.int64, gpu) as positions,
    ):
        given = torch.tensor(lengths).to(gpu), table.to(gpu), rows, 16
        live = torch.tensor(active).to(gpu)
        window_slots(*given, active=live, out=(slots, positions))
        expected = [
            [-1] * rows
            if b == 2
            else [page * 16 + at for t in range(rows) for page, at in [paged.slot(b, n + t)]]
            for b, n in enumerate(lengths)
        ]
        assert slots.view(5, rows).tolist() == expected
        counted = torch.tensor(lengths)[:, None] + torch.arange(rows)
        assert torch.equal(positions.cpu().view(5, rows), counted)
        window_slots(*given, active=live, tree=tree.to(gpu), out=(slots, positions))
        assert slots.view(5, rows).tolist() == expected
        depth = torch.tensor([[t > 0 for t in range(rows)]] * 5).long()
        depth[3, -1] = rows - 1
        assert torch.equal(positions.cpu().view(5, rows), torch.tensor(lengths)[:, None] + depth)


def test_the_launcher_names_what_does_not_fit() -> None:
    lengths, table = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="page_table must be torch.int32, got torch.int64"):
        window_slots(lengths, table.long(), 4, 16)
    with pytest.raises(ValueError, match=r"tree must be \[B, T\]=\[2, 4\], got \[2, 3\]"):
        window_slots(lengths, table, 4, 16, tree=table.long())
