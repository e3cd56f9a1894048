"""Arithmetic on 8 lanes; sums over lanes are trees written out.

The order of logits is `kernels/_ranking.py`'s: NaN above every number, -0 equal to 0.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from ._intrinsics import F8, F32, I8, I32, I64, LANES, call, lanes_of, operation, store


@operation(F8, types.float32)
def splat(builder, value):
    return _splat(builder, value, F8.llvm)


@operation(I8)
def lane_ids(builder):
    return ir.Constant(I8.llvm, list(range(LANES)))


@operation(I8, types.int64)
def splat_i(builder, value):
    return _splat(builder, builder.trunc(value, I32), I8.llvm)


def _splat(builder: Any, value: Any, kind: Any) -> Any:
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), lanes_of(0))


@operation(F8, F8, F8, F8)
def fma(builder, a, b, c):
    return call(builder, "llvm.fma.v8f32", F8.llvm, a, b, c)


@operation(types.float32, types.float32, types.float32, types.float32)
def fma_scalar(builder, a, b, c):
    return call(builder, "llvm.fma.f32", F32, a, b, c)


@operation(types.float32, types.float32)
def sqrt(builder, value):
    return call(builder, "llvm.sqrt.f32", F32, value)


@operation(F8, F8, F8)
def maximum(builder, a, b):
    """a where it is larger than b, else b: so b where a is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@operation(F8, F8)
def absolute(builder, value):
    return call(builder, "llvm.fabs.v8f32", F8.llvm, value)


@operation(I8, F8)
def magnitude(builder, value):
    """Integers in the order of the absolute values: infinity is INFINITE, a NaN is above it."""
    return builder.and_(builder.bitcast(value, I8.llvm), lanes_of(0x7FFFFFFF))


@operation(I8, I8, I8)
def maximum_i(builder, a, b):
    return builder.select(builder.icmp_signed(">", a, b), a, b)


@operation(F8, F8)
def round_even(builder, value):
    """The nearest integer, ties to even."""
    return call(builder, "llvm.roundeven.v8f32", F8.llvm, value)


@operation(I8, F8)
def to_int(builder, value):
    """Of numbers within int32's range."""
    return builder.fptosi(value, I8.llvm)


@operation(F8, F8)
def low_bits_exponent(builder, value):
    """2^(e - 127) where e, 1..254, are the low bits of the number's representation."""
    bits = builder.bitcast(value, I8.llvm)
    return builder.bitcast(builder.shl(bits, lanes_of(23)), F8.llvm)


@operation(F8, F8, F8, F8, F8)
def where_less(builder, a, b, chosen, other):
    """chosen in the lanes where a < b, other elsewhere."""
    return builder.select(builder.fcmp_ordered("<", a, b), chosen, other)


@operation(F8, F8, types.int64, types.int64)
def mask_outside(builder, value, begin, end):
    """Lanes begin..end-1 of value, -inf in the others."""
    lanes = ir.Constant(I8.llvm, list(range(LANES)))
    low = _splat(builder, builder.trunc(begin, I32), I8.llvm)
    high = _splat(builder, builder.trunc(end, I32), I8.llvm)
    inside = builder.and_(
        builder.icmp_signed(">=", lanes, low), builder.icmp_signed("<", lanes, high)
    )
    return builder.select(inside, value, lanes_of(float("-inf"), F32))


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def _halves(builder: Any, value: Any, width: int) -> tuple[Any, Any]:
    nothing = ir.Constant(value.type, ir.Undefined)
    low = list(range(width))
    high = list(range(width, 2 * width))
    return tuple(_shuffle(builder, value, nothing, lanes) for lanes in (low, high))


@operation(types.float32, F8)
def reduce_add(builder, value):
    """Sum of the lanes: i + 4, then i + 2, then the last two."""
    for width in (4, 2, 1):
        value = builder.fadd(*_halves(builder, value, width))
    return builder.extract_element(value, ir.Constant(I32, 0))


@operation(types.int64, I8, I8)
def reduce_add_two(builder, a, b):
    """The sum of a's lanes in the low half, of b's in the high one, 32 bits each."""
    value = builder.add(
        _shuffle(builder, a, b, [0, 1, 2, 3, 8, 9, 10, 11]),
        _shuffle(builder, a, b, [4, 5, 6, 7, 12, 13, 14, 15]),
    )
    for low, high in (([0, 1, 4, 5], [2, 3, 6, 7]), ([0, 2], [1, 3])):
        value = builder.add(*(_shuffle(builder, value, value, lanes) for lanes in (low, high)))
    return builder.bitcast(value, I64)


@operation(types.float32, F8)
def reduce_max(builder, value):
    """The largest lane; NaN only where every lane is."""
    for width in (4, 2, 1):
        a, b = _halves(builder, value, width)
        ordered = builder.fcmp_ordered(">", a, b)
        unordered = builder.fcmp_unordered("uno", b, b)
        value = builder.select(builder.or_(ordered, unordered), a, b)
    return builder.extract_element(value, ir.Constant(I32, 0))


@operation(types.void, types.int64, types.int64, *[F8] * 8)
def store_transposed(builder, address, stride, *rows):
    """Store column i of eight rows at address + stride * i."""
    # Halves of 4, then of 2, then of 1 lane change places.
    columns = list(rows)
    for width in (4, 2, 1):
        for i in range(LANES):
            if not i & width:
                a, b = columns[i], columns[i + width]
                lanes = range(LANES)
                low = [k if not k & width else k - width + LANES for k in lanes]
                high = [k + width if not k & width else k + LANES for k in lanes]
                columns[i] = _shuffle(builder, a, b, low)
                columns[i + width] = _shuffle(builder, a, b, high)
    for column in columns:
        store(builder, address, column, 4)
        address = builder.add(address, stride)


@operation(I8, F8)
def order_key(builder, value):
    bits = builder.bitcast(value, I8.llvm)
    zero = builder.fcmp_ordered("==", value, lanes_of(0.0, F32))
    bits = builder.select(zero, lanes_of(0), bits)
    nan = builder.fcmp_unordered("uno", value, value)
    bits = builder.select(nan, lanes_of(0x7FC00000), bits)
    sign = builder.and_(builder.ashr(bits, lanes_of(31)), lanes_of(0x7FFFFFFF))
    return builder.xor(bits, sign)


@operation(I8, I8, I8, I8, I8)
def select_greater(builder, a, b, chosen, other):
    """chosen in the lanes where a > b, other elsewhere."""
    return builder.select(builder.icmp_signed(">", a, b), chosen, other)


@operation(types.int64, I8)
def reduce_max_i(builder, value):
    for width in (4, 2, 1):
        a, b = _halves(builder, value, width)
        value = builder.select(builder.icmp_signed(">", a, b), a, b)
    return builder.sext(builder.extract_element(value, ir.Constant(I32, 0)), I64)


@operation(types.int64, I8, I8, types.int64)
def lowest_where(builder, keys, ids, key):
    """The lowest of ids in the lanes whose key it is."""
    wanted = _splat(builder, builder.trunc(key, I32), I8.llvm)
    value = builder.select(builder.icmp_signed("==", keys, wanted), ids, lanes_of(0x7FFFFFFF))
    for width in (4, 2, 1):
        a, b = _halves(builder, value, width)
        value = builder.select(builder.icmp_signed("<", a, b), a, b)
    return builder.sext(builder.extract_element(value, ir.Constant(I32, 0)), I64)


@operation(types.float32, types.int64)
def key_value(builder, key):
    bits = builder.trunc(key, I32)
    sign = builder.and_(builder.ashr(bits, ir.Constant(I32, 31)), ir.Constant(I32, 0x7FFFFFFF))
    return builder.bitcast(builder.xor(bits, sign), F32)


@operation(types.int64, types.float32)
def float_bits(builder, value):
    return builder.sext(builder.bitcast(value, I32), I64)


@operation(types.float32, types.int64)
def bits_float(builder, bits):
    return builder.bitcast(builder.trunc(bits, I32), F32)
