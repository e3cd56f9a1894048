"""gate_up_silu: its equation in float64, and a row's bits, which do not depend on other rows."""

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import assert_within_budget, guarded_output
from traffic import recorded_traffic

from mtpkern.kernels.gate_up_silu import gate_up_silu, gate_up_silu_ref


def test_a_row_keeps_its_bits_where_threads_share_wide_rows() -> None:
    """Three threads would split five rows of 14,336 in the middle of a vector."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        w = torch.randn(2 * 14336, 16, generator=torch.Generator().manual_seed(1))
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
        norm = torch.ones(16)
        together = gate_up_silu_ref(x, norm, 1e-5, w)
        for row, alone in enumerate(x.split(1)):
            assert torch.equal(together[row : row + 1], gate_up_silu_ref(alone, norm, 1e-5, w))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 3), (13, 7), (576, 129)])
def test_values_and_row_bits(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    width, hidden = sizes
    x, norm = torch.randn(9, width).to(dtype), torch.randn(width).to(dtype)
    gate, up = (torch.randn(hidden, width).to(dtype) / width**0.5 for _ in range(2))
    w = torch.cat([gate, up])
    out = gate_up_silu_ref(x, norm, 1e-5, w)
    wide = x.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.double()
    truth = F.silu(normed @ gate.double().T) * (normed @ up.double().T)
    torch.testing.assert_close(
        out.double(), truth, atol=32 * torch.finfo(dtype).eps, rtol=8 * torch.finfo(dtype).eps
    )
    for count in range(1, 10):
        part = gate_up_silu_ref(x[:count], norm, 1e-5, w)
        torch.testing.assert_close(part, out[:count], atol=0, rtol=0)


# R, F, E: empty, one row, one past a tile and a tier, a tail, several passes; odd, prime and real.
LAUNCHES = [(0, 16, 16), (1, 1, 1), (5, 7, 13), (17, 33, 129), (133, 17, 65), (257, 16, 40)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("launch", [*LAUNCHES, (5, 96, 192)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_kernel_is_within_twice_the_error_of_the_dtype(
    gpu: str, launch: tuple[int, int, int], dtype: torch.dtype, with_bias: bool
) -> None:
    R, F, E = launch
    torch.manual_seed(3)
    x, norm_w = 3 * torch.randn(R, E), 1 + torch.randn(E) / 4
    w, bias = torch.randn(2 * F, E) / E**0.5, torch.randn(2 * F) * with_bias
    x, norm_w, w, bias = (t.to(dtype) for t in (x, norm_w, w, bias))

    def definition(x, norm_w, w, bias):
        normed = torch.nn.functional.rms_norm(x, (E,), norm_w, 1e-5)
        gate, up = (normed @ w.T + bias).chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    truth = definition(*(t.double() for t in (x, norm_w, w, bias)))
    given = bias.to(gpu) if with_bias else None
    with guarded_output((R, F), dtype, gpu) as out:
        gate_up_silu(x.to(gpu), norm_w.to(gpu), 1e-5, w.to(gpu), given, out=out)
        assert_within_budget(out, definition(x, norm_w, w, bias), truth, terms=E)


@pytest.mark.parametrize("tier", [16, 32])
def test_a_row_of_the_kernel_keeps_its_bits_within_a_tier(gpu: str, tier: int) -> None:
    torch.manual_seed(4)
    x, norm_w, w = torch.randn(tier, 144), torch.rand(144), torch.randn(50, 144)
    x, norm_w, w = (t.bfloat16().to(gpu) for t in (x, norm_w, w))
    expected = gate_up_silu(x, norm_w, 1e-5, w)
    for count in (tier // 2 + 1, tier - 1):
        for shift in (0, 3):
            rows = gate_up_silu(x.roll(shift, 0)[:count], norm_w, 1e-5, w)
            torch.testing.assert_close(rows, expected.roll(shift, 0)[:count], atol=0, rtol=0)
    x[1:] = float("nan")
    torch.testing.assert_close(gate_up_silu(x, norm_w, 1e-5, w)[0], expected[0], atol=0, rtol=0)


@pytest.mark.parametrize(("rows", "passes"), [(1, 1), (160, 1), (193, 2)])
def test_a_weight_is_read_once_for_192_rows(gpu: str, rows: int, passes: int) -> None:
    F, E = 33, 70
    x, norm_w = torch.randn(rows, E).bfloat16().to(gpu), torch.rand(E).bfloat16().to(gpu)
    w = torch.randn(2 * F, E).bfloat16().to(gpu)
    with recorded_traffic() as traffic:
        out = gate_up_silu(x, norm_w, 1e-5, w)
    assert bool((traffic.reads(w) == passes).all())
    assert bool((traffic.reads(x) == 1).all()), "by the norm"
    assert bool((traffic.writes(out) == 1).all())
