"""linear: values within the budget, and a row's bits the same beside any other rows."""

from types import SimpleNamespace

import pytest
import torch
from kernel_checks import assert_within_budget, guarded_output
from traffic import recorded_traffic

from mtpkern.kernels import linear as linear_module
from mtpkern.kernels._launch import column_tile, row_tier
from mtpkern.kernels.linear import linear, linear_ref

# Shapes odd and prime, one past a tile, and one real one.
SHAPES = [(1, 1), (7, 13), (65, 33), (129, 64), (576, 1536)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_at_every_row_count_and_position(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    given = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    x = torch.randn(300, shape[1]).to(dtype)
    alone = torch.cat([linear_ref(row[None], *given) for row in x[:40]])
    for count in (1, 2, 3, 5, 9, 17, 33, 40, 77, 129, 300):
        here = linear_ref(x[:count], *given)[:40]
        torch.testing.assert_close(here, alone[:count], atol=0, rtol=0)
        shifted = linear_ref(x.roll(11, 0)[: count + 11], *given)[11:51]
        torch.testing.assert_close(shifted, alone[: len(shifted)], atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_within_twice_the_error_of_the_dtype(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    w, bias, x = torch.randn(shape), torch.randn(shape[0]), torch.randn(5, shape[1])
    w, bias, x = (t.to(dtype) for t in (w, bias, x))
    residual = torch.randn(5, shape[0]).to(dtype)
    truth = x.double() @ w.double().T + bias.double()
    in_dtype = x @ w.T + bias
    budget = 2 * (in_dtype.double() - truth).abs().max() + torch.finfo(dtype).eps
    assert (linear_ref(x, w, bias).double() - truth).abs().max() <= budget
    # One rounding, of the sum with the residual.
    added, truth = linear_ref(x, w, bias, residual=residual), truth + residual.double()
    budget += torch.finfo(dtype).eps * truth.abs().max()
    assert (added.double() - truth).abs().max() <= budget
    wide = linear_ref(x.float(), w, bias) + residual.float()
    torch.testing.assert_close(added, wide.to(dtype), atol=0, rtol=0)


def test_no_rows_give_no_rows() -> None:
    assert linear_ref(torch.empty(0, 13), torch.randn(7, 13)).shape == (0, 7)


def test_shapes_that_do_not_fit_are_named() -> None:
    w = torch.randn(7, 13)
    for multiply in (linear, linear_ref):
        with pytest.raises(ValueError, match=r"w must be \[N, K\]=\[7, 12\], got \[7, 13\]"):
            multiply(torch.randn(5, 12), w)
        with pytest.raises(ValueError, match=r"bias must be \[N\]=\[7\], got \[6\]"):
            multiply(torch.randn(5, 13), w, torch.randn(6))


# R, N, K: empty, one row, one past a tier, several passes; odd, prime and real.
LAUNCHES = [
    (0, 16, 16),
    (1, 1, 1),
    (5, 7, 13),
    (16, 48, 128),
    (17, 65, 129),
    (33, 33, 40),
    (160, 33, 65),
    (257, 17, 33),
    (5, 576, 192),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("extras", [False, True])
def test_the_kernel_is_within_twice_the_error_of_the_dtype(
    gpu: str, launch: tuple[int, int, int], dtype: torch.dtype, extras: bool
) -> None:
    R, N, K = launch
    torch.manual_seed(1)
    x, w = torch.randn(R, K).to(dtype), torch.randn(N, K).to(dtype)
    bias, residual = torch.randn(N).to(dtype), torch.randn(R, N).to(dtype)
    truth = x.double() @ w.double().T
    in_dtype = x @ w.T
    if extras:
        truth, in_dtype = truth + bias + residual, in_dtype + bias + residual
    given = (bias.to(gpu), residual.to(gpu)) if extras else (None, None)
    with guarded_output((R, N), dtype, gpu) as out:
        linear(x.to(gpu), w.to(gpu), given[0], residual=given[1], out=out)
        assert_within_budget(out, in_dtype, truth, terms=K)


@pytest.mark.parametrize("tier", [16, 32])
def test_a_row_of_the_kernel_keeps_its_bits_within_a_tier(gpu: str, tier: int) -> None:
    torch.manual_seed(2)
    w, x = torch.randn(48, 144).bfloat16().to(gpu), torch.randn(tier, 144).bfloat16().to(gpu)
    expected = linear(x, w)
    for count in (tier // 2 + 1, tier - 1):
        for shift in (0, 3):
            rows = x.roll(shift, 0)[:count]
            torch.testing.assert_close(
                linear(rows, w), expected.roll(shift, 0)[:count], atol=0, rtol=0
            )
    x[1:] = float("nan")
    torch.testing.assert_close(linear(x, w)[0], expected[0], atol=0, rtol=0)


@pytest.mark.parametrize(("rows", "passes"), [(1, 1), (40, 1), (160, 1), (192, 1), (193, 2)])
def test_a_weight_is_read_once_for_192_rows(gpu: str, rows: int, passes: int) -> None:
    N, K = 33, 70
    x, w = torch.randn(rows, K).bfloat16().to(gpu), torch.randn(N, K).bfloat16().to(gpu)
    bias, residual = torch.randn(N).bfloat16().to(gpu), torch.randn(rows, N).bfloat16().to(gpu)
    with recorded_traffic() as traffic:
        out = linear(x, w, bias, residual=residual)
    assert bool((traffic.reads(w) == passes).all())
    assert bool((traffic.reads(x) == -(-N // column_tile(N, K, row_tier(rows), 2))).all())
    assert bool((traffic.reads(bias) == (1 if rows <= 16 else rows)).all())
    assert bool((traffic.reads(residual) == 1).all())
    assert bool((traffic.writes(out) == 1).all())


def test_a_profiler_is_told_what_a_launch_reads_and_computes() -> None:
    pytest.importorskip("triton")
    w = torch.empty(6, 8, dtype=torch.bfloat16)
    given = {"w_ptr": w, "R": 5, "x_ptr": torch.empty(5, 8)}
    costs = linear_module._linear_kernel.compiled.launch_metadata(
        (1,), SimpleNamespace(name="it"), given
    )
    assert costs == {"name": "it", "bytes": 96, "flops16": 480}
