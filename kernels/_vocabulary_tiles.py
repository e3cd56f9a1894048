"""The first launch of `multi_head_projection`: tiles of the vocabulary matrix times all rows.

It stores all logits, and for each tile of columns the largest one and the sum of exponentials.
"""

from __future__ import annotations

from ._launch import device, jit, prefetch_l2, tl, wait_for_producer
from ._ranking import LOWEST_KEY, key_value, sort_key
from ._skinny_matmul import add_exactly


@jit(
    *("CHUNK", "CHUNKS", "TAIL", "V", "E"),
    do_not_specialize=("logits_rows", "given_count"),
    definition="multi_head_projection_ref",
)
def _vocabulary_tiles_kernel(
    x_ptr, w_ptr, token_ids_ptr, wanted_ptr,  # [R, E] [V, E] [V] [R, n]
    all_ptr, largest_ptr, sum_ptr,  # [R, V] [R, tiles] [R, tiles]
    given_ptr, logits_ptr,  # [R, n] [logits_rows, V]
    R, logits_rows, given_count,
    stride_xr, stride_wv, stride_wanted, stride_given, stride_lr,
    V: tl.constexpr, E: tl.constexpr,
    HAS_GIVEN: tl.constexpr, HAS_LOGITS: tl.constexpr, WGMMA: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, TAIL: tl.constexpr,
    TILES: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: the logits of CHUNK times CHUNKS + TAIL rows over TILES tiles of TILE columns;
    for each tile the sort key of its largest logit and its sum of exponentials."""
    BLOCK_V: tl.constexpr = TILES * TILE
    first_tile = tl.program_id(1) * TILES
    v = first_tile * TILE + tl.arange(0, BLOCK_V)
    if PDL:
        prefetch_l2(w_ptr, v, v < V, stride_wv, tl.arange(0, 4) * 64, E)
        wait_for_producer()
    first = tl.program_id(0) * (CHUNK * CHUNKS + TAIL)
    r = first + tl.arange(0, CHUNK)
    tail_r = first + CHUNK * CHUNKS + tl.arange(0, TAIL if TAIL > 0 else 1)
    # With wgmma the weights are the left operand, which has at least 64 rows. With mma.sync they
    # are the right one, and the other is chunks of 16 or 32 rows: all chunks then use the same
    # registers of weights. The order of e is the same.
    if WGMMA:
        accs = (tl.zeros([BLOCK_V, CHUNK], tl.float32),) * CHUNKS
    else:
        accs = (tl.zeros([CHUNK, BLOCK_V], tl.float32),) * CHUNKS
    tail_acc = tl.zeros([BLOCK_V, TAIL if TAIL > 0 else 1], tl.float32)
    for begin in range(0, E, BLOCK_E):
        e = begin + tl.arange(0, BLOCK_E)
        w = _load(w_ptr, v, v < V, stride_wv, e, e < E, WGMMA, "evict_first")
        sums = ()
        for c in tl.static_range(CHUNKS):
            rows = r + c * CHUNK
            x = _load(x_ptr, rows, rows < R, stride_xr, e, e < E, not WGMMA, "")
            if WGMMA:
                total = tl.dot(w, x, accs[c], input_precision="ieee")
            else:
                total = tl.dot(x, w, accs[c], input_precision="ieee")
            sums = sums + (total,)  # type: ignore[assignment]
        accs = sums
        if TAIL > 0:
            x = _load(x_ptr, tail_r, tail_r < R, stride_xr, e, e < E, not WGMMA, "")
            tail_acc = tl.dot(w, x, tail_acc, input_precision="ieee")
    # At most 32 rows of a wide chunk at a time, for the registers.
    PIECE: tl.constexpr = 32 if CHUNK > 64 else CHUNK
    pieces = ()
    for c in tl.static_range(CHUNKS):
        acc = accs[c]
        if not WGMMA:
            acc = tl.trans(acc)
        if CHUNK > PIECE:
            low, high = _halves(acc)
            pieces = pieces + _halves(low) + _halves(high)  # type: ignore[assignment]
        else:
            pieces = pieces + (acc,)  # type: ignore[assignment]
    if TAIL > 0:
        pieces = pieces + (tail_acc,)  # type: ignore[assignment]
    for i in tl.static_range(CHUNKS * (CHUNK // PIECE) + TAIL // PIECE):
        _finish_tiles(
            pieces[i], first + i * PIECE + tl.arange(0, PIECE), first_tile, v,
            token_ids_ptr, wanted_ptr, all_ptr, largest_ptr, sum_ptr, given_ptr, logits_ptr,
            R, logits_rows, given_count, stride_wanted, stride_given, stride_lr,
            V, HAS_GIVEN, HAS_LOGITS, TILES, TILE,
        )  # fmt: skip


@device
def _halves(x):
    """The first and the last half of the columns of x."""
    halves = tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2])
    return tl.split(tl.permute(halves, [0, 2, 1]))


@device
def _load(ptr, n, in_n, stride_n, k, in_k, ROWS_FIRST: tl.constexpr, EVICTION: tl.constexpr):
    """Rows n of a matrix at the columns k -> [n, k], or [k, n] unless ROWS_FIRST."""
    n = n.to(tl.int64) * stride_n
    if ROWS_FIRST:
        ptrs, mask = ptr + n[:, None] + k[None, :], in_n[:, None] & in_k[None, :]
    else:
        ptrs, mask = ptr + n[None, :] + k[:, None], in_n[None, :] & in_k[:, None]
    return tl.load(ptrs, mask=mask, other=0.0, eviction_policy=EVICTION)


@device
def _finish_tiles(
    logits, r, first_tile, v, token_ids_ptr, wanted_ptr, all_ptr, largest_ptr, sum_ptr,
    given_ptr, logits_ptr, R, logits_rows, given_count, stride_wanted, stride_given, stride_lr,
    V: tl.constexpr, HAS_GIVEN: tl.constexpr, HAS_LOGITS: tl.constexpr,
    TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store what is kept of `logits` [TILES * TILE, rows] of the rows r."""
    BLOCK_V: tl.constexpr = TILES * TILE
    tiles: tl.constexpr = (V + TILE - 1) // TILE
    in_r, r = r < R, r.to(tl.int64)
    in_tile = (v < V)[:, None] & in_r[None, :]
    tl.store(all_ptr + (r * V)[None, :] + v[:, None], logits, mask=in_tile)
    if HAS_LOGITS:
        ptrs = logits_ptr + (r * stride_lr)[None, :] + v[:, None]
        in_logits = in_tile & (r < logits_rows)[None, :]
        tl.store(ptrs, logits.to(logits_ptr.dtype.element_ty), mask=in_logits)
    if HAS_GIVEN:
        names = v
        if token_ids_ptr is not None:
            names = tl.load(token_ids_ptr + v, mask=v < V, other=-1)
        for i in range(given_count):
            wanted = tl.load(wanted_ptr + r * stride_wanted + i, mask=in_r, other=-1)
            hit = in_tile & (names[:, None] == wanted[None, :])
            given_ptrs = given_ptr + (r * stride_given + i)[None, :]
            tl.store(tl.broadcast_to(given_ptrs, hit.shape), logits, mask=hit)
    keys = tl.where((v < V)[:, None], sort_key(logits), LOWEST_KEY)
    largest = tl.max(tl.reshape(keys, [TILES, TILE, logits.shape[1]]), 1)
    tile = first_tile + tl.arange(0, TILES)
    ptrs = largest_ptr + (r * tiles)[None, :] + tile[:, None]
    tl.store(ptrs, largest, mask=(tile < tiles)[:, None] & in_r[None, :])
    shift = tl.broadcast_to(finite(key_value(largest))[:, None, :], [TILES, TILE, r.shape[0]])
    p = tl.exp(logits - tl.reshape(shift, logits.shape))
    # Row i adds the columns of tile i.
    i = tl.arange(0, 16)
    ones = tl.where(i[:, None] == (tl.arange(0, BLOCK_V) // TILE)[None, :], 1.0, 0.0)
    total = add_exactly(ones.to(tl.bfloat16), tl.where((v < V)[:, None], p, 0.0))
    ptrs = sum_ptr + (r * tiles)[None, :] + (first_tile + i)[:, None]
    in_sums = (i < TILES) & (first_tile + i < tiles)
    tl.store(ptrs, total, mask=in_sums[:, None] & in_r[None, :])


@device
def finite(largest):
    """What to subtract before exp: the largest logit, unless it is infinite."""
    return tl.where(tl.abs(largest) == float("inf"), 0.0, largest)
