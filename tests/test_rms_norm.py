"""rms_norm: its equation in float64, and rows that do not know each other."""

import pytest
import torch

from mtpkern.kernels.rms_norm import rms_norm_ref


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
