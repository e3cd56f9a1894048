"""Capture a fixed-shape step as one CUDA graph, so that a step costs the host one launch."""

from collections.abc import Callable
from typing import Any

import torch


def capture(step: Callable[[], Any], pool: Any = None) -> Callable[[], None]:
    """Capture `step`, which reads and writes tensors that stay where they are -> its replay.

    It runs twice before, which compiles kernels and sets up libraries: neither may happen under
    capture. Graphs of one `pool` (torch.cuda.graph_pool_handle) share the memory of what lives
    within a step, and must not run at the same time.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        step()
    return graph.replay


def measure(replay: Callable[[], object], repeat: int = 10) -> float:
    """Seconds of one replay, of `repeat` one behind the other; the first of all is not counted."""
    replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeat):
        replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / repeat
