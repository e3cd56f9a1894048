"""A kernel's case: one op at one shape, with inputs, truth and baseline."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

DTYPE = torch.bfloat16
EPS = 1e-5
PAGE_SIZE = 64
K = 4  # parallel heads


class Call(NamedTuple):
    """One set of inputs, ready to run. The first three return the same tensors, or tuples of them.

    `truth` computes in float64 and may use the outputs of the preceding launch. `in_dtype` computes
    with torch in the inputs' dtype; its error sets the tolerance. `baseline` is timed beside the
    kernel.
    """

    launch: Callable[[bool], object]  # argument: pdl
    truth: Callable[[], object]
    in_dtype: Callable[[], object]
    baseline: Callable[[], object]


class KernelCase(NamedTuple):
    """An op at one shape. `inputs(device)` makes new random inputs at every call."""

    name: str
    shape: str
    bytes_moved: int
    inputs: Callable[[str], Call]
    bytes_varying: int = 0  # of bytes_moved, those that the data may save


def normal(device: str, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=device, dtype=DTYPE) * scale


def normed(x: Tensor, w: Tensor) -> Tensor:
    wide = x.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * w.double()
