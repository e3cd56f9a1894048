"""Weights as the matmul tile reads them: packed from GGUF blocks as they are, or rounded.

A value is d q + m, with q of 4, 6 or 8 bits in groups of 32 inputs that share d (and m), or one d
for all inputs of an output ("q8"); or a number of 16 or 32 bits. `_tile` draws the layout.

Bytes per weight: q4_0 0.5625, q4_1 0.625, q6_k 0.8125 and two scales, q8_0 1.0625, q8 1, bf16 and
fp16 2, fp32 4; GGUF's own, but for padding to 64 bytes per 8 outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._tile import FLOATS, FORMATS, GROUP, GROUP_BYTES, ROUNDED

Array = np.ndarray
LANES = 8
# GGUF's block bytes and the inputs that a block holds.
BLOCKS = {"q4_0": (18, 32), "q4_1": (20, 32), "q8_0": (34, 32), "q6_k": (210, 256)}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Weights(NamedTuple):
    """One matrix [N, K], packed, with its bias.

    Outputs are padded with zeros to a multiple of 8, and K to one of 32 for 16 and 32 bits.
    """

    format: str
    data: Array  # [blocks, block_bytes] uint8, on a cache line
    out_features: int
    in_features: int
    bias: Array | None  # [8 blocks] float32

    @property
    def blocks(self) -> int:
        return self.data.shape[0]

    @property
    def groups(self) -> int:
        return -(-self.in_features // GROUP)


class Quants(NamedTuple):
    """Values of N outputs and K inputs, not yet packed: q and its scales.

    q [N, K] uint8 (4 and 6 bits) or int8; scales as the format has them: d and m [N, K / 32] fp16;
    q8 d [N] float32; q6_k d [N, ceil(K / 256)] fp16 and the int8 scales [N, K / 16]; for 16 and 32
    bits q holds the numbers themselves, as uint16 or float32.
    """

    format: str
    q: Array
    scales: tuple[Array, ...]

    def take_inputs(self, columns: Array) -> Quants:
        """The inputs `columns`, in that order; -1 stands for one of zeros. What has scales for
        groups of inputs becomes float32."""
        w = self if self.format in FLOATS else Quants("fp32", expanded(self), ())
        return Quants(w.format, np.where(columns < 0, w.q.dtype.type(0), w.q[:, columns]), ())

    def take(self, rows: Array) -> Quants:
        """The outputs `rows`, in that order; -1 stands for one of zeros."""
        taken = Quants(self.format, self.q[rows], tuple(s[rows] for s in self.scales))
        for part in (taken.q, *taken.scales) if (rows < 0).any() else ():
            part[rows < 0] = 0
        return taken


def block_bytes(format: str, groups: int) -> int:
    """Bytes of 8 outputs, as `_tile` computes them."""
    size = groups * GROUP_BYTES[format]
    size += 32 if format == "q8" else 0
    size += -(-groups // 8) * 16 if format == "q6_k" else 0
    return -(-size // 64) * 64


def from_gguf(data: Array, format: str) -> Quants:
    """Read GGUF rows: data [N, row bytes] uint8, or fp16/fp32 [N, K] as the gguf package gives
    them. ValueError for a format or a row length that does not fit."""
    if format not in FORMATS or format == "q8":
        raise ValueError(f"format must be one of GGUF's {', '.join(FORMATS)}, got {format!r}")
    if format in FLOATS:
        rows = np.ascontiguousarray(data)
        return Quants(format, rows.view(np.float32 if format == "fp32" else np.uint16), ())
    size, inputs = BLOCKS[format]
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] % size:
        raise ValueError(f"{format} rows must be uint8 [N, blocks * {size}], got {data.shape}")
    N = data.shape[0]
    blocks = np.ascontiguousarray(data).reshape(N, -1, size)

    def half(begin: int) -> Array:
        return np.ascontiguousarray(blocks[:, :, begin : begin + 2].view(np.float16)[:, :, 0])

    if format == "q8_0":
        return Quants(format, blocks[:, :, 2:].view(np.int8).reshape(N, -1), (half(0),))
    if format == "q6_k":
        return _from_q6_k(blocks, half(208))
    begin = 4 if format == "q4_1" else 2
    nibbles = blocks[:, :, begin:]
    q = np.empty((*nibbles.shape[:2], GROUP), np.uint8)
    np.bitwise_and(nibbles, 15, out=q[:, :, :16])
    np.right_shift(nibbles, 4, out=q[:, :, 16:])
    return Quants(format, q.reshape(N, -1), (half(0), half(2)) if format == "q4_1" else (half(0),))


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
    return Quants("q6_k", q.reshape(N, -1), (d, scales))


def rounded(w: Tensor, format: str) -> Quants:
    """Round a matrix w [N, K] to a format: to nearest, as GGUF's reference does.

    q6_k is for GGUF files only. ValueError where K is no multiple of 32 for 4 and 8 bits, or where
    a number is not finite.
    """
    if format in FLOATS:
        numbers = w.detach().to(TORCH_DTYPES[format]).contiguous()
        if format == "bf16":
            return Quants(format, numbers.view(torch.int16).numpy().view(np.uint16), ())
        values = numbers.numpy()
        return Quants(format, values if format == "fp32" else values.view(np.uint16), ())
    if format not in ROUNDED or format == "q6_k":
        raise ValueError(f"w can be rounded to {', '.join(FORMATS)} but q6_k, got {format!r}")
    values = w.detach().float().numpy()
    N, K = values.shape
    if K % GROUP:
        raise ValueError(f"w must be [N, K] with K a multiple of {GROUP} for {format}, got {K}")
    if not np.isfinite(values).all():
        raise ValueError(f"w must be finite to be rounded to {format}")
    if format == "q8":
        d = (np.abs(values).max(-1) / 127).astype(np.float32)
        return Quants(format, _steps(values, d[:, None], -127, 127).astype(np.int8), (d,))
    grouped = values.reshape(N, -1, GROUP)
    if format == "q8_0":
        d = (np.abs(grouped).max(-1) / 127).astype(np.float16)
        q = _steps(grouped, d.astype(np.float32)[..., None], -127, 127).astype(np.int8)
        return Quants(format, q.reshape(N, K), (d,))
    if format == "q4_1":
        m = grouped.min(-1).astype(np.float16)
        d = ((grouped.max(-1) - grouped.min(-1)) / 15).astype(np.float16)
        centred = grouped - m.astype(np.float32)[..., None]
        q = _steps(centred, d.astype(np.float32)[..., None], 0, 15).astype(np.uint8)
        return Quants(format, q.reshape(N, K), (d, m))
    # q4_0: the number of largest magnitude becomes -8.
    index = np.abs(grouped).argmax(-1)[..., None]
    d = (np.take_along_axis(grouped, index, -1)[..., 0] / -8).astype(np.float16)
    q = _steps(grouped, d.astype(np.float32)[..., None], -8, 7) + 8
    return Quants(format, q.astype(np.uint8).reshape(N, K), (d,))


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
        if (part.format, part.q.shape[1]) != (first.format, first.q.shape[1]):
            raise ValueError(
                f"parts must be {first.format} of K={first.q.shape[1]} like the first, got "
                f"{part.format} of {part.q.shape[1]}"
            )
    scales = zip(*(part.scales for part in parts), strict=True)
    return Quants(
        first.format,
        np.concatenate([part.q for part in parts]),
        tuple(np.concatenate(some) for some in scales),
    )


def is_held(format: str, other: str) -> bool:
    """Whether every matrix of `format` has the same values in the format `other`."""
    return other in (format, "fp32") or (format == "q4_0" and other in ("q4_1", "q8_0"))


def widened(w: Quants, format: str) -> Quants:
    """The same values in a format that holds them (`is_held`).

    q4_0 has no m, and its q is 8 more than q8_0's: (q - 8) d = q d + m with m = -8 d, exactly.
    """
    if w.format == format:
        return w
    if format == "fp32":
        return Quants(format, expanded(w), ())
    if not is_held(w.format, format):
        raise ValueError(f"{format} does not hold the values of {w.format}")
    (d,) = w.scales
    if format == "q4_1":
        return Quants(format, w.q, (d, -8 * d))
    return Quants(format, w.q.astype(np.int8) - np.int8(8), (d,))


def expanded(w: Quants) -> Array:
    """What the quants stand for: [N, K] float32."""
    N, K = w.q.shape
    if w.format == "bf16":
        return (w.q.astype(np.uint32) << 16).view(np.float32)
    if w.format in FLOATS:
        return w.q.view(np.float16 if w.format == "fp16" else np.float32).astype(np.float32)
    q = w.q.astype(np.float32)
    if w.format == "q8":
        return q * w.scales[0][:, None]
    if w.format == "q6_k":
        d, scales = w.scales
        each = np.repeat(d.astype(np.float32), 16, -1)[:, : K // 16] * scales
        return ((q - 32).reshape(N, -1, 16) * each[..., None]).reshape(N, K)
    d = w.scales[0].astype(np.float32)[..., None]
    offset = w.scales[1].astype(np.float32)[..., None] if w.format == "q4_1" else 0
    grouped = q.reshape(N, -1, GROUP) - (8 if w.format == "q4_0" else 0)
    return (grouped * d + offset).reshape(N, K)


def pack(w: Quants, bias: Tensor | None = None, order: Array | None = None) -> Weights:
    """Pack quants for the tile; `order` gives the outputs' order, -1 an output of zeros
    (`interleaved`, `padded_heads`)."""
    count = len(w.q)
    if order is not None:
        w = w.take(order)
    N, K = w.q.shape
    if w.format in ROUNDED and K % GROUP:
        raise ValueError(f"{w.format} needs K to be a multiple of {GROUP}, got {K}")
    blocks, groups = -(-N // LANES), -(-K // GROUP)
    data = on_cache_line((blocks, block_bytes(w.format, groups)))
    q, scales = _padded(w.q, blocks), [_padded(s, blocks) for s in w.scales]
    _fill(data, w.format, q, scales, blocks, groups)
    if bias is None:
        return Weights(w.format, data, N, K, None)
    if bias.shape != (count,):
        raise ValueError(f"bias must be [N]=[{count}], got {list(bias.shape)}")
    values = bias.detach().float().numpy()
    if order is not None:
        values = np.where(order < 0, np.float32(0), values[order])
    return Weights(w.format, data, N, K, _padded(values, blocks))


def _fill(
    data: Array, format: str, q: Array, scales: Sequence[Array], blocks: int, groups: int
) -> None:
    """Write the blocks of `data` [blocks, block_bytes]."""
    if format in FLOATS:
        K = q.shape[1]
        size = LANES * BYTES[format]
        words = data[:, : groups * GROUP * size].view(q.dtype).reshape(blocks, -1, LANES)
        words[:, :K] = q.reshape(blocks, LANES, K).transpose(0, 2, 1)
        return
    # Four inputs at a time: what is done to bytes below stays within each byte.
    quads: Array = q.view(np.uint32).reshape(blocks, LANES, groups, 8)
    if format == "q6_k":
        low = quads & 0x0F0F0F0F
        halves = ((quads >> 4) & 0x0F0F0F0F).reshape(blocks, LANES, groups, 2, 4)
        high = sum(halves[..., i] << (2 * i) for i in range(4))
        quads = np.concatenate([low[..., :4] | low[..., 4:] << 4, high], -1)
    elif format not in ("q8_0", "q8"):
        quads = quads[..., :4] | quads[..., 4:] << 4
    at = groups * LANES * 4 * quads.shape[-1]
    body = data[:, :at].view(np.uint32).reshape(blocks, groups, -1, LANES)
    body[:] = quads.transpose(0, 2, 3, 1)
    if format == "q8":
        data[:, at : at + 32].view(np.float32)[:] = scales[0].reshape(blocks, LANES)
        return
    if format == "q6_k":
        sixteenths = scales[1].reshape(blocks, LANES, groups, 2).transpose(0, 2, 3, 1)
        data[:, at : at + groups * 16].view(np.int8)[:] = sixteenths.reshape(blocks, -1)
        at += groups * 16
        shared = scales[0].reshape(blocks, LANES, -1).transpose(0, 2, 1).reshape(blocks, -1)
        data[:, at : at + 2 * shared.shape[1]].view(np.float16)[:] = shared
        return
    stacked = np.stack([s.reshape(blocks, LANES, groups).transpose(0, 2, 1) for s in scales], 2)
    halves = data[:, at : at + 16 * len(scales) * groups].view(np.float16)
    halves[:] = stacked.reshape(blocks, -1)


def interleaved(gate_features: int) -> Array:
    """Order of [gate; up] rows that puts 8 gates before their 8 ups, for F = gate_features: [2F],
    with -1 where F is filled up to whole lanes."""
    gates = np.arange(-(-gate_features // LANES) * LANES)
    gates[gate_features:] = -1
    ups = np.where(gates < 0, -1, gates + gate_features)
    return np.stack([gates.reshape(-1, LANES), ups.reshape(-1, LANES)], 1).reshape(-1)


def padded_heads(heads: int, head_dim: int) -> Array:
    """Order of the outputs of `heads` heads that fills either half of each up to whole lanes:
    [heads * padded_dim(head_dim)], with -1 for padding."""
    half = np.full((heads, 2, padded_dim(head_dim) // 2), -1)
    half[:, :, : head_dim // 2] = np.arange(heads * head_dim).reshape(heads, 2, -1)
    return half.reshape(-1)


def padded_dim(head_dim: int) -> int:
    """The head dimension that the kernels take: halves, which are rotated, of whole lanes."""
    return 2 * -(-head_dim // (2 * LANES)) * LANES


def on_cache_line(shape: tuple[int, ...], dtype: type = np.uint8) -> Array:
    """Zeros whose first byte begins a cache line."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    base = np.zeros(size + 64, np.uint8)
    begin = -base.ctypes.data % 64
    return base[begin : begin + size].view(dtype).reshape(shape)


def _padded(values: Array, blocks: int) -> Array:
    missing = blocks * LANES - len(values)
    padding = [(0, missing)] + [(0, 0)] * (values.ndim - 1)
    return np.ascontiguousarray(np.pad(values, padding) if missing else values)
