"""Exact integer dot products of a group: weights of 4, 6 or 8 bits and activations of 8 bits.

Every form gives the same integers; `_tile` proves that none overflows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ._ir import I8, I16, I32, Writer, constant


def _sum_of_group(o: Writer, group_sum: Callable[[int], str]) -> str:
    return o.op(f"add {I32} {group_sum(0)}, {group_sum(1)}")


def _accumulate(o: Writer, form: str, pairs: list[tuple[str, str]], signed: bool) -> str:
    """Sum of four products per lane over (weights, activations), by 32-bit dot instructions."""
    total = "zeroinitializer"
    for w, x in pairs:
        if form == "vnni":
            arguments = ((I32, total), (I32, _as_i32(o, w)), (I32, _as_i32(o, x)))
            total = o.call(I32, "llvm.x86.avx512.vpdpbusd.256", *arguments)
        elif form == "neon":
            total = _neon_dot(o, total, w, x)
        else:
            total = o.op(f"add {I32} {total}, {_portable_dot(o, w, x, signed)}")
    return total


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


def _pairs(o: Writer, w: str, x: str) -> str:
    """pmaddubsw: products of unsigned w and signed x, added in pairs to 16 bits."""
    return o.call(I16, "llvm.x86.avx2.pmadd.ub.sw", (I8, w), (I8, x))


def _widen(o: Writer, pairs: str, factors: str) -> str:
    """pmaddwd: 16-bit pairs times factors, added in pairs to 32 bits."""
    return o.call(I32, "llvm.x86.avx2.pmadd.wd", (I16, pairs), (I16, factors))


ONES = constant("i16", 1, 16)


def _dot_q4(
    o: Writer,
    form: str,
    vectors: list[str],
    quads: Iterator[str],
    scales: list[str],
    group_sum: Callable[[int], str],
) -> str:
    if form == "avx2":
        total = ""
        for w, x in zip(vectors, quads, strict=True):
            pairs = _pairs(o, w, x)
            total = o.op(f"add {I16} {total}, {pairs}") if total else pairs
        return _widen(o, total, ONES)
    return _accumulate(o, form, list(zip(vectors, quads, strict=True)), signed=False)


def _dot_q4_0(
    o: Writer,
    form: str,
    vectors: list[str],
    quads: Iterator[str],
    scales: list[str],
    group_sum: Callable[[int], str],
) -> str:
    total = _dot_q4(o, form, vectors, quads, scales, group_sum)
    offset = o.op(f"shl {I32} {_sum_of_group(o, group_sum)}, {constant('i32', 3, 8)}")
    return o.op(f"sub {I32} {total}, {offset}")


def _dot_q8(
    o: Writer,
    form: str,
    vectors: list[str],
    quads: Iterator[str],
    scales: list[str],
    group_sum: Callable[[int], str],
) -> str:
    if form == "avx2":
        total = "zeroinitializer"
        for w, x in zip(vectors, quads, strict=True):
            size = o.call(I8, "llvm.abs.v32i8", (I8, w), ("i1", "false"))
            turned = o.call(I8, "llvm.x86.avx2.psign.b", (I8, x), (I8, w))
            total = o.op(f"add {I32} {total}, {_widen(o, _pairs(o, size, turned), ONES)}")
        return total
    total = _accumulate(o, form, list(zip(vectors, quads, strict=True)), signed=True)
    if form != "vnni":
        return total
    offset = o.op(f"shl {I32} {_sum_of_group(o, group_sum)}, {constant('i32', 7, 8)}")
    return o.op(f"sub {I32} {total}, {offset}")


def _dot_q6(
    o: Writer,
    form: str,
    vectors: list[str],
    quads: Iterator[str],
    scales: list[str],
    group_sum: Callable[[int], str],
) -> str:
    pairs, halves = list(zip(vectors, quads, strict=True)), []
    for half in (0, 1):
        four = pairs[4 * half : 4 * half + 4]
        if form == "avx2":
            two = [
                o.op(f"add {I16} {_pairs(o, *a)}, {_pairs(o, *b)}") for a, b in (four[:2], four[2:])
            ]
            total = o.op(f"add {I32} {_widen(o, two[0], ONES)}, {_widen(o, two[1], ONES)}")
        else:
            total = _accumulate(o, form, four, signed=False)
        offset = o.op(f"shl {I32} {group_sum(half)}, {constant('i32', 5, 8)}")
        total = o.op(f"sub {I32} {total}, {offset}")
        halves.append(o.op(f"mul {I32} {total}, {scales[1 + half]}"))
    return o.op(f"add {I32} {halves[0]}, {halves[1]}")


DOTS = {
    "q4_0": _dot_q4_0,
    "q4_1": _dot_q4,
    "q8_0": _dot_q8,
    "q8": _dot_q8,
    "q6_k": _dot_q6,
    "q4_k": _dot_q4,
}
