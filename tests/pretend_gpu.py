"""A pretended GPU, for what LLM does on one besides computing: memory, streams, compiling.

    with pretend_gpu() as gpu:
        llm = LLM(directory, device="cuda")
        gpu.binaries  # what Triton would have compiled by now

All tensors are on the CPU, and new ones are zero. Launches compute nothing, except `advance`, which
runs its definition so that the host is told about each step. Triton's own code says which binary a
launch needs, for sm_90. Memory follows the rules of torch's caching allocator: graphs of one pool
share what was allocated on the same stream, and freed memory stays cached until `empty_cache`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, JitFunctionInfo

from mtpkern.kernels.advance import Progress, advance_ref

UNINITIALISED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
MEMORY = 80 << 30


class Stream:
    """A stream that records which streams it waited for."""

    def __init__(self) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class Event:
    def __init__(self, enable_timing: bool = False):
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class Graph:
    """The launches of a capture; a replay repeats them."""

    def __init__(self) -> None:
        self.launches: list[Callable[[], None]] = []

    def replay(self) -> None:
        for launch in self.launches:
            launch()


class Driver:
    """The answers that Triton needs from a driver before a launch."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 7  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


class PretendGpu(TorchFunctionMode):
    """The state of the device: binaries, memory, streams."""

    def __init__(self) -> None:
        super().__init__()
        self.binaries: Counter[tuple[str, str]] = Counter()  # kernel and specialisation: launches
        self.grids: dict[str, set[tuple[int, ...]]] = {}  # of each kernel
        self.default = self.current = Stream()
        self.used = self.cached = 0
        # Bytes of each pool, by the stream on which they were allocated.
        self.pools: dict[tuple[object, Stream], int] = {}
        self.graphs: list[int] = []  # bytes allocated under each capture
        self._capturing: Graph | None = None
        self._allocated = 0

    # Memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        if func is torch.Tensor.to:
            args = tuple(torch.device("cpu") if _is_cuda(arg) else arg for arg in args)
        if func is torch.Tensor.pin_memory:
            return args[0]
        result = func(*args, **kwargs)
        if getattr(func, "__name__", "") in UNINITIALISED:
            self._allocated += result.numel() * result.element_size()
            result.zero_()
        return result

    def free(self) -> tuple[int, int]:
        return MEMORY - self.used - self.cached - sum(self.pools.values()), MEMORY

    def empty_cache(self) -> None:
        self.cached = 0

    # Streams and graphs

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        began = self._allocated
        try:
            yield
        finally:
            self.current = before
            # What ran there has freed it again.
            self.cached += self._allocated - began

    @contextmanager
    def capture(self, graph: Graph, pool: object, stream: Stream) -> Iterator[None]:
        self.empty_cache()
        before, self.current, self._capturing = self.current, stream, graph
        began = self._allocated
        try:
            yield
        finally:
            self.current, self._capturing = before, None
            needed = self._allocated - began
            self.graphs.append(needed)
            place = (pool, stream)
            self.pools[place] = max(self.pools.get(place, 0), needed)

    # Kernels

    def binary(
        self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[str, str]:
        """Kernel and specialisation of a launch, computed by Triton's own code."""
        *_, binder = kernel.device_caches[Driver().get_current_device()]
        _, specialization, rest = binder(*args, **options)
        return kernel.__name__, f"{specialization} {rest}"

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binary = self.binary(kernel, args, options)
        if binary not in self.binaries and (hook := triton.knobs.runtime.jit_cache_hook):
            hook(fn=JitFunctionInfo(kernel.module, kernel.fn.__qualname__, kernel))
        self.binaries[binary] += 1
        self.grids.setdefault(kernel.__name__, set()).add(grid)
        if kernel.__name__ == "_advance_kernel":
            given = dict(zip(kernel.arg_names, args, strict=False))

            def launch() -> None:
                _advance(given)

            launch()
            if self._capturing is not None:
                self._capturing.launches.append(launch)


def _is_cuda(device: object) -> bool:
    return not isinstance(device, Tensor) and str(device).startswith("cuda")


def _advance(given: dict[str, Any]) -> None:
    names = ("window", "target", "largest", "logprobs")
    progress = Progress(*(given[f"{name}_ptr"] for name in Progress._fields))
    results = advance_ref(*(given[f"{name}_ptr"] for name in names), progress)
    for name, result in zip(("accepted", "count"), results, strict=True):
        given[f"{name}_ptr"].copy_(result)


@contextmanager
def pretend_gpu() -> Iterator[PretendGpu]:
    """Present an H100 to torch and Triton inside the block."""
    gpu = PretendGpu()
    handles = iter(range(1, 1 << 20))
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "pretended",
        "current_device": lambda: 0,
        "mem_get_info": gpu.free,
        "empty_cache": gpu.empty_cache,
        "synchronize": lambda device=None: None,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "current_stream": lambda device=None: gpu.current,
        "stream": gpu.on,
        "graph": gpu.capture,
        "graph_pool_handle": lambda: next(handles),
    }

    def run(kernel: Any, *args: Any, **options: Any) -> None:
        gpu.run(kernel, *args, **options)

    with (
        patch.multiple(torch.cuda, **answers),
        patch.object(triton.runtime.driver, "_active", Driver()),
        patch.object(JITFunction, "run", run),
        patch("mtpkern.kernels._launch._is_reachable", lambda tensor: True),
        gpu,
    ):
        yield gpu
