"""Sums of products in registers: rows of numbers times a matrix of float32.

    out[c] += sum over i of x[i] b[i, c], i ascending, each step one FMA

Every column is a lane of its own, so that its bits do not depend on the rows and columns that are
multiplied with it. Eight registers of sums keep both multipliers of a CPU busy: 2 rows of 32
columns, or one of 64.

Unless `ahead` is 0, each i and 32 columns prefetch the byte there, and it moves on by `step`.
"""

from __future__ import annotations

from ._intrinsics import compiled
from ._memory import load_f8, load_f32, prefetch, store_f8
from ._vectors import fma, splat


@compiled
def add_products(x, b, count, stride, columns, out, ahead, step):
    """One row x [count] times b [count, columns], `stride` bytes apart; columns in eights."""
    c, hint = 0, ahead
    if count <= 0:
        return
    while c + 64 <= columns:
        a = out + 4 * c
        a0, a1, a2, a3 = load_f8(a), load_f8(a + 32), load_f8(a + 64), load_f8(a + 96)
        a4, a5, a6, a7 = load_f8(a + 128), load_f8(a + 160), load_f8(a + 192), load_f8(a + 224)
        at = b + 4 * c
        for i in range(count):
            if ahead != 0:
                prefetch(hint)
                hint += 2 * step
            w = splat(load_f32(x + 4 * i))
            a0 = fma(w, load_f8(at), a0)
            a1 = fma(w, load_f8(at + 32), a1)
            a2 = fma(w, load_f8(at + 64), a2)
            a3 = fma(w, load_f8(at + 96), a3)
            a4 = fma(w, load_f8(at + 128), a4)
            a5 = fma(w, load_f8(at + 160), a5)
            a6 = fma(w, load_f8(at + 192), a6)
            a7 = fma(w, load_f8(at + 224), a7)
            at += stride
        store_f8(a, a0)
        store_f8(a + 32, a1)
        store_f8(a + 64, a2)
        store_f8(a + 96, a3)
        store_f8(a + 128, a4)
        store_f8(a + 160, a5)
        store_f8(a + 192, a6)
        store_f8(a + 224, a7)
        c += 64
    while c < columns:
        a0 = load_f8(out + 4 * c)
        for i in range(count):
            a0 = fma(splat(load_f32(x + 4 * i)), load_f8(b + 4 * c + stride * i), a0)
        store_f8(out + 4 * c, a0)
        c += 8


@compiled
def add_products_2(x, y, b, count, stride, columns, x_out, y_out, ahead, step):
    """Two rows times b [count, columns]: each register of b is loaded once for both."""
    c, hint = 0, ahead
    while c + 32 <= columns:
        p, q = x_out + 4 * c, y_out + 4 * c
        a0, a1, a2, a3 = load_f8(p), load_f8(p + 32), load_f8(p + 64), load_f8(p + 96)
        b0, b1, b2, b3 = load_f8(q), load_f8(q + 32), load_f8(q + 64), load_f8(q + 96)
        at = b + 4 * c
        for i in range(count):
            if ahead != 0:
                prefetch(hint)
                hint += step
            v, w = splat(load_f32(x + 4 * i)), splat(load_f32(y + 4 * i))
            k = load_f8(at)
            a0, b0 = fma(v, k, a0), fma(w, k, b0)
            k = load_f8(at + 32)
            a1, b1 = fma(v, k, a1), fma(w, k, b1)
            k = load_f8(at + 64)
            a2, b2 = fma(v, k, a2), fma(w, k, b2)
            k = load_f8(at + 96)
            a3, b3 = fma(v, k, a3), fma(w, k, b3)
            at += stride
        store_f8(p, a0)
        store_f8(p + 32, a1)
        store_f8(p + 64, a2)
        store_f8(p + 96, a3)
        store_f8(q, b0)
        store_f8(q + 32, b1)
        store_f8(q + 64, b2)
        store_f8(q + 96, b3)
        c += 32
    if c < columns:
        add_products(x, b + 4 * c, count, stride, columns - c, x_out + 4 * c, 0, 0)
        add_products(y, b + 4 * c, count, stride, columns - c, y_out + 4 * c, 0, 0)
