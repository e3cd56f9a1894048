"""verify_attention: against a dense softmax in float64, and bit for bit against itself."""

import pytest
import torch
from paged import Paged, fill, gathered, make_paged

from mtpkern.kernels.verify_attention import verify_attention_ref

HEADS = [(1, 1, 8), (3, 3, 64), (2, 1, 20), (1, 8, 16), (1, 24, 6)]  # Hk, group, D
LENGTHS = [0, 1, 63, 64, 130]


def attend(paged: Paged, q: torch.Tensor, lengths: list[int], group: int) -> torch.Tensor:
    plan = paged.plan(lengths, q.shape[1], group)
    return verify_attention_ref(q, paged.k[0], paged.v[0], paged.page_table, plan)


def setup(
    heads: tuple[int, int, int], dtype: torch.dtype, page_size: int, rows: int
) -> tuple[Paged, torch.Tensor]:
    kv_heads, group, head_dim = heads
    paged = make_paged(len(LENGTHS), 256 // page_size, page_size, kv_heads, head_dim, dtype)
    fill(paged, [length + rows for length in LENGTHS])
    torch.manual_seed(2)
    return paged, torch.randn(len(LENGTHS), rows, kv_heads * group, head_dim).to(dtype)


@pytest.mark.parametrize("page_size", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS)
def test_values_equal_a_dense_softmax(
    heads: tuple[int, int, int], dtype: torch.dtype, page_size: int
) -> None:
    kv_heads, group, head_dim = heads
    paged, q = setup(heads, dtype, page_size, rows=7)
    out = attend(paged, q, LENGTHS, group)
    for b, length in enumerate(LENGTHS):
        for t in range(7):
            k = gathered(paged, paged.k, b, length + t + 1).repeat_interleave(group, 1)
            v = gathered(paged, paged.v, b, length + t + 1).repeat_interleave(group, 1)
            scores = torch.einsum("hd,shd->hs", q[b, t].double(), k) / head_dim**0.5
            truth = torch.einsum("hs,shd->hd", scores.softmax(-1), v)
            torch.testing.assert_close(
                out[b, t].double(), truth, atol=8 * torch.finfo(dtype).eps, rtol=0.01
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS)
def test_a_row_has_the_same_bits_in_every_window_that_reaches_it(
    heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Row t of a window at length s is row 0 of the window at s + t, alone in its batch."""
    paged, q = setup(heads, dtype, 256, rows=9)
    for rows in (2, 3, 5, 6, 9):
        out = attend(paged, q[:, :rows], LENGTHS, heads[1])
        for b, length in enumerate(LENGTHS):
            alone = paged._replace(page_table=paged.page_table[b : b + 1])
            for t in range(rows):
                # Planning clears what lies behind the window, so write that again.
                fill(paged, [n + 9 for n in LENGTHS])
                single = attend(alone, q[b : b + 1, t : t + 1], [length + t], heads[1])
                torch.testing.assert_close(single[0, 0], out[b, t], atol=0, rtol=0)
        fill(paged, [n + 9 for n in LENGTHS])


def test_whatever_lies_behind_the_window_counts_for_nothing() -> None:
    paged, q = setup((2, 3, 16), torch.bfloat16, 64, rows=3)
    expected = attend(paged, q, LENGTHS, 3)
    for poison in (float("nan"), float("inf"), 1e30):
        for b, length in enumerate(LENGTHS):
            for position in range(length + 3, 256):
                page, offset = paged.slot(b, position)
                paged.k[0, page, offset] = paged.v[0, page, offset] = poison
        torch.testing.assert_close(attend(paged, q, LENGTHS, 3), expected, atol=0, rtol=0)


def test_query_heads_that_do_not_fit_are_named() -> None:
    paged, q = setup((2, 3, 16), torch.float32, 64, rows=3)
    with pytest.raises(ValueError, match="heads, got 5"):
        attend(paged, q[:, :, :5], LENGTHS, 3)
