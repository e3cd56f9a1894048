"""One tensor in a file: where it lies, and its rows as numbers.

Tensors of a GGUF may be quantised, and those of Q and K may have the rows of each head in another
order: Meta's RoPE turns neighbouring rows, Hugging Face's row i and row D / 2 + i. Rows here are
always in the latter order, which is the model's.
"""

import functools
import math
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtpkern.errors import ModelLoadError, printable

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Rows that are expanded at a time.
SLICE_ROWS = 4096

Maps = dict[Path, mmap.mmap]


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: the file, and the bytes in it."""

    file: Path
    name: str
    dtype: str  # a key of TORCH_DTYPES, or the name of a quantised type of GGUF
    shape: tuple[int, ...]
    offset: int
    size: int
    heads: int = 0  # heads whose rows are in Meta's order; 0: rows are in the model's order

    def __str__(self) -> str:
        return f"{printable(self.file)}: tensor {printable(self.name)}"

    @property
    def is_plain(self) -> bool:
        """Whether the bytes in the file are the numbers, in the model's order."""
        return self.dtype in TORCH_DTYPES and not self.heads

    @property
    def order(self) -> np.ndarray:
        """The file's row for each row of the model."""
        rows = np.arange(self.shape[0])
        return rows.reshape(self.heads, -1, 2).swapaxes(1, 2).reshape(-1) if self.heads else rows


@functools.cache
def is_expandable(dtype: str) -> bool:
    """Whether `expanded` reads a quantised type of GGUF."""
    if dtype in TORCH_DTYPES:
        return False
    # Models in other files do without this package.
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    if dtype not in GGMLQuantizationType.__members__:
        return False
    kind = GGMLQuantizationType[dtype]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def mapped(entry: TensorEntry, maps: Maps) -> Tensor:
    """A plain tensor as a mapping of its file, in the file's order; `maps` keeps the mappings."""
    dtype = TORCH_DTYPES[entry.dtype]
    count = math.prod(entry.shape)
    if count == 0:
        return torch.empty(entry.shape, dtype=dtype)
    flat = torch.frombuffer(_map(entry.file, maps), dtype=dtype, count=count, offset=entry.offset)
    return flat.view(entry.shape)


def stored_rows(entry: TensorEntry, maps: Maps) -> np.ndarray:
    """The file's bytes of each row of a matrix, uint8 [N, row bytes], in the file's order."""
    data = np.frombuffer(_map(entry.file, maps), np.uint8, entry.size, entry.offset)
    return data.reshape(entry.shape[0], -1)


def expanded(entry: TensorEntry, maps: Maps, rows: slice | np.ndarray) -> Tensor:
    """Rows of a tensor, by the model's order: float32 if it is quantised, else its own dtype."""
    if entry.dtype in TORCH_DTYPES:
        values = mapped(entry, maps)
        return values[torch.from_numpy(entry.order[rows])] if entry.heads else values[rows]
    from gguf import GGMLQuantizationType, dequantize

    stored = stored_rows(entry, maps)
    part = stored[entry.order[rows] if entry.heads else rows]
    return torch.from_numpy(dequantize(part, GGMLQuantizationType[entry.dtype]))


def row_slices(entry: TensorEntry) -> list[slice]:
    """All rows, some at a time."""
    begins = range(0, entry.shape[0], SLICE_ROWS)
    return [slice(begin, min(begin + SLICE_ROWS, entry.shape[0])) for begin in begins]


def read_into(entry: TensorEntry, target: Tensor) -> None:
    """Fill a contiguous CPU tensor with the file's bytes, without a mapping or a buffer between."""
    left = target.view(-1).view(torch.uint8).numpy().data
    with open(entry.file, "rb", buffering=0) as stream:
        stream.seek(entry.offset)
        while left:
            got = stream.readinto(left)
            if not got:
                raise ModelLoadError(f"{entry} ends early: {os.path.getsize(entry.file)} bytes")
            left = left[got:]


def release(mappings: Iterable[mmap.mmap]) -> None:
    """Let go of the mappings' resident pages; what is still used is read again when touched."""
    if hasattr(mmap, "MADV_DONTNEED"):
        for mapping in mappings:
            mapping.madvise(mmap.MADV_DONTNEED)


def _map(file: Path, maps: Maps) -> mmap.mmap:
    if file not in maps:
        with open(file, "rb") as stream:
            # A private copy-on-write mapping: torch wants it writable, the file stays untouched.
            maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    return maps[file]
