"""Capture a fixed-shape step as one CUDA graph, so that a step costs the host one launch."""

from collections.abc import Callable
from typing import Any

import torch


class GraphPool:
    """Captures CUDA graphs that share the memory of what lives within a step.

    They must not run at the same time. All are captured on one stream: torch reuses a pool's memory
    only on the stream that it was allocated on.
    """

    def __init__(self) -> None:
        self._handle = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def capture(self, step: Callable[[], Any]) -> Callable[[], None]:
        """Capture `step`, which reads and writes tensors that stay where they are -> its replay.

        It runs twice before, which compiles kernels and sets up libraries: neither may happen under
        capture.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._handle, stream=self._stream):
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
