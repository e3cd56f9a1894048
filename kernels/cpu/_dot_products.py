"""Exact integer dot products of a group: weights of 4, 6 or 8 bits and activations of 8 bits.

A group is eight vectors of 32 weights: vector i has inputs 4 i to 4 i + 3 of each of 8 outputs.
Every form gives the same integers; `_tile` proves that none overflows.
"""

from __future__ import annotations

from collections.abc import Callable

from ._ir import I8, I16, I32, Writer, constant

SIGNED = ("q8_0", "q8")
# How many vectors' products fit into 16-bit sums, in the avx2 form.
RUNS = {"q4_0": 8, "q4_1": 8, "q4_k": 8, "q6_k": 2, "q8_0": 1, "q8": 1}
ONES = constant("i16", 1, 16)


def unsigned_of(o: Writer, form: str, weights: str, w: str) -> str:
    """Vector w as the factor whose bytes are unsigned: |w| for pmaddubsw, w + 128 for vpdpbusd."""
    if weights in SIGNED and form == "avx2":
        return o.call(I8, "llvm.abs.v32i8", (I8, w), ("i1", "false"))
    if weights in SIGNED and form == "vnni":
        return o.op(f"xor {I8} {w}, {constant('i8', -128, 32)}")
    return w


def in_turn(o: Writer, form: str, kind: str, value: str) -> str:
    """The value, computed before whatever is written after this, by an empty piece of assembly. On
    its own LLVM loads the activations of many rows ahead, and moves sums to memory to make room."""
    if form not in ("avx2", "vnni"):
        return value
    return o.op(f'call {kind} asm sideeffect "", "=x,0,~{{memory}}"({kind} {value})')


class GroupDot:
    """The dot products of one row with a group of 8 outputs, built one vector at a time.

    Formats whose halves have a scale each (q6_k) have one total per half.
    """

    def __init__(self, o: Writer, form: str, weights: str):
        self.o, self.form, self.weights = o, form, weights
        halves = 2 if weights == "q6_k" else 1
        self.totals = ["zeroinitializer"] * halves
        # 16-bit sums that are not in a total yet, and how many vectors they hold.
        self._pairs, self._held = [""] * halves, [0] * halves

    def add(self, i: int, w: str, unsigned: str, x: str) -> None:
        """Add the products of vector i: bytes w, `unsigned_of` them, and the row's x, all
        [8 outputs][4]."""
        o, half = self.o, i // 4 if len(self.totals) == 2 else 0
        if self.form == "avx2":
            self._add_pairs(half, w, unsigned, x)
        elif self.form == "vnni":
            factors = (I32, _as_i32(o, unsigned)), (I32, _as_i32(o, x))
            arguments = (I32, self.totals[half]), *factors
            total = o.call(I32, "llvm.x86.avx512.vpdpbusd.256", *arguments)
            self.totals[half] = in_turn(o, self.form, I32, total)
        elif self.form == "neon":
            self.totals[half] = _neon_dot(o, self.totals[half], w, x)
        else:
            dot = _portable_dot(o, w, x, self.weights in SIGNED)
            self.totals[half] = o.op(f"add {I32} {self.totals[half]}, {dot}")

    def _add_pairs(self, half: int, w: str, unsigned: str, x: str) -> None:
        """pmaddubsw: products of |w| and x with w's sign, added in pairs to 16 bits."""
        o = self.o
        if self.weights in SIGNED:
            x = o.call(I8, "llvm.x86.avx2.psign.b", (I8, x), (I8, w))
        pairs = o.call(I16, "llvm.x86.avx2.pmadd.ub.sw", (I8, unsigned), (I8, x))
        if self._held[half]:
            pairs = o.op(f"add {I16} {self._pairs[half]}, {pairs}")
        self._held[half] += 1
        if self._held[half] < RUNS[self.weights]:
            self._pairs[half] = in_turn(o, self.form, I16, pairs)
            return
        wide = o.call(I32, "llvm.x86.avx2.pmadd.wd", (I16, pairs), (I16, ONES))
        total = o.op(f"add {I32} {self.totals[half]}, {wide}")
        self.totals[half], self._held[half] = in_turn(o, self.form, I32, total), 0

    def total(self, scales: list[str], group_sum: Callable[[int], str]) -> str:
        """The integers, 8 outputs; `group_sum(half)` is the row's sum of x over half a group."""
        o = self.o
        if self.weights == "q6_k":
            halves = []
            for half, total in enumerate(self.totals):
                offset = o.op(f"shl {I32} {group_sum(half)}, {constant('i32', 5, 8)}")
                total = o.op(f"sub {I32} {total}, {offset}")
                halves.append(o.op(f"mul {I32} {total}, {scales[1 + half]}"))
            return o.op(f"add {I32} {halves[0]}, {halves[1]}")
        shift = 3 if self.weights == "q4_0" else 0
        if self.form == "vnni" and self.weights in SIGNED:
            shift = 7
        if not shift:
            return self.totals[0]
        whole = o.op(f"add {I32} {group_sum(0)}, {group_sum(1)}")
        offset = o.op(f"shl {I32} {whole}, {constant('i32', shift, 8)}")
        return o.op(f"sub {I32} {self.totals[0]}, {offset}")


def _as_i32(o: Writer, vector: str) -> str:
    return o.op(f"bitcast {I8} {vector} to {I32}")


def _neon_dot(o: Writer, total: str, w: str, x: str) -> str:
    """Weights below 128 are signed bytes too."""
    halves = []
    for h in (0, 1):
        wide = ", ".join(f"i32 {i}" for i in range(16 * h, 16 * h + 16))
        four = ", ".join(f"i32 {i}" for i in range(4 * h, 4 * h + 4))
        part = [o.op(f"shufflevector {I8} {v}, {I8} poison, <16 x i32> <{wide}>") for v in (w, x)]
        some = o.op(f"shufflevector {I32} {total}, {I32} poison, <4 x i32> <{four}>")
        arguments = (("<4 x i32>", some), ("<16 x i8>", part[0]), ("<16 x i8>", part[1]))
        halves.append(o.call("<4 x i32>", "llvm.aarch64.neon.sdot.v4i32.v16i8", *arguments))
    every = ", ".join(f"i32 {i}" for i in range(8))
    pair = f"<4 x i32> {halves[0]}, <4 x i32> {halves[1]}"
    return o.op(f"shufflevector {pair}, <8 x i32> <{every}>")


def _portable_dot(o: Writer, w: str, x: str, signed: bool) -> str:
    wide = o.op(f"{'sext' if signed else 'zext'} {I8} {w} to <32 x i32>")
    product = o.op(f"mul <32 x i32> {wide}, {o.op(f'sext {I8} {x} to <32 x i32>')}")
    parts = []
    for j in range(4):
        lanes = ", ".join(f"i32 {4 * n + j}" for n in range(8))
        vector = f"<32 x i32> {product}, <32 x i32> poison"
        parts.append(o.op(f"shufflevector {vector}, <8 x i32> <{lanes}>"))
    first, second = (o.op(f"add {I32} {parts[j]}, {parts[j + 1]}") for j in (0, 2))
    return o.op(f"add {I32} {first}, {second}")
