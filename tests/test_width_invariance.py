"""A row's bits do not depend on how many rows there are: across all tiers, for every matmul.

At the depths of real models and two column tiles wide: an order of sums that follows the tile shows
only where a row has several tiles of inputs. Outputs are float32, since bfloat16 hides most of it.
On a CPU the kernels' own IR is executed, with dots that add as a tensor core does
(tests/tensor_core.py).
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from tensor_core import dots_of_sixteen
from torch import Tensor

from mtpkern.cache import rotary_tables
from mtpkern.kernels.gate_up_silu import gate_up_silu
from mtpkern.kernels.linear import linear
from mtpkern.kernels.qkv_rope_cache import qkv_rope_cache

# The inner sizes of models of 1B and 8B parameters, and one that is no multiple of a tile.
DEPTHS = (144, 2048, 4096, 8192, 14336)
# The first rows of launches of every tier.
COUNTS = (1, 20, 40, 100, 160, 250)
N = 64


@pytest.fixture(autouse=True)
def tensor_core(gpu: str) -> Iterator[None]:
    with dots_of_sixteen():
        yield


def weight(gpu: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).bfloat16().to(gpu)


def rows(gpu: str, count: int, depth: int) -> Tensor:
    return weight(gpu, count, depth) * depth**0.5


def run_linear(x: Tensor) -> Tensor:
    gpu, (count, depth) = str(x.device), x.shape
    out = torch.empty(count, N, device=gpu)
    return linear(x, weight(gpu, N, depth), residual=x[:, :N], out=out)


def run_gate_up_silu(x: Tensor) -> Tensor:
    gpu, (count, depth) = str(x.device), x.shape
    out = torch.empty(count, N // 2, device=gpu)
    return gate_up_silu(x, 1 + weight(gpu, depth), 1e-5, weight(gpu, N, depth), out=out)


def run_qkv_rope_cache(x: Tensor) -> Tensor:
    """q, K and V of the first 16 rows, side by side."""
    gpu, (count, depth) = str(x.device), x.shape
    cos, sin = (t.to(gpu) for t in rotary_tables(torch.ones(8), 1.0, 300))
    k, v = (torch.zeros(20, 16, 1, 16, device=gpu) for _ in range(2))
    at = torch.arange(count, device=gpu)
    out = torch.empty(count, N // 16 - 2, 16, device=gpu)
    w = weight(gpu, N, depth)
    qkv_rope_cache(x, 1 + weight(gpu, depth), 1e-5, w, k, v, at, at, cos, sin, out=out)
    return torch.cat([t.flatten(1) for t in (out[:16], k[0, : len(x)], v[0, : len(x)])], 1)


RUNS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": run_linear,
    "gate_up_silu": run_gate_up_silu,
    "qkv_rope_cache": run_qkv_rope_cache,
}


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("op", RUNS)
def test_a_row_keeps_its_bits_across_tiers(gpu: str, op: str, depth: int) -> None:
    run, x = RUNS[op], rows(gpu, max(COUNTS), depth)
    expected = run(x[:16])
    for count in COUNTS:
        found = run(x[:count])[:16]
        torch.testing.assert_close(found, expected[: len(found)], atol=0, rtol=0)
