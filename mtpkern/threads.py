"""How many threads to compute with on a CPU."""

import os
from pathlib import Path

import torch

from mtpkern.validation import integer

MAX_THREADS = 1024
_TOPOLOGY = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def use_threads(count: int | None) -> int:
    """Set how many threads torch computes with, in the whole process -> that count.

    None keeps what torch or OMP_NUM_THREADS chose, but for more threads than there are physical
    cores: those would wait for each other.
    """
    if count is None:
        count = min(torch.get_num_threads(), physical_cores())
    else:
        count = integer("threads", count, 1, MAX_THREADS)
    if count != torch.get_num_threads():
        torch.set_num_threads(count)
    return count


def physical_cores() -> int:
    """Cores that this process may run on, two threads of one core counted once.

    A container's quota of CPU time counts as so many cores.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
    else:
        allowed = set(range(os.cpu_count() or 1))
    cores = {_siblings(cpu) for cpu in allowed}
    return max(1, min(len(cores), _quota() or len(cores)))


def _siblings(cpu: int) -> str:
    """The threads of a CPU's core, as the system lists them; its own number where it does not."""
    try:
        return (_TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _quota() -> int | None:
    """The container's limit in whole cores, rounded up; None where there is none."""
    try:
        quota, period = _QUOTA.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else -(-int(quota) // int(period))
