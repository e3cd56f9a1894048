"""LLVM IR as text: the writer that the matmul tiles are written with."""

from __future__ import annotations

I8, I16, I32, F32 = "<32 x i8>", "<16 x i16>", "<8 x i32>", "<8 x float>"


class Writer:
    """Lines of IR; `op` numbers the values."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.declared: dict[str, None] = {}
        self.count = 0

    def line(self, text: str) -> None:
        self.lines.append(text)

    def op(self, text: str) -> str:
        self.count += 1
        self.lines.append(f"  %v{self.count} = {text}")
        return f"%v{self.count}"

    def call(self, result: str, name: str, *arguments: tuple[str, str]) -> str:
        types = ", ".join(kind for kind, _ in arguments)
        self.declared[f"declare {result} @{name}({types})"] = None
        return self.op(f"call {result} @{name}({', '.join(f'{k} {v}' for k, v in arguments)})")

    def at(self, pointer: str, offset: str | int) -> str:
        """The address `offset` bytes past a pointer."""
        return self.op(f"getelementptr i8, ptr {pointer}, i64 {offset}")

    def load(self, kind: str, pointer: str, align: int) -> str:
        return self.op(f"load {kind}, ptr {pointer}, align {align}")

    def splat(self, scalar: str, value: str, lanes: int) -> str:
        one = self.op(f"insertelement <{lanes} x {scalar}> poison, {scalar} {value}, i32 0")
        zeros = f"<{lanes} x i32> zeroinitializer"
        vector = f"<{lanes} x {scalar}>"
        return self.op(f"shufflevector {vector} {one}, {vector} poison, {zeros}")

    def fma(self, a: str, b: str, c: str) -> str:
        return self.call(F32, "llvm.fma.v8f32", (F32, a), (F32, b), (F32, c))

    def prefetch(self, pointer: str) -> None:
        self.declared["declare void @llvm.prefetch.p0(ptr, i32, i32, i32)"] = None
        self.line(f"  call void @llvm.prefetch.p0(ptr {pointer}, i32 0, i32 3, i32 1)")

    def text(self) -> str:
        return "\n".join([*self.declared, *self.lines]) + "\n"


def constant(scalar: str, value: int, lanes: int) -> str:
    return "<" + ", ".join([f"{scalar} {value}"] * lanes) + ">"
