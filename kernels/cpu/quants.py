"""Matrices before they are packed: as a GGUF holds them, or rounded from floating point.

A value is d q + m, where q is an integer of 4, 6 or 8 bits and d (and m) is shared by a group of 32
inputs ("q8": by all inputs of an output), or it is a number of 16 or 32 bits.

Bytes per weight: q4_0 0.5625, q4_1 0.625, q8_0 1.0625, q8 1, bf16 and fp16 2, fp32 4 (GGUF's own);
q4_k 0.578; q6_k is unpacked to a byte per integer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._formats import FLOATS, FORMATS, GROUP, QUANTISED

Array = np.ndarray
# GGUF's block bytes and the inputs that a block holds.
BLOCKS = {
    "q4_0": (18, 32),
    "q4_1": (20, 32),
    "q8_0": (34, 32),
    "q6_k": (210, 256),
    "q4_k": (144, 256),
}
NIBBLES = ("q4_0", "q4_1", "q4_k")
# Read from GGUF files only.
K_QUANTS = ("q4_k", "q6_k")
# Outputs that are rounded or packed at a time: what is computed in between stays in the CPU's
# caches, and out of the peak of memory. A multiple of the lanes.
SLICE = 512
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Quants(NamedTuple):
    """A matrix of N outputs and K inputs: integers or numbers, and scales.

    q [N, K / 32, ...] holds groups of 32 inputs: 16 uint8 for 4 bits (byte i has input i in its low
    half and input 16 + i in its high half, as in GGUF), 32 uint8 for q6_k, 32 int8 for q8_0 and q8.
    For 16 and 32 bits q [N, K] holds the numbers themselves, as uint16 or float32.
    scales: d, and m for q4_1, [N, K / 32] fp16; q8 d [N] float32; q6_k d [N, ceil(K / 256)] fp16
    and an int8 factor per 16 inputs [N, K / 16]; q4_k d and -m [N, ceil(K / 256)] fp16 and uint8
    factors of both [N, K / 32].
    Both may be views of a mapped file.
    """

    format: str
    q: Array
    scales: tuple[Array, ...]

    @property
    def shape(self) -> tuple[int, int]:
        N, K = self.q.shape[:2]
        return N, K if self.format in FLOATS else K * GROUP

    def take(self, rows: Array | slice) -> Quants:
        """The outputs `rows`, in that order; -1 gives an output of zeros."""
        taken = Quants(self.format, self.q[rows], tuple(s[rows] for s in self.scales))
        if isinstance(rows, slice):
            return taken
        for part in (taken.q, *taken.scales) if (rows < 0).any() else ():
            part[rows < 0] = 0
        return taken

    def take_inputs(self, columns: Array) -> Quants:
        """The inputs `columns`, in that order; -1 gives an input of zeros. A format that has
        scales per group of inputs becomes fp32."""
        w = self if self.format in FLOATS else Quants("fp32", dequantise(self), ())
        return Quants(w.format, np.where(columns < 0, w.q.dtype.type(0), w.q[:, columns]), ())


def of_integers(format: str, integers: Array, scales: tuple[Array, ...]) -> Quants:
    """Quants of integers [N, K]: 0..15 for 4 bits, 0..63 for q6_k, -128..127 for 8 bits."""
    N = len(integers)
    if format not in NIBBLES:
        kind = np.uint8 if format == "q6_k" else np.int8
        return Quants(format, integers.astype(kind).reshape(N, -1, GROUP), scales)
    halves = integers.astype(np.uint8).reshape(N, -1, 2, GROUP // 2)
    return Quants(format, halves[:, :, 0] | halves[:, :, 1] << 4, scales)


def integers_of(w: Quants) -> Array:
    """The integers [N, K] of a matrix of 4, 6 or 8 bits."""
    q = np.concatenate([w.q & 15, w.q >> 4], -1) if w.format in NIBBLES else w.q
    return q.reshape(len(q), -1)


def from_gguf(data: Array, format: str) -> Quants:
    """Read GGUF rows without a copy (but for q6_k): data [N, row bytes] uint8, or fp16/fp32 [N, K]
    as the gguf package gives them. ValueError for a format or a row length that does not fit."""
    if format not in FORMATS or format == "q8":
        raise ValueError(f"format must be one of GGUF's {', '.join(FORMATS)}, got {format!r}")
    if format in FLOATS:
        rows = np.ascontiguousarray(data)
        return Quants(format, rows.view(np.float32 if format == "fp32" else np.uint16), ())
    size, inputs = BLOCKS[format]
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] % size:
        raise ValueError(f"{format} rows must be uint8 [N, blocks * {size}], got {data.shape}")
    blocks = np.ascontiguousarray(data).reshape(len(data), -1, size)

    def half(begin: int) -> Array:
        return blocks[:, :, begin : begin + 2].view(np.float16)[:, :, 0]

    if format == "q6_k":
        return _from_q6_k(blocks, half(208))
    if format == "q4_k":
        return _from_q4_k(blocks, half(0), half(2))
    if format == "q8_0":
        return Quants(format, blocks[:, :, 2:].view(np.int8), (half(0),))
    if format == "q4_1":
        return Quants(format, blocks[:, :, 4:], (half(0), half(2)))
    return Quants(format, blocks[:, :, 2:], (half(0),))


def _from_q6_k(blocks: Array, d: Array) -> Quants:
    """Blocks [N, blocks, 210]: 128 bytes of low bits, 64 of high bits, 16 scales, d.

    Each half of 128 inputs is four runs of 32: the low bits of runs 0 and 2 share the first 32
    bytes, those of 1 and 3 the next; high bits of all four share a byte.
    """
    N, count = blocks.shape[:2]
    low = blocks[:, :, :128].reshape(N, count, 2, 2, 32)
    high = blocks[:, :, 128:192].reshape(N, count, 2, 32)
    q = np.empty((N, count, 2, 4, 32), np.uint8)
    for run in range(4):
        four = low[:, :, :, run % 2] >> 4 if run > 1 else low[:, :, :, run % 2] & 15
        q[:, :, :, run] = four | ((high >> (2 * run)) & 3) << 4
    scales = np.ascontiguousarray(blocks[:, :, 192:208]).view(np.int8).reshape(N, -1)
    return Quants("q6_k", q.reshape(N, -1, GROUP), (d, scales))


def _from_q4_k(blocks: Array, d: Array, m: Array) -> Quants:
    """Blocks [N, blocks, 144]: d, m, 12 bytes of 6-bit factors, 128 bytes of integers.

    32 bytes of integers hold two groups, one in the low and one in the high halves.
    """
    N, count = blocks.shape[:2]
    packed = blocks[:, :, 4:16].reshape(N, count, 3, 4)
    # The first four factors of either kind, and the low bits of the other four.
    first, low = packed[:, :, :2] & 63, packed[:, :, 2:]
    low = np.concatenate([low & 15, low >> 4], 2)
    last = low | (packed[:, :, :2] >> 6) << 4
    factors = np.concatenate([first, last], 3)
    pairs = blocks[:, :, 16:].reshape(N, count, 4, 1, 32)
    groups = np.concatenate([pairs & 15, pairs >> 4], 3).reshape(N, -1, 2, 16)
    q = groups[:, :, 0] | groups[:, :, 1] << 4
    scales, offsets = (factors[:, :, i].reshape(N, -1) for i in (0, 1))
    return Quants("q4_k", q, (d, m, scales, offsets))


def quantise(w: Tensor, format: str) -> Quants:
    """Round a matrix w [N, K] to a format: to nearest, as GGUF's reference does.

    ValueError for K-quants, which are only read from GGUF files, for a K that is not a multiple of
    32 (4 and 8 bits), and for values that are not finite.
    """
    if format in FLOATS:
        numbers = w.detach().to(TORCH_DTYPES[format]).contiguous()
        if format == "bf16":
            return Quants(format, numbers.view(torch.int16).numpy().view(np.uint16), ())
        values = numbers.numpy()
        return Quants(format, values if format == "fp32" else values.view(np.uint16), ())
    if format not in QUANTISED or format in K_QUANTS:
        supported = [name for name in FORMATS if name not in K_QUANTS]
        raise ValueError(f"w can be rounded to {', '.join(supported)}, got {format!r}")
    N, K = w.shape
    if K % GROUP:
        raise ValueError(f"w must be [N, K] with K a multiple of {GROUP} for {format}, got {K}")
    return joined(*(_rounded(part.detach().float().numpy(), format) for part in w.split(SLICE)))


def _rounded(values: Array, format: str) -> Quants:
    """`quantise` to 4 or 8 bits: values [N, K] float32."""
    N, K = values.shape
    if not np.isfinite(values).all():
        raise ValueError(f"w must be finite to be rounded to {format}")
    if format == "q8":
        d = (np.abs(values).max(-1) / 127).astype(np.float32)
        return of_integers(format, _steps(values, d[:, None], -127, 127), (d,))
    grouped = values.reshape(N, -1, GROUP)
    if format == "q8_0":
        d = (np.abs(grouped).max(-1) / 127).astype(np.float16)
        q = _steps(grouped, d.astype(np.float32)[..., None], -127, 127)
        return of_integers(format, q.reshape(N, K), (d,))
    if format == "q4_1":
        m = grouped.min(-1).astype(np.float16)
        d = ((grouped.max(-1) - grouped.min(-1)) / 15).astype(np.float16)
        centred = grouped - m.astype(np.float32)[..., None]
        q = _steps(centred, d.astype(np.float32)[..., None], 0, 15)
        return of_integers(format, q.reshape(N, K), (d, m))
    # q4_0: the number of largest magnitude becomes -8.
    index = np.abs(grouped).argmax(-1)[..., None]
    d = (np.take_along_axis(grouped, index, -1)[..., 0] / -8).astype(np.float16)
    q = _steps(grouped, d.astype(np.float32)[..., None], -8, 7) + 8
    return of_integers(format, q.reshape(N, K), (d,))


def _steps(values: Array, d: Array, least: int, most: int) -> Array:
    """values / d to the nearest integer within bounds; 0 where d is 0."""
    inverse = np.divide(1.0, d, out=np.zeros_like(d), where=d != 0)
    return np.clip(np.rint(values * inverse), least, most)


def joined(*parts: Quants) -> Quants:
    """Matrices of one format and K stacked along their outputs: [N_1 + N_2 + ..., K]."""
    first = parts[0]
    if len(parts) == 1:
        return first
    for part in parts:
        if (part.format, part.shape[1]) != (first.format, first.shape[1]):
            raise ValueError(
                f"parts must be {first.format} of K={first.shape[1]} like the first, got "
                f"{part.format} of {part.shape[1]}"
            )
    scales = zip(*(part.scales for part in parts), strict=True)
    return Quants(
        first.format,
        np.concatenate([part.q for part in parts]),
        tuple(np.concatenate(some) for some in scales),
    )


def is_held(format: str, other: str) -> bool:
    """Whether `other` represents every matrix of `format` exactly."""
    return other in (format, "fp32") or (format == "q4_0" and other in ("q4_1", "q8_0"))


def widened(w: Quants, format: str) -> Quants:
    """The same values in a format that represents them exactly (`is_held`).

    q4_0 has no m, and its q is 8 more than q8_0's: (q - 8) d = q d + m with m = -8 d, exactly.
    """
    if w.format == format:
        return w
    if format == "fp32":
        return Quants(format, dequantise(w), ())
    if not is_held(w.format, format):
        raise ValueError(f"{format} does not hold the values of {w.format}")
    (d,) = w.scales
    if format == "q4_1":
        return Quants(format, w.q, (d, -8 * d))
    return of_integers(format, integers_of(w).astype(np.int8) - np.int8(8), (d,))


def dequantise(w: Quants) -> Array:
    """The values [N, K] as float32."""
    N, K = w.shape
    if w.format == "bf16":
        return (w.q.astype(np.uint32) << 16).view(np.float32)
    if w.format in FLOATS:
        return w.q.view(np.float16 if w.format == "fp16" else np.float32).astype(np.float32)
    q = integers_of(w).astype(np.float32)
    if w.format == "q8":
        return q * w.scales[0][:, None]
    if w.format == "q6_k":
        d, scales = w.scales
        each = np.repeat(d.astype(np.float32), 16, -1)[:, : K // 16] * scales
        return ((q - 32).reshape(N, -1, 16) * each[..., None]).reshape(N, K)
    if w.format == "q4_k":
        d, m = (np.repeat(s.astype(np.float32), 8, -1)[:, : K // GROUP] for s in w.scales[:2])
        grouped = q.reshape(N, -1, GROUP) * (d * w.scales[2])[..., None]
        return (grouped - (m * w.scales[3])[..., None]).reshape(N, K)
    d = w.scales[0].astype(np.float32)[..., None]
    offset = w.scales[1].astype(np.float32)[..., None] if w.format == "q4_1" else 0
    grouped = q.reshape(N, -1, GROUP) - (8 if w.format == "q4_0" else 0)
    return (grouped * d + offset).reshape(N, K)
