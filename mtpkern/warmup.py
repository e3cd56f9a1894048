"""What Triton is compiling, said while it does: a model's first load takes minutes of it.

Triton keeps on disk what it compiled, and a second load takes it from there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mtpkern.kernels._launch import triton
from mtpkern.status import Phase


@contextmanager
def noting_kernels(phase: Phase) -> Iterator[None]:
    """Note on `phase` each kernel that is about to be compiled, until the block ends."""
    count = 0

    def note(*, fn: Any, **_: Any) -> None:
        nonlocal count
        count += 1
        op = fn.name.rpartition(".")[2].strip("_").removesuffix("_kernel")
        phase.advance(0, f"kernel {count}: {op}")

    runtime = triton.knobs.runtime
    before, runtime.jit_cache_hook = runtime.jit_cache_hook, note
    try:
        yield
    finally:
        runtime.jit_cache_hook = before
