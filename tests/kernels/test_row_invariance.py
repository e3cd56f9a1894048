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
from mtpkern.kernels import _launch
from mtpkern.kernels.gate_up_silu import gate_up_silu
from mtpkern.kernels.linear import linear
from mtpkern.kernels.medusa_blocks import medusa_blocks
from mtpkern.kernels.multi_head_projection import multi_head_projection
from mtpkern.kernels.qkv_rope_cache import qkv_rope_cache

# The inner sizes of models of 1B and 8B parameters.
DEPTHS = (2048, 4096, 8192, 14336)
# The first rows of launches of every tier.
COUNTS = (1, 20, 40, 100, 160)
# The multiprocessors that a launch should fill: so few that two column tiles do and the tiles are
# as wide as a real model's; and as many as there are, so that the inputs are split.
FILLS = (2, _launch.FILL)


@pytest.fixture(autouse=True)
def tensor_core(gpu: str) -> Iterator[None]:
    with dots_of_sixteen():
        yield


def weight(gpu: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).bfloat16().to(gpu)


def run_linear(x: Tensor, N: int) -> Tensor:
    gpu, (count, depth) = str(x.device), x.shape
    out = torch.empty(count, N, device=gpu)
    return linear(x, weight(gpu, N, depth), residual=x[:, :N], out=out)


def run_gate_up_silu(x: Tensor, N: int) -> Tensor:
    gpu, (count, depth) = str(x.device), x.shape
    out = torch.empty(count, N // 2, device=gpu)
    return gate_up_silu(x, 1 + weight(gpu, depth), 1e-5, weight(gpu, N, depth), out=out)


def run_qkv_rope_cache(x: Tensor, N: int, with_norms: bool = False) -> Tensor:
    """q, K and V of the first 16 rows, side by side."""
    gpu, (count, depth) = str(x.device), x.shape
    cos, sin = (t.to(gpu) for t in rotary_tables(torch.ones(8), 1.0, 300))
    k, v = (torch.zeros(20, 16, 1, 16, device=gpu) for _ in range(2))
    at = torch.arange(count, device=gpu)
    norms = dict.fromkeys(("q_norm", "k_norm"), weight(gpu, 16)) if with_norms else {}
    out = torch.empty(count, N // 16 - 2, 16, device=gpu)
    plan = k, v, at, at, cos, sin
    given = (x, 1 + weight(gpu, depth), 1e-5, weight(gpu, N, depth))
    qkv_rope_cache(*given, *plan, **norms, out=out)
    return torch.cat([t.flatten(1) for t in (out[:16], k[0, :count], v[0, :count])], 1)


def run_multi_head_projection(x: Tensor, N: int) -> Tensor:
    kept = multi_head_projection(x, weight(str(x.device), N, x.shape[1]), logits_rows=len(x))
    assert kept.logits is not None
    return torch.cat([kept.logits, kept.logsumexp[:, None]], 1)


def run_medusa_blocks(x: Tensor, N: int) -> Tensor:
    gpu, (count, E) = str(x.device), x.shape
    out = torch.empty(2, count, E, device=gpu).transpose(0, 1)
    return medusa_blocks(x, weight(gpu, 1, 1, E, E), weight(gpu, 1, 1, E), out=out).flatten(1)


def run_qkv_with_norms(x: Tensor, N: int) -> Tensor:
    return run_qkv_rope_cache(x, N, with_norms=True)


def assert_equal_across_tiers(
    run: Callable[[Tensor, int], Tensor], gpu: str, depth: int, N: int
) -> None:
    x = weight(gpu, max(COUNTS), depth) * depth**0.5
    expected = run(x[:16], N)
    for count in COUNTS:
        found = run(x[:count], N)[:16]
        torch.testing.assert_close(found, expected[: len(found)], atol=0, rtol=0)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_row_keeps_its_bits_across_tiers(
    gpu: str, depth: int, fill: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_launch, "FILL", fill)
    N = 2 * _launch.column_tile(256, depth, 128, 2)
    assert (N == 256) == (fill == 2)
    assert_equal_across_tiers(run_linear, gpu, depth, N)


@pytest.mark.parametrize(
    "run", [run_gate_up_silu, run_qkv_rope_cache, run_qkv_with_norms, run_multi_head_projection]
)
def test_what_follows_the_sums_keeps_a_row_s_bits_too(
    gpu: str, run: Callable[[Tensor, int], Tensor]
) -> None:
    assert_equal_across_tiers(run, gpu, 4096, 64)


@pytest.mark.parametrize("run", [run_linear, run_multi_head_projection])
def test_the_tiles_of_wgmma_keep_the_order_of_the_sums(
    gpu: str, run: Callable[[Tensor, int], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU; a GPU with wgmma has these tiles in all tests."""
    if torch.version.cuda is not None:
        pytest.skip("another GPU would multiply these tiles with its own instructions")
    monkeypatch.setattr(_launch, "compute_capability", lambda: 90)
    monkeypatch.setattr(_launch, "FILL", 2)
    assert_equal_across_tiers(run, gpu, 2048, 256)


def run_linear_in_float32(x: Tensor, N: int) -> Tensor:
    return linear(x.float(), weight(str(x.device), N, x.shape[1]).float())


def test_float32_keeps_a_row_s_bits_with_tiles_of_its_own(gpu: str) -> None:
    assert_equal_across_tiers(run_linear_in_float32, gpu, 2048, 128)


def test_blocks_of_heads_keep_a_row_s_bits(gpu: str) -> None:
    assert_equal_across_tiers(run_medusa_blocks, gpu, 144, 144)
