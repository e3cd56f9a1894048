"""Matmul phases: a thread prepares the rows once, then multiplies them by chunks of a weight.

    linear      out = norm(x) w^T + b (+ residual)
    gate_up     out = silu(gate) * up

Bytes moved: the chunk's weights once; rows and outputs within the cache.
"""

from __future__ import annotations

import numpy as np

from ._activations import norm_row, quantise_row
from ._elementary import silu
from ._intrinsics import compiled
from ._layout import (
    ALL_BLOCKS,
    BIAS,
    BLOCK_BYTES,
    BLOCKS,
    EPS,
    GROUPS,
    INPUTS,
    NORM_W,
    OUT,
    OUT_STRIDE,
    QUANTISED,
    RESIDUAL,
    RESIDUAL_STRIDE,
    TILE,
    WEIGHT,
    X_STRIDE,
    X,
)
from ._memory import load_f8, store_f8, store_f32, word
from ._processor import call_tile
from ._vectors import bits_float

F32 = np.float32


@compiled
def activation_bytes(phase, rows):
    per_group = 48 if word(phase, QUANTISED) == 1 else 128
    return (rows * word(phase, GROUPS) * per_group + 63) // 64 * 64


@compiled
def prepare(phase, rows, scratch):
    """Normalise and quantise a matmul's rows into this thread's scratch."""
    x, stride, K = word(phase, X), 4 * word(phase, X_STRIDE), word(phase, INPUTS)
    w, eps = word(phase, NORM_W), bits_float(word(phase, EPS))
    groups = word(phase, GROUPS)
    if word(phase, QUANTISED) == 1:
        stats = scratch + rows * groups * 32
        for r in range(rows):
            xq = scratch + 32 * groups * r
            quantise_row(x + r * stride, w, eps, K, xq, stats + 16 * groups * r)
        return
    for r in range(rows):
        out = scratch + 128 * groups * r
        norm_row(x + r * stride, w, eps, K, K, out)
        for k in range(K, 32 * groups):
            store_f32(out + 4 * k, F32(0.0))


@compiled
def multiply(phase, rows, scratch, first, blocks, out, stride):
    """Rows of `prepare` times blocks first..first+blocks-1 of the weight, and the bias."""
    groups = word(phase, GROUPS)
    w = word(phase, WEIGHT) + first * word(phase, BLOCK_BYTES)
    stats = scratch + rows * groups * 32
    call_tile(word(phase, TILE), w, scratch, stats, out, blocks, groups, stride, rows)
    bias = word(phase, BIAS)
    if bias != 0:
        for r in range(rows):
            for n in range(0, 32 * blocks, 32):
                y = out + 4 * stride * r + n
                store_f8(y, load_f8(y) + load_f8(bias + 32 * first + n))


@compiled
def linear_chunk(phase, rows, chunk, scratch, work):
    """out = x w^T + b (+ residual)"""
    first = chunk * word(phase, BLOCKS)
    blocks = min(word(phase, BLOCKS), word(phase, ALL_BLOCKS) - first)
    residual, stride = word(phase, RESIDUAL), word(phase, OUT_STRIDE)
    out = word(phase, OUT) + 32 * first
    if residual == 0:
        multiply(phase, rows, scratch, first, blocks, out, stride)
        return
    multiply(phase, rows, scratch, first, blocks, work, 8 * blocks)
    residual += 32 * first
    for r in range(rows):
        y, x = out + 4 * stride * r, residual + 4 * word(phase, RESIDUAL_STRIDE) * r
        for n in range(0, 32 * blocks, 32):
            store_f8(y + n, load_f8(work + 32 * blocks * r + n) + load_f8(x + n))


@compiled
def gate_up_chunk(phase, rows, chunk, scratch, work):
    """out = silu(gate) * up, 8 gates before their 8 ups in the weight."""
    first = chunk * word(phase, BLOCKS)
    blocks = min(word(phase, BLOCKS), word(phase, ALL_BLOCKS) - first)
    multiply(phase, rows, scratch, first, blocks, work, 8 * blocks)
    out = word(phase, OUT) + 16 * first
    for r in range(rows):
        for pair in range(blocks // 2):
            a = work + 32 * blocks * r + 64 * pair
            y = silu(load_f8(a)) * load_f8(a + 32)
            store_f8(out + 4 * word(phase, OUT_STRIDE) * r + 32 * pair, y)
