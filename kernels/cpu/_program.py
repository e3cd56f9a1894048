"""The compiled program: every thread of a step runs `run_program`, phase by phase.

See `_layout` for the memory. A ticket holds the step's epoch beside the next chunk, so a thread
that comes back late from an earlier step finds another epoch and leaves without having touched
anything.
"""

from __future__ import annotations

import numpy as np

from ._attention import attend_split, first_seen, merge_splits, store_row
from ._elementary import exp, log, silu
from ._layout import (
    ALL_BLOCKS,
    ATTEND,
    BATCH,
    BEST,
    BIAS,
    BLOCK_BYTES,
    BLOCKS,
    CHUNKS,
    CLOSED,
    COS,
    COUNTER_WORDS,
    DONE,
    EMBED,
    EPS,
    GATE_UP,
    GROUPS,
    HEAD_COUNT,
    HEAD_DIM,
    HEADS,
    IDS,
    INPUTS,
    K_NORM,
    K_PAGES,
    KV_HEADS,
    KV_KIND,
    LENGTHS,
    LINEAR,
    MAX_SPLITS,
    MERGES,
    NORM_W,
    OP,
    OUT,
    OUT_STRIDE,
    OUTPUTS,
    PAGE_SIZE,
    PAGE_TABLE,
    PARTIALS,
    PHASE_TABLE,
    PHASE_WORDS,
    PHASES,
    PROJECT,
    Q_NORM,
    QKV,
    READ,
    RESIDUAL,
    RESIDUAL_STRIDE,
    ROUNDED,
    SCALE,
    SCRATCH,
    SCRATCH_BYTES,
    SIN,
    SLIDING,
    SPLIT,
    TABLE_STRIDE,
    TICKETS,
    TILE,
    V_PAGES,
    WEIGHT,
    WEIGHT_FORMAT,
    WINDOW_ROWS,
    WRITE_LOGITS,
    X_STRIDE,
    X,
)
from ._rounding import norm_row, round_row
from ._tile import FORMATS
from ._vectors import (
    IEEE_MODE,
    atomic_add,
    atomic_load,
    atomic_store,
    bits_float,
    call_tile,
    compare_swap,
    compiled,
    float_bits,
    float_mode,
    fma,
    keep,
    key_value,
    lane_numbers,
    largest,
    largest_i,
    load_byte,
    load_f8,
    load_f32,
    load_half,
    load_i32,
    load_i64,
    lowest_where,
    order_key,
    pause,
    set_float_mode,
    splat,
    splat_i,
    store_f8,
    store_f32,
    store_i64,
    ticks,
    total,
    where_larger,
    yield_core,
)

F32 = np.float32
Q4_0, Q4_1, Q8_0, Q8, Q6_K, BFLOAT, HALF, FLOAT = range(8)
assert FORMATS == ("q4_0", "q4_1", "q8_0", "q8", "q6_k", "bf16", "fp16", "fp32")
INT_MIN = -(2**31)
# Some microseconds, longer than a chunk takes.
SPINS = 200


@compiled
def word(base, index):
    return load_i64(base + 8 * index)


@compiled
def splits_of(phase, length, rows):
    """(first split of a sequence's window, number of splits)."""
    first = first_seen(length, word(phase, SLIDING)) // SPLIT
    return first, (length + rows - 1) // SPLIT - first + 1


@compiled
def chunks_of(head, phase):
    if word(phase, OP) != ATTEND:
        return word(phase, CHUNKS)
    chunks = 0
    for b in range(word(head, BATCH)):
        _, splits = splits_of(phase, word(word(head, LENGTHS), b), word(head, WINDOW_ROWS))
        chunks += splits
    return chunks * word(phase, KV_HEADS)


@compiled
def grab(ticket, epoch, chunks):
    """The next chunk; -1 where all are handed out, -2 where the step is over."""
    while True:
        seen = atomic_load(ticket)
        if seen >> 32 != epoch:
            return -2
        chunk = seen & 0xFFFFFFFF
        if chunk >= chunks:
            return -2 if chunk == CLOSED else -1
        if compare_swap(ticket, seen, seen + 1) == 1:
            return chunk


@compiled
def activation_bytes(phase, rows):
    per_group = 48 if word(phase, ROUNDED) == 1 else 128
    return (rows * word(phase, GROUPS) * per_group + 63) // 64 * 64


@compiled
def prepare(phase, rows, scratch):
    """Normalise and round a matmul's rows into this thread's scratch."""
    x, stride, K = word(phase, X), 4 * word(phase, X_STRIDE), word(phase, INPUTS)
    w, eps = word(phase, NORM_W), bits_float(word(phase, EPS))
    groups = word(phase, GROUPS)
    if word(phase, ROUNDED) == 1:
        facts = scratch + rows * groups * 32
        for r in range(rows):
            round_row(x + r * stride, w, eps, K, scratch + 32 * groups * r, facts + 16 * groups * r)
        return
    for r in range(rows):
        out = scratch + 128 * groups * r
        norm_row(x + r * stride, w, eps, K, K, out)
        for k in range(K, 32 * groups):
            store_f32(out + 4 * k, F32(0.0))


@compiled
def multiply(phase, rows, scratch, first, blocks, out, stride):
    """Rows of `prepare` times blocks first..first+blocks-1 of the weight, and the bias."""
    groups = word(phase, GROUPS)
    w = word(phase, WEIGHT) + first * word(phase, BLOCK_BYTES)
    facts = scratch + rows * groups * 32
    call_tile(word(phase, TILE), w, scratch, facts, out, blocks, groups, stride, rows)
    bias = word(phase, BIAS)
    if bias != 0:
        for r in range(rows):
            for n in range(0, 32 * blocks, 32):
                y = out + 4 * stride * r + n
                store_f8(y, load_f8(y) + load_f8(bias + 32 * first + n))


@compiled
def linear_chunk(phase, rows, chunk, scratch, work):
    """out = x w^T + b (+ residual)"""
    first = chunk * word(phase, BLOCKS)
    blocks = min(word(phase, BLOCKS), word(phase, ALL_BLOCKS) - first)
    residual, stride = word(phase, RESIDUAL), word(phase, OUT_STRIDE)
    out = word(phase, OUT) + 32 * first
    if residual == 0:
        multiply(phase, rows, scratch, first, blocks, out, stride)
        return
    multiply(phase, rows, scratch, first, blocks, work, 8 * blocks)
    residual += 32 * first
    for r in range(rows):
        y, x = out + 4 * stride * r, residual + 4 * word(phase, RESIDUAL_STRIDE) * r
        for n in range(0, 32 * blocks, 32):
            store_f8(y + n, load_f8(work + 32 * blocks * r + n) + load_f8(x + n))


@compiled
def gate_up_chunk(phase, rows, chunk, scratch, work):
    """out = silu(gate) * up, 8 gates before their 8 ups in the weight."""
    first = chunk * word(phase, BLOCKS)
    blocks = min(word(phase, BLOCKS), word(phase, ALL_BLOCKS) - first)
    multiply(phase, rows, scratch, first, blocks, work, 8 * blocks)
    out = word(phase, OUT) + 16 * first
    for r in range(rows):
        for pair in range(blocks // 2):
            a = work + 32 * blocks * r + 64 * pair
            y = silu(load_f8(a)) * load_f8(a + 32)
            store_f8(out + 4 * word(phase, OUT_STRIDE) * r + 32 * pair, y)


@compiled
def rotate(x, cos, sin, D):
    """x [D] rotated: (x_i, x_{i + D/2}) by the angles of its position (Su et al. 2021)."""
    half = 2 * D
    for d in range(0, half, 32):
        low, high = load_f8(x + d), load_f8(x + half + d)
        store_f8(x + d, fma(low, load_f8(cos + d), high * load_f8(sin + d)))
        high = fma(high, load_f8(cos + half + d), low * load_f8(sin + half + d))
        store_f8(x + half + d, high)


@compiled
def qkv_chunk(head, phase, rows, chunk, scratch):
    """One head of Q, K or V: projected, normalised, rotated; K and V go to the cache."""
    heads, kv_heads, D = word(phase, HEADS), word(phase, KV_HEADS), word(phase, HEAD_DIM)
    stride, T = word(phase, OUT_STRIDE), word(head, WINDOW_ROWS)
    out = word(phase, OUT) + 4 * D * chunk
    multiply(phase, rows, scratch, chunk * (D // 8), D // 8, out, stride)
    page_size, kind = word(phase, PAGE_SIZE), word(phase, KV_KIND)
    item = 4 if kind == 0 else 2
    norm_w = word(phase, Q_NORM) if chunk < heads else word(phase, K_NORM)
    for r in range(rows):
        b, t = r // T, r % T
        position = word(word(head, LENGTHS), b) + t
        x = out + 4 * stride * r
        if chunk < heads + kv_heads:
            if norm_w != 0:
                norm_row(x, norm_w, bits_float(word(phase, EPS)), D, word(phase, HEAD_COUNT), x)
            table = 4 * D * position
            rotate(x, word(phase, COS) + table, word(phase, SIN) + table, D)
        if chunk >= heads:
            pages = word(phase, K_PAGES) if chunk < heads + kv_heads else word(phase, V_PAGES)
            slot = slot_of(head, b, position, page_size)
            kv_head = (chunk - heads) % kv_heads
            store_row(x, kind, pages + (slot * kv_heads + kv_head) * D * item, D)


@compiled
def table_of(head, b):
    return word(head, PAGE_TABLE) + 4 * word(head, TABLE_STRIDE) * b


@compiled
def slot_of(head, b, position, page_size):
    entry = table_of(head, b) + 4 * (position // page_size)
    return load_i32(entry) * page_size + position % page_size


@compiled
def attend_chunk(head, phase, chunk, work):
    heads, kv_heads, D = word(phase, HEADS), word(phase, KV_HEADS), word(phase, HEAD_DIM)
    group, T = heads // kv_heads, word(head, WINDOW_ROWS)
    b = 0
    while True:
        length = word(word(head, LENGTHS), b)
        first, splits = splits_of(phase, length, T)
        if chunk < splits * kv_heads:
            break
        chunk -= splits * kv_heads
        b += 1
    kv_head, split = chunk // splits, first + chunk % splits
    size = 4 * D + 32
    per_head = size * word(phase, MAX_SPLITS)
    begin = b * T * heads + kv_head * group
    partials = word(phase, PARTIALS) + per_head * begin
    attend_split(
        word(phase, X) + 4 * (word(phase, X_STRIDE) * b * T + kv_head * group * D),
        4 * word(phase, X_STRIDE),
        T,
        group,
        length,
        split,
        word(phase, K_PAGES),
        word(phase, V_PAGES),
        table_of(head, b),
        kv_head,
        kv_heads,
        D,
        word(phase, PAGE_SIZE),
        word(phase, KV_KIND),
        word(phase, SLIDING),
        bits_float(word(phase, SCALE)),
        partials + size * split,
        per_head * heads,
        per_head,
        work,
    )
    counter = word(phase, MERGES) + 8 * COUNTER_WORDS * (b * kv_heads + kv_head)
    if atomic_add(counter, 1) == splits - 1:
        atomic_store(counter, 0)
        for t in range(T):
            position = length + t
            first = first_seen(position, word(phase, SLIDING)) // SPLIT
            for g in range(group):
                out = word(phase, OUT_STRIDE) * (b * T + t) + (kv_head * group + g) * D
                merge_splits(
                    partials + per_head * (heads * t + g),
                    first,
                    position // SPLIT,
                    size,
                    D,
                    word(phase, OUT) + 4 * out,
                )


@compiled
def project_chunk(phase, rows, chunk, scratch, work):
    """Logits of some columns; of each row its largest one and the sum of exponentials."""
    first = chunk * word(phase, BLOCKS)
    blocks = min(word(phase, BLOCKS), word(phase, ALL_BLOCKS) - first)
    out, stride = work, 8 * blocks
    if word(phase, WRITE_LOGITS) == 1:
        out, stride = word(phase, OUT) + 32 * first, word(phase, OUT_STRIDE)
    multiply(phase, rows, scratch, first, blocks, out, stride)
    columns = word(phase, OUTPUTS) - 8 * first
    for r in range(rows):
        y = out + 4 * stride * r
        best = splat_i(INT_MIN)
        ids = splat_i(0)
        for n in range(blocks):
            key = order_key(keep(load_f8(y + 32 * n), 0, columns - 8 * n))
            ids = where_larger(key, best, splat_i(n), ids)
            best = where_larger(key, best, key, best)
        key = largest_i(best)
        m = key_value(key)
        shift = splat(m if m > F32(-np.inf) else F32(0.0))
        z = splat(0.0)
        for n in range(blocks):
            z = z + exp(keep(load_f8(y + 32 * n), 0, columns - 8 * n) - shift)
        lane = lowest_where(best, ids * splat_i(8) + lane_numbers(), key)
        part = word(phase, PARTIALS) + 16 * (word(phase, CHUNKS) * r + chunk)
        # One word of key and id, one of the sum.
        store_i64(part, (key << 32) | (8 * first + lane))
        store_f32(part + 8, total(z))
    if atomic_add(word(phase, MERGES), 1) == word(phase, CHUNKS) - 1:
        atomic_store(word(phase, MERGES), 0)
        for r in range(rows):
            merge_project(phase, r)


@compiled
def merge_project(phase, r):
    """Of one row: the likeliest column, its logit, and log(sum(exp(logits)))."""
    chunks = word(phase, CHUNKS)
    parts = word(phase, PARTIALS) + 16 * chunks * r
    best = word(parts, 0)
    for chunk in range(1, chunks):
        part = word(parts, 2 * chunk)
        if part >> 32 > best >> 32:
            best = part
    m = key_value(best >> 32)
    shift = m if m > F32(-np.inf) else F32(0.0)
    z = splat(0.0)
    for chunk in range(chunks):
        weight = exp(splat(key_value(word(parts, 2 * chunk) >> 32) - shift))
        z = fma(splat(load_f32(parts + 16 * chunk + 8)), weight, z)
    sum_exp = largest(z)
    if not sum_exp == sum_exp:
        m = sum_exp  # the order of logits skips NaN, and their sum does not
    out = word(phase, BEST) + 24 * r
    store_i64(out, best & 0xFFFFFFFF)
    store_i64(out + 8, float_bits(m))
    store_i64(out + 16, float_bits(shift + log(sum_exp)))


@compiled
def embed_row(phase, token, out):
    """Row `token` of a packed matrix [V, K], as float32 [K]."""
    K, groups, kind = word(phase, INPUTS), word(phase, GROUPS), word(phase, WEIGHT_FORMAT)
    block = word(phase, WEIGHT) + token // 8 * word(phase, BLOCK_BYTES)
    lane = token % 8
    for k in range(K):
        group, j = k // 32, k % 32
        quad = 4 * lane + j % 4 + 32 * (j // 4 % 4)  # of 16 inputs
        if kind == BFLOAT:
            bits = load_byte(block + 16 * k + 2 * lane + 1) << 8
            value = bits_float((bits | load_byte(block + 16 * k + 2 * lane)) << 16)
        elif kind == HALF:
            value = load_half(block + 16 * k + 2 * lane)
        elif kind == FLOAT:
            value = load_f32(block + 32 * k + 4 * lane)
        elif kind == Q8_0 or kind == Q8:
            q = load_byte(block + 256 * group + quad + 128 * (j // 16))
            q -= (q & 128) << 1
            scales = block + 256 * groups
            if kind == Q8:
                value = F32(q) * load_f32(scales + 4 * lane)
            else:
                value = F32(q) * load_half(scales + 16 * group + 2 * lane)
        elif kind == Q6_K:
            at = block + 192 * group
            q = (load_byte(at + quad) >> (4 * (j // 16))) & 15
            high = load_byte(at + 128 + 32 * (j // 16) + 4 * lane + j % 4)
            q |= ((high >> (2 * (j // 4 % 4))) & 3) << 4
            scale = load_byte(block + 192 * groups + 16 * group + 8 * (j // 16) + lane)
            scale -= (scale & 128) << 1
            d = load_half(block + 208 * groups + 16 * (group // 8) + 2 * lane)
            value = F32((q - 32) * scale) * d
        else:
            q = (load_byte(block + 128 * group + quad) >> (4 * (j // 16))) & 15
            scales = block + 128 * groups
            if kind == Q4_1:
                d = load_half(scales + 32 * group + 2 * lane)
                value = F32(q) * d + load_half(scales + 32 * group + 16 + 2 * lane)
            else:
                value = F32(q - 8) * load_half(scales + 16 * group + 2 * lane)
        store_f32(out + 4 * k, value)


@compiled
def read_chunk(phase, chunk):
    """Read one MiB and leave its sum: the memory's speed, measured as a step reads weights."""
    begin = word(phase, X) + (chunk << 20)
    a = splat(0.0)
    b = splat(0.0)
    c = splat(0.0)
    d = splat(0.0)
    for at in range(begin, begin + (1 << 20), 128):
        a = a + load_f8(at)
        b = b + load_f8(at + 32)
        c = c + load_f8(at + 64)
        d = d + load_f8(at + 96)
    store_f32(word(phase, OUT) + 4 * chunk, total((a + b) + (c + d)))


@compiled
def run_chunk(head, phase, rows, chunk, scratch, work):
    op = word(phase, OP)
    if op == LINEAR:
        linear_chunk(phase, rows, chunk, scratch, work)
    elif op == QKV:
        qkv_chunk(head, phase, rows, chunk, scratch)
    elif op == ATTEND:
        attend_chunk(head, phase, chunk, work)
    elif op == GATE_UP:
        gate_up_chunk(phase, rows, chunk, scratch, work)
    elif op == PROJECT:
        project_chunk(phase, rows, chunk, scratch, work)
    elif op == READ:
        read_chunk(phase, chunk)
    else:
        for r in range(rows):
            out = word(phase, OUT) + 4 * word(phase, OUT_STRIDE) * r
            if op == EMBED:
                embed_row(phase, word(word(head, IDS), r), out)
            else:
                x = word(phase, X) + 4 * word(phase, X_STRIDE) * r
                eps = bits_float(word(phase, EPS))
                K = word(phase, INPUTS)
                norm_row(x, word(phase, NORM_W), eps, K, K, out)


@compiled
def run_phases(head, epoch, thread):
    """Work until the step is over -> how many ticks this thread waited for others."""
    rows = word(head, BATCH) * word(head, WINDOW_ROWS)
    scratch = word(head, SCRATCH) + word(head, SCRATCH_BYTES) * thread
    waited = 0
    for i in range(word(head, PHASES)):
        phase = word(head, PHASE_TABLE) + 8 * PHASE_WORDS * i
        ticket = word(head, TICKETS) + 8 * COUNTER_WORDS * i
        done = word(head, DONE) + 8 * COUNTER_WORDS * i
        chunks = chunks_of(head, phase)
        work = scratch
        prepared = False
        while True:
            chunk = grab(ticket, epoch, chunks)
            if chunk == -2:
                return waited
            if chunk == -1:
                break
            if not prepared and word(phase, TILE) != 0:
                prepare(phase, rows, scratch)
                work = scratch + activation_bytes(phase, rows)
            prepared = True
            run_chunk(head, phase, rows, chunk, scratch, work)
            atomic_add(done, 1)
        if atomic_load(done) < chunks:
            begin = ticks()
            spins = 0
            while atomic_load(done) < chunks:
                if atomic_load(ticket) >> 32 != epoch:
                    return waited
                spins += 1
                # The thread that is waited for may be waiting for this core.
                if spins < SPINS:
                    pause()
                else:
                    yield_core()
            waited += ticks() - begin
    return waited


@compiled
def run_program(head, epoch, thread):
    """Run a step's phases -> the share of the time, in thousandths, that this thread waited.

    The floating-point mode is IEEE's inside and the caller's again behind.
    """
    mode = float_mode()
    set_float_mode(IEEE_MODE)
    begin = ticks()
    waited = run_phases(head, epoch, thread)
    total = ticks() - begin
    set_float_mode(mode)
    return 1000 * waited // max(total, 1)
