"""The loads and stores of a kernel's launches, counted by element.

ttsem executes kernels one access at a time, so they can be counted, which is impossible on a GPU.
All requested elements count, except in masked lanes, whichever cache would serve them.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


class Traffic:
    """Every address read and written, with its number of bytes, in order."""

    def __init__(self) -> None:
        self.read: list[tuple[np.ndarray, int]] = []
        self.written: list[tuple[np.ndarray, int]] = []

    def reads(self, tensor: Tensor) -> Tensor:
        """How often each element of `tensor` was read, in its shape."""
        return _count(self.read, tensor)

    def writes(self, tensor: Tensor) -> Tensor:
        """How often each element of `tensor` was written, in its shape."""
        return _count(self.written, tensor)

    def bytes_touched(self) -> int:
        """Bytes read from and written to memory with an unlimited cache: each counts once."""
        return _distinct_bytes(self.read) + _distinct_bytes(self.written)


def _count(accesses: list[tuple[np.ndarray, int]], tensor: Tensor) -> Tensor:
    shape, strides = tensor.shape, tensor.stride()
    extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    counts = np.zeros(extent, np.int64)
    for addresses, _ in accesses:
        elements, rest = np.divmod(addresses - tensor.data_ptr(), tensor.element_size())
        inside = (elements >= 0) & (elements < extent) & (rest == 0)
        counts += np.bincount(elements[inside], minlength=extent)
    return torch.from_numpy(counts).as_strided(shape, strides)


def _distinct_bytes(accesses: list[tuple[np.ndarray, int]]) -> int:
    sizes = {size for _, size in accesses}
    return sum(
        size * len(np.unique(np.concatenate([a for a, s in accesses if s == size])))
        for size in sizes
    )


@contextmanager
def recorded_traffic() -> Iterator[Traffic]:
    """Count the loads and stores of the launches inside the block."""
    if "ttsem.memory" not in sys.modules:
        pytest.skip("only ttsem can count accesses: `python -m ttsem.sanitize pytest -m kernel`")
    memory: Any = sys.modules["ttsem.memory"].Memory
    load, store, traffic = memory.load, memory.store, Traffic()

    def lanes(addresses: Any, mask: Any) -> np.ndarray:
        live = True if mask is None else np.asarray(mask, bool)
        return np.asarray(addresses, np.int64)[np.broadcast_to(live, np.shape(addresses))]

    def counted_load(self: Any, addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
        traffic.read.append((lanes(addresses, mask), np.dtype(dtype).itemsize))
        return load(self, addresses, mask, other, dtype)

    def counted_store(self: Any, addresses: Any, values: Any, mask: Any) -> None:
        traffic.written.append((lanes(addresses, mask), np.asarray(values).dtype.itemsize))
        store(self, addresses, values, mask)

    memory.load, memory.store = counted_load, counted_store
    try:
        yield traffic
    finally:
        memory.load, memory.store = load, store
