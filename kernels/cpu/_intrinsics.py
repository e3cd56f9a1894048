"""Numba types for fixed vectors of 8 lanes, and `operation`, which makes an intrinsic of LLVM IR.

Numba has neither vectors nor pointers: `F8` is 8 float32 in a register and `I8` 8 int32, an address
is an int64. Every operation is the IEEE one; nothing may be reassociated or contracted.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

LANES = 8

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


def operation(result: Any, *kinds: Any) -> Callable[[Callable[..., Any]], Any]:
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
            5: lambda typing, a, b, c, d, e: (sig, codegen),
            8: lambda typing, a, b, c, d, e, f, g, h: (sig, codegen),
            9: lambda typing, a, b, c, d, e, f, g, h, i: (sig, codegen),
            10: lambda typing, a, b, c, d, e, f, g, h, i, j: (sig, codegen),
        }
        return intrinsic(by_count[len(kinds)])

    return wrap


def pointer_to(builder: Any, address: Any, kind: ir.Type) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def load(builder: Any, address: Any, kind: ir.Type, align: int) -> Any:
    return builder.load(pointer_to(builder, address, kind), align=align)


def store(builder: Any, address: Any, value: Any, align: int) -> None:
    builder.store(value, pointer_to(builder, address, value.type), align=align)


def call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, [a.type for a in args])
    module = builder.module
    function = module.globals.get(name) or ir.Function(module, kind, name)
    return builder.call(function, args)


def lanes_of(value: float, scalar: ir.Type = I32) -> ir.Constant:
    return ir.Constant(ir.VectorType(scalar, LANES), [value] * LANES)
