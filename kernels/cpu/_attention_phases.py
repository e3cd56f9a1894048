"""Attention phases: one head of Q, K or V projected into the cache; one split of the keys attended.

`_attention` has the arithmetic; here a chunk's number becomes heads, splits and addresses.
"""

from __future__ import annotations

from ._activations import norm_row
from ._attention import attend_split, first_seen, merge_splits
from ._cache_rows import store_row
from ._intrinsics import compiled
from ._layout import (
    COS,
    COUNTER_WORDS,
    EPS,
    FIRST_HEAD,
    HEAD_COUNT,
    HEAD_DIM,
    HEADS,
    K_NORM,
    K_PAGES,
    KV_HEADS,
    KV_KIND,
    LENGTHS,
    MAX_SPLITS,
    MERGES,
    OUT,
    OUT_STRIDE,
    PAGE_SIZE,
    PAGE_TABLE,
    PARTIALS,
    Q_NORM,
    SCALE,
    SIN,
    SLIDING,
    SPLIT,
    TABLE_STRIDE,
    THREADS,
    V_PAGES,
    WINDOW_ROWS,
    X_STRIDE,
    X,
)
from ._matmul import multiply
from ._memory import atomic_add, atomic_store, load_f8, load_i32, store_f8, word
from ._vectors import bits_float, fma


@compiled
def splits_of(phase, length, rows):
    """(first split of a sequence's window, number of splits)."""
    first = first_seen(length, word(phase, SLIDING)) // SPLIT
    return first, (length + rows - 1) // SPLIT - first + 1


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
    index = word(phase, FIRST_HEAD) + chunk
    out = word(phase, OUT) + 4 * D * index
    multiply(phase, rows, scratch, chunk * (D // 8), D // 8, out, stride)
    page_size, kind = word(phase, PAGE_SIZE), word(phase, KV_KIND)
    item = 4 if kind == 0 else 2
    norm_w = word(phase, Q_NORM) if index < heads else word(phase, K_NORM)
    for r in range(rows):
        b, t = r // T, r % T
        position = word(word(head, LENGTHS), b) + t
        x = out + 4 * stride * r
        if index < heads + kv_heads:
            if norm_w != 0:
                norm_row(x, norm_w, bits_float(word(phase, EPS)), D, word(phase, HEAD_COUNT), x)
            table = 4 * D * position
            rotate(x, word(phase, COS) + table, word(phase, SIN) + table, D)
        if index >= heads:
            pages = word(phase, K_PAGES) if index < heads + kv_heads else word(phase, V_PAGES)
            slot = slot_of(head, b, position, page_size)
            kv_head = (index - heads) % kv_heads
            store_row(x, kind, pages + (slot * kv_heads + kv_head) * D * item, D)


@compiled
def table_of(head, b):
    return word(head, PAGE_TABLE) + 4 * word(head, TABLE_STRIDE) * b


@compiled
def slot_of(head, b, position, page_size):
    entry = table_of(head, b) + 4 * (position // page_size)
    return load_i32(entry) * page_size + position % page_size


@compiled
def attend_chunk(head, phase, chunk, begin, end, work):
    """One head and split, of this thread's chunks begin..end-1 of the phase."""
    before, after = chunk - begin, end - chunk
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
    # A split's heads are side by side in memory; few splits would be shared out unevenly.
    many = splits >= 2 * word(head, THREADS)
    if many:
        kv_head, split = chunk % kv_heads, first + chunk // kv_heads
    else:
        kv_head, split = chunk // splits, first + chunk % splits
    size = 4 * D + 32
    per_head = size * word(phase, MAX_SPLITS)
    partials = word(phase, PARTIALS) + per_head * (b * T * heads + kv_head * group)
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
        not many or before < kv_heads,
        many and after > kv_heads,
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
                    work,
                    word(phase, OUT) + 4 * out,
                )
