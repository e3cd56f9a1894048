"""step_plan: slots through the page table, extents in whole tiles, and nothing else cleared."""

import pytest
import torch
from paged import fill, make_paged


def test_slots_follow_the_page_table_across_a_page_border() -> None:
    paged = make_paged(2, 3, 64, 1, 4, torch.float32)
    plan = paged.plan([62, 127], rows=4, group=1)
    expected = [
        page * 64 + offset
        for b, start in enumerate((62, 127))
        for page, offset in (paged.slot(b, start + t) for t in range(4))
    ]
    assert plan.slots.tolist() == expected
    assert plan.extents == [128, 192]


def test_each_row_sees_its_own_position_and_what_is_before_it() -> None:
    paged = make_paged(1, 2, 64, 1, 4, torch.float32)
    plan = paged.plan([60], rows=7, group=3)
    mask = plan.masks[0].view(-1, plan.extents[0])
    assert plan.extents == [128] and mask.shape[0] == 32
    for packed in range(7 * 3):
        visible = (mask[packed] == 0).nonzero().view(-1)
        assert visible.tolist() == list(range(60 + packed // 3 + 1))


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
