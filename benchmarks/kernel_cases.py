"""Every kernel at the shapes of real models: what is launched, checked, timed and compiled.

`OPS` has one entry an op. `bench_kernels.py` runs the cases on a GPU, `codegen.py` compiles them
on any machine from tensors without data (device "meta").
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from checkout import ROOT  # noqa: F401
from torch import Tensor

from mtpkern.kernels.linear import linear

DTYPE = torch.bfloat16


class Model(NamedTuple):
    """The sizes of a model, in the letters of the README."""

    E: int
    F: int
    Hq: int
    Hk: int
    D: int
    V: int
    qk_norm: bool = False


MODELS = {
    "smollm2-135m": Model(E=576, F=1536, Hq=9, Hk=3, D=64, V=49152),
    "llama-3.2-1b": Model(E=2048, F=8192, Hq=32, Hk=8, D=64, V=128256),
    "llama-3.1-8b": Model(E=4096, F=14336, Hq=32, Hk=8, D=128, V=128256),
    "qwen3-8b": Model(E=4096, F=12288, Hq=32, Hk=8, D=128, V=151936, qk_norm=True),
}

# Sequences and window rows [B, T] of a step: plain decoding, K = 4, and K = 4 in batches.
STEPS = ((1, 1), (1, 5), (8, 5), (32, 5))


class Call(NamedTuple):
    """One set of inputs, ready to run. All four return the same tensors, or tuples of them.

    `truth` computes in float32 or wider, `in_dtype` as torch does in the inputs' dtype, whose
    error sets the tolerance. `baseline` is what the kernel is timed against.
    """

    launch: Callable[[bool], object]  # takes pdl
    truth: Callable[[], object]
    in_dtype: Callable[[], object]
    baseline: Callable[[], object]


class Case(NamedTuple):
    """An op at one shape. `inputs` makes a new set of random inputs on a device at every call."""

    name: str
    shape: str
    bytes_moved: int
    inputs: Callable[[str], Call]


def normal(device: str, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=device, dtype=DTYPE) * scale


def linear_cases(model: Model, B: int, T: int) -> Iterator[Case]:
    """The output and the down projection, residual added."""
    R, N = B * T, model.E
    for name, K in (("o", model.Hq * model.D), ("down", model.F)):

        def inputs(device: str, K: int = K) -> Call:
            x, w = normal(device, R, K), normal(device, N, K, scale=K**-0.5)
            residual, out = normal(device, R, N), torch.empty(R, N, device=device, dtype=DTYPE)

            def in_dtype() -> Tensor:
                return F.linear(x, w) + residual

            return Call(
                lambda pdl: linear(x, w, residual=residual, out=out, pdl=pdl),
                lambda: F.linear(x.double(), w.double()) + residual.double(),
                in_dtype,
                in_dtype,
            )

        moved = DTYPE.itemsize * (N * K + R * K + 2 * R * N)
        yield Case(name, f"R={R} N={N} K={K}", moved, inputs)


OPS: dict[str, Callable[[Model, int, int], Iterator[Case]]] = {
    "linear": linear_cases,
}
