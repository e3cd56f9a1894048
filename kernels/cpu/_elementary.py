"""Elementary functions of 8 lanes: exp, silu; and log of one number.

Polynomials of Cephes (Moshier), evaluated by FMA: within 2 units in the last place of float32.
NaN in, NaN out.
"""

from __future__ import annotations

import numpy as np

from ._intrinsics import compiled
from ._vectors import (
    bits_float,
    float_bits,
    fma,
    fma_scalar,
    low_bits_exponent,
    splat,
    where_less,
)

F32 = np.float32
# 1.5 * 2^23: float32 of this size are integers.
ROUNDING = 12582912.0


@compiled
def exp(x):
    """e^x: 0 below -86.6, infinity above 88.72, where float32 ends."""
    # The sum's low bits are n + 126, for a factor of 2^(n - 1), where n is the integer nearest to
    # x / log 2: 2^n itself would end at e^88.37.
    magic = splat(ROUNDING + 126.0)
    rounded = fma(x, splat(1.44269504088896341), magic)
    n = rounded - magic
    r = fma(n, splat(-0.693359375), x)
    r = fma(n, splat(2.12194440e-4), r)
    p = splat(1.9875691500e-4)
    p = fma(p, r, splat(1.3981999507e-3))
    p = fma(p, r, splat(8.3334519073e-3))
    p = fma(p, r, splat(4.1665795894e-2))
    p = fma(p, r, splat(1.6666665459e-1))
    p = fma(p, r, splat(5.0000001201e-1))
    y = fma(p, r * r, r) + splat(1.0)
    y = (y + y) * low_bits_exponent(rounded)
    y = where_less(x, splat(-86.6), splat(0.0), y)
    return where_less(splat(88.73), x, splat(np.inf), y)


@compiled
def silu(x):
    return x / (splat(1.0) + exp(splat(0.0) - x))


@compiled
def log(x):
    """Natural logarithm of a normal x > 0; infinity and NaN are returned as they are."""
    if not x < F32(3.4028235e38):
        return x
    bits = float_bits(x)
    exponent = (bits >> 23) - 126
    m = bits_float((bits & 0x7FFFFF) | 0x3F000000)
    if m < F32(0.70710678):
        exponent -= 1
        m = m + m
    m = m - F32(1.0)
    z = m * m
    p = F32(7.0376836292e-2)
    p = fma_scalar(p, m, F32(-1.1514610310e-1))
    p = fma_scalar(p, m, F32(1.1676998740e-1))
    p = fma_scalar(p, m, F32(-1.2420140846e-1))
    p = fma_scalar(p, m, F32(1.4249322787e-1))
    p = fma_scalar(p, m, F32(-1.6668057665e-1))
    p = fma_scalar(p, m, F32(2.0000714765e-1))
    p = fma_scalar(p, m, F32(-2.4999993993e-1))
    p = fma_scalar(p, m, F32(3.3333331174e-1))
    e = F32(exponent)
    y = fma_scalar(e, F32(-2.12194440e-4), p * m * z)
    y = fma_scalar(F32(-0.5), z, y)
    return fma_scalar(e, F32(0.693359375), m + y)
