"""rms_norm: its equation in float64, and a row's bits, which do not depend on other rows."""

import pytest
import torch
from kernel_checks import assert_within_budget, guarded_output

from mtpkern.kernels.rms_norm import rms_norm, rms_norm_ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 576, 4099])
def test_values_and_row_bits(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(9, width).to(dtype) * 3, torch.randn(width).to(dtype)
    truth = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * w.double()
    out = rms_norm_ref(x, w, 1e-5)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), truth, atol=1e-6, rtol=2 * torch.finfo(dtype).eps)
    for count in range(1, 10):
        torch.testing.assert_close(rms_norm_ref(x[:count], w, 1e-5), out[:count], atol=0, rtol=0)
        torch.testing.assert_close(
            rms_norm_ref(x[count - 1], w, 1e-5), out[count - 1], atol=0, rtol=0
        )


def test_a_row_of_zeros_stays_zero() -> None:
    assert (rms_norm_ref(torch.zeros(1, 8), torch.ones(8), 1e-5) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 13), (17, 576), (3, 1031)])
def test_the_kernel_is_within_twice_the_error_of_the_dtype(
    gpu: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(5)
    x, w = (3 * torch.randn(shape)).to(dtype), torch.randn(shape[1]).to(dtype)
    truth = torch.nn.functional.rms_norm(x.double(), shape[1:], w.double(), 1e-5)
    with guarded_output(shape, dtype, gpu) as out:
        rms_norm(x.to(gpu), w.to(gpu), 1e-5, out=out)
        in_dtype = torch.nn.functional.rms_norm(x, shape[1:], w, 1e-5)
        assert_within_budget(out, in_dtype, truth, terms=shape[1])
        alone = rms_norm(x[-1:].to(gpu), w.to(gpu), 1e-5)
        torch.testing.assert_close(alone, out[-1:], atol=0, rtol=0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.kernel)])
def test_rows_looked_up_are_the_rows_themselves(
    device: str, request: pytest.FixtureRequest
) -> None:
    """Written to one half of a wider row, as a head's pairs are; no other column changes."""
    where = request.getfixturevalue("gpu") if device == "gpu" else device
    norm = rms_norm if device == "gpu" else rms_norm_ref
    torch.manual_seed(6)
    table, w = torch.randn(50, 72).to(where), torch.randn(72).to(where)
    ids = torch.tensor([49, 0, 7, 7, 31]).to(where)
    out = torch.full((5, 144), 3.5).to(where)
    norm(table, w, 1e-5, ids=ids, out=out[:, 72:])
    torch.testing.assert_close(out[:, 72:], norm(table[ids], w, 1e-5), atol=0, rtol=0)
    assert (out[:, :72] == 3.5).all()
