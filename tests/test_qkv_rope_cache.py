"""qkv_rope_cache: its equations in float64, written to the right slots and to no others."""

import pytest
import torch
from paged import gathered, make_paged

from mtpkern.kernels.linear import pack_ref
from mtpkern.kernels.qkv_rope_cache import qkv_rope_cache_ref

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
    plan = paged.plan(LENGTHS, rows, heads // kv_heads)
    cleared = paged.k.isnan(), paged.v.isnan()
    q = qkv_rope_cache_ref(x, norm, 1e-5, pack_ref(w, bias), paged.k[0], paged.v[0], plan)

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
    # Every other slot is as it was: still NaN, but for what the plan had cleared.
    flat = torch.zeros(paged.k[0].shape[:2], dtype=torch.bool).view(-1)
    flat[plan.slots] = True
    for was_nan, cache in zip(cleared, (paged.k, paged.v), strict=True):
        others = ~flat.view(paged.k[0].shape[:2])
        assert torch.equal(cache[0].isnan()[others], was_nan[0][others])
        assert not cache[0][~others].isnan().any()
