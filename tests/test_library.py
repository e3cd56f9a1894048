"""torch.ops.mtpkern.*, kernels and definitions: torch's own checks, and a layer is one graph."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mtpkern import definitions, library
from mtpkern.cache import rotary_tables

Given = tuple[tuple[Any, ...], dict[str, Any]]


@pytest.fixture
def ops(gpu: str, plain_devices: None) -> Iterator[Any]:
    """The operators as kernels, which without a GPU run through ttsem, on the CPU's tensors."""
    if torch.version.cuda:
        yield torch.ops.mtpkern
        return
    on_cpu = torch.library.Library("mtpkern", "IMPL")
    for name in OPERATORS:
        launcher = library._kept if name == "multi_head_projection" else getattr(library, name)
        on_cpu.impl(name, launcher, "CPU", allow_override=True)
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
    cached = k, v, *slots, cos, sin
    qkv = random(3, 12), random(12), 1e-5, random(64, 12), *cached
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
        "rope_cache": [
            ((random(3, 64), *cached), {}),
            ((random(3, 64), *cached), dict(q_norm=random(8), k_norm=random(8), eps=1e-5)),
        ],
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


def moved(given: Given, device: str) -> Given:
    """The same arguments in memory of their own on `device`, with their strides."""

    def there(value: Any) -> Any:
        return value.clone().to(device) if isinstance(value, Tensor) else value

    return tuple(map(there, given[0])), {name: there(value) for name, value in given[1].items()}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_kernel_is_declared_as_it_is(gpu: str, ops: Any, name: str) -> None:
    """Schema, fake kernel, mutation: torch's own checks."""
    for given in arguments()[name]:
        torch.library.opcheck(getattr(ops, name).default, *moved(given, gpu))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_a_definition_is_declared_as_it_is(name: str) -> None:
    for given in arguments()[name]:
        torch.library.opcheck(getattr(torch.ops.mtpkern, name).default, *moved(given, "cpu"))


@pytest.mark.parametrize("name", OPERATORS)
def test_a_definition_gives_what_the_kernel_gives(gpu: str, ops: Any, name: str) -> None:
    definition = getattr(definitions, name, None) or getattr(library, f"{name}_ref")
    for given in arguments()[name]:
        (on_gpu, options), (on_cpu, same) = moved(given, gpu), moved(given, "cpu")
        pairs = [(getattr(ops, name)(*on_gpu, **options), definition(*on_cpu, **same))]
        pairs += zip(on_gpu, on_cpu, strict=True)  # what was written in place
        for from_kernel, from_definition in pairs:
            torch.testing.assert_close(
                from_kernel, from_definition, check_device=False, check_stride=True, equal_nan=True
            )


class Layer(NamedTuple):
    """A decoder layer and the end of a step, as code under torch.compile writes them."""

    w: list[Tensor]
    norm: Tensor
    vocabulary: Tensor
    pages: Tensor
    tables: tuple[Tensor, Tensor]

    @classmethod
    def make(cls, device: str) -> "Layer":
        shapes = ((64, E), (E, Hq * D), (2 * F, E), (E, F))
        cos, sin = (t.to(device) for t in rotary_tables(torch.ones(D // 2), 1.0, 64))
        w = [random(*shape).to(device) / 5 for shape in shapes]
        return cls(w, random(E).to(device), random(31, E).to(device), PAGES.to(device), (cos, sin))

    def step(self, x: Tensor, k: Tensor, v: Tensor, window: Tensor, lengths: Tensor) -> Tensor:
        ops, w, pages = torch.ops.mtpkern, self.w, self.pages
        slots, positions = ops.window_slots(lengths, pages, 3, 16)
        q = ops.qkv_rope_cache(x, self.norm, 1e-5, w[0], k[0], v[0], slots, positions, *self.tables)
        attended = ops.verify_attention(q.view(2, 3, Hq, D), k[0], v[0], pages, lengths)
        x = ops.linear(attended.view(6, -1), w[1], residual=x)
        x = ops.linear(ops.gate_up_silu(x, self.norm, 1e-5, w[2]), w[3], residual=x)
        normed = ops.rms_norm(x, self.norm, 1e-5)
        target = ops.multi_head_projection(normed, self.vocabulary)[1]
        accepted, bonus = ops.accept(window, target.view(2, 3))
        ops.kv_rollback(k, v, pages, lengths, accepted)
        return bonus + 0 * accepted


E, F, Hq, Hk, D = 24, 40, 4, 2, 8


def assert_one_graph_gives_what_the_operators_give(device: str) -> None:
    def inputs() -> list[Tensor]:
        caches = random(1, 8, 16, Hk, D), random(1, 8, 16, Hk, D) + 1
        return [t.to(device) for t in (random(6, E), *caches, ids(31, 2, 3), LENGTHS.clone())]

    layer, eager, compiled = Layer.make(device), inputs(), inputs()
    expected = layer.step(*eager)
    graph = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    assert torch.equal(graph(*compiled), expected)
    for changed, as_eager in zip(compiled, eager, strict=True):
        torch.testing.assert_close(changed, as_eager, atol=0, rtol=0)
    assert not torch.equal(eager[4].cpu(), LENGTHS)


def test_a_layer_compiles_as_one_graph_and_gives_what_it_gives_without(gpu: str, ops: Any) -> None:
    assert_one_graph_gives_what_the_operators_give(gpu)


def test_a_layer_compiles_as_one_graph_on_a_cpu() -> None:
    assert_one_graph_gives_what_the_operators_give("cpu")
