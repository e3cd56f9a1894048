"""qkv_rope_cache: its equations in float64, written to the right slots and to no others."""

from typing import NamedTuple

import pytest
import torch
from kernel_checks import assert_within_budget, guarded_output
from paged import gathered, make_paged
from torch import Tensor
from traffic import recorded_traffic

from mtpkern.cache import rotary_tables
from mtpkern.kernels.qkv_rope_cache import qkv_rope_cache, qkv_rope_cache_ref

LENGTHS = [0, 62, 127]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_projects_rotates_and_writes_in_place(biased: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    width, heads, kv_heads, head_dim, rows = 33, 6, 2, 10, 4
    paged = make_paged(3, 3, 64, kv_heads, head_dim, dtype)
    x, norm = torch.randn(3 * rows, width).to(dtype), torch.randn(width).to(dtype)
    w = (torch.randn((heads + 2 * kv_heads) * head_dim, width) / width**0.5).to(dtype)
    bias = torch.randn(w.shape[0]).to(dtype) if biased else None
    slots, *_ = placed = paged.placed(LENGTHS, rows)
    pages = paged.k[0], paged.v[0]
    q = qkv_rope_cache_ref(x, norm, 1e-5, w, *pages, *placed, bias=bias)
    q = q.view(3, rows, heads, head_dim)

    wide = x.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.double()
    qkv = normed @ w.double().T + (0 if bias is None else bias.double())
    qkv = qkv.view(3, rows, -1, head_dim)
    tolerance = dict(atol=64 * torch.finfo(dtype).eps, rtol=8 * torch.finfo(dtype).eps)
    for b, length in enumerate(LENGTHS):
        for t in range(rows):
            angle = (length + t) / 100.0 ** (torch.arange(0, head_dim, 2).double() / head_dim)
            turn = torch.polar(torch.ones_like(angle), angle)
            pairs = torch.complex(*qkv[b, t, : heads + kv_heads].chunk(2, -1)) * turn
            rotated = torch.cat([pairs.real, pairs.imag], -1)
            torch.testing.assert_close(q[b, t].double(), rotated[:heads], **tolerance)
            k = gathered(paged, paged.k, b, length + t + 1)[-1]
            v = gathered(paged, paged.v, b, length + t + 1)[-1]
            torch.testing.assert_close(k, rotated[heads:], **tolerance)
            torch.testing.assert_close(v, qkv[b, t, heads + kv_heads :], **tolerance)
    # Every other slot is as it was: still NaN.
    written = torch.zeros(9 * 64 + 128, dtype=torch.bool)
    written[slots] = True
    for cache in pages:
        assert not cache.flatten(0, 1)[written].isnan().any()
        assert cache.flatten(0, 1)[~written].isnan().all()


def test_the_definition_writes_a_row_that_is_nan_as_a_key_that_is_nan_and_a_value_of_zero() -> None:
    paged = make_paged(1, 1, 64, 2, 10, torch.float32)
    x, w = torch.randn(2, 33), torch.randn(60, 33)
    x[1] = float("nan")
    pages = paged.k[0], paged.v[0]
    q = qkv_rope_cache_ref(x, None, 1e-5, w, *pages, *paged.placed([5], 2))
    page = int(paged.page_table[0, 0])
    assert bool(q[1].isnan().all() and paged.k[0, page, 6].isnan().all())
    assert not paged.v[0, page, 6].any()
    assert bool(q[0].isfinite().all() and paged.v[0, page, 5].isfinite().all())


class Launch(NamedTuple):
    """Inputs of one launch, and pages with strides that differ between K and V."""

    x: Tensor
    norm_w: Tensor
    w: Tensor
    bias: Tensor
    q_norm: Tensor
    k_norm: Tensor
    slots: Tensor
    positions: Tensor
    cos: Tensor
    sin: Tensor
    k_pages: Tensor
    v_pages: Tensor

    def run(
        self, device: str, out: Tensor | None, extras: bool, rows: slice = slice(None)
    ) -> Tensor:
        x, norm_w, w, bias, q_norm, k_norm, slots, positions, cos, sin = (
            t.to(device) for t in self[:10]
        )
        given = {"bias": bias, "q_norm": q_norm, "k_norm": k_norm} if extras else {}
        return qkv_rope_cache(
            x[rows],
            norm_w,
            1e-5,
            w,
            self.k_pages,
            self.v_pages,
            slots[rows],
            positions[rows],
            cos,
            sin,
            out=out,
            **given,
        )

    def defined(self, dtype: torch.dtype, extras: bool) -> tuple[Tensor, Tensor, Tensor]:
        """q [R, Hq, D], k and v [R, Hk, D], computed in `dtype`."""
        Hk, D = self.k_pages.shape[2:]
        x, norm_w, w, bias, q_norm, k_norm = (t.to(dtype) for t in self[:6])
        normed = torch.nn.functional.rms_norm(x, x.shape[1:], norm_w, 1e-5)
        heads = (normed @ w.T + (bias if extras else 0)).unflatten(1, (-1, D))
        q, k, v = heads[:, : -2 * Hk], heads[:, -2 * Hk : -Hk], heads[:, -Hk:]
        if extras:
            q = torch.nn.functional.rms_norm(q, (D,), q_norm, 1e-5)
            k = torch.nn.functional.rms_norm(k, (D,), k_norm, 1e-5)
        cos, sin = (t[self.positions][:, None].to(dtype) for t in (self.cos, self.sin))
        q, k = (t * cos + t.roll(D // 2, -1) * sin for t in (q, k))
        return q, k, v


def make_launch(R: int, Hq: int, Hk: int, D: int, E: int, dtype: torch.dtype, gpu: str) -> Launch:
    torch.manual_seed(R + D)
    page_size, pages = 16, -(-R // 16) + 2
    tensors = [
        3 * torch.randn(R, E),
        1 + torch.randn(E) / 4,
        torch.randn((Hq + 2 * Hk) * D, E) / E**0.5,
    ]
    tensors += [torch.randn((Hq + 2 * Hk) * D), 1 + torch.randn(D) / 4, 1 + torch.randn(D) / 4]
    slots = torch.randperm(pages * page_size)[:R]
    slots[R // 2 : R // 2 + 1] = -1
    cos, sin = rotary_tables(1 / 100.0 ** (torch.arange(0, D, 2) / D), 1.5, 97)
    nan = torch.full((pages + 1, page_size, Hk, D + 3), float("nan"), dtype=dtype, device=gpu)
    # V in the layout HND of vLLM and FlashInfer, heads before slots, with gaps between pages.
    apart = torch.full((pages, Hk, page_size + 1, D + 3), float("nan"), dtype=dtype, device=gpu)
    v_pages = apart[:, :, :page_size, 3:].transpose(1, 2)
    positions = torch.randint(0, 97, (R,))
    inputs = [t.to(dtype) for t in tensors]
    return Launch(*inputs, slots, positions, cos, sin, nan[1:, :, :, :D], v_pages)


# R, Hq, Hk, D, E: empty, one row, heads that tiles cut, one past a tier, a tail.
LAUNCHES = [
    (0, 1, 1, 16, 16),
    (1, 1, 1, 2, 1),
    (5, 3, 1, 20, 33),
    (17, 4, 2, 32, 129),
    (133, 1, 1, 24, 40),
    (5, 9, 3, 64, 64),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", LAUNCHES)
@pytest.mark.parametrize("extras", [False, True])
def test_the_kernel_is_within_twice_the_error_of_the_dtype(
    gpu: str, sizes: tuple[int, int, int, int, int], dtype: torch.dtype, extras: bool
) -> None:
    R, Hq, Hk, D, E = sizes
    launch = make_launch(*sizes, dtype, gpu)
    truth, in_dtype = launch.defined(torch.float64, extras), launch.defined(dtype, extras)
    with guarded_output((R, Hq * D), dtype, gpu) as out:
        launch.run(gpu, out.unflatten(1, (Hq, D)), extras)
        assert_within_budget(out, in_dtype[0].flatten(1), truth[0].flatten(1), terms=E)
    written = launch.slots[launch.slots >= 0]
    for pages, values, exact in (
        (launch.k_pages, in_dtype[1], truth[1]),
        (launch.v_pages, in_dtype[2], truth[2]),
    ):
        rows = pages.reshape(-1, Hk, D).cpu()
        live = launch.slots >= 0
        assert_within_budget(rows[written], values[live], exact[live], terms=E)
        rows[written] = float("nan")
        assert bool(rows.isnan().all()), "a slot was written that belongs to no sequence"
    whole = launch.k_pages._base
    assert bool(whole[0].isnan().all() and whole[..., D:].isnan().all())


@pytest.mark.parametrize("tier", [16, 32])
@pytest.mark.parametrize("extras", [False, True])
def test_a_row_of_the_kernel_keeps_its_bits_within_a_tier(
    gpu: str, tier: int, extras: bool
) -> None:
    launch = make_launch(tier, 3, 1, 16, 144, torch.bfloat16, gpu)
    expected = launch.run(gpu, None, extras).clone()
    k, v = launch.k_pages.clone(), launch.v_pages.clone()
    for rows in (slice(0, tier // 2 + 1), slice(3, tier), slice(1, tier)):
        launch.k_pages.fill_(7.0)
        launch.v_pages.fill_(7.0)
        torch.testing.assert_close(
            launch.run(gpu, None, extras, rows), expected[rows], atol=0, rtol=0
        )
        for pages, whole in ((launch.k_pages, k), (launch.v_pages, v)):
            slots = launch.slots[rows][launch.slots[rows] >= 0]
            page, offset = slots // 16, slots % 16
            torch.testing.assert_close(pages[page, offset], whole[page, offset], atol=0, rtol=0)


@pytest.mark.parametrize("extras", [False, True])
def test_the_value_of_a_row_that_is_nan_is_zero(gpu: str, extras: bool) -> None:
    """Rows that do not see it multiply it by zero; those that see it become NaN by its key."""
    launch = make_launch(17, 3, 2, 20, 40, torch.bfloat16, gpu)
    expected = launch.run(gpu, None, extras).clone()
    k, v = launch.k_pages.clone(), launch.v_pages.clone()
    launch.x[3] = float("nan")
    q = launch.run(gpu, None, extras)
    page, offset = launch.slots[3] // 16, launch.slots[3] % 16
    assert bool(q[3].isnan().all() and launch.k_pages[page, offset].isnan().all())
    assert not launch.v_pages[page, offset].any()
    for now, before in ((launch.k_pages, k), (launch.v_pages, v)):
        now[page, offset] = before[page, offset]
        torch.testing.assert_close(now, before, atol=0, rtol=0, equal_nan=True)
    others = [r for r in range(17) if r != 3]
    torch.testing.assert_close(q[others], expected[others], atol=0, rtol=0)


def test_the_kernel_names_what_does_not_fit(gpu: str) -> None:
    launch = make_launch(5, 3, 1, 16, 32, torch.bfloat16, gpu)
    with pytest.raises(ValueError, match=r"w must be \[\(Hq \+ 2 Hk\) \* D, E\]"):
        launch._replace(w=launch.w[:-1]).run(gpu, None, False)
    with pytest.raises(ValueError, match=r"slots must be \[R\]=\[5\], got \[4\]"):
        launch._replace(slots=launch.slots[:4]).run(gpu, None, False)


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(("rows", "passes"), [(5, 1), (160, 1), (193, 2)])
def test_a_weight_is_read_once_for_192_rows(gpu: str, rows: int, passes: int, extras: bool) -> None:
    launch = make_launch(rows, 3, 1, 24, 40, torch.bfloat16, gpu)
    with recorded_traffic() as traffic:
        q = launch.run(gpu, None, extras)
    assert bool((traffic.reads(launch.w) == passes).all())
    # With norms of the heads, q and K are written and read a second time.
    times = 2 if extras else 1
    assert bool((traffic.writes(q) == times).all())
    slots = launch.slots[launch.slots >= 0]
    for pages, count in ((launch.k_pages, times), (launch.v_pages, 1)):
        written = traffic.writes(pages)
        assert bool((written[slots // 16, slots % 16] == count).all())
        assert int(written.sum()) == count * slots.numel() * 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 150])
def test_without_a_norm_the_input_is_projected_as_it_is(
    gpu: str, rows: int, dtype: torch.dtype
) -> None:
    """As in the layer of EAGLE-3, whose input is two halves with a norm each."""
    launch = make_launch(rows, 3, 1, 16, 144, dtype, gpu)
    slots, positions, cos, sin = (t.to(gpu) for t in launch[6:10])
    pages = (launch.k_pages, launch.v_pages)
    with guarded_output((rows, 48), dtype, gpu) as out:
        qkv_rope_cache(
            launch.x.to(gpu),
            None,
            1e-5,
            launch.w.to(gpu),
            *pages,
            slots,
            positions,
            cos,
            sin,
            out=out.unflatten(1, (3, 16)),
        )
        found = []
        for wide in (dtype, torch.float64):
            heads = (launch.x.to(wide) @ launch.w.to(wide).T)[:, :48].unflatten(1, (3, 16))
            turns = (t[launch.positions][:, None].to(wide) for t in (launch.cos, launch.sin))
            c, s = turns
            found.append((heads * c + heads.roll(8, -1) * s).flatten(1))
        assert_within_budget(out, *found, terms=144)
