"""Whether a model fits into memory, found before any of it is read.

Only what certainly cannot work is refused: the least that the weights take is compared with all
that the process could still get, including swap and the file cache.
"""

import errno
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from mtpkern.checkpoints.directory import EMBEDDING, LM_HEAD, is_gguf
from mtpkern.checkpoints.llama import expected_tensors
from mtpkern.checkpoints.quantised import kept_format, vocabulary_format
from mtpkern.checkpoints.tensor_entry import TensorEntry
from mtpkern.config import ModelConfig
from mtpkern.errors import UserError, printable
from mtpkern.kernels.cpu.quants import TORCH_DTYPES
from mtpkern.kernels.cpu.weights import packed_bytes

_FORMATS = {dtype: format for format, dtype in TORCH_DTYPES.items()}


class OutOfMemory(UserError):
    """A model that does not fit into memory."""


def check_fit(
    name: str,
    weights: int,
    device: torch.device,
    *,
    cache: int = 0,
    lower: str = "max_length",
    smaller: Mapping[str, int] | None = None,
) -> None:
    """Raise OutOfMemory if a model of `weights` bytes and its cache exceed the memory that is free.

    `cache` counts what is allocated at once: on a CPU, untouched pages take no memory. `lower`
    names the arguments that a smaller cache needs; `smaller` has settings that make the weights
    smaller, and their bytes then.
    """
    free = device_memory() if device.type == "cuda" else host_memory()
    if free is None or weights + cache <= free:
        return
    whose = "GPU memory" if device.type == "cuda" else "memory"
    need = f"{_gigabytes(weights)} for its weights"
    if cache:
        need += f" and {_gigabytes(cache)} for the cache"
    fitting = [how for how, size in (smaller or {}).items() if size + cache <= free]
    if fitting:
        advice = f"give {fitting[0]}, or take a smaller model"
    else:
        advice = f"lower {lower}" if weights < free else "take a smaller model"
    raise OutOfMemory(
        f"{printable(name)} does not fit into {whose}: it needs {need}, and "
        f"{_gigabytes(free)} is free: {advice}"
    )


@contextmanager
def explain_out_of_memory(what: str, advice: str) -> Iterator[None]:
    """Turn a refused allocation, of memory or of a mapping of a file, into OutOfMemory."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        line = (str(error).strip() or "MemoryError").splitlines()[0]
        if isinstance(error, OSError):
            refused = error.errno == errno.ENOMEM
        else:
            refused = isinstance(error, MemoryError) or "allocate" in line or "overflow" in line
        if not refused:
            raise
        raise OutOfMemory(f"no memory for {what} ({printable(line)}): {advice}") from None


def weight_bytes(
    config: ModelConfig,
    entries: Mapping[str, TensorEntry],
    *,
    dtype: torch.dtype,
    weights: str | None,
    packed: bool,
) -> int:
    """The least memory that a model's weights take once they are loaded.

    `dtype` and `weights` are as in `load_model`; `entries` may be empty for random weights.
    `packed`: as the CPU's kernels read them, vectors not counted.
    """
    format = None if weights == "auto" else weights
    quantised = weights is not None and (format is not None or is_gguf(entries))
    total = 0
    for name, shape in expected_tensors(config):
        if not packed:
            total += math.prod(shape) * dtype.itemsize
        elif len(shape) == 2:
            given = vocabulary_format(format) if name in (EMBEDDING, LM_HEAD) else format
            if quantised:
                kind = given or kept_format(entries[name].dtype)
            else:
                kind = _FORMATS[dtype]
            total += packed_bytes(kind, *shape)
    return total


def device_memory() -> int:
    """Bytes of the GPU's memory that this process can still take."""
    held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + held


def host_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory and swap that this process can still take, within the limits of its control
    groups, such as a container's; None if the system does not report them. `root` is for tests."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        sizes = {name: int(rest.split()[0]) * 1024 for name, rest in (x.split(":") for x in lines)}
        available, swap = sizes["MemAvailable"], sizes["SwapFree"]
    except (OSError, ValueError, KeyError):  # only Linux has them
        return None
    return min([available + swap, *_within_limits(root, swap)])


def _within_limits(root: Path, swap: int) -> Iterator[int]:
    """What each control group that contains this process leaves it, of both versions."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        group = top / path.strip("/")
        for directory in (group, *group.parents):
            room = _room(directory, *names, swap)
            if room is not None:
                yield room
            if directory == top:
                break


def _room(group: Path, limit_file: str, usage_file: str, prefix: str, swap: int) -> int | None:
    """What a control group may still take, its file cache included; None without a limit."""
    try:
        limit = (group / limit_file).read_text().strip()
        if limit == "max":
            return None
        used = int((group / usage_file).read_text())
        stats = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # not such a group
        return None
    names = ("active_file", "inactive_file", "slab_reclaimable")
    reclaimable = sum(int(stats.get(prefix + name, 0)) for name in names)
    try:
        most = int((group / "memory.swap.max").read_text())
        swap = min(swap, max(0, most - int((group / "memory.swap.current").read_text())))
    except (OSError, ValueError):  # without a limit of its own
        pass
    return max(0, int(limit) - used + reclaimable) + swap


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
