"""torch.ops.mtpkern.*: each operator passes torch's own checks, and a layer is one graph."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mtpkern import library
from mtpkern.cache import rotary_tables

Given = tuple[tuple[Any, ...], dict[str, Any]]


@pytest.fixture
def ops(gpu: str, plain_devices: None) -> Iterator[Any]:
    """The operators, which on a CPU run through ttsem, on the CPU's own tensors."""
    if torch.version.cuda:
        yield torch.ops.mtpkern
        return
    on_cpu = torch.library.Library("mtpkern", "IMPL")
    for name in OPERATORS:
        launcher = library._kept if name == "multi_head_projection" else getattr(library, name)
        on_cpu.impl(name, launcher, "CPU")
    yield torch.ops.mtpkern
    on_cpu._destroy()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def ids(limit: int, *shape: int) -> Tensor:
    return torch.randint(limit, shape, generator=torch.Generator().manual_seed(limit))


PAGES = torch.randperm(8, generator=torch.Generator().manual_seed(0)).view(2, 4).int()
LENGTHS = torch.tensor([5, 17])
TREE = torch.tensor([[1, 3, 5]] * 2)


def arguments() -> dict[str, list[Given]]:
    cos, sin = rotary_tables(1 / 100.0 ** (torch.arange(0, 8, 2) / 8), 1.0, 40)
    k, v = random(8, 16, 2, 8), random(8, 2, 16, 8).transpose(1, 2)
    slots = torch.tensor([3, -1, 40]), torch.tensor([1, 0, 30])
    qkv = random(3, 12), random(12), 1e-5, random(64, 12), k, v, *slots, cos, sin
    extras = dict(bias=random(64), q_norm=random(8), k_norm=random(8))
    attention = random(2, 3, 4, 8), k.nan_to_num(), v, PAGES, LENGTHS
    caches = random(2, 8, 16, 2, 8), random(2, 8, 2, 16, 8).transpose(2, 3), PAGES
    rollback = *caches, LENGTHS.clone(), torch.tensor([2, 0])
    path = dict(path=torch.tensor([[0, 2, 1]] * 2), active=torch.tensor([1, 1]))
    everything = dict(top_k=3, given=ids(31, 3, 2), logits_rows=2, token_ids=torch.arange(31) * 2)
    plan = dict(active=torch.tensor([1, 0]), tree=TREE)
    mlp = random(3, 12), random(12), 1e-5, random(20, 12)
    return {
        "rms_norm": [((random(3, 12), random(12), 1e-5), {})],
        "linear": [
            ((random(3, 12), random(7, 12)), {}),
            ((random(3, 12), random(7, 12), random(7)), dict(residual=random(3, 7))),
        ],
        "gate_up_silu": [(mlp, {}), ((*mlp, random(20)), {})],
        "qkv_rope_cache": [(qkv, {}), (qkv, extras)],
        "verify_attention": [
            (attention, {}),
            (attention, dict(tree=TREE, window=9, scale=0.5)),
        ],
        "medusa_blocks": [((random(3, 12), random(2, 2, 12, 12), random(2, 2, 12)), {})],
        "multi_head_projection": [
            ((random(3, 12), random(31, 12)), {}),
            ((random(3, 12), random(31, 12)), everything),
        ],
        "accept": [((ids(2, 2, 3), ids(2, 2, 3)), {})],
        "kv_rollback": [(rollback, {}), (rollback, path)],
        "sample": [((random(3, 31),), {}), ((random(3, 31), torch.arange(31) + 5), {})],
        "ngram": [((ids(3, 2, 40), torch.tensor([30, 2]), 4), {})],
        "window_slots": [((LENGTHS, PAGES, 3, 16), {}), ((LENGTHS, PAGES, 3, 16), plan)],
    }


OPERATORS = list(arguments())


def test_every_operator_is_checked_here() -> None:
    registered = {name.split("::")[1].split(".")[0] for name in library._library._op_defs}
    assert registered == set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_schema_fake_kernel_and_mutation_are_as_declared(gpu: str, ops: Any, name: str) -> None:
    for args, options in arguments()[name]:
        args = tuple(a.to(gpu) if isinstance(a, Tensor) else a for a in args)
        options = {k: v.to(gpu) if isinstance(v, Tensor) else v for k, v in options.items()}
        torch.library.opcheck(getattr(ops, name).default, args, options)


def test_a_layer_compiles_as_one_graph_and_gives_what_it_gives_without(gpu: str, ops: Any) -> None:
    E, F, Hq, Hk, D = 24, 40, 4, 2, 8
    cos, sin = (t.to(gpu) for t in rotary_tables(torch.ones(D // 2), 1.0, 64))
    w = [random(*shape).to(gpu) / 5 for shape in ((64, E), (E, Hq * D), (2 * F, E), (E, F))]
    norm, vocabulary, pages = random(E).to(gpu), random(31, E).to(gpu), PAGES.to(gpu)

    def step(x: Tensor, k: Tensor, v: Tensor, window: Tensor, lengths: Tensor) -> Tensor:
        slots, positions = ops.window_slots(lengths, pages, 3, 16)
        q = ops.qkv_rope_cache(x, norm, 1e-5, w[0], k[0], v[0], slots, positions, cos, sin)
        attended = ops.verify_attention(q.view(2, 3, Hq, D), k[0], v[0], pages, lengths)
        x = ops.linear(attended.view(6, -1), w[1], residual=x)
        x = ops.linear(ops.gate_up_silu(x, norm, 1e-5, w[2]), w[3], residual=x)
        target = ops.multi_head_projection(ops.rms_norm(x, norm, 1e-5), vocabulary)[1]
        accepted, bonus = ops.accept(window, target.view(2, 3))
        ops.kv_rollback(k, v, pages, lengths, accepted)
        return bonus + 0 * accepted

    def inputs() -> list[Tensor]:
        caches = random(1, 8, 16, Hk, D), random(1, 8, 16, Hk, D) + 1
        return [t.to(gpu) for t in (random(6, E), *caches, ids(31, 2, 3), LENGTHS.clone())]

    eager, compiled = inputs(), inputs()
    expected = step(*eager)
    graph = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(graph(*compiled), expected)
    for changed, as_eager in zip(compiled, eager, strict=True):
        torch.testing.assert_close(changed, as_eager, atol=0, rtol=0)
    assert not torch.equal(eager[4].cpu(), LENGTHS)
