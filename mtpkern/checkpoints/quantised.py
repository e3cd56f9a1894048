"""Matrices as quants: with the bits of a GGUF, or rounded from any checkpoint's numbers."""

import logging
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch

from mtpkern.checkpoints.tensor_entry import (
    Maps,
    TensorEntry,
    map_row_bytes,
    read_rows,
    row_slices,
)
from mtpkern.errors import ModelLoadError
from mtpkern.kernels.cpu.quants import (
    TORCH_DTYPES,
    Quants,
    from_gguf,
    is_held,
    joined,
    quantise,
    widened,
)

_LOG = logging.getLogger("mtpkern")

# Types of tensors in a file -> formats that keep their bits.
_EXACT_FORMATS = {
    "Q4_0": "q4_0",
    "Q4_1": "q4_1",
    "Q8_0": "q8_0",
    "Q6_K": "q6_k",
    "Q4_K": "q4_k",
    "F16": "fp16",
    "BF16": "bf16",
    "F32": "fp32",
}
# Formats that any checkpoint can be rounded to, and the one that all other types are rounded to.
ROUNDED_FORMATS = ("q4_0", "q4_1", "q8_0", "q8", "bf16", "fp16", "fp32")
_FALLBACK = "q8_0"


def vocabulary_format(format: str | None) -> str | None:
    """The format of the embedding and LM head of a model whose layers are rounded to `format`.

    It has at least 8 bits, since 4 bits reduce quality most in these matrices.
    """
    return "q8_0" if format in ("q4_0", "q4_1") else format


def kept_format(dtype: str) -> str:
    """The format in which a tensor of a file is kept: with its own bits if there is a kernel."""
    return _EXACT_FORMATS.get(dtype, _FALLBACK)


class QuantReader:
    """Reads named matrices as quants, and logs each reason for rounding a GGUF's numbers once."""

    def __init__(self, entries: Mapping[str, TensorEntry], maps: Maps):
        self.entries, self.maps = entries, maps
        self._logged: set[str] = set()

    def read(self, names: Sequence[str], format: str | None = None) -> Quants:
        """The named matrices, stacked along their outputs, in `format`.

        None keeps the file's bits where there is a kernel for them. Parts of one matrix share a
        format: that of one part if it represents the others exactly, else q8_0. Raises
        ModelLoadError for values that are not finite, or rows that are not a whole number of the
        format's groups.
        """
        parts = [self.entries[name] for name in names]
        shared = self._shared_format(parts) if format is None else format
        return joined(*(self._read_part(part, shared) for part in parts))

    def read_parts(self, names: Sequence[str], format: str | None = None) -> list[Quants]:
        """As `read`, but cut where the format changes, so that every part keeps its bits."""
        if format is not None:
            return [self.read(names, format)]
        formats = [self._own_format(self.entries[name]) for name in names]
        runs = groupby(zip(formats, names, strict=True), key=itemgetter(0))
        return [self.read([name for _, name in run], kept) for kept, run in runs]

    def _own_format(self, part: TensorEntry) -> str:
        if part.dtype not in _EXACT_FORMATS:
            self._log_once(f"{part.dtype} has no kernel: its tensors are rounded to {_FALLBACK}")
        return kept_format(part.dtype)

    def _shared_format(self, parts: Sequence[TensorEntry]) -> str:
        formats = sorted({self._own_format(part) for part in parts})
        for format in formats:
            if all(is_held(other, format) for other in formats):
                return format
        types = " and ".join(sorted({part.dtype for part in parts}))
        self._log_once(f"tensors of {types} that form one matrix here are rounded to {_FALLBACK}")
        return _FALLBACK

    def _read_part(self, part: TensorEntry, format: str) -> Quants:
        exact = _EXACT_FORMATS.get(part.dtype)
        if exact is not None and is_held(exact, format):
            rows = map_row_bytes(part, self.maps)
            rows = rows[part.file_rows] if part.interleaved_heads else rows
            quants = widened(from_gguf(rows, exact), format)
        else:
            try:
                slices = (read_rows(part, self.maps, rows) for rows in row_slices(part))
                quants = joined(*(quantise(values, format) for values in slices))
            except ValueError as error:
                raise ModelLoadError(f"{part}: {error}") from None
        if not _is_finite(quants):
            raise ModelLoadError(f"{part} holds values that are not finite in {format}")
        return quants

    def _log_once(self, message: str) -> None:
        if message not in self._logged:
            self._logged.add(message)
            _LOG.warning("%s", message)


def _is_finite(w: Quants) -> bool:
    if w.format not in TORCH_DTYPES:
        return all(np.isfinite(s).all() for s in w.scales)
    words = w.q if w.format == "fp32" else w.q.view(np.int16)
    # The extremes reveal infinities, and NaN since it propagates, in one pass over the data.
    low, high = torch.aminmax(torch.from_numpy(words).view(TORCH_DTYPES[w.format]))
    return bool(low.isfinite() and high.isfinite())
