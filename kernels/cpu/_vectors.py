"""Numba types and intrinsics for code in fixed vectors of 8 lanes, on plain addresses.

Numba has neither vectors nor pointers: `F8` is 8 float32 in a register and `I8` 8 int32, an address
is an int64. Every operation is the IEEE one; nothing here may be reassociated or contracted, and
sums over lanes are trees written out.
"""

from __future__ import annotations

import operator
import platform
import sys
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

LANES = 8
X86 = platform.machine().lower() in ("x86_64", "amd64")

# How every function of the compiled program is declared: no exceptions, no Python objects.
compiled = njit(
    nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, fastmath=False
)

I64, I32, I16, BYTE, F32 = (*(ir.IntType(n) for n in (64, 32, 16, 8)), ir.FloatType())


class Vector(types.Type):  # type: ignore[misc]
    """8 lanes of one scalar type in a register."""

    def __init__(self, name: str, llvm: ir.Type):
        self.llvm = ir.VectorType(llvm, LANES)
        super().__init__(name=name)


F8, I8 = Vector("F8", F32), Vector("I8", I32)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Vector):
        super().__init__(manager, kind, kind.llvm)


def _arithmetic(symbol: Any, floats: str, integers: str | None) -> None:
    @infer_global(symbol)
    class _Typed(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: Any, kwargs: Any) -> Any:
            wanted = (F8, F8) if integers is None else (args[0], args[0])
            if len(args) == 2 and isinstance(args[0], Vector) and tuple(args) == wanted:
                return signature(args[0], *args)

    @lower_builtin(symbol, Vector, Vector)
    def _lowered(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, floats if sig.args[0] == F8 else integers or floats)(*args)


_arithmetic(operator.add, "fadd", "add")
_arithmetic(operator.sub, "fsub", "sub")
_arithmetic(operator.mul, "fmul", "mul")
_arithmetic(operator.truediv, "fdiv", None)


def _operation(result: Any, *kinds: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make an intrinsic of `emit(builder, *values)`."""

    def wrap(emit: Callable[..., Any]) -> Any:
        sig = signature(result, *kinds)

        def codegen(context: Any, builder: Any, _: Any, args: Any) -> Any:
            value = emit(builder, *args)
            return context.get_dummy_value() if result is types.void else value

        # Numba reads the parameters' names: one function per count.
        by_count = {
            0: lambda typing: (sig, codegen),
            1: lambda typing, a: (sig, codegen),
            2: lambda typing, a, b: (sig, codegen),
            3: lambda typing, a, b, c: (sig, codegen),
            4: lambda typing, a, b, c, d: (sig, codegen),
            8: lambda typing, a, b, c, d, e, f, g, h: (sig, codegen),
            9: lambda typing, a, b, c, d, e, f, g, h, i: (sig, codegen),
        }
        return intrinsic(by_count[len(kinds)])

    return wrap


def _pointer(builder: Any, address: Any, kind: ir.Type) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder: Any, address: Any, kind: ir.Type, align: int) -> Any:
    return builder.load(_pointer(builder, address, kind), align=align)


def _store(builder: Any, address: Any, value: Any, align: int) -> None:
    builder.store(value, _pointer(builder, address, value.type), align=align)


def _call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, [a.type for a in args])
    module = builder.module
    function = module.globals.get(name) or ir.Function(module, kind, name)
    return builder.call(function, args)


def _lanes(value: float, scalar: ir.Type = I32) -> ir.Constant:
    return ir.Constant(ir.VectorType(scalar, LANES), [value] * LANES)


# Memory.


@_operation(types.int64, types.int64)
def load_i64(builder, address):
    return _load(builder, address, I64, 8)


@_operation(types.int64, types.int64)
def load_i32(builder, address):
    return builder.sext(_load(builder, address, I32, 4), I64)


@_operation(types.int64, types.int64)
def load_byte(builder, address):
    return builder.zext(_load(builder, address, BYTE, 1), I64)


@_operation(types.void, types.int64)
def prefetch(builder, address):
    pointer = builder.inttoptr(address, BYTE.as_pointer())
    read, close, data = (ir.Constant(I32, value) for value in (0, 3, 1))
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, read, close, data)


@_operation(types.float32, types.int64)
def load_f32(builder, address):
    return _load(builder, address, F32, 4)


@_operation(types.float32, types.int64)
def load_half(builder, address):
    return builder.fpext(_load(builder, address, ir.HalfType(), 2), F32)


@_operation(types.void, types.int64, types.int64)
def store_i64(builder, address, value):
    _store(builder, address, value, 8)


@_operation(types.void, types.int64, types.int64)
def store_byte(builder, address, value):
    _store(builder, address, builder.trunc(value, BYTE), 1)


@_operation(types.void, types.int64, types.int64)
def store_i32(builder, address, value):
    _store(builder, address, builder.trunc(value, I32), 4)


@_operation(types.void, types.int64, types.float32)
def store_f32(builder, address, value):
    _store(builder, address, value, 4)


@_operation(F8, types.int64)
def load_f8(builder, address):
    return _load(builder, address, F8.llvm, 4)


@_operation(types.void, types.int64, F8)
def store_f8(builder, address, value):
    _store(builder, address, value, 4)


@_operation(types.void, types.int64, I8)
def store_bytes(builder, address, value):
    """The low byte of each lane."""
    _store(builder, address, builder.trunc(value, ir.VectorType(BYTE, LANES)), 1)


@_operation(F8, types.int64)
def load_half8(builder, address):
    return builder.fpext(_load(builder, address, ir.VectorType(ir.HalfType(), LANES), 2), F8.llvm)


@_operation(types.void, types.int64, F8)
def store_half8(builder, address, value):
    _store(builder, address, builder.fptrunc(value, ir.VectorType(ir.HalfType(), LANES)), 2)


@_operation(F8, types.int64)
def load_bfloat8(builder, address):
    wide = builder.zext(_load(builder, address, ir.VectorType(I16, LANES), 2), I8.llvm)
    return builder.bitcast(builder.shl(wide, _lanes(16)), F8.llvm)


@_operation(types.void, types.int64, F8)
def store_bfloat8(builder, address, value):
    """Rounded to nearest, ties to even; a NaN stays one."""
    bits = builder.bitcast(value, I8.llvm)
    odd = builder.and_(builder.lshr(bits, _lanes(16)), _lanes(1))
    near = builder.lshr(builder.add(bits, builder.add(odd, _lanes(0x7FFF))), _lanes(16))
    nan = builder.or_(builder.lshr(bits, _lanes(16)), _lanes(0x40))
    out = builder.select(builder.fcmp_unordered("uno", value, value), nan, near)
    _store(builder, address, builder.trunc(out, ir.VectorType(I16, LANES)), 2)


# Arithmetic.


@_operation(F8, types.float32)
def splat(builder, value):
    return _splat(builder, value, F8.llvm)


@_operation(I8)
def lane_numbers(builder):
    return ir.Constant(I8.llvm, list(range(LANES)))


@_operation(I8, types.int64)
def splat_i(builder, value):
    return _splat(builder, builder.trunc(value, I32), I8.llvm)


def _splat(builder: Any, value: Any, kind: Any) -> Any:
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), _lanes(0))


@_operation(F8, F8, F8, F8)
def fma(builder, a, b, c):
    return _call(builder, "llvm.fma.v8f32", F8.llvm, a, b, c)


@_operation(types.float32, types.float32, types.float32, types.float32)
def fma_scalar(builder, a, b, c):
    return _call(builder, "llvm.fma.f32", F32, a, b, c)


@_operation(types.float32, types.float32)
def sqrt(builder, value):
    return _call(builder, "llvm.sqrt.f32", F32, value)


@_operation(F8, F8, F8)
def larger(builder, a, b):
    """a where it is larger than b, else b: so b where a is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@_operation(F8, F8, F8)
def smaller(builder, a, b):
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


@_operation(F8, F8)
def magnitude(builder, value):
    return _call(builder, "llvm.fabs.v8f32", F8.llvm, value)


@_operation(F8, F8)
def nearest(builder, value):
    """The nearest integer, ties to even."""
    return _call(builder, "llvm.roundeven.v8f32", F8.llvm, value)


@_operation(I8, F8)
def to_int(builder, value):
    """Of numbers within int32's range."""
    return builder.fptosi(value, I8.llvm)


@_operation(F8, I8)
def to_float(builder, value):
    return builder.sitofp(value, F8.llvm)


@_operation(F8, I8)
def power_of_two(builder, exponent):
    """2^exponent for exponents -126..127."""
    biased = builder.add(exponent, _lanes(127))
    return builder.bitcast(builder.shl(biased, _lanes(23)), F8.llvm)


@_operation(I8, I8)
def half_of(builder, value):
    return builder.ashr(value, _lanes(1))


@_operation(F8, F8, F8)
def nan_of(builder, source, value):
    """value, or NaN in the lanes where source is NaN."""
    return builder.select(builder.fcmp_unordered("uno", source, source), source, value)


@_operation(F8, F8, types.int64, types.int64)
def keep(builder, value, begin, end):
    """Lanes begin..end-1 of value, -inf in the others."""
    lanes = ir.Constant(I8.llvm, list(range(LANES)))
    low = _splat(builder, builder.trunc(begin, I32), I8.llvm)
    high = _splat(builder, builder.trunc(end, I32), I8.llvm)
    inside = builder.and_(
        builder.icmp_signed(">=", lanes, low), builder.icmp_signed("<", lanes, high)
    )
    return builder.select(inside, value, _lanes(float("-inf"), F32))


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def _halves(builder: Any, value: Any, width: int) -> tuple[Any, Any]:
    nothing = ir.Constant(value.type, ir.Undefined)
    low = list(range(width))
    high = list(range(width, 2 * width))
    return tuple(_shuffle(builder, value, nothing, lanes) for lanes in (low, high))


@_operation(types.float32, F8)
def total(builder, value):
    """Sum of the lanes: i + 4, then i + 2, then the last two."""
    for width in (4, 2, 1):
        value = builder.fadd(*_halves(builder, value, width))
    return builder.extract_element(value, ir.Constant(I32, 0))


@_operation(types.int64, I8)
def total_i(builder, value):
    for width in (4, 2, 1):
        value = builder.add(*_halves(builder, value, width))
    return builder.sext(builder.extract_element(value, ir.Constant(I32, 0)), I64)


@_operation(types.float32, F8)
def largest(builder, value):
    """The largest lane; NaN only where every lane is."""
    for width in (4, 2, 1):
        a, b = _halves(builder, value, width)
        ordered = builder.fcmp_ordered(">", a, b)
        unordered = builder.fcmp_unordered("uno", b, b)
        value = builder.select(builder.or_(ordered, unordered), a, b)
    return builder.extract_element(value, ir.Constant(I32, 0))


@_operation(F8, *[F8] * 8)
def totals(builder, *values):
    """The sums of eight vectors, one per lane, each by the tree of `total`."""
    rows = list(values)
    for width in (4, 2, 1):
        runs = [range(start, start + width) for start in range(0, 2 * LANES, 2 * width)]
        low = [lane for run in runs for lane in run]
        high = [lane + width for lane in low]
        pairs = zip(rows[::2], rows[1::2], strict=True)
        rows = [builder.fadd(*(_shuffle(builder, *pair, m) for m in (low, high))) for pair in pairs]
    return rows[0]


# The order of logits (`kernels/_ranking.py`): NaN above every number, -0 equal to 0.


@_operation(I8, F8)
def order_key(builder, value):
    bits = builder.bitcast(value, I8.llvm)
    zero = builder.fcmp_ordered("==", value, _lanes(0.0, F32))
    bits = builder.select(zero, _lanes(0), bits)
    nan = builder.fcmp_unordered("uno", value, value)
    bits = builder.select(nan, _lanes(0x7FC00000), bits)
    sign = builder.and_(builder.ashr(bits, _lanes(31)), _lanes(0x7FFFFFFF))
    return builder.xor(bits, sign)


@_operation(I8, I8, I8)
def larger_i(builder, a, b):
    return builder.select(builder.icmp_signed(">", a, b), a, b)


@_operation(I8, I8, I8, I8, I8)
def where_larger(builder, a, b, chosen, other):
    """chosen in the lanes where a > b, other elsewhere."""
    return builder.select(builder.icmp_signed(">", a, b), chosen, other)


@_operation(types.int64, I8)
def largest_i(builder, value):
    for width in (4, 2, 1):
        a, b = _halves(builder, value, width)
        value = builder.select(builder.icmp_signed(">", a, b), a, b)
    return builder.sext(builder.extract_element(value, ir.Constant(I32, 0)), I64)


@_operation(types.int64, I8, I8, types.int64)
def lowest_where(builder, keys, ids, key):
    """The lowest of ids in the lanes whose key it is."""
    wanted = _splat(builder, builder.trunc(key, I32), I8.llvm)
    value = builder.select(builder.icmp_signed("==", keys, wanted), ids, _lanes(0x7FFFFFFF))
    for width in (4, 2, 1):
        a, b = _halves(builder, value, width)
        value = builder.select(builder.icmp_signed("<", a, b), a, b)
    return builder.sext(builder.extract_element(value, ir.Constant(I32, 0)), I64)


@_operation(types.float32, types.int64)
def key_value(builder, key):
    bits = builder.trunc(key, I32)
    sign = builder.and_(builder.ashr(bits, ir.Constant(I32, 31)), ir.Constant(I32, 0x7FFFFFFF))
    return builder.bitcast(builder.xor(bits, sign), F32)


@_operation(types.int64, types.float32)
def float_bits(builder, value):
    return builder.sext(builder.bitcast(value, I32), I64)


@_operation(types.float32, types.int64)
def bits_float(builder, bits):
    return builder.bitcast(builder.trunc(bits, I32), F32)


# Other threads, other code.


@_operation(types.int64, types.int64)
def atomic_load(builder, address):
    return builder.load_atomic(_pointer(builder, address, I64), "acquire", 8)


@_operation(types.void, types.int64, types.int64)
def atomic_store(builder, address, value):
    builder.store_atomic(value, _pointer(builder, address, I64), "seq_cst", 8)


@_operation(types.int64, types.int64, types.int64)
def atomic_add(builder, address, value):
    return builder.atomic_rmw("add", _pointer(builder, address, I64), value, "seq_cst")


@_operation(types.int64, types.int64, types.int64, types.int64)
def compare_swap(builder, address, expected, value):
    """1 where the word was `expected` and is `value` now."""
    pointer = _pointer(builder, address, I64)
    pair = builder.cmpxchg(pointer, expected, value, "seq_cst", "monotonic")
    return builder.zext(builder.extract_value(pair, 1), I64)


@_operation(types.void)
def pause(builder):
    if X86:
        _call(builder, "llvm.x86.sse2.pause", ir.VoidType())
    else:
        _call(builder, "llvm.aarch64.hint", ir.VoidType(), ir.Constant(I32, 1))


@_operation(types.void)
def yield_core(builder):
    """Let another thread have this core."""
    _call(builder, "SwitchToThread" if sys.platform == "win32" else "sched_yield", I32)


@_operation(types.int64)
def ticks(builder):
    """A clock of constant rate, of no particular unit."""
    name = "llvm.readcyclecounter" if X86 else "llvm.readsteadycounter"
    return _call(builder, name, I64)


@_operation(types.int64)
def float_mode(builder):
    """The thread's rounding, denormals and exceptions, as one word."""
    if not X86:
        return _call(builder, "llvm.aarch64.get.fpcr", I64)
    place = builder.alloca(I32)
    _call(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), builder.bitcast(place, BYTE.as_pointer()))
    return builder.zext(builder.load(place), I64)


@_operation(types.void, types.int64)
def set_float_mode(builder, mode):
    if not X86:
        _call(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), mode)
        return
    place = builder.alloca(I32)
    builder.store(builder.trunc(mode, I32), place)
    _call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), builder.bitcast(place, BYTE.as_pointer()))


# Round to nearest, denormals as they are, no traps.
IEEE_MODE = 0x1F80 if X86 else 0


@_operation(types.void, *[types.int64] * 9)
def call_tile(builder, tile, w, x, facts, out, blocks, groups, stride, rows):
    pointer = BYTE.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer] * 4 + [I64] * 4)
    addresses = [builder.inttoptr(a, pointer) for a in (w, x, facts, out)]
    function = builder.inttoptr(tile, kind.as_pointer())
    builder.call(function, [*addresses, blocks, groups, stride, rows])
