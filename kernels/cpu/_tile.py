"""The matmul tile in LLVM vector IR: 8 outputs in the lanes, any number of rows and outputs.

    out[r, n] = sum_g  d[n, g] dx[r, g] sum_j q[n, g, j] xq[r, g, j]  (+ m[n, g] sx[r, g])   rounded
    out[r, n] = sum_k  w[n, k] x[r, k]                                                       others

Bytes moved: a weight block is read once for up to 8 rows (5 for weights of 16 and 32 bits), and
from the cache for further rows.

Weights of 4, 6 and 8 bits are multiplied by activations of 8 bits, in groups of 32 inputs. The
integer sum of a group is exact in every form below; the float sum of an output runs over its groups
in ascending order by explicit FMA. So a row's bits depend neither on the rows beside it nor on the
instruction set. Weights of 16 and 32 bits are widened to float32; an output's sum runs over the
even and the odd inputs, each in ascending order, and these two are added last.

Ranges, for xq in -127..127:
  4 bits   q in 0..15: a pair's products are at most 2 * 15 * 127 = 3,810, and the 8 pairs of a lane
           30,480 < 2^15, so 16-bit sums cannot overflow.
  6 bits   q in 0..63: two pairs are at most 4 * 63 * 127 = 32,004 < 2^15; times a scale in
           -128..127 and summed over a group at most 32 * 63 * 127 * 128 = 32,772,096 < 2^31. With
           the offset of 32 taken off, at most 32 * 32 * 127 * 128 = 16,646,144 < 2^24, which
           float32 holds exactly.
  8 bits   q in -128..127: pmaddubsw multiplies |q| <= 128, unsigned, by xq with q's sign; a pair
           is at most 2 * 128 * 127 = 32,512 < 2^15, and is widened to 32 bits before it is added.
  vpdpbusd adds four products to 32 bits without saturation; signed weights are offset by 128, and
           128 * sum xq is taken off again: at most 32 * 255 * 127 = 1,036,320 < 2^24.

A vector of 32 weights is multiplied by all rows before the next one is read.

Layout of a block of 8 outputs, padded to 64 bytes; G groups of 32 inputs:
  q4_0, q4_1, q4_k   [G][4][8 outputs][4] bytes: byte j of i holds input 4 i + j in the low 4 bits
               and input 16 + 4 i + j in the high ones
  q8_0, q8     [G][8][8 outputs][4] int8
  q6_k         [G][4][8][4] low 4 bits as above, then [2][8][4] bytes of 2 high bits: bits 2 i of
               byte j of half h belong to input 16 h + 4 i + j
then the scales: q4_0, q8_0 [G][8] fp16; q4_1 [G][2][8] fp16 (d, m); q8 [8] float32;
  q6_k         [G][2][8] int8 scales of 16 inputs, then [ceil(G / 8)][8] fp16
  q4_k         [G][2][8] uint8 scales of d and of m, then [ceil(G / 8)][2][8] fp16; products of fp16
               and 6 bits are exact in float32
  bf16, fp16, fp32   [K][8]
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ._dot_products import GroupDot, in_turn, unsigned_of
from ._formats import FLOATS, GROUP_BYTES, QUANTISED, STATS_BYTES
from ._ir import F32, I8, I32, Writer, constant

# Rows of one pass over a block: what 16 vector registers hold.
ROWS, FLOAT_ROWS = 8, 5
# How far ahead weights are prefetched: groups, or bytes for formats without groups.
PREFETCH_GROUPS = 32
PREFETCH_BYTES = 4096


def form_of(features: set[str], arch: str) -> str:
    """The best form of the integer tile for a machine: vnni, avx2, neon or portable."""
    if arch in ("aarch64", "arm64"):
        return "neon" if "dotprod" in features else "portable"
    if "avxvnni" in features or {"avx512vnni", "avx512vl"} <= features:
        return "vnni"
    return "avx2" if "avx2" in features else "portable"


def tile_ir(weights: str, form: str) -> str:
    """LLVM IR of `tile_<format>`; every form gives the same bits.

    void tile(w, xq, stats, out, i64 blocks, i64 groups, i64 out_stride, i64 rows): w the first
    block; xq [rows, 32 groups] int8 and stats [rows, groups] of STATS_BYTES, or, for weights of 16
    and 32 bits, x [rows, 32 groups] float32 and no stats; out [rows, 8 blocks] float32, out_stride
    elements from row to row.
    """
    writer = Writer()
    most = FLOAT_ROWS if weights in FLOATS else ROWS
    for rows in range(1, most + 1):
        if weights in FLOATS:
            _float_tile(writer, weights, rows)
        else:
            _quantised_tile(writer, weights, form, rows)
    _passes(writer, weights, most)
    return writer.text()


SIGNATURE = (
    "ptr noalias %w, ptr noalias %x, ptr noalias %stats, ptr noalias %out, "
    "i64 %blocks, i64 %groups, i64 %stride"
)


def _passes(o: Writer, weights: str, most: int) -> None:
    """`most` rows at a time, then the rest, over the same blocks."""
    x_bytes = 32 if weights in QUANTISED else 128
    o.line(f"define void @tile_{weights}({SIGNATURE}, i64 %rows) {{\nentry:")
    o.line(f"  %xrow = mul i64 %groups, {x_bytes}\n  %frow = mul i64 %groups, {STATS_BYTES}")
    o.line("  %orow = mul i64 %stride, 4\n  br label %pass\npass:")
    o.line("  %r = phi i64 [0, %entry], [%next, %done]\n  %left = sub i64 %rows, %r")
    o.line("  %xo = mul i64 %r, %xrow\n  %fo = mul i64 %r, %frow\n  %oo = mul i64 %r, %orow")
    o.line("  %xp = getelementptr i8, ptr %x, i64 %xo")
    o.line("  %fp = getelementptr i8, ptr %stats, i64 %fo")
    o.line("  %op = getelementptr i8, ptr %out, i64 %oo")
    cases = " ".join(f"i64 {rows}, label %rows{rows}" for rows in range(1, most))
    o.line(f"  switch i64 %left, label %rows{most} [{cases}]")
    for rows in range(1, most + 1):
        o.line(f"rows{rows}:\n  call void @rows{rows}_{weights}(ptr %w, ptr %xp, ptr %fp, ptr %op,")
        o.line("    i64 %blocks, i64 %groups, i64 %stride)\n  br label %done")
    o.line(f"done:\n  %next = add i64 %r, {most}\n  %more = icmp slt i64 %next, %rows")
    o.line("  br i1 %more, label %pass, label %end\nend:\n  ret void\n}")


def _open(o: Writer, weights: str, rows: int) -> None:
    o.line(f"define internal void @rows{rows}_{weights}({SIGNATURE}) {{\nentry:")


def _block_bytes(o: Writer, weights: str) -> str:
    """Bytes of a block of 8 outputs; `weights.block_bytes` is the same formula."""
    size = o.op(f"mul i64 %groups, {GROUP_BYTES[weights]}")
    if weights == "q8":
        size = o.op(f"add i64 {size}, 32")
    if shared := {"q6_k": 16, "q4_k": 32}.get(weights):
        eighths = o.op(f"lshr i64 {o.op('add i64 %groups, 7')}, 3")
        size = o.op(f"add i64 {size}, {o.op(f'mul i64 {eighths}, {shared}')}")
    return o.op(f"and i64 {o.op(f'add i64 {size}, 63')}, -64")


def _store(o: Writer, rows: int, sums: list[str]) -> None:
    o.line("  %column = mul i64 %b, 8")
    for r, total in zip(range(rows), sums, strict=True):
        index = o.op(f"add i64 {o.op(f'mul i64 %stride, {r}')}, %column")
        pointer = o.op(f"getelementptr float, ptr %out, i64 {index}")
        o.line(f"  store {F32} {total}, ptr {pointer}, align 4")
    o.line("  %b1 = add i64 %b, 1\n  %more = icmp ult i64 %b1, %blocks")
    o.line("  br i1 %more, label %block, label %done\ndone:\n  ret void\n}")


def _quantised_tile(o: Writer, weights: str, form: str, rows: int) -> None:
    _open(o, weights, rows)
    size = _block_bytes(o, weights)
    quants = {"q8_0": 256, "q8": 256, "q6_k": 192}.get(weights, 128)
    o.line("  %xrow = mul i64 %groups, 32")
    o.line(f"  %frow = mul i64 %groups, {STATS_BYTES}\n  %body = mul i64 %groups, {quants}")
    o.line("  br label %block\nblock:\n  %b = phi i64 [0, %entry], [%b1, %end]")
    o.line(f"  %offset = mul i64 %b, {size}\n  %wb = getelementptr i8, ptr %w, i64 %offset")
    o.line("  %sb = getelementptr i8, ptr %wb, i64 %body\n  br label %group\ngroup:")
    o.line("  %g = phi i64 [0, %block], [%g1, %group]")
    for r in range(rows):
        o.line(f"  %acc{r} = phi {F32} [zeroinitializer, %block], [%sum{r}, %group]")
    group = o.at("%wb", o.op(f"mul i64 %g, {quants}"))
    # Evenly along the block, scales included.
    step = GROUP_BYTES[weights]
    ahead = o.at("%wb", o.op(f"mul i64 %g, {step}"))
    for line in range(0, step, 64):
        o.prefetch(o.at(ahead, PREFETCH_GROUPS * step + line))
    inputs, offset = o.op("mul i64 %g, 32"), o.op(f"mul i64 %g, {STATS_BYTES}")
    xs = [o.at(o.at("%x", o.op(f"mul i64 %xrow, {r}")), inputs) for r in range(rows)]
    stats = [o.at(o.at("%stats", o.op(f"mul i64 %frow, {r}")), offset) for r in range(rows)]
    dots = [GroupDot(o, form, weights) for _ in range(rows)]
    read = {"q8_0": _read_q8, "q8": _read_q8, "q6_k": _read_q6}.get(weights, _read_q4)
    for i, vector in read(o, group):
        unsigned = unsigned_of(o, form, weights, vector)
        for x, dot in zip(xs, dots, strict=True):
            four = o.splat("i32", o.load("i32", o.at(x, 4 * i), 4), 8)
            dot.add(i, vector, unsigned, o.op(f"bitcast {I32} {four} to {I8}"))
    scales = _scales(o, weights)
    for r in range(rows):
        dx = o.splat("float", o.load("float", stats[r], 4), 8)
        total = dots[r].total(scales, partial(_group_sum, o, stats[r]))
        product = o.op(f"sitofp {I32} {total} to {F32}")
        acc = f"%acc{r}"
        if weights in ("q4_1", "q4_k"):
            sx = o.splat("float", o.load("float", o.at(stats[r], 4), 4), 8)
            acc = o.fma(scales[1], sx, acc)
        scale = dx if weights == "q8" else o.op(f"fmul {F32} {scales[0]}, {dx}")
        acc = in_turn(o, form, F32, o.fma(product, scale, acc))
        o.line(f"  %sum{r} = bitcast {F32} {acc} to {F32}")
    o.line("  %g1 = add i64 %g, 1\n  %again = icmp ult i64 %g1, %groups")
    o.line("  br i1 %again, label %group, label %end\nend:")
    sums = [f"%sum{r}" for r in range(rows)]
    if weights == "q8":
        channel = o.load(F32, "%sb", 32)
        sums = [o.op(f"fmul {F32} {total}, {channel}") for total in sums]
    _store(o, rows, sums)


def _group_sum(o: Writer, stats: str, index: int) -> str:
    """A row's sum of xq over half `index` of the group, in all lanes."""
    return o.splat("i32", o.load("i32", o.at(stats, 8 + 4 * index), 4), 8)


def _scales(o: Writer, weights: str) -> list[str]:
    """Float32 lanes of d, and of m; for q6_k d and the int8 scales of both halves."""

    def halves(pointer: str) -> str:
        return o.op(f"fpext <8 x half> {o.load('<8 x half>', pointer, 16)} to {F32}")

    if weights == "q8":
        return []
    if weights == "q6_k":
        pair = o.at("%sb", o.op("mul i64 %g, 16"))
        d = o.at(o.at("%sb", o.op("mul i64 %groups, 16")), o.op("mul i64 %eighth, 16"))
        bytes_ = [o.load("<8 x i8>", o.at(pair, 8 * h), 8) for h in (0, 1)]
        return [halves(d), *(o.op(f"sext <8 x i8> {b} to {I32}") for b in bytes_)]
    if weights == "q4_k":
        pair = o.at("%sb", o.op("mul i64 %g, 16"))
        d = o.at("%sb", o.op("mul i64 %groups, 16"))
        d = o.at(d, o.op(f"mul i64 {o.op('lshr i64 %g, 3')}, 32"))
        bytes_ = [o.load("<8 x i8>", o.at(pair, 8 * h), 8) for h in (0, 1)]
        factors = [o.op(f"uitofp <8 x i8> {b} to {F32}") for b in bytes_]
        scale = o.op(f"fmul {F32} {halves(d)}, {factors[0]}")
        offset = o.op(f"fmul {F32} {halves(o.at(d, 16))}, {factors[1]}")
        return [scale, o.op(f"fneg {F32} {offset}")]
    pointer = o.at("%sb", o.op(f"mul i64 %g, {32 if weights == 'q4_1' else 16}"))
    return [halves(pointer)] + ([halves(o.at(pointer, 16))] if weights == "q4_1" else [])


def _read_q4(o: Writer, group: str) -> Iterator[tuple[int, str]]:
    """A group's vectors and their numbers, in the order in which they are stored."""
    for i in range(4):
        packed = o.load(I8, o.at(group, 32 * i), 32)
        yield i, o.op(f"and {I8} {packed}, {constant('i8', 15, 32)}")
        yield 4 + i, o.op(f"lshr {I8} {packed}, {constant('i8', 4, 32)}")


def _read_q6(o: Writer, group: str) -> Iterator[tuple[int, str]]:
    # %eighth: 8 groups share a d.
    o.line("  %eighth = lshr i64 %g, 3")
    high = [o.load(I8, o.at(group, 128 + 32 * half), 32) for half in (0, 1)]
    for i, low in _read_q4(o, group):
        half, quarter = i // 4, i % 4
        bits = high[half]
        if quarter:
            bits = o.op(f"lshr {I8} {bits}, {constant('i8', 2 * quarter, 32)}")
        bits = o.op(f"and {I8} {bits}, {constant('i8', 3, 32)}")
        bits = o.op(f"shl {I8} {bits}, {constant('i8', 4, 32)}")
        yield i, o.op(f"or {I8} {low}, {bits}")


def _read_q8(o: Writer, group: str) -> Iterator[tuple[int, str]]:
    for i in range(8):
        yield i, o.load(I8, o.at(group, 32 * i), 32)


def _float_tile(o: Writer, weights: str, rows: int) -> None:
    _open(o, weights, rows)
    size = _block_bytes(o, weights)
    item = 4 if weights == "fp32" else 2
    o.line("  %xrow = mul i64 %groups, 128\n  %depth = mul i64 %groups, 32")
    o.line("  br label %block\nblock:\n  %b = phi i64 [0, %entry], [%b1, %end]")
    o.line(f"  %offset = mul i64 %b, {size}\n  %wb = getelementptr i8, ptr %w, i64 %offset")
    o.line("  br label %pair\npair:\n  %k = phi i64 [0, %block], [%k1, %pair]")
    sums = [(f"%even{r}", f"%odd{r}") for r in range(rows)]
    for pair in sums:
        for name in pair:
            o.line(f"  {name} = phi {F32} [zeroinitializer, %block], [{name}n, %pair]")
    two = o.at("%wb", o.op(f"mul i64 %k, {8 * item}"))
    o.prefetch(o.at(two, PREFETCH_BYTES))
    lanes = [_widened(o, weights, o.at(two, 8 * item * odd)) for odd in (0, 1)]
    x = o.at("%x", o.op("mul i64 %k, 4"))
    for r in range(rows):
        xr = o.at(x, o.op(f"mul i64 %xrow, {r}"))
        for odd, name in enumerate(sums[r]):
            value = o.splat("float", o.load("float", o.at(xr, 4 * odd), 4), 8)
            o.line(f"  {name}n = bitcast {F32} {o.fma(lanes[odd], value, name)} to {F32}")
    o.line("  %k1 = add i64 %k, 2\n  %again = icmp ult i64 %k1, %depth")
    o.line("  br i1 %again, label %pair, label %end\nend:")
    _store(o, rows, [o.op(f"fadd {F32} {even}n, {odd}n") for even, odd in sums])


def _widened(o: Writer, weights: str, pointer: str) -> str:
    if weights == "fp32":
        return o.load(F32, pointer, 32)
    if weights == "fp16":
        return o.op(f"fpext <8 x half> {o.load('<8 x half>', pointer, 16)} to {F32}")
    wide = o.op(f"zext <8 x i16> {o.load('<8 x i16>', pointer, 16)} to {I32}")
    shifted = o.op(f"shl {I32} {wide}, {constant('i32', 16, 8)}")
    return o.op(f"bitcast {I32} {shifted} to {F32}")
