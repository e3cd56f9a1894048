"""medusa_blocks: every head's residual blocks, and a row's bits the same beside any others."""

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import assert_within_budget, guarded_output
from torch import Tensor

from mtpkern.kernels.medusa_blocks import medusa_blocks, medusa_blocks_ref


def make(heads: int, depth: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    w = torch.randn(heads, depth, width, width) / width**0.5
    return w.to(dtype), torch.randn(heads, depth, width).to(dtype)


def equation(normed: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """The op written out, all in one dtype."""
    rows = [normed]
    for blocks, biases in zip(w, bias, strict=True):
        x = normed
        for w_d, bias_d in zip(blocks, biases, strict=True):
            x = x + F.silu(x @ w_d.T + bias_d)
        rows.append(x)
    return torch.stack(rows, 1)


# R, H, depth, E: empty, one row, past a tier, a tail, several passes; odd, prime and real.
LAUNCHES = [
    (0, 2, 1, 16),
    (1, 1, 1, 1),
    (5, 3, 1, 13),
    (5, 3, 2, 40),
    (17, 2, 2, 65),
    (133, 1, 3, 33),
    (257, 2, 1, 17),
    (5, 0, 1, 24),
    (5, 2, 0, 24),
    (5, 2, 1, 192),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_values_are_within_twice_the_error_of_the_dtype(
    gpu: str, launch: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    R, H, depth, E = launch
    torch.manual_seed(1)
    normed, (w, bias) = torch.randn(R, E).to(dtype), make(H, depth, E, dtype)
    truth, in_dtype = equation(*(t.double() for t in (normed, w, bias))), equation(normed, w, bias)
    terms = max(E * depth, 1)
    assert_within_budget(medusa_blocks_ref(normed, w, bias), in_dtype, truth, terms=terms)
    with guarded_output((R, 1 + H, E), dtype, gpu) as out:
        medusa_blocks(normed.to(gpu), w.to(gpu), bias.to(gpu), out=out)
        torch.testing.assert_close(out[:, 0].cpu(), normed, atol=0, rtol=0)
        assert_within_budget(out, in_dtype, truth, terms=terms)


def test_the_rows_of_the_language_model_come_first_in_memory_and_may_be_there_already(
    gpu: str,
) -> None:
    torch.manual_seed(2)
    normed, (w, bias) = torch.randn(5, 24).to(gpu), make(3, 2, 24, torch.float32)
    w, bias = w.to(gpu), bias.to(gpu)
    expected = medusa_blocks(normed, w, bias)
    memory = expected.transpose(0, 1)
    assert memory.is_contiguous() and torch.equal(memory[0], normed)
    out = torch.full((4, 5, 24), float("nan"), device=gpu)
    out[0] = normed
    result = medusa_blocks(out[0], w, bias, out=out.transpose(0, 1))
    assert result.data_ptr() == out.data_ptr()
    torch.testing.assert_close(result, expected, atol=0, rtol=0)


@pytest.mark.parametrize("tier", [16, 32])
def test_a_row_keeps_its_bits_within_a_tier(gpu: str, tier: int) -> None:
    torch.manual_seed(3)
    normed, (w, bias) = torch.randn(tier, 72).bfloat16().to(gpu), make(2, 2, 72, torch.bfloat16)
    w, bias = w.to(gpu), bias.to(gpu)
    expected = medusa_blocks(normed, w, bias)
    for count in (tier // 2 + 1, tier - 1):
        for shift in (0, 3):
            rows = medusa_blocks(normed.roll(shift, 0)[:count], w, bias)
            torch.testing.assert_close(rows, expected.roll(shift, 0)[:count], atol=0, rtol=0)
    normed[1:] = float("nan")
    torch.testing.assert_close(medusa_blocks(normed, w, bias)[0], expected[0], atol=0, rtol=0)


def test_arguments_that_do_not_fit_are_named() -> None:
    normed, w, bias = torch.randn(5, 24), torch.randn(3, 1, 24, 24), torch.randn(3, 1, 24)
    with pytest.raises(ValueError, match=r"w must be \[H, depth, E, E\]=\[3, 1, 25, 25\]"):
        medusa_blocks(torch.randn(5, 25), w, bias)
    with pytest.raises(ValueError, match=r"bias must be \[H, depth, E\]=\[3, 1, 24\]"):
        medusa_blocks(normed, w, bias[:2])
    with pytest.raises(ValueError, match=r"out must be \[R, 1 \+ H, E\]=\[5, 4, 24\]"):
        medusa_blocks(normed, w, bias, out=torch.empty(5, 3, 24))
