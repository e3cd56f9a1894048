"""rope_cache: against its equation in float64, and nothing else of the cache touched."""

import pytest
import torch
from kernel_checks import assert_within_budget, guarded_output

from mtpkern.cache import rotary_tables
from mtpkern.kernels.rope_cache import rope_cache, rope_cache_ref

EPS = 1e-5
SHAPES = [(1, 1, 1, 2), (5, 6, 2, 10), (7, 9, 3, 64), (3, 17, 1, 34)]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_within_twice_the_error_of_the_dtype(
    gpu: str, shape: tuple[int, int, int, int], dtype: torch.dtype, norm: bool
) -> None:
    R, Hq, Hk, D = shape
    torch.manual_seed(3)
    qkv = torch.randn(R, (Hq + 2 * Hk) * D + 8).to(dtype)[:, :-8]
    gains = {}
    if norm:
        gains = {name: (1 + torch.randn(D) / 9).to(dtype) for name in ("q_norm", "k_norm")}
    slots = torch.randperm(4 * 64)[:R]
    slots[R // 2] = -1
    positions = 3 + 11 * torch.arange(R)
    tables = rotary_tables(10.0 ** -torch.arange(D // 2), 1.0, 3 + 11 * R)
    pages = (4, 64, Hk, D)

    def expected(wide: torch.dtype) -> list[torch.Tensor]:
        k, v = torch.full(pages, 7, dtype=wide), torch.full(pages, 7, dtype=wide)
        given = {name: gain.to(wide) for name, gain in gains.items()}
        plan = (slots, positions, *(table.to(wide) for table in tables))
        heads = qkv.to(wide).reshape(R, -1)
        return [rope(heads, k, v, *plan, **given, wide=wide), k, v]

    truth, in_dtype = expected(torch.float64), expected(dtype)
    by_head = (Hk, 4, 64, D)  # V's strides are all other than K's
    with (
        guarded_output((R, Hq * D), dtype, gpu) as flat,
        guarded_output(pages, dtype, gpu) as k,
        guarded_output(by_head, dtype, gpu) as v_by_head,
    ):
        out, v = flat.unflatten(1, (Hq, D)), v_by_head.permute(1, 2, 0, 3)
        for cache in (k, v):
            cache.fill_(7)
        placed = [t.to(gpu) for t in (slots, positions, *tables)]
        given = {name: gain.to(gpu) for name, gain in gains.items()}
        rope_cache(qkv.to(gpu), k, v, *placed, **given, eps=EPS, out=out)
        for mine, exact, rough in zip((out, k, v), truth, in_dtype, strict=True):
            assert_within_budget(mine, rough, exact, terms=D)


def rope(
    qkv: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    wide: torch.dtype,
    **gains: torch.Tensor,
) -> torch.Tensor:
    """The op written out, all in one dtype."""
    Hk, D = k.shape[2:]
    heads = qkv.view(len(qkv), -1, D)
    q, new_k, new_v = heads.split([heads.shape[1] - 2 * Hk, Hk, Hk], 1)
    if gains:
        q, new_k = (
            part * torch.rsqrt(part.square().mean(-1, keepdim=True) + EPS) * gain
            for part, gain in zip((q, new_k), gains.values(), strict=True)
        )

    def turned(x: torch.Tensor) -> torch.Tensor:
        return x * cos[positions, None] + x.roll(D // 2, -1) * sin[positions, None]

    for r, slot in enumerate(slots.tolist()):
        if slot >= 0:
            k.view(-1, Hk, D)[slot] = turned(new_k)[r].to(wide)
            v.view(-1, Hk, D)[slot] = new_v[r]
    return turned(q).to(wide)


@pytest.mark.parametrize("norm", [False, True])
def test_the_definition_is_the_equation(norm: bool) -> None:
    R, Hq, Hk, D = 5, 6, 2, 10
    torch.manual_seed(4)
    qkv = torch.randn(R, (Hq + 2 * Hk) * D)
    gains = {n: 1 + torch.randn(D) / 9 for n in ("q_norm", "k_norm")} if norm else {}
    slots, positions = torch.tensor([3, -1, 200, 7, 64]), torch.arange(5) * 7
    tables = rotary_tables(10.0 ** -torch.arange(D // 2), 1.0, 40)
    mine, theirs = ([torch.zeros(4, 64, Hk, D) for _ in range(2)] for _ in range(2))
    q = rope_cache_ref(qkv, *mine, slots, positions, *tables, **gains, eps=EPS)
    expected = rope(qkv, *theirs, slots, positions, *tables, **gains, wide=torch.float32)
    torch.testing.assert_close(q, expected)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
