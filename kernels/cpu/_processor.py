"""The processor itself: clock, spinning, floating-point mode; and calls of a matmul tile."""

from __future__ import annotations

import platform
import sys

from llvmlite import ir
from numba import types

from ._intrinsics import BYTE, I32, I64, call, operation

X86 = platform.machine().lower() in ("x86_64", "amd64")


@operation(types.void)
def pause(builder):
    if X86:
        call(builder, "llvm.x86.sse2.pause", ir.VoidType())
    else:
        call(builder, "llvm.aarch64.hint", ir.VoidType(), ir.Constant(I32, 1))


@operation(types.void)
def yield_core(builder):
    """Let another thread have this core."""
    call(builder, "SwitchToThread" if sys.platform == "win32" else "sched_yield", I32)


@operation(types.int64)
def ticks(builder):
    """A clock of constant rate, of no particular unit."""
    name = "llvm.readcyclecounter" if X86 else "llvm.readsteadycounter"
    return call(builder, name, I64)


@operation(types.int64)
def float_mode(builder):
    """The thread's rounding, denormals and exceptions, as one word."""
    if not X86:
        return call(builder, "llvm.aarch64.get.fpcr", I64)
    place = builder.alloca(I32)
    call(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), builder.bitcast(place, BYTE.as_pointer()))
    return builder.zext(builder.load(place), I64)


@operation(types.void, types.int64)
def set_float_mode(builder, mode):
    if not X86:
        call(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), mode)
        return
    place = builder.alloca(I32)
    builder.store(builder.trunc(mode, I32), place)
    call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), builder.bitcast(place, BYTE.as_pointer()))


# Round to nearest, denormals as they are, no traps.
IEEE_MODE = 0x1F80 if X86 else 0


@operation(types.void, *[types.int64] * 9)
def call_tile(builder, tile, w, x, stats, out, blocks, groups, stride, rows):
    pointer = BYTE.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer] * 4 + [I64] * 4)
    addresses = [builder.inttoptr(a, pointer) for a in (w, x, stats, out)]
    function = builder.inttoptr(tile, kind.as_pointer())
    builder.call(function, [*addresses, blocks, groups, stride, rows])
