"""Rows of the cache: float32 rounded into a slot, and tiles of keys and values as float32 again."""

from __future__ import annotations

from ._intrinsics import compiled
from ._layout import BF16, FP16, KEYS
from ._memory import (
    load_bfloat8,
    load_f8,
    load_half8,
    load_i32,
    prefetch,
    store_bfloat8,
    store_f8,
    store_half8,
)
from ._vectors import store_transposed

# Rows that are prefetched ahead of those that are read.
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
def tile_address(pages, table, begin, kv_head, KV_HEADS, D, page_size, kind):
    """(address of the row of position `begin`, bytes from one position's row to the next)."""
    item = 4 if kind < FP16 else 2
    slot = load_i32(table + 4 * (begin // page_size)) * page_size + begin % page_size
    return pages + (slot * KV_HEADS + kv_head) * D * item, KV_HEADS * D * item


@compiled
def load_eight(source, kind):
    if kind == FP16:
        return load_half8(source)
    if kind == BF16:
        return load_bfloat8(source)
    return load_f8(source)


@compiled
def prefetch_bytes(at, size):
    for line in range(0, size, 64):
        prefetch(at + line)


@compiled
def widen_tile(source, step, count, kind, D, cold, out):
    """`count` rows as [count, D] float32; what follows them is prefetched where it is `cold`."""
    item = 4 if kind < FP16 else 2
    for _ in range(count):
        if cold:
            prefetch_bytes(source + AHEAD * step, item * D)
        for d in range(0, D, 8):
            store_f8(out + 4 * d, load_eight(source + item * d, kind))
        source += step
        out += 4 * D


@compiled
def transpose_tile(source, step, count, kind, D, cold, out):
    """`count` rows as [D, KEYS] float32; the columns from `count` on hold anything."""
    item = 4 if kind < FP16 else 2
    for _ in range(0, count, 8):
        for d in range(0, D, 8):
            # 64 numbers of each of eight rows in turn, then the next 64.
            if cold:
                ahead = source + (AHEAD + d // 8 % 8) * step
                prefetch_bytes(ahead + item * (d // 64 * 64), 64 * item)
            at = source + item * d
            store_transposed(
                out + 4 * KEYS * d,
                4 * KEYS,
                load_eight(at, kind),
                load_eight(at + step, kind),
                load_eight(at + 2 * step, kind),
                load_eight(at + 3 * step, kind),
                load_eight(at + 4 * step, kind),
                load_eight(at + 5 * step, kind),
                load_eight(at + 6 * step, kind),
                load_eight(at + 7 * step, kind),
            )
        source += 8 * step
        out += 32
