"""gate_up_silu: its equation in float64, and rows that do not know each other."""

import pytest
import torch
import torch.nn.functional as F

from mtpkern.kernels.gate_up_silu import gate_up_silu_ref
from mtpkern.kernels.linear import pack_ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 3), (13, 7), (576, 129)])
def test_values_and_row_bits(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    width, hidden = sizes
    x, norm = torch.randn(9, width).to(dtype), torch.randn(width).to(dtype)
    gate, up = (torch.randn(hidden, width).to(dtype) / width**0.5 for _ in range(2))
    w = pack_ref(torch.cat([gate, up]))
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
