"""Activations prepared for a matmul: RMS norm, then 8 bits per value in groups of 32.

    y = x / sqrt(mean(x^2) + eps) * w          (Zhang and Sennrich 2019, equation 4)
    dx = max |y| / 127;  xq = round(y / dx), ties to even;  per group, as in llama.cpp's Q8_0

Statistics stored per group: dx, dx * sum(xq), and the sums of its first and its last 16 xq.

Bytes moved: 4 K read, K + K / 2 written per row, within the cache.

|xq| <= 127, so sums of 32 are exact in float32. A group that holds a non-finite number has dx =
NaN, which makes NaN of every output of its row; where 1 / dx overflows, dx and xq are 0.
"""

from __future__ import annotations

import numpy as np

from ._intrinsics import compiled
from ._memory import load_f8, store_bytes, store_f8, store_f32, store_i64
from ._vectors import (
    bits_float,
    fma,
    magnitude,
    maximum,
    maximum_i,
    reduce_add,
    reduce_add_two,
    reduce_max_i,
    round_even,
    splat,
    sqrt,
    to_int,
)

F32 = np.float32
INFINITE = 0x7F800000  # see `magnitude`


@compiled
def inverse_rms(x, K, count, eps):
    """1 / sqrt(sum(x^2) / count + eps) of the K numbers at address x, which are padded with zeros
    to a multiple of 8."""
    a = splat(0.0)
    b = splat(0.0)
    c = splat(0.0)
    d = splat(0.0)
    k = 0
    while k + 32 <= K:
        v = load_f8(x + 4 * k)
        a = fma(v, v, a)
        v = load_f8(x + 4 * k + 32)
        b = fma(v, v, b)
        v = load_f8(x + 4 * k + 64)
        c = fma(v, v, c)
        v = load_f8(x + 4 * k + 96)
        d = fma(v, v, d)
        k += 32
    while k < K:
        v = load_f8(x + 4 * k)
        a = fma(v, v, a)
        k += 8
    mean = reduce_add((a + b) + (c + d)) / F32(count)
    return F32(1.0) / sqrt(mean + eps)


@compiled
def norm_row(x, w, eps, K, count, out):
    """RMS-normalise K numbers, `count` of which are not padding; if w is 0, copy them."""
    if w == 0:
        for k in range(0, K, 8):
            store_f8(out + 4 * k, load_f8(x + 4 * k))
        return
    r = splat(inverse_rms(x, K, count, eps))
    for k in range(0, K, 8):
        store_f8(out + 4 * k, load_f8(x + 4 * k) * r * load_f8(w + 4 * k))


@compiled
def quantise_group(v0, v1, v2, v3, xq, stats):
    most = reduce_max_i(
        maximum_i(maximum_i(magnitude(v0), magnitude(v1)), maximum_i(magnitude(v2), magnitude(v3)))
    )
    dx = bits_float(most) / F32(127.0)
    inverse = F32(1.0) / dx
    if most >= INFINITE:
        inverse = F32(0.0)
        dx = F32(np.nan)
    elif not inverse < F32(np.inf):
        # dx is too small to divide by.
        inverse = F32(0.0)
        dx = F32(0.0)
    d = splat(inverse)
    low = splat(-127.0)  # for NaN; finite products are within 127 (1 + 2^-20)
    q0 = to_int(round_even(maximum(v0 * d, low)))
    q1 = to_int(round_even(maximum(v1 * d, low)))
    q2 = to_int(round_even(maximum(v2 * d, low)))
    q3 = to_int(round_even(maximum(v3 * d, low)))
    store_bytes(xq, q0, q1, q2, q3)
    halves = reduce_add_two(q0 + q1, q2 + q3)
    both = (halves >> 32) + (halves << 32 >> 32)
    store_f32(stats, dx)
    store_f32(stats + 4, dx * F32(both))
    store_i64(stats + 8, halves)


@compiled
def quantise_row(x, w, eps, K, xq, stats):
    """Normalise (unless w is 0) and quantise K numbers, K a multiple of 32."""
    if w == 0:
        for g in range(K // 32):
            a = x + 128 * g
            quantise_group(
                load_f8(a),
                load_f8(a + 32),
                load_f8(a + 64),
                load_f8(a + 96),
                xq + 32 * g,
                stats + 16 * g,
            )
        return
    r = splat(inverse_rms(x, K, K, eps))
    for g in range(K // 32):
        a = x + 128 * g
        b = w + 128 * g
        quantise_group(
            load_f8(a) * r * load_f8(b),
            load_f8(a + 32) * r * load_f8(b + 32),
            load_f8(a + 64) * r * load_f8(b + 64),
            load_f8(a + 96) * r * load_f8(b + 96),
            xq + 32 * g,
            stats + 16 * g,
        )
