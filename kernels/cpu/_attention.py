"""Attention of window rows against a paged cache, one KV head and one split of the keys at a time.

    softmax(q k^T * scale) v, row t of a sequence seeing positions up to lengths[b] + t

The definition is `kernels/verify_attention.py`'s. A tile of keys is widened to float32 once for all
window rows and all query heads that share it. Splits begin at absolute positions; a split's scores
are summed over D in 8 lanes, its exponentials over keys in 8 lanes, its values over keys in
ascending order; splits are merged in ascending order by the thread that finishes a head.
So a row's bits depend on its own position and keys only. Keys that a row does not see are neither
multiplied nor added, so the contents of their slots, even NaN, have no effect.

Bytes moved: the cache once per step; per split and row 4 (D + 8) of partial results.
"""

from __future__ import annotations

import numpy as np

from ._elementary import exp
from ._intrinsics import compiled
from ._layout import BF16, FP16, KEYS, SPLIT
from ._memory import (
    load_bfloat8,
    load_f8,
    load_f32,
    load_half8,
    load_i32,
    prefetch,
    store_bfloat8,
    store_f8,
    store_f32,
    store_half8,
)
from ._vectors import fma, mask_outside, maximum, reduce_add, reduce_add_8, reduce_max, splat

F32 = np.float32
# Keys that are prefetched ahead.
AHEAD = 16


@compiled
def store_row(source, kind, out, D):
    """Round D float32 to a cache row."""
    for d in range(0, D, 8):
        v = load_f8(source + 4 * d)
        if kind == FP16:
            store_half8(out + 2 * d, v)
        elif kind == BF16:
            store_bfloat8(out + 2 * d, v)
        else:
            store_f8(out + 4 * d, v)


@compiled
def widen_row(source, kind, out, D):
    """D float32 of a cache row."""
    if kind == FP16:
        for d in range(0, D, 8):
            store_f8(out + 4 * d, load_half8(source + 2 * d))
    elif kind == BF16:
        for d in range(0, D, 8):
            store_f8(out + 4 * d, load_bfloat8(source + 2 * d))
    else:
        for d in range(0, D, 8):
            store_f8(out + 4 * d, load_f8(source + 4 * d))


@compiled
def widen_keys(pages, table, begin, end, kv_head, KV_HEADS, D, page_size, kind, out):
    """Keys or values begin..end-1 of a sequence, in one page, as [end - begin, D] float32."""
    item = 4 if kind < FP16 else 2
    slot = load_i32(table + 4 * (begin // page_size)) * page_size + begin % page_size
    source = pages + (slot * KV_HEADS + kv_head) * D * item
    row = KV_HEADS * D * item
    for _ in range(end - begin):
        for line in range(0, D * item, 64):
            prefetch(source + AHEAD * row + line)
        widen_row(source, kind, out, D)
        source += row
        out += 4 * D


@compiled
def first_seen(position, sliding):
    """The first position that a row at `position` sees."""
    if sliding == 0 or position < sliding:
        return 0
    return position - sliding + 1


@compiled
def score_eight(q, keys, D):
    """q k^T of 8 keys [8, D]."""
    zero = splat(0.0)
    s0, s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero, zero
    row = 4 * D
    for d in range(0, row, 32):
        x = load_f8(q + d)
        k = keys + d
        s0 = fma(x, load_f8(k), s0)
        s1 = fma(x, load_f8(k + row), s1)
        s2 = fma(x, load_f8(k + 2 * row), s2)
        s3 = fma(x, load_f8(k + 3 * row), s3)
        s4 = fma(x, load_f8(k + 4 * row), s4)
        s5 = fma(x, load_f8(k + 5 * row), s5)
        s6 = fma(x, load_f8(k + 6 * row), s6)
        s7 = fma(x, load_f8(k + 7 * row), s7)
    return reduce_add_8(s0, s1, s2, s3, s4, s5, s6, s7)


@compiled
def score_tile(q, keys, start, count, begin, end, D, scale, scores):
    """Scores of one row and the keys start..start+count-1, count a multiple of 8; -inf where the
    row, which sees begin..end-1, does not see them."""
    for n in range(start, start + count, 8):
        out = scores + 4 * (n - start)
        if n >= end or n + 8 <= begin:
            store_f8(out, splat(F32(-np.inf)))
        else:
            s = score_eight(q, keys + 4 * D * (n - start), D) * splat(scale)
            store_f8(out, mask_outside(s, begin - n, end - n))


@compiled
def exponentials(scores, count, partial):
    """Turn scores into exponentials; their maximum and sum are stored at `partial`."""
    most = splat(F32(-np.inf))
    for n in range(0, 4 * count, 32):
        most = maximum(load_f8(scores + n), most)
    m = reduce_max(most)
    shift = splat(m if m > F32(-np.inf) else F32(0.0))
    z = splat(0.0)
    for n in range(0, 4 * count, 32):
        p = exp(load_f8(scores + n) - shift)
        store_f8(scores + n, p)
        z = z + p
    store_f32(partial, m)
    store_f32(partial + 4, reduce_add(z))


@compiled
def add_values(p, values, count, D, acc):
    """acc [D] += sum over count keys of p[n] values[n, D]."""
    row = 4 * D
    d = 0
    while d + 256 <= row:
        a = acc + d
        a0, a1, a2, a3 = load_f8(a), load_f8(a + 32), load_f8(a + 64), load_f8(a + 96)
        a4, a5, a6, a7 = load_f8(a + 128), load_f8(a + 160), load_f8(a + 192), load_f8(a + 224)
        v = values + d
        for n in range(count):
            w = splat(load_f32(p + 4 * n))
            a0 = fma(w, load_f8(v), a0)
            a1 = fma(w, load_f8(v + 32), a1)
            a2 = fma(w, load_f8(v + 64), a2)
            a3 = fma(w, load_f8(v + 96), a3)
            a4 = fma(w, load_f8(v + 128), a4)
            a5 = fma(w, load_f8(v + 160), a5)
            a6 = fma(w, load_f8(v + 192), a6)
            a7 = fma(w, load_f8(v + 224), a7)
            v += row
        store_f8(a, a0)
        store_f8(a + 32, a1)
        store_f8(a + 64, a2)
        store_f8(a + 96, a3)
        store_f8(a + 128, a4)
        store_f8(a + 160, a5)
        store_f8(a + 192, a6)
        store_f8(a + 224, a7)
        d += 256
    while d < row:
        a0 = load_f8(acc + d)
        for n in range(count):
            a0 = fma(splat(load_f32(p + 4 * n)), load_f8(values + d + row * n), a0)
        store_f8(acc + d, a0)
        d += 32


@compiled
def attend_split(
    q,  # address of the sequence's first row and of the KV head's first query head
    q_stride,  # bytes
    rows,
    group,
    length,
    split,
    k_pages,
    v_pages,
    table,
    kv_head,
    KV_HEADS,
    D,
    page_size,
    kind,
    sliding,
    scale,
    partials,  # of the first row and head
    partial_row,  # bytes from window row to window row
    partial_head,
    work,
):
    """Store each row's maximum, sum and, from byte 32 on, weighted values [D] in its partial."""
    low = split * SPLIT
    # Tiles of keys are aligned like pages, so that each is within one page.
    begin = max(low, first_seen(length, sliding) // KEYS * KEYS)
    end = min(low + SPLIT, length + rows)
    last = (end + 7) // 8 * 8
    scores = work + 4 * KEYS * D
    for start in range(begin, last, KEYS):
        stop = min(start + KEYS, last)
        widen_keys(k_pages, table, start, stop, kv_head, KV_HEADS, D, page_size, kind, work)
        for t in range(rows):
            position = length + t
            first = first_seen(position, sliding)
            for g in range(group):
                score_tile(
                    q + t * q_stride + 4 * D * g,
                    work,
                    start,
                    stop - start,
                    first,
                    position + 1,
                    D,
                    scale,
                    scores + 4 * (SPLIT * (t * group + g) + start - begin),
                )
    for t in range(rows):
        for g in range(group):
            partial = partials + t * partial_row + g * partial_head
            exponentials(scores + 4 * SPLIT * (t * group + g), last - begin, partial)
            for d in range(0, 4 * D, 32):
                store_f8(partial + 32 + d, splat(0.0))
    for start in range(begin, end, KEYS):
        stop = min(start + KEYS, end)
        widen_keys(v_pages, table, start, stop, kv_head, KV_HEADS, D, page_size, kind, work)
        for t in range(rows):
            position = length + t
            first = max(first_seen(position, sliding), start)
            count = min(position + 1, stop) - first
            if count > 0:
                for g in range(group):
                    add_values(
                        scores + 4 * (SPLIT * (t * group + g) + first - begin),
                        work + 4 * D * (first - start),
                        count,
                        D,
                        partials + t * partial_row + g * partial_head + 32,
                    )


@compiled
def merge_splits(partial, first, last, size, D, out):
    """Merge splits first..last of one row and head, `size` bytes each: out [D]."""
    m = F32(-np.inf)
    z = F32(0.0)
    for d in range(0, 4 * D, 32):
        store_f8(out + d, splat(0.0))
    for split in range(first, last + 1):
        part = partial + split * size
        m_split = load_f32(part)
        m_new = m_split if m_split > m else m
        shift = splat(m_new if m_new > F32(-np.inf) else F32(0.0))
        decay = exp(splat(m) - shift)
        weight = exp(splat(m_split) - shift)
        z = reduce_max(fma(splat(z), decay, splat(load_f32(part + 4)) * weight))
        for d in range(0, 4 * D, 32):
            store_f8(out + d, fma(load_f8(out + d), decay, load_f8(part + 32 + d) * weight))
        m = m_new
    if z == F32(0.0):
        z = F32(1.0)
    for d in range(0, 4 * D, 32):
        store_f8(out + d, load_f8(out + d) / splat(z))
