"""Matrices as quants: a GGUF's own bits, or any checkpoint's numbers rounded at load."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mtpkern.checkpoints.tensor_files import Maps, TensorEntry, expanded, row_slices, stored_rows
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

# Types in a file -> formats that keep their bits.
OWN_FORMATS = {
    "Q4_0": "q4_0",
    "Q4_1": "q4_1",
    "Q8_0": "q8_0",
    "Q6_K": "q6_k",
    "Q4_K": "q4_k",
    "F16": "fp16",
    "BF16": "bf16",
    "F32": "fp32",
}
# What any checkpoint can be rounded to, and what other types are rounded to.
ROUNDED_FORMATS = ("q4_0", "q4_1", "q8_0", "q8", "bf16", "fp16", "fp32")
_FALLBACK = "q8_0"


def vocabulary_format(format: str | None) -> str | None:
    """The format of embedding and LM head, which 4 bits would hurt most, where layers have
    `format`."""
    return "q8_0" if format in ("q4_0", "q4_1") else format


class Quantiser:
    """Reads named tensors as quants; says once what of a file it cannot keep as it is."""

    def __init__(self, entries: Mapping[str, TensorEntry], maps: Maps):
        self.entries, self.maps = entries, maps
        self._said: set[str] = set()

    def __call__(self, names: Sequence[str], format: str | None = None) -> Quants:
        """The matrices under these names, stacked along their outputs, in `format`.

        None keeps the file's bits where there are kernels for them. Parts of one matrix share a
        format: one of theirs if it holds the others exactly, else q8_0. ModelLoadError where a
        number is not finite, or rows do not divide into the format's groups.
        """
        parts = [self.entries[name] for name in names]
        wanted = self._shared_format(parts) if format is None else format
        return joined(*(self._read(part, wanted) for part in parts))

    def _shared_format(self, parts: Sequence[TensorEntry]) -> str:
        for part in parts:
            if part.dtype not in OWN_FORMATS:
                self._say(f"{part.dtype} has no kernel: its tensors are rounded to {_FALLBACK}")
        formats = sorted({OWN_FORMATS.get(part.dtype, _FALLBACK) for part in parts})
        for format in formats:
            if all(is_held(other, format) for other in formats):
                return format
        types = " and ".join(sorted({part.dtype for part in parts}))
        self._say(f"tensors of {types} that form one matrix here are rounded to {_FALLBACK}")
        return _FALLBACK

    def _read(self, part: TensorEntry, format: str) -> Quants:
        own = OWN_FORMATS.get(part.dtype)
        if own is not None and is_held(own, format):
            rows = stored_rows(part, self.maps)
            own_rows = rows[part.order] if part.heads else rows
            found = widened(from_gguf(own_rows, own), format)
        else:
            try:
                slices = (expanded(part, self.maps, rows) for rows in row_slices(part))
                found = joined(*(quantise(values, format) for values in slices))
            except ValueError as error:
                raise ModelLoadError(f"{part}: {error}") from None
        if not _is_finite(found):
            raise ModelLoadError(f"{part} holds values that are not finite in {format}")
        return found

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            _LOG.warning("%s", message)


def _is_finite(w: Quants) -> bool:
    if w.format not in TORCH_DTYPES:
        return all(np.isfinite(s).all() for s in w.scales)
    words = w.q if w.format == "fp32" else w.q.view(np.int16)
    # The extremes show both NaN (it propagates) and infinity, at the speed of reading.
    low, high = torch.aminmax(torch.from_numpy(words).view(TORCH_DTYPES[w.format]))
    return bool(low.isfinite() and high.isfinite())
