"""Facts about this machine: its CPU, how fast it reads memory."""

import math
import platform
import time
from pathlib import Path

import torch

from mtpkern.errors import counted

_MIB = 1 << 20
SMALLEST_BUFFER, LARGEST_BUFFER = 64 * _MIB, 1024 * _MIB
_SECONDS = 0.5  # so long that a busy neighbour pauses meanwhile


def measure_read_bandwidth(working_set: int) -> float:
    """Bytes per second at which all threads read `working_set` bytes, at best in half a second.

    The buffer is as large as one step's weights, within 64 MiB to 1 GiB, because weights that fit
    the last-level cache are not read from memory.
    """
    size = max(SMALLEST_BUFFER, min(LARGEST_BUFFER, working_set))
    buffer = torch.ones(size // 4, dtype=torch.float32)
    best, began = math.inf, time.perf_counter()
    ended = began
    while ended - began < _SECONDS:
        started = time.perf_counter()
        buffer.sum()
        ended = time.perf_counter()
        best = min(best, ended - started)
    return buffer.nbytes / best


def describe_bandwidth(bandwidth: float) -> str:
    return f"{bandwidth / 1e9:.1f} GB/s, measured on the CPU with {describe_threads()}"


def describe_threads() -> str:
    """The threads that torch computes with, in words."""
    return counted(torch.get_num_threads(), "thread")


def cpu_model() -> str:
    """The CPU's model name, or its architecture if the system does not report a name."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """Instruction set extensions in Linux's spelling; empty elsewhere."""
    return next((set(line.split()) for line in _cpuinfo() if line.startswith("flags")), set())


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # only Linux has it
        return []
