"""Loads and stores at addresses, and atomic words that threads share."""

from __future__ import annotations

from llvmlite import ir
from numba import types

from ._intrinsics import (
    BYTE,
    F8,
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    call,
    compiled,
    lanes_of,
    load,
    operation,
    pointer_to,
    store,
)


@operation(types.int64, types.int64)
def load_i64(builder, address):
    return load(builder, address, I64, 8)


@operation(types.int64, types.int64)
def load_i32(builder, address):
    return builder.sext(load(builder, address, I32, 4), I64)


@operation(types.int64, types.int64)
def load_byte(builder, address):
    return builder.zext(load(builder, address, BYTE, 1), I64)


@operation(types.void, types.int64)
def prefetch(builder, address):
    pointer = builder.inttoptr(address, BYTE.as_pointer())
    read, close, data = (ir.Constant(I32, value) for value in (0, 3, 1))
    call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, read, close, data)


@operation(types.float32, types.int64)
def load_f32(builder, address):
    return load(builder, address, F32, 4)


@operation(types.float32, types.int64)
def load_half(builder, address):
    return builder.fpext(load(builder, address, ir.HalfType(), 2), F32)


@operation(types.void, types.int64, types.int64)
def store_i64(builder, address, value):
    store(builder, address, value, 8)


@operation(types.void, types.int64, types.int64)
def store_byte(builder, address, value):
    store(builder, address, builder.trunc(value, BYTE), 1)


@operation(types.void, types.int64, types.int64)
def store_i32(builder, address, value):
    store(builder, address, builder.trunc(value, I32), 4)


@operation(types.void, types.int64, types.float32)
def store_f32(builder, address, value):
    store(builder, address, value, 4)


@operation(F8, types.int64)
def load_f8(builder, address):
    return load(builder, address, F8.llvm, 4)


@operation(types.void, types.int64, F8)
def store_f8(builder, address, value):
    store(builder, address, value, 4)


@operation(types.void, types.int64, *[I8] * 4)
def store_bytes(builder, address, *values):
    """The low bytes of 32 lanes."""
    a, b = (concatenated(builder, *values[i : i + 2]) for i in (0, 2))
    bytes_ = builder.trunc(concatenated(builder, a, b), ir.VectorType(BYTE, 4 * LANES))
    store(builder, address, bytes_, 1)


def concatenated(builder, a, b):
    lanes = list(range(2 * a.type.count))
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


@operation(F8, types.int64)
def load_half8(builder, address):
    return builder.fpext(load(builder, address, ir.VectorType(ir.HalfType(), LANES), 2), F8.llvm)


@operation(types.void, types.int64, F8)
def store_half8(builder, address, value):
    store(builder, address, builder.fptrunc(value, ir.VectorType(ir.HalfType(), LANES)), 2)


@operation(F8, types.int64)
def load_bfloat8(builder, address):
    wide = builder.zext(load(builder, address, ir.VectorType(I16, LANES), 2), I8.llvm)
    return builder.bitcast(builder.shl(wide, lanes_of(16)), F8.llvm)


@operation(types.void, types.int64, F8)
def store_bfloat8(builder, address, value):
    """Rounded to nearest, ties to even; a NaN stays one."""
    bits = builder.bitcast(value, I8.llvm)
    odd = builder.and_(builder.lshr(bits, lanes_of(16)), lanes_of(1))
    near = builder.lshr(builder.add(bits, builder.add(odd, lanes_of(0x7FFF))), lanes_of(16))
    nan = builder.or_(builder.lshr(bits, lanes_of(16)), lanes_of(0x40))
    out = builder.select(builder.fcmp_unordered("uno", value, value), nan, near)
    store(builder, address, builder.trunc(out, ir.VectorType(I16, LANES)), 2)


@compiled
def word(base, index):
    return load_i64(base + 8 * index)


@operation(types.int64, types.int64)
def atomic_load(builder, address):
    return builder.load_atomic(pointer_to(builder, address, I64), "acquire", 8)


@operation(types.void, types.int64, types.int64)
def atomic_store(builder, address, value):
    builder.store_atomic(value, pointer_to(builder, address, I64), "seq_cst", 8)


@operation(types.int64, types.int64, types.int64)
def atomic_add(builder, address, value):
    return builder.atomic_rmw("add", pointer_to(builder, address, I64), value, "seq_cst")


@operation(types.int64, types.int64, types.int64, types.int64)
def compare_swap(builder, address, expected, value):
    """1 where the word was `expected` and is `value` now."""
    place = pointer_to(builder, address, I64)
    pair = builder.cmpxchg(place, expected, value, "seq_cst", "monotonic")
    return builder.zext(builder.extract_value(pair, 1), I64)
