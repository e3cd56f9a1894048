"""window_slots: slots through the page table, positions by depth, -1 for a finished sequence."""

import pytest
import torch
from kernel_checks import guarded_output
from paged import make_paged

from mtpkern.kernels.window_slots import window_slots


def test_slots_follow_the_page_table_across_a_page_border() -> None:
    paged = make_paged(2, 3, 64, 1, 4, torch.float32)
    slots, positions, *_ = paged.placed([62, 127], rows=4)
    expected = [
        page * 64 + offset
        for b, start in enumerate((62, 127))
        for page, offset in (paged.slot(b, start + t) for t in range(4))
    ]
    assert slots.tolist() == expected
    assert positions.tolist() == [62, 63, 64, 65, 127, 128, 129, 130]


@pytest.mark.parametrize("rows", [1, 4, 33])
def test_the_kernel_follows_the_page_table_and_gives_finished_sequences_no_slot(
    gpu: str, rows: int
) -> None:
    lengths, active = [0, 15, 16, 62, 100], [1, 1, 0, 1, 5]
    paged = make_paged(5, 9, 16, 1, 4, torch.float32)
    table = paged.page_table.clone()
    for b, length in enumerate(lengths):  # entries that must not be read
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
