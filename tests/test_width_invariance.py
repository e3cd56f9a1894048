"""A row's bits do not depend on how many rows there are: across all tiers, for every matmul.

Exact on a GPU, where every tier multiplies with one instruction in one order. The CPU's own dot,
which ttsem multiplies with, goes by shape: there the values agree. Within a tier all is exact
everywhere; the tests of each op say so.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtpkern.cache import rotary_tables
from mtpkern.kernels.gate_up_silu import gate_up_silu
from mtpkern.kernels.linear import linear
from mtpkern.kernels.medusa_blocks import medusa_blocks
from mtpkern.kernels.qkv_rope_cache import qkv_rope_cache

E = 144
# The first rows of launches of every tier, and of two passes.
COUNTS = (20, 40, 100, 160, 250, 260)


def weight(gpu: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) / E**0.5).bfloat16().to(gpu)


def cached(gpu: str, q_norm: bool) -> Callable[[Tensor], Tensor]:
    """q, K and V of the first 16 rows, side by side."""
    cos, sin = (t.to(gpu) for t in rotary_tables(torch.ones(8), 1.0, 300))
    norms = dict.fromkeys(("q_norm", "k_norm"), weight(gpu, 16)) if q_norm else {}

    def run(x: Tensor) -> Tensor:
        k, v = weight(gpu, 20, 16, 2, 16), weight(gpu, 20, 16, 2, 16)
        rows = torch.arange(len(x), device=gpu)
        plan = k, v, rows, rows, cos, sin
        q = qkv_rope_cache(x, weight(gpu, E), 1e-5, weight(gpu, 128, E), *plan, **norms)
        return torch.cat([t[: len(x)].flatten(1) for t in (q[:16], k[0], v[0])], 1)

    return run


def runs(gpu: str) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "linear": lambda x: linear(x, weight(gpu, 48, E), residual=x[:, :48]),
        "gate_up_silu": lambda x: gate_up_silu(x, weight(gpu, E), 1e-5, weight(gpu, 64, E)),
        "qkv_rope_cache": cached(gpu, q_norm=False),
        "qkv_rope_cache with norms": cached(gpu, q_norm=True),
        "medusa_blocks": lambda x: medusa_blocks(x, weight(gpu, 2, 1, E, E), weight(gpu, 2, 1, E)),
    }


@pytest.mark.parametrize("op", runs("cpu"))
def test_a_row_keeps_its_bits_across_tiers(gpu: str, op: str) -> None:
    run, x = runs(gpu)[op], weight(gpu, max(COUNTS), E) * E**0.5
    exact = dict(atol=0, rtol=0) if torch.version.cuda else dict(atol=1e-2, rtol=2e-2)
    expected = run(x[:16])
    for count in COUNTS:
        torch.testing.assert_close(run(x[:count])[:16], expected, **exact)
    alone = run(x[:1])
    torch.testing.assert_close(alone, expected[:1], atol=0, rtol=0)
