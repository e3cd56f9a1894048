"""Weights as the matmul tile reads them: outputs in blocks of 8, on cache lines.

`_tile` draws the layout. Bytes per weight: those of `quants`, q6_k 0.8125 and two scales, and the
padding to 64 bytes per 8 outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ._tile import FLOATS, GROUP, GROUP_BYTES, ROUNDED
from .quants import Array, Quants

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


def block_bytes(format: str, groups: int) -> int:
    """Bytes of 8 outputs, as `_tile` computes them."""
    size = groups * GROUP_BYTES[format]
    size += 32 if format == "q8" else 0
    size += -(-groups // 8) * 16 if format == "q6_k" else 0
    return -(-size // 64) * 64


def pack(w: Quants, bias: Tensor | None = None, order: Array | None = None) -> Weights:
    """Pack quants for the tile; `order` gives the outputs' order, -1 an output of zeros
    (`interleaved`, `padded_heads`)."""
    count = w.shape[0]
    if order is not None:
        w = w.take(order)
    N, K = w.shape
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
        size = groups * GROUP * LANES * q.itemsize
        words = data[:, :size].view(q.dtype).reshape(blocks, -1, LANES)
        words[:, :K] = q.reshape(blocks, LANES, K).transpose(0, 2, 1)
        return
    # Four bytes at a time; what is done to them below stays within each byte.
    quads: Array = q.view(np.uint32).reshape(blocks, LANES, groups, -1)
    if format == "q6_k":
        low = quads & 0x0F0F0F0F
        halves = ((quads >> 4) & 0x0F0F0F0F).reshape(blocks, LANES, groups, 2, 4)
        high = sum(halves[..., i] << (2 * i) for i in range(4))
        quads = np.concatenate([low[..., :4] | low[..., 4:] << 4, high], -1)
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
