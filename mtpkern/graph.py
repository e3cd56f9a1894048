"""Capture a fixed-shape step as one CUDA graph, so that a step costs the host one launch."""

from collections.abc import Callable
from typing import Any

import torch


class GraphPool:
    """Captures CUDA graphs that share the memory of their intermediate tensors.

    No two of them may run at the same time. All are captured on one stream, because torch reuses a
    pool's memory only on the stream that allocated it.
    """

    def __init__(self) -> None:
        self._handle = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def capture(self, step: Callable[[], Any]) -> Callable[[], None]:
        """Capture `step`, which reads and writes tensors at fixed addresses -> its replay.

        `step` runs twice first, to compile kernels and set up libraries, which must not happen
        during capture.
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
    """Seconds per replay: the mean of `repeat` in a row, after an untimed one."""
    replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeat):
        replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / repeat
