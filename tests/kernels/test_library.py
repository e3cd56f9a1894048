"""torch.ops.mtpkern.*, kernels and definitions: torch's own checks, and a layer is one graph."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from operators import LENGTHS, OPERATORS, PAGES, arguments, ids, moved, random
from torch import Tensor

from mtpkern import library
from mtpkern.cache import rotary_tables


@pytest.fixture
def ops(gpu: str, plain_devices: None) -> Iterator[Any]:
    """The operators as kernels, which without a GPU run through ttsem, on the CPU's tensors."""
    if torch.version.cuda:
        yield torch.ops.mtpkern
        return
    on_cpu = torch.library.Library("mtpkern", "IMPL")
    for name in OPERATORS:
        launcher = getattr(library, name)
        if name == "multi_head_projection":
            launcher = library.projection_kernel
        on_cpu.impl(name, launcher, "CPU", allow_override=True)
    yield torch.ops.mtpkern
    on_cpu._destroy()


def test_every_operator_is_checked_here() -> None:
    registered = {name.split("::")[1].split(".")[0] for name in library._library._op_defs}
    assert registered == set(OPERATORS)


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
    definition = getattr(library, f"{name}_ref")
    if name == "multi_head_projection":
        definition = library.projection_definition
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
