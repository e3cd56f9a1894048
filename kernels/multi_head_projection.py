"""Final norm, then one read of the vocabulary matrix for the LM head and all parallel heads.

    h_0 = rms_norm(x);  h_i = h_0 + silu(h_0 w_i^T + b_i)  (Medusa, Cai et al. 2024, section 2.1)
    logits_i = h_i w_vocabulary^T

The norm and the heads' blocks are launches of their own, `rms_norm` and `medusa_blocks`, so that
they are not computed once per vocabulary tile. Here are two: the tiles of the vocabulary and their
merge. For each tile of 64 columns the first stores the largest logit and the sum of exponentials,
and beside them all logits. The top_k largest logits of a row are in the top_k tiles with the
largest ones, so that the merge reads top_k tiles of logits per row.

Bytes moved: V * E weights, once per 160 rows, though the passes over a tile run side by side and
share it in the L2; R * E of the rows, read by each block of 64 or 128 columns, mostly from the L2;
R * V logits in float32, written; R * V / 64 * 8 bytes of partial results, written and read;
R * top_k * 64 logits, read; the logits that were asked for.

One read of the vocabulary or two. All heads at all rows of the windows are R = B * T * (1 + H) rows
and one read. If the LM head goes first, acceptance decides at which row of a sequence the heads are
needed, and two reads with B * (T + H) rows in all suffice. A read of w bytes takes w / 4.4 TB/s
from the memory of an H200. Between L2 and multiprocessors, at some 5.5 TB/s, go w for each pass of
160 rows, and w * R / 128, since each block reads all rows. In w / (TB/s), one read takes 0.41 at
160 rows and 0.59 at 161, and two reads of few rows take 0.50: hence `ONE_READ_ROWS`. On an H200 the
vocabulary of an 8B model takes 0.45 ms at 160 rows and 0.27 ms at 40.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import (
    ceil_div,
    check_shape,
    device,
    has_wgmma,
    jit,
    power_of_two,
    prefetch_l2,
    tl,
    wait_for_producer,
)
from ._ranking import (
    HIGHEST,
    LOWEST,
    LOWEST_KEY,
    key_value,
    rank,
    ranked_column,
    ranked_key,
    ranked_value,
    sort_key,
)
from ._skinny_matmul import add_exactly, sum_columns
from .linear import linear_ref

# Columns of a vocabulary tile: the same for every row count, since exponentials are summed by tile.
TILE = 64


class Projection(NamedTuple):
    """What `multi_head_projection` keeps of R rows' logits over the vocabulary."""

    values: Tensor  # [R, top_k] float32, descending
    ids: Tensor  # [R, top_k] int64
    logsumexp: Tensor  # [R] float32
    given: Tensor | None  # [R, n] float32
    logits: Tensor | None  # [logits_rows, V]


def multi_head_projection_ref(
    hidden: Tensor,
    vocabulary: Tensor,
    *,
    top_k: int = 1,
    given: Tensor | None = None,
    logits_rows: int = 0,
    token_ids: Tensor | None = None,
) -> Projection:
    """Project normed rows: hidden [R, E], vocabulary [V, E] -> what `Projection` lists, float32;
    see `multi_head_projection`."""
    logits = linear_ref(hidden.float(), vocabulary)
    # Stable: between equal logits the lowest column comes first.
    values, columns = logits.sort(dim=-1, descending=True, stable=True)
    values, columns = values[:, :top_k].contiguous(), columns[:, :top_k].contiguous()
    names = torch.arange(len(vocabulary)) if token_ids is None else token_ids
    asked = None
    if given is not None:
        hits = given[:, :, None] == names
        asked = logits[:, None].where(hits, float("-inf")).amax(-1)
    kept = logits[:logits_rows] if logits_rows else None
    return Projection(values, names[columns], logits.logsumexp(-1), asked, kept)


@jit("CHUNK", "CHUNKS", "TAIL", "V", "E", do_not_specialize=("logits_rows", "given_count"))
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
        pieces = pieces + (tail_acc,)
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
    shift = tl.broadcast_to(_finite(key_value(largest))[:, None, :], [TILES, TILE, r.shape[0]])
    p = tl.exp(logits - tl.reshape(shift, logits.shape))
    # Row i adds the columns of tile i.
    i = tl.arange(0, 16)
    ones = tl.where(i[:, None] == (tl.arange(0, BLOCK_V) // TILE)[None, :], 1.0, 0.0)
    total = add_exactly(ones.to(tl.bfloat16), tl.where((v < V)[:, None], p, 0.0))
    ptrs = sum_ptr + (r * tiles)[None, :] + (first_tile + i)[:, None]
    in_sums = (i < TILES) & (first_tile + i < tiles)
    tl.store(ptrs, total, mask=in_sums[:, None] & in_r[None, :])


@device
def _finite(largest):
    """What to subtract before exp: the largest logit, unless it is infinite."""
    return tl.where(tl.abs(largest) == float("inf"), 0.0, largest)


@jit("TOP_K", "TILES")
def _vocabulary_merge_kernel(
    all_ptr, largest_ptr, sum_ptr, token_ids_ptr,  # [R, V] [R, TILES] [R, TILES] [V]
    value_ptr, id_ptr, logsumexp_ptr,  # [R, TOP_K] [R, TOP_K] [R]
    stride_vr, stride_ir,
    V: tl.constexpr, TOP_K: tl.constexpr,
    TILES: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: a row, over all tiles."""
    if PDL:
        wait_for_producer()
    r = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK)
    keys = tl.load(largest_ptr + r * TILES + tile, mask=tile < TILES, other=LOWEST_KEY)
    sums = tl.load(sum_ptr + r * TILES + tile, mask=tile < TILES, other=0.0)
    largest = key_value(tl.max(keys, 0))
    shift = _finite(largest)
    scaled = tl.where(tile < TILES, sums * tl.exp(_finite(key_value(keys)) - shift), 0.0)
    sixteen = sum_columns(tl.reshape(scaled, [16, BLOCK // 16]))
    total = tl.max(sum_columns(tl.broadcast_to(sixteen[None, :], [16, 16])), 0)
    infinite = largest == float("inf")
    tl.store(logsumexp_ptr + r, tl.where(infinite, largest, tl.log(total) + shift))
    above = tl.full([], HIGHEST, tl.int64)
    for i in range(TOP_K):
        # Of the logits that are left, the largest is in the first tile with the largest key.
        _, best_tile = tl.max(keys, 0, return_indices=True)
        v = best_tile * TILE + tl.arange(0, TILE)
        logits = tl.load(all_ptr + r * V + v, mask=v < V, other=0.0)
        ranks = tl.where(v < V, rank(logits, v), LOWEST)
        above = tl.max(tl.where(ranks < above, ranks, LOWEST), 0)
        left = tl.max(tl.where(ranks < above, ranks, LOWEST), 0)
        keys = tl.where(tile == best_tile, ranked_key(left), keys)
        column = ranked_column(above)
        tl.store(value_ptr + r * stride_vr + i, ranked_value(above))
        if token_ids_ptr is not None:
            column = tl.load(token_ids_ptr + column)
        tl.store(id_ptr + r * stride_ir + i, column)


class _Tier(NamedTuple):
    """Tile sizes for up to `rows` rows."""

    chunk: int  # rows that are multiplied at a time
    chunks: int
    tail: int  # further rows
    tiles: int  # of the vocabulary per block
    depth: int  # bytes of a row per iteration
    stages: int
    num_warps: int
    wgmma: bool = False

    @property
    def rows(self) -> int:
        return self.chunk * self.chunks + self.tail


_FEW = (_Tier(16, 1, 0, 1, 256, 5, 4), _Tier(32, 1, 0, 1, 256, 5, 4))
# With mma.sync. The sums of more than 160 rows do not fit into registers.
_TIERS = (
    *_FEW,
    _Tier(32, 2, 0, 1, 128, 6, 4),
    _Tier(32, 4, 0, 1, 128, 5, 8),
    _Tier(32, 5, 0, 1, 128, 4, 8),
)
# With wgmma, by the times on an H200.
_WGMMA_TIERS = (
    *_FEW,
    _Tier(64, 1, 0, 1, 128, 4, 4, True),
    _Tier(128, 1, 0, 2, 128, 3, 8, True),
    _Tier(128, 1, 32, 2, 128, 3, 8, True),
)
# Rows of the LM head and all parallel heads up to which one read is faster; see the header.
ONE_READ_ROWS = _TIERS[-1].rows


def multi_head_projection(
    hidden: Tensor,
    vocabulary: Tensor,
    *,
    top_k: int = 1,
    given: Tensor | None = None,
    logits_rows: int = 0,
    token_ids: Tensor | None = None,
    out: Projection | None = None,
    pdl: bool = False,
) -> Projection:
    """Project normed rows: hidden [R, E], vocabulary [V, E] -> what `Projection` lists, float32.

    Rows may be of the LM head or of other heads. The top_k largest logits come in descending order,
    between equal ones the lowest column first; a NaN is larger than every number, as in torch.max.
    given [R, n] int64 are token ids whose logits are returned, -inf for an id that is not in the
    vocabulary. The logits of the first `logits_rows` rows are written out as well. token_ids [V]
    int64 are the ids of the columns of a reduced vocabulary. The tensors of `out` may have any
    strides but the last, which is 1. `pdl`: see `linear`.
    """
    (R, E), V = hidden.shape, vocabulary.shape[0]
    check_shape("vocabulary", vocabulary, "[V, E]", V, E)
    check_shape("hidden", hidden, "[R, E]", R, E)
    if vocabulary.dtype != hidden.dtype:
        raise ValueError(
            f"vocabulary must have hidden's dtype {hidden.dtype}, got {vocabulary.dtype}"
        )
    if not 1 <= top_k <= V:
        raise ValueError(f"top_k must be 1..V={V}, got {top_k}")
    if not 0 <= logits_rows <= R:
        raise ValueError(f"logits_rows must be 0..R={R}, got {logits_rows}")
    n = 0 if given is None else given.shape[1]
    if given is not None:
        check_shape("given", given, "[R, n]", R, n)
    if token_ids is not None:
        check_shape("token_ids", token_ids, "[V]", V)
    if out is None:
        out = Projection(
            hidden.new_empty(R, top_k, dtype=torch.float32),
            hidden.new_empty(R, top_k, dtype=torch.int64),
            hidden.new_empty(R, dtype=torch.float32),
            None if given is None else hidden.new_empty(R, n, dtype=torch.float32),
            hidden.new_empty(logits_rows, V, dtype=torch.float32) if logits_rows else None,
        )
    check_shape("out.values", out.values, "[R, top_k]", R, top_k)
    check_shape("out.ids", out.ids, "[R, top_k]", R, top_k)
    check_shape("out.logsumexp", out.logsumexp, "[R]", R)
    if (out.given is None) != (given is None) or (out.logits is None) != (logits_rows == 0):
        raise ValueError("out must have given and logits exactly where they are asked for")
    if out.given is not None:
        check_shape("out.given", out.given, "[R, n]", R, n)
        out.given.fill_(float("-inf"))
    if out.logits is not None:
        check_shape("out.logits", out.logits, "[logits_rows, V]", logits_rows, V)
    if R == 0:
        return out
    tiles, size = ceil_div(V, TILE), hidden.element_size()
    tiers = _WGMMA_TIERS if has_wgmma(size) else _TIERS
    # The rows of a pass, in as few passes as the largest tier needs.
    rows = ceil_div(R, ceil_div(R, tiers[-1].rows))
    tier = next(tier for tier in tiers if rows <= tier.rows)
    # In float32 all inputs of a tile are in registers (`depth_tile`).
    depth = tier.depth if size == 2 or tier.rows == 16 else 128
    logits = torch.empty(R, V, dtype=torch.float32, device=hidden.device)
    largest = torch.empty(R, tiles, dtype=torch.int32, device=hidden.device)
    sums = torch.empty(R, tiles, dtype=torch.float32, device=hidden.device)
    # The passes over one tile are neighbours, so that they find it in the L2.
    _vocabulary_tiles_kernel[(ceil_div(R, tier.rows), ceil_div(tiles, tier.tiles))](
        hidden, vocabulary, token_ids, given, logits, largest, sums, out.given, out.logits,
        R, logits_rows, n,
        hidden.stride(0), vocabulary.stride(0),
        0 if given is None else given.stride(0),
        0 if out.given is None else out.given.stride(0),
        0 if out.logits is None else out.logits.stride(0),
        V=V, E=E, HAS_GIVEN=n > 0, HAS_LOGITS=logits_rows > 0, WGMMA=tier.wgmma,
        CHUNK=tier.chunk, CHUNKS=tier.chunks, TAIL=tier.tail,
        TILES=tier.tiles, TILE=TILE, BLOCK_E=depth // size,
        num_warps=tier.num_warps,
        # Without a limit, ptxas spills a little to fit a further block.
        maxnreg=None if tier.wgmma else 200,
        num_stages=tier.stages,
        pdl=pdl,
    )  # fmt: skip
    _vocabulary_merge_kernel[(R,)](
        logits, largest, sums, token_ids, out.values, out.ids, out.logsumexp,
        out.values.stride(0), out.ids.stride(0),
        V=V, TOP_K=top_k, TILES=tiles, TILE=TILE, BLOCK=power_of_two(tiles, 256),
        num_warps=4, pdl=pdl,
    )  # fmt: skip
    return out
