"""`TensorEntry`: where one tensor is in a file, and how its rows are read.

A GGUF's tensors may be quantised, and rows of Q and K may be interleaved: Meta's RoPE rotates rows
2i and 2i + 1 of a head, Hugging Face's rows i and D/2 + i. Here, "model order" is Hugging Face's
and "file order" is whatever the file has.
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
# Rows dequantised at a time.
_SLICE_ROWS = 4096

Maps = dict[Path, mmap.mmap]


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor is: its file and the range of bytes."""

    file: Path
    name: str
    dtype: str  # a key of TORCH_DTYPES, or the name of a quantised type of GGUF
    shape: tuple[int, ...]
    offset: int
    size: int
    interleaved_heads: int = 0  # heads whose rows are interleaved; 0: file order is model order

    def __str__(self) -> str:
        return f"{printable(self.file)}: tensor {printable(self.name)}"

    @property
    def is_plain(self) -> bool:
        """Whether the file's bytes are the tensor's numbers in model order."""
        return self.dtype in TORCH_DTYPES and not self.interleaved_heads

    @property
    def file_rows(self) -> np.ndarray:
        """The file's row index for each row in model order."""
        rows = np.arange(self.shape[0])
        if not self.interleaved_heads:
            return rows
        return rows.reshape(self.interleaved_heads, -1, 2).swapaxes(1, 2).reshape(-1)


@functools.cache
def is_dequantisable(dtype: str) -> bool:
    """Whether `read_rows` supports a quantised type of GGUF."""
    if dtype in TORCH_DTYPES:
        return False
    # Imported only where a GGUF is read.
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    if dtype not in GGMLQuantizationType.__members__:
        return False
    kind = GGMLQuantizationType[dtype]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def map_tensor(entry: TensorEntry, maps: Maps) -> Tensor:
    """A tensor of a dtype in TORCH_DTYPES, as a mapping of its file, in file order.

    Mappings are added to `maps`, one per file.
    """
    dtype = TORCH_DTYPES[entry.dtype]
    count = math.prod(entry.shape)
    if count == 0:
        return torch.empty(entry.shape, dtype=dtype)
    flat = torch.frombuffer(_map(entry.file, maps), dtype=dtype, count=count, offset=entry.offset)
    return flat.view(entry.shape)


def map_row_bytes(entry: TensorEntry, maps: Maps) -> np.ndarray:
    """The bytes of each row of a matrix, uint8 [N, row bytes], in file order."""
    data = np.frombuffer(_map(entry.file, maps), np.uint8, entry.size, entry.offset)
    return data.reshape(entry.shape[0], -1)


def read_rows(entry: TensorEntry, maps: Maps, rows: slice | np.ndarray) -> Tensor:
    """Rows in model order: dequantised to float32, or in the file's own dtype."""
    if entry.dtype in TORCH_DTYPES:
        values = map_tensor(entry, maps)
        if entry.interleaved_heads:
            return values[torch.from_numpy(entry.file_rows[rows])]
        return values[rows]
    from gguf import GGMLQuantizationType, dequantize

    stored = map_row_bytes(entry, maps)
    part = stored[entry.file_rows[rows] if entry.interleaved_heads else rows]
    return torch.from_numpy(dequantize(part, GGMLQuantizationType[entry.dtype]))


def row_slices(entry: TensorEntry) -> list[slice]:
    """Slices that cover all rows, each small enough to dequantise at once."""
    begins = range(0, entry.shape[0], _SLICE_ROWS)
    return [slice(begin, min(begin + _SLICE_ROWS, entry.shape[0])) for begin in begins]


def read_into(entry: TensorEntry, target: Tensor) -> None:
    """Read the file's bytes straight into a contiguous CPU tensor."""
    remaining = target.view(-1).view(torch.uint8).numpy().data
    with open(entry.file, "rb", buffering=0) as stream:
        stream.seek(entry.offset)
        while remaining:
            count = stream.readinto(remaining)
            if not count:
                raise ModelLoadError(f"{entry} ends early: {os.path.getsize(entry.file)} bytes")
            remaining = remaining[count:]


def release_pages(mappings: Iterable[mmap.mmap]) -> None:
    """Drop the mappings' resident pages. Later accesses read them from the file again."""
    if hasattr(mmap, "MADV_DONTNEED"):
        for mapping in mappings:
            mapping.madvise(mmap.MADV_DONTNEED)


def _map(file: Path, maps: Maps) -> mmap.mmap:
    if file not in maps:
        with open(file, "rb") as stream:
            # A copy-on-write mapping: torch needs it writable, and the file is never changed.
            maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    return maps[file]
