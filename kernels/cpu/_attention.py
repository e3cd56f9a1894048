"""Attention of window rows against a paged cache, one KV head and one split of the keys at a time.

    softmax(q k^T * scale) v, row t of a sequence seeing positions up to lengths[b] + t

The definition is `kernels/verify_attention.py`'s. A tile of keys is widened to float32 once for all
window rows and all query heads that share it, and transposed: 8 keys are in a register, so that
no sum goes across lanes. Splits begin at absolute positions; a split's scores are summed over D in
ascending order, its exponentials over keys in 8 lanes, its values over keys in ascending order;
splits are merged in ascending order by the thread that finishes a head. So a row's bits depend on
its own position and keys only. Scores of keys that a row does not see are discarded and their
values are not read, so the contents of their slots, even NaN, have no effect.

Bytes moved: the cache once per step; per split and row 4 (D + 8) of partial results. The next
split's bytes are prefetched evenly over a split's multiply-adds, since a CPU has few misses under
way at a time, and in the order of their addresses, since that is what its own prefetcher follows.
"""

from __future__ import annotations

import numpy as np

from ._cache_rows import tile_address, transpose_tile, widen_tile
from ._elementary import exp
from ._intrinsics import compiled
from ._layout import FP16, KEYS, SPLIT
from ._memory import load_f8, load_f32, store_f8, store_f32
from ._products import add_products, add_products_2
from ._vectors import fma, fma_scalar, mask_outside, maximum, reduce_add, reduce_max, splat

F32 = np.float32


@compiled
def first_seen(position, sliding):
    """The first position that a row at `position` sees."""
    if sliding == 0 or position < sliding:
        return 0
    return position - sliding + 1


@compiled
def next_query(t, g, group):
    """The window row and head after head g, of a group, in row t."""
    return (t, g + 1) if g + 1 < group else (t + 1, 0)


@compiled
def score_tile(q0, q1, keys, begin, end, D, out0, out1, ahead, step):
    """q k^T of two rows, which may be one, and keys begin..end-1 of a tile [D, KEYS]; keys beside
    them may be multiplied, too. `ahead` and `step`: see `_products`."""
    n = begin // 32 * 32
    while n < end:
        width = 64 if q0 == q1 and n + 32 < end else 32
        for c in range(4 * n, 4 * (n + width), 32):
            store_f8(out0 + c, splat(0.0))
            store_f8(out1 + c, splat(0.0))
        tile, out = keys + 4 * n, out0 + 4 * n
        if width == 64:
            add_products(q0, tile, D, 4 * KEYS, 64, out, ahead, step)
        else:
            add_products_2(q0, q1, tile, D, 4 * KEYS, 32, out, out1 + 4 * n, ahead, step)
        if ahead != 0:
            ahead += step * D
        n += width


@compiled
def exponentials(scores, count, begin, end, scale, partial):
    """Turn the sums of `count` keys, of which begin..end-1 are seen, into exponentials of their
    scores; the maximum and the sum are stored at `partial`."""
    most = splat(F32(-np.inf))
    for n in range(0, count, 8):
        s = mask_outside(load_f8(scores + 4 * n) * splat(scale), begin - n, end - n)
        store_f8(scores + 4 * n, s)
        most = maximum(s, most)
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
def add_values(p0, first0, end0, p1, first1, end1, values, D, out0, out1, ahead, step):
    """out [D] += sum over n of p[n] values[n, D], for two rows, each over first..end-1."""
    first, end = max(first0, first1), min(end0, end1)
    row = 4 * D
    if first < end:
        add_products(p0 + 4 * first0, values + row * first0, first - first0, row, D, out0, 0, 0)
        add_products(p1 + 4 * first1, values + row * first1, first - first1, row, D, out1, 0, 0)
        add_products_2(
            p0 + 4 * first,
            p1 + 4 * first,
            values + row * first,
            end - first,
            row,
            D,
            out0,
            out1,
            ahead,
            step,
        )
        first0, first1 = end, end
    add_products(p0 + 4 * first0, values + row * first0, end0 - first0, row, D, out0, 0, 0)
    add_products(p1 + 4 * first1, values + row * first1, end1 - first1, row, D, out1, 0, 0)


@compiled
def share_of_tile(pages, table, position, seen, kv_head, KV_HEADS, D, page_size, kind):
    """(address of a head's equal share of the bytes of the tile at `position`, its size); 0 for the
    address if the tile is not among the first `seen` positions."""
    size = KEYS * D * (4 if kind < FP16 else 2)
    if position >= seen:
        return 0, size
    first, _ = tile_address(pages, table, position, 0, KV_HEADS, D, page_size, kind)
    return first + size * kv_head, size


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
    cold,  # whether this split's keys have not been prefetched
    prefetching,  # whether to prefetch this head's share of the next split's
    work,
):
    """Store each row's maximum, sum and, from byte 32 on, weighted values [D] in its partial."""
    low = split * SPLIT
    # Tiles of keys are aligned like pages, so that each is within one page.
    begin = max(low, first_seen(length, sliding) // KEYS * KEYS)
    end = min(low + SPLIT, length + rows)
    count = (end - begin + 7) // 8 * 8
    scores = work + 4 * KEYS * D
    # The loops over pairs of query rows prefetch in equal steps.
    steps = KEYS // 32 * D
    pairs = (rows * group + 1) // 2
    known = length + rows if prefetching else 0
    for start in range(begin, end, KEYS):
        stop = min(start + KEYS, end)
        source, step = tile_address(k_pages, table, start, kv_head, KV_HEADS, D, page_size, kind)
        transpose_tile(source, step, stop - start, kind, D, cold, work)
        ahead, size = share_of_tile(
            k_pages, table, start + SPLIT, known, kv_head, KV_HEADS, D, page_size, kind
        )
        hint = size // (pairs * steps)
        row, t, g = scores + 4 * (start - begin), 0, 0
        while t < rows:
            u, h = next_query(t, g, group)
            pair = u < rows
            x = q + t * q_stride + 4 * D * g
            score_tile(
                x,
                q + u * q_stride + 4 * D * h if pair else x,
                work,
                max(first_seen(length + t, sliding) - start, 0),
                min(length + u + 1, stop) - start,
                D,
                row,
                row + 4 * SPLIT if pair else row,
                ahead,
                hint,
            )
            if ahead != 0:
                ahead += hint * steps
            row += 8 * SPLIT
            t, g = next_query(u, h, group)
    row = scores
    for t in range(rows):
        first = first_seen(length + t, sliding) - begin
        for g in range(group):
            partial = partials + t * partial_row + g * partial_head
            exponentials(row, count, first, length + t + 1 - begin, scale, partial)
            for d in range(0, 4 * D, 32):
                store_f8(partial + 32 + d, splat(0.0))
            row += 4 * SPLIT
    for start in range(begin, end, KEYS):
        stop = min(start + KEYS, end)
        source, step = tile_address(v_pages, table, start, kv_head, KV_HEADS, D, page_size, kind)
        widen_tile(source, step, stop - start, kind, D, cold, work)
        ahead, size = share_of_tile(
            v_pages, table, start + SPLIT, known, kv_head, KV_HEADS, D, page_size, kind
        )
        hint = size // (pairs * steps)
        p, t, g = scores + 4 * (start - begin), 0, 0
        while t < rows:
            u, h = next_query(t, g, group)
            out = partials + 32 + t * partial_row + g * partial_head
            first = max(first_seen(length + t, sliding) - start, 0)
            seen = min(length + t + 1, stop) - start
            if u < rows:
                add_values(
                    p,
                    first,
                    seen,
                    p + 4 * SPLIT,
                    max(first_seen(length + u, sliding) - start, 0),
                    min(length + u + 1, stop) - start,
                    work,
                    D,
                    out,
                    partials + 32 + u * partial_row + h * partial_head,
                    ahead,
                    hint,
                )
                if ahead != 0:
                    ahead += hint * steps
            else:
                add_products(
                    p + 4 * first, work + 4 * D * first, seen - first, 4 * D, D, out, ahead, hint
                )
            p += 8 * SPLIT
            t, g = next_query(u, h, group)


@compiled
def merge_splits(partial, first, last, size, D, weights, out):
    """Merge splits first..last of one row and head, `size` bytes each: out [D].

    `weights` has room for 8 float32 more than there are splits.
    """
    part, count = partial + first * size, last - first + 1
    m = F32(-np.inf)
    for i in range(count):
        m_split = load_f32(part + size * i)
        store_f32(weights + 4 * i, m_split)
        m = m_split if m_split > m else m
    shift = splat(m if m > F32(-np.inf) else F32(0.0))
    for i in range(0, 4 * count, 32):
        store_f8(weights + i, exp(load_f8(weights + i) - shift))
    z = F32(0.0)
    for i in range(count):
        z = fma_scalar(load_f32(weights + 4 * i), load_f32(part + size * i + 4), z)
    scale = splat(F32(1.0) / (z if z != F32(0.0) else F32(1.0)))
    for d in range(0, 4 * D, 32):
        store_f8(out + d, splat(0.0))
    for i in range(count):
        w = splat(load_f32(weights + 4 * i))
        for d in range(0, 4 * D, 32):
            store_f8(out + d, fma(load_f8(part + size * i + 32 + d), w, load_f8(out + d)))
    for d in range(0, 4 * D, 32):
        store_f8(out + d, load_f8(out + d) * scale)
