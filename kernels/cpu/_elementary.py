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
    halve,
    maximum,
    minimum,
    power_of_two,
    propagate_nan,
    round_even,
    splat,
    to_int,
)

F32 = np.float32


@compiled
def exp(x):
    """e^x: 0 below -104, infinity above 89; denormal results are kept."""
    bounded = maximum(minimum(x, splat(89.0)), splat(-105.0))
    n = round_even(bounded * splat(1.44269504088896341))
    r = fma(n, splat(-0.693359375), bounded)
    r = fma(n, splat(2.12194440e-4), r)
    p = splat(1.9875691500e-4)
    p = fma(p, r, splat(1.3981999507e-3))
    p = fma(p, r, splat(8.3334519073e-3))
    p = fma(p, r, splat(4.1665795894e-2))
    p = fma(p, r, splat(1.6666665459e-1))
    p = fma(p, r, splat(5.0000001201e-1))
    y = fma(p, r * r, r) + splat(1.0)
    # Two factors, since n is in -152..129.
    exponent = to_int(n)
    half = halve(exponent)
    return propagate_nan(x, y * power_of_two(half) * power_of_two(exponent - half))


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
