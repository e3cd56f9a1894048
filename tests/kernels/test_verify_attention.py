"""verify_attention: against a dense softmax in float64, and bit for bit against itself."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import assert_within_budget, guarded_output
from paged import Paged, fill, gathered, make_paged
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import flex_attention

from mtpkern.kernels.verify_attention import (
    split_count,
    split_size,
    verify_attention,
    verify_attention_ref,
    workspace_size,
)

HEADS = [(1, 1, 8), (3, 3, 64), (2, 1, 20), (1, 8, 16), (1, 24, 6)]  # Hk, group, D
LENGTHS = [0, 1, 63, 64, 130]


def attend(paged: Paged, q: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    pages = paged.k[0], paged.v[0], paged.page_table
    return verify_attention_ref(q, *pages, torch.tensor(lengths))


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
    out = attend(paged, q, LENGTHS)
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
def test_a_row_keeps_its_bits_where_the_window_reaches_the_next_tile_of_keys(
    dtype: torch.dtype,
) -> None:
    """At every tile up to a long context: libraries block their sums by how many keys there are."""
    kv_heads, group, head_dim = 3, 3, 64
    paged = make_paged(1, 1, 1152, kv_heads, head_dim, dtype)
    torch.manual_seed(4)
    k, v = torch.randn(2, 1152, kv_heads, head_dim).to(dtype)
    page = int(paged.page_table[0, 0])
    q = torch.randn(1, 6, kv_heads * group, head_dim).to(dtype)
    for length in [tile * 64 - before for tile in range(1, 18) for before in (1, 3, 5)]:
        results = []
        for begin, rows in [(0, 6), *((t, 1) for t in range(6))]:
            paged.k[0, page], paged.v[0, page] = k, v
            window = q[:, begin : begin + rows]
            results.append(attend(paged, window, [length + begin])[0])
        together, alone = results[0], torch.cat(results[1:])
        torch.testing.assert_close(alone, together, atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS)
def test_a_row_has_the_same_bits_in_every_window_that_reaches_it(
    heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Row t of a window at length s is row 0 of the window at s + t, alone in its batch."""
    paged, q = setup(heads, dtype, 256, rows=9)
    for rows in (2, 3, 5, 6, 9):
        out = attend(paged, q[:, :rows], LENGTHS)
        for b, length in enumerate(LENGTHS):
            alone = paged._replace(page_table=paged.page_table[b : b + 1])
            for t in range(rows):
                single = attend(alone, q[b : b + 1, t : t + 1], [length + t])
                torch.testing.assert_close(single[0, 0], out[b, t], atol=0, rtol=0)


def test_keys_past_the_window_have_no_effect() -> None:
    paged, q = setup((2, 3, 16), torch.bfloat16, 64, rows=3)
    expected = attend(paged, q, LENGTHS)
    for poison in (float("nan"), float("inf"), 1e30):
        for b, length in enumerate(LENGTHS):
            for position in range(length + 3, 256):
                page, offset = paged.slot(b, position)
                paged.k[0, page, offset] = paged.v[0, page, offset] = poison
        torch.testing.assert_close(attend(paged, q, LENGTHS), expected, atol=0, rtol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_nan_key_reaches_only_rows_that_see_it(poison: float) -> None:
    paged, q = setup((2, 3, 16), torch.bfloat16, 64, rows=5)
    expected = attend(paged, q, LENGTHS)
    for b, length in enumerate(LENGTHS):
        page, offset = paged.slot(b, length + 2)
        paged.k[0, page, offset] = paged.v[0, page, offset] = poison
    out = attend(paged, q, LENGTHS)
    torch.testing.assert_close(out[:, :2], expected[:, :2], atol=0, rtol=0)
    if poison != poison:
        assert bool(out[:, 2:].isnan().all())


def test_query_heads_that_do_not_fit_are_named() -> None:
    paged, q = setup((2, 3, 16), torch.float32, 64, rows=3)
    with pytest.raises(ValueError, match="heads, got 5"):
        attend(paged, q[:, :, :5], LENGTHS)


class Launch(NamedTuple):
    """A window of T rows after `lengths` committed keys, and the other arguments of its launch.

    Pages are in random order, K's and V's with strides of their own; slots that must not be read
    are NaN, and entries of the page table that must not be followed are out of range.
    """

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    lengths: Tensor

    def at(self, rows: slice, begin: int) -> "Launch":
        """These rows of the window alone, after `begin` more keys."""
        return self._replace(q=self.q[:, rows], lengths=self.lengths + begin)

    def dense(self, b: int) -> tuple[Tensor, Tensor]:
        """K and V [Hk, keys, D] of one sequence, its window's included."""
        places = torch.arange(int(self.lengths[b]) + self.q.shape[1])
        page_size = self.k_pages.shape[1]
        pages = self.page_table[b].cpu().long()[places // page_size]
        k, v = (t.cpu()[pages, places % page_size] for t in (self.k_pages, self.v_pages))
        return k.transpose(0, 1), v.transpose(0, 1)


def make_launch(
    gpu: str,
    lengths: list[int],
    T: int,
    heads: tuple[int, int, int],
    page_size: int,
    dtype: torch.dtype,
) -> Launch:
    (Hk, group, D), B = heads, len(lengths)
    torch.manual_seed(T + D)
    max_pages = -(-(max(lengths) + T) // page_size) + 1
    pages = B * max_pages + 2
    k_pages = torch.full((pages, page_size, Hk, D + 8), float("nan"), dtype=dtype)[..., 8:]
    v_pages = torch.full((pages, Hk, page_size + 1, D), float("nan"), dtype=dtype)
    v_pages = v_pages[:, :, :page_size].transpose(1, 2)
    table = torch.randperm(pages)[: B * max_pages].view(B, max_pages).int()
    for b, length in enumerate(lengths):
        used = -(-(length + T) // page_size)
        for place in range(length + T):
            page, offset = int(table[b, place // page_size]), place % page_size
            k_pages[page, offset] = torch.randn(Hk, D).to(dtype)
            v_pages[page, offset] = torch.randn(Hk, D).to(dtype)
        table[b, used:] = 2**20
    # There are gaps between q's rows and between its heads.
    q = torch.randn(B, T + 1, Hk * group + 1, D + 8).to(dtype)[:, :T, :-1, :D]
    inputs = q, k_pages, v_pages, table, torch.tensor(lengths)
    return Launch(*(t.to(gpu) for t in inputs))


def random_tree(B: int, T: int) -> Tensor:
    """Ancestor masks [B, T] of random trees, whose last node is a filler."""
    masks = []
    for _ in range(B):
        mask = [1]
        for t in range(1, T):
            mask.append(mask[int(torch.randint(t, ()))] | 1 << t)
        if T > 1:
            mask[-1] = 0
        masks.append([m - (m >> 63 << 64) for m in mask])
    return torch.tensor(masks)


def visible(length: int, T: int, tree: Tensor | None, window: int) -> Tensor:
    """Which of length + T keys the rows see, [T, length + T]."""
    t, n = torch.arange(T)[:, None], torch.arange(length + T)
    if tree is None:
        sees, position = n <= length + t, length + t
    else:
        bits = tree[:, None] >> torch.arange(64) & 1
        sees = torch.cat([torch.ones(T, length), bits[:, :T]], 1).bool()
        position = length + (bits.sum(1, keepdim=True) - 1).clamp(min=0)
    return sees & (n > position - window) if window else sees


def attention(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
    """q [T, Hq, D], k and v [Hk, n, D], sees [T, n] -> [T, Hq, D]; zero where nothing is seen."""
    T, Hq, D = q.shape
    k, v = (t.repeat_interleave(Hq // len(t), 0) for t in (k, v))
    scores = torch.einsum("thd,hnd->htn", q, k) * D**-0.5
    p = scores.masked_fill(~sees, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("htn,hnd->thd", p, v)


@pytest.mark.parametrize(("in_tree", "window"), [(0, 0), (0, 3), (0, 70), (1, 0), (1, 70)])
def test_the_definition_is_a_dense_softmax_in_trees_and_sliding_windows(
    in_tree: int, window: int
) -> None:
    lengths, T = [0, 60, 255], 7
    launch = make_launch("cpu", lengths, T, (2, 3, 16), 16, torch.float32)
    tree = random_tree(3, T) if in_tree else None
    out = verify_attention_ref(*launch, tree=tree, window=window)
    for b, length in enumerate(lengths):
        sees = visible(length, T, None if tree is None else tree[b], window)
        dense = launch.q[b], *launch.dense(b)
        truth = attention(*(t.double() for t in dense), sees)
        assert_within_budget(out[b], attention(*dense, sees), truth, terms=length + T)


# Lengths, T, (Hk, group, D), page_size: nothing yet, around a split's edge, several tiles of rows,
# a head of 20, the widest window, pages smaller and larger than a split.
LAUNCHES = [
    ([0, 1, 255, 256, 257], 1, (1, 1, 8), 16),
    ([3, 251, 252, 511], 5, (2, 4, 64), 16),
    ([0, 300], 19, (1, 3, 20), 128),
    ([700], 64, (1, 1, 16), 1024),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", LAUNCHES)
@pytest.mark.parametrize(("in_tree", "window"), [(0, 0), (0, 70), (1, 0), (1, 70)])
def test_the_kernel_is_within_twice_the_error_of_the_dtype(
    gpu: str,
    sizes: tuple[list[int], int, tuple[int, int, int], int],
    dtype: torch.dtype,
    in_tree: int,
    window: int,
) -> None:
    lengths, T, (Hk, group, D), _ = sizes
    launch, B = make_launch(gpu, *sizes, dtype), len(lengths)
    tree = random_tree(B, T) if in_tree else None
    shape = (B, T, Hk * group, D)
    with guarded_output(shape, dtype, gpu) as out:
        given = None if tree is None else tree.to(gpu)
        verify_attention(*launch, tree=given, window=window, out=out)
        exact, in_dtype = [], []
        for b, length in enumerate(lengths):
            sees = visible(length, T, None if tree is None else tree[b], window)
            dense = launch.q[b].cpu(), *launch.dense(b)
            exact.append(attention(*(t.double() for t in dense), sees))
            in_dtype.append(attention(*dense, sees))
        assert_within_budget(out, torch.stack(in_dtype), torch.stack(exact), terms=max(lengths) + T)


@pytest.mark.parametrize(
    ("heads", "window", "dtype"),
    [
        ((1, 4, 16), 0, torch.bfloat16),
        ((2, 1, 40), 0, torch.float32),
        ((1, 4, 16), 70, torch.float32),
    ],
)
def test_a_row_of_the_kernel_has_its_bits_in_every_window_and_beside_any_neighbour(
    gpu: str, heads: tuple[int, int, int], window: int, dtype: torch.dtype
) -> None:
    """Row t of a window at length s is row 0 of a window at s + t, alone, in a longer table."""
    lengths, T = [0, 60, 250, 505], 17
    launch = make_launch(gpu, lengths, T, heads, 16, dtype)
    expected = verify_attention(*launch, window=window)
    for begin, count in ((0, 5), (3, 1), (7, 9), (16, 1)):
        rows = slice(begin, begin + count)
        out = verify_attention(*launch.at(rows, begin), window=window)
        torch.testing.assert_close(out, expected[:, rows], atol=0, rtol=0)
    for b in range(len(lengths)):
        far = torch.full((1, 40), 2**20, dtype=torch.int32, device=gpu)
        table = torch.cat([launch.page_table[b : b + 1], far], 1)
        alone = Launch(launch.q[b : b + 1], *launch[1:3], table, launch.lengths[b : b + 1])
        out = verify_attention(*alone, window=window)
        torch.testing.assert_close(out[0], expected[b], atol=0, rtol=0)


@pytest.mark.parametrize(("in_tree", "window"), [(0, 0), (1, 0), (0, 1300)])
def test_a_row_of_the_kernel_has_its_bits_however_large_the_splits_are(
    gpu: str, in_tree: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Splits of 256 and 1024 keys; of 64 and 256; of 64 and 64. The longer sequence goes through
    every level of the tree. In float32, since rounding to 16 bits hides most other orders.
    """
    lengths, T = [300, 4200], 3
    launch = make_launch(gpu, lengths, T, (1, 2, 16), 1024, torch.float32)
    tree = random_tree(2, T).to(gpu) if in_tree else None
    results = []
    for blocks in (1, 16, 400):
        monkeypatch.setattr(f"{verify_attention.__module__}.FILL", blocks)
        results.append(verify_attention(*launch, tree=tree, window=window))
    for out in results[1:]:
        torch.testing.assert_close(out, results[0], atol=0, rtol=0)
    for b, length in enumerate(lengths):
        sees = visible(length, T, None if tree is None else tree[b].cpu(), window)
        dense = launch.q[b].cpu(), *launch.dense(b)
        truth = attention(*(t.double() for t in dense), sees)
        in_dtype = attention(*dense, sees)
        assert_within_budget(results[0][b], in_dtype, truth, terms=length + T)


@pytest.mark.parametrize(
    ("B", "T", "keys", "live", "launched"),
    [
        (1, 5, 1029, 72, 96),
        (1, 5, 32768, 128, 320),
        (1, 1, 131072, 512, 512),
        (8, 5, 1029, 192, 768),
    ],
)
def test_an_8b_model_fills_half_of_an_h100_or_more_with_few_partial_results(
    B: int, T: int, keys: int, live: int, launched: int
) -> None:
    Hq, Hk, D = 32, 8, 128
    size = split_size(B, T, Hq, Hk, D, keys)
    assert B * Hk * -(-keys // size) == live >= 66
    assert B * Hk * split_count(B, T, Hq, Hk, D, keys) == launched
    partials = 2 * 4 * (D + 2) * T * Hq * -(-keys // size)
    if keys >= 32768:
        assert partials < 0.2 * 2 * 2 * keys * Hk * D


@pytest.mark.parametrize("keys", [60, 300, 1029, 4200])
def test_the_kernel_writes_as_many_parts_as_the_host_counts(
    gpu: str, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{verify_attention.__module__}.FILL", 16)
    T, Hq, Hk, D = 3, 2, 1, 16
    launch = make_launch(gpu, [keys - T], T, (Hk, Hq, D), 1024, torch.bfloat16)
    size = workspace_size(1, T, Hq, Hk, D, launch.page_table.shape[1], 1024)
    workspace = torch.full((size,), float("nan"), device=gpu)
    verify_attention(*launch, workspace=workspace)
    written = int(workspace.isfinite().sum()) + int(workspace.isinf().sum())
    parts = -(-keys // split_size(1, T, Hq, Hk, D, keys))
    assert written == parts * T * Hq * (D + 2)


def test_a_key_that_is_nan_reaches_only_rows_of_the_kernel_that_see_it(gpu: str) -> None:
    lengths = [0, 60, 255]
    launch = make_launch(gpu, lengths, 5, (2, 3, 16), 16, torch.bfloat16)
    expected = verify_attention(*launch)
    for b, length in enumerate(lengths):
        page, offset = int(launch.page_table[b, (length + 2) // 16]), (length + 2) % 16
        launch.k_pages[page, offset] = float("nan")
    out = verify_attention(*launch)
    torch.testing.assert_close(out[:, :2], expected[:, :2], atol=0, rtol=0)
    assert bool(out[:, 2:].isnan().all())


def test_a_path_down_a_tree_has_the_tokens_of_a_chain(gpu: str) -> None:
    """A tree that is a chain sees what a chain sees, whatever its fillers hold."""
    launch = make_launch(gpu, [5, 300], 7, (2, 2, 16), 64, torch.float32)
    chain = torch.tensor([[(2 << t) - 1 for t in range(7)]] * 2).to(gpu)
    for window in (0, 64):
        torch.testing.assert_close(
            verify_attention(*launch, tree=chain, window=window),
            verify_attention(*launch, window=window),
            atol=0,
            rtol=0,
        )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_kernel_equals_torch_on_a_dense_chain_and_flex_attention_on_a_dense_tree(
    gpu: str, plain_devices: None
) -> None:
    length, T, (Hk, group, D) = 290, 9, (2, 3, 32)
    launch = make_launch(gpu, [length], T, (Hk, group, D), 16, torch.float32)
    q = launch.q.cpu().transpose(1, 2)
    k, v = (t[None] for t in launch.dense(0))
    bias = causal_lower_right(T, length + T)
    peer = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
    torch.testing.assert_close(verify_attention(*launch).cpu(), peer.transpose(1, 2))

    tree = random_tree(1, T)
    sees = visible(length, T, tree[0], 0)

    def ancestors_only(score: Tensor, b: Tensor, h: Tensor, t: Tensor, n: Tensor) -> Tensor:
        return torch.where(sees[t, n], score, -float("inf"))

    peer = flex_attention(q, k, v, score_mod=ancestors_only, enable_gqa=True)
    out = verify_attention(*launch, tree=tree.to(gpu)).cpu()
    torch.testing.assert_close(out, peer.transpose(1, 2))


def test_a_finished_launch_leaves_nothing_in_a_larger_workspace(gpu: str) -> None:
    launch = make_launch(gpu, [100, 300], 5, (1, 2, 16), 64, torch.bfloat16)
    size = workspace_size(2, 5, 2, 1, 16, launch.page_table.shape[1], 64)
    workspace = torch.full((size + 100,), float("nan"), device=gpu)
    out = verify_attention(*launch, workspace=workspace)
    torch.testing.assert_close(out, verify_attention(*launch), atol=0, rtol=0)
    assert bool(workspace[size:].isnan().all())


def test_arguments_of_the_launcher_that_do_not_fit_are_named() -> None:
    launch = make_launch("cpu", [3, 9], 5, (2, 2, 16), 16, torch.bfloat16)
    tree = random_tree(2, 5)
    refused: list[tuple[str, Launch, dict[str, Any]]] = [
        ("T=1..64, Hq a multiple of Hk=2", launch._replace(q=launch.q[:, :, :3]), {}),
        (
            "k_pages must be torch.bfloat16, got torch.float32",
            launch._replace(k_pages=launch.k_pages.float()),
            {},
        ),
        (
            "page_table must be torch.int32, got torch.int64",
            launch._replace(page_table=launch.page_table.long()),
            {},
        ),
        (
            r"lengths must be \[B\]=\[2\], got \[1\]",
            launch._replace(lengths=launch.lengths[:1]),
            {},
        ),
        (r"tree must be \[B, T\]=\[2, 5\], got \[2, 4\]", launch, dict(tree=tree[:, :4])),
        ("window must be 0, or T=5 or more with a tree, got 4", launch, dict(tree=tree, window=4)),
        ("window must be 0, got -1", launch, dict(window=-1)),
        ("workspace must be contiguous, of 2880 elements", launch, dict(workspace=torch.empty(9))),
    ]
    for message, changed, options in refused:
        with pytest.raises(ValueError, match=message):
            verify_attention(*changed, **options)
