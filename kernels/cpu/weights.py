"""Weights as the matmul tile reads them: outputs in blocks of 8, on cache lines.

`_tile` draws the layout. Bytes per weight: those of `quants`, q6_k 0.8125 and two scales, and the
padding to 64 bytes per 8 outputs.
"""

from __future__ import annotations

import mmap
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ._formats import FLOATS, GROUP, QUANTISED
from .quants import SLICE, Array, Quants

LANES = 8


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


def sections(format: str, groups: int) -> list[tuple[int, Any]]:
    """The parts of a block of 8 outputs, in order: items per output, and their type."""
    if format in FLOATS:
        return [(groups * GROUP, np.float32 if format == "fp32" else np.uint16)]
    if format == "q6_k":
        return [(6 * groups, np.uint32), (2 * groups, np.int8), (-(-groups // 8), np.float16)]
    if format == "q4_k":
        return [(4 * groups, np.uint32), (2 * groups, np.uint8), (-(-groups // 8) * 2, np.float16)]
    if format == "q8":
        return [(8 * groups, np.uint32), (1, np.float32)]
    words, scales = {"q4_0": (4, 1), "q4_1": (4, 2), "q8_0": (8, 1)}[format]
    return [(words * groups, np.uint32), (scales * groups, np.float16)]


def block_bytes(format: str, groups: int) -> int:
    """Bytes of a block of 8 outputs, as `_tile` computes them."""
    size = sum(count * np.dtype(kind).itemsize for count, kind in sections(format, groups))
    return -(-size * LANES // 64) * 64


def packed_bytes(format: str, out_features: int, in_features: int) -> int:
    """The size of a packed matrix without its bias."""
    return -(-out_features // LANES) * block_bytes(format, -(-in_features // GROUP))


def pack(w: Quants, bias: Tensor | None = None, order: Array | None = None) -> Weights:
    """Pack a matrix for the tile. `order` (`interleaved`, `padded_heads`) lists the outputs to
    pack, -1 for one of zeros."""
    count, K = w.shape
    N = count if order is None else len(order)
    if w.format in QUANTISED and K % GROUP:
        raise ValueError(f"{w.format} needs K to be a multiple of {GROUP}, got {K}")
    data = _empty_blocks(w.format, N, K)
    for begin in range(0, N, SLICE):
        rows = slice(begin, min(N, begin + SLICE))
        part = w.take(rows if order is None else order[rows])
        _fill(data[begin // LANES :], w.format, K, _items(part))
    if bias is None:
        return Weights(w.format, data, N, K, None)
    if bias.shape != (count,):
        raise ValueError(f"bias must be [N]=[{count}], got {list(bias.shape)}")
    values = bias.detach().float().numpy()
    if order is not None:
        values = np.where(order < 0, np.float32(0), values[order])
    padded = np.pad(values, (0, -N % LANES))
    return Weights(w.format, data, N, K, padded)


def take_outputs(w: Weights, rows: Array) -> Weights:
    """The outputs `rows` of a packed matrix without a bias, in that order."""
    parts = _parts(w.data, w.format, w.groups)
    items = [part[rows // LANES, :, rows % LANES] for part in parts]
    data = _empty_blocks(w.format, len(rows), w.in_features)
    _fill(data, w.format, w.in_features, items)
    return Weights(w.format, data, len(rows), w.in_features, None)


def _items(w: Quants) -> list[Array]:
    """What `sections` lists, by output: [N, items] each."""
    N, K = w.shape
    if w.format in FLOATS:
        return [w.q]
    # Four bytes at a time; what is done to them below stays within each byte.
    words = np.ascontiguousarray(w.q).view(np.uint32)
    if w.format == "q6_k":
        low = words & 0x0F0F0F0F
        halves = ((words >> 4) & 0x0F0F0F0F).reshape(N, -1, 2, 4)
        high = sum(halves[..., i] << (2 * i) for i in range(4))
        words = np.concatenate([low[..., :4] | low[..., 4:] << 4, high], -1)
    if w.format == "q6_k":
        scales = [w.scales[1], w.scales[0]]
    elif w.format == "q4_k":
        scales = [np.stack(w.scales[2:], -1), np.stack(w.scales[:2], -1)]
    else:
        scales = [np.stack(w.scales, -1)]
    return [part.reshape(N, -1) for part in (words, *scales)]


def _empty_blocks(format: str, out_features: int, in_features: int) -> Array:
    """Blocks [ceil(N / 8), block_bytes] of zeros."""
    size = block_bytes(format, -(-in_features // GROUP))
    return on_cache_line((-(-out_features // LANES), size))


def _fill(data: Array, format: str, in_features: int, items: list[Array]) -> None:
    """Write the items [N, ...] of N outputs to the first blocks of `data`."""
    N, groups = len(items[0]), -(-in_features // GROUP)
    blocks, missing = -(-N // LANES), -N % LANES
    for part, rows in zip(_parts(data[:blocks], format, groups), items, strict=True):
        whole = np.pad(rows, ((0, missing), (0, 0))) if missing else rows
        columns = rows.shape[1]
        part[:, :columns] = whole.reshape(blocks, LANES, columns).transpose(0, 2, 1)


def _parts(data: Array, format: str, groups: int) -> list[Array]:
    """The sections of all blocks as views [blocks, items, 8]."""
    found, begin = [], 0
    for count, kind in sections(format, groups):
        end = begin + count * LANES * np.dtype(kind).itemsize
        found.append(data[:, begin:end].view(kind).reshape(len(data), count, LANES))
        begin = end
    return found


def interleaved(gate_features: int) -> Array:
    """The order of [gate; up] rows that puts 8 gates before their 8 ups, for F = gate_features:
    [2F], with -1 for the padding of F to a multiple of 8."""
    gates = np.arange(-(-gate_features // LANES) * LANES)
    gates[gate_features:] = -1
    ups = np.where(gates < 0, -1, gates + gate_features)
    return np.stack([gates.reshape(-1, LANES), ups.reshape(-1, LANES)], 1).reshape(-1)


def padded_heads(heads: int, head_dim: int) -> Array:
    """The order of the outputs of `heads` heads that pads each half of a head to a multiple of 8:
    [heads * padded_dim(head_dim)], with -1 for padding."""
    half = np.full((heads, 2, padded_dim(head_dim) // 2), -1)
    half[:, :, : head_dim // 2] = np.arange(heads * head_dim).reshape(heads, 2, -1)
    return half.reshape(-1)


def padded_dim(head_dim: int) -> int:
    """The head dimension of the kernels: halves, which are rotated, are multiples of 8."""
    return 2 * -(-head_dim // (2 * LANES)) * LANES


def on_cache_line(shape: tuple[int, ...], dtype: type = np.uint8) -> Array:
    """Zeros whose first byte begins a cache line."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    base = np.zeros(size + 64, np.uint8)
    begin = -base.ctypes.data % 64
    return base[begin : begin + size].view(dtype).reshape(shape)


def on_own_pages(shape: tuple[int, ...], dtype: type = np.uint8) -> Array:
    """Zeros on pages of their own: only those that are written take memory.

    Freshly allocated zeros may be recycled memory, all of which is resident.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not size or not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return on_cache_line(shape, dtype)
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype).reshape(shape)
