"""How many threads to compute with on a CPU."""

import os
from pathlib import Path

import torch

from mtpkern.validation import integer

MAX_THREADS = 1024
_TOPOLOGY = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def use_threads(count: int | None) -> int:
    """Set the number of torch's threads for the whole process -> that number.

    None keeps the number that torch or OMP_NUM_THREADS chose, up to the number of physical cores:
    two threads of one core slow each other down.
    """
    if count is None:
        count = min(torch.get_num_threads(), physical_cores())
    else:
        count = integer("threads", count, 1, MAX_THREADS)
    if count != torch.get_num_threads():
        torch.set_num_threads(count)
    return count


def physical_cores() -> int:
    """The number of physical cores that this process may use.

    A container's quota of CPU time is a limit too.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
    else:
        allowed = set(range(os.cpu_count() or 1))
    cores = {_siblings(cpu) for cpu in allowed}
    return max(1, min(len(cores), _quota() or len(cores)))


def _siblings(cpu: int) -> str:
    """The threads of a CPU's core as the system lists them, or the CPU's number if it does not."""
    try:
        return (_TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _quota() -> int | None:
    """The container's limit in whole cores, rounded up; None without a limit."""
    try:
        quota, period = _QUOTA.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else -(-int(quota) // int(period))
