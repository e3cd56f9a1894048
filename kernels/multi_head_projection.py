"""Final norm, then one read of the vocabulary matrix for the LM head and all parallel heads.

    h_0 = rms_norm(x);  h_i = h_0 + silu(h_0 w_i^T + b_i)  (Medusa, Cai et al. 2024, section 2.1)
    logits_i = h_i w_vocabulary^T

The norm and the heads' blocks are launches of their own, `rms_norm` and `medusa_blocks`, so that
they are not computed once per vocabulary tile. Here are two: the tiles of the vocabulary and their
merge. Logits stay in registers: a tile writes its largest ones, its sum of exponentials, and those
that were asked for.

Bytes moved: V * E weights, once per 160 rows, though the passes over a tile run side by side and
share it in the L2; R * E of the rows, read by each of V / 64 tiles, mostly from the L2;
R * V / 64 * (8 top_k + 4) bytes of partial results, written and read; the logits that were asked
for.

One read of the vocabulary or two. All heads at all rows of the windows are R = B * T * (1 + H) rows
and one read. If the LM head goes first, acceptance decides at which row of a sequence the heads are
needed, and two reads with B * (T + H) rows in all suffice. A read of w bytes takes w / 3.0 TB/s
from memory. Between L2 and multiprocessors, at some 5.5 TB/s on an H100 (assumed, not measured), go
w for each pass of 160 rows, and w * R / 64, since each tile reads all rows. In w / (TB/s), one read
takes 0.64 at 160 rows and 0.82 at 161, and two reads of few rows take 0.67: hence `ONE_READ_ROWS`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import (
    ceil_div,
    check_shape,
    device,
    jit,
    prefetch_l2,
    tl,
    wait_for_producer,
)
from ._ranking import HIGHEST, LOWEST, rank, ranked_column, ranked_value
from ._skinny_matmul import sum_columns
from .linear import linear_ref

# Columns of a vocabulary tile: the same for every row count, since exponentials are summed by tile.
BLOCK_V = 64
# Partial results that an iteration of the merge reads.
BLOCK_MERGE = 1024


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


@jit("CHUNK", "CHUNKS", "TOP_K", "V", "E", do_not_specialize=("logits_rows", "given_count"))
def _vocabulary_tiles_kernel(
    x_ptr, w_ptr, token_ids_ptr, wanted_ptr,  # [R, E] [V, E] [V] [R, n]
    best_ptr, sum_ptr,  # [R, tiles, TOP_K] [R, tiles]
    given_ptr, logits_ptr,  # [R, n] [logits_rows, V]
    R, logits_rows, given_count,
    stride_xr, stride_wv, stride_wanted, stride_given, stride_lr,
    V: tl.constexpr, E: tl.constexpr,
    TOP_K: tl.constexpr, HAS_GIVEN: tl.constexpr, HAS_LOGITS: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: the logits of CHUNK times CHUNKS rows over a tile of BLOCK_V columns, of which
    it stores the ranks of the TOP_K largest, the sum of exponentials, and what was asked for."""
    tile = tl.program_id(1)
    v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    if PDL:
        prefetch_l2(w_ptr, v, v < V, stride_wv, tl.arange(0, 4) * 64, E)
        wait_for_producer()
    first = tl.program_id(0) * (CHUNK * CHUNKS)
    rows = tl.arange(0, CHUNK)
    w_ptrs = w_ptr + v.to(tl.int64)[None, :] * stride_wv
    # Rows are the left operand, in chunks of 16 or 32: too few for wgmma, so that every tier
    # multiplies with mma.sync m16n8k16 in the same order of e. All chunks use the same registers of
    # weights.
    accs = (tl.zeros([CHUNK, BLOCK_V], tl.float32),) * CHUNKS
    for begin in range(0, E, BLOCK_E):
        e = begin + tl.arange(0, BLOCK_E)
        in_w = (e < E)[:, None] & (v < V)[None, :]
        w = tl.load(w_ptrs + e[:, None], mask=in_w, other=0.0, eviction_policy="evict_first")
        sums = ()
        for c in tl.static_range(CHUNKS):
            r = first + c * CHUNK + rows
            x_ptrs = x_ptr + r.to(tl.int64)[:, None] * stride_xr + e[None, :]
            x = tl.load(x_ptrs, mask=(r < R)[:, None] & (e < E)[None, :], other=0.0)
            total = tl.dot(x, w, accs[c], input_precision="ieee")
            sums = sums + (total,)  # type: ignore[assignment]
        accs = sums
    names = tl.load(token_ids_ptr + v, mask=v < V, other=-1) if token_ids_ptr is not None else v
    for c in tl.static_range(CHUNKS):
        logits = accs[c]
        r = (first + c * CHUNK + rows).to(tl.int64)
        if HAS_LOGITS:
            ptrs = logits_ptr + (r * stride_lr)[:, None] + v[None, :]
            in_logits = (r < tl.minimum(R, logits_rows))[:, None] & (v < V)[None, :]
            tl.store(ptrs, logits.to(logits_ptr.dtype.element_ty), mask=in_logits)
        if HAS_GIVEN:
            for i in range(given_count):
                wanted = tl.load(wanted_ptr + r * stride_wanted + i, mask=r < R, other=-1)
                hit = (names[None, :] == wanted[:, None]) & (v < V)[None, :]
                value = tl.sum(tl.where(hit, logits, 0.0), 1)
                found = tl.max(hit.to(tl.int32), 1) > 0
                tl.store(given_ptr + r * stride_given + i, value, mask=found & (r < R))
        ranks = tl.where((v < V)[None, :], rank(logits, v[None, :]), LOWEST)
        best = tl.max(ranks, 1)
        tiles = tl.num_programs(1)
        entry = (r * tiles + tile) * TOP_K
        tl.store(best_ptr + entry, best, mask=r < R)
        p = tl.exp(logits - _finite(ranked_value(best))[:, None])
        total = sum_columns(tl.where((v < V)[None, :], p, 0.0))
        tl.store(sum_ptr + r * tiles + tile, total, mask=r < R)
        for i in range(1, TOP_K):
            ranks = tl.where(ranks == best[:, None], LOWEST, ranks)
            best = tl.max(ranks, 1)
            tl.store(best_ptr + entry + i, best, mask=r < R)


@device
def _finite(largest):
    """What to subtract before exp: the largest logit, unless it is infinite."""
    return tl.where(tl.abs(largest) == float("inf"), 0.0, largest)


@jit("TOP_K", "TILES")
def _vocabulary_merge_kernel(
    best_ptr, sum_ptr, token_ids_ptr,  # [R, TILES, TOP_K] [R, TILES] [V]
    value_ptr, id_ptr, logsumexp_ptr,  # [R, TOP_K] [R, TOP_K] [R]
    stride_vr, stride_ir,
    TOP_K: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: a row, over all tiles."""
    if PDL:
        wait_for_producer()
    r = tl.program_id(0).to(tl.int64)
    best_ptr += r * TILES * TOP_K
    largest = 0.0
    above = tl.full([], HIGHEST, tl.int64)
    for i in range(TOP_K):
        best = tl.full([BLOCK], LOWEST, tl.int64)
        for begin in range(0, TILES * TOP_K, BLOCK):
            j = begin + tl.arange(0, BLOCK)
            ranks = tl.load(best_ptr + j, mask=j < TILES * TOP_K, other=LOWEST)
            best = tl.maximum(best, tl.where(ranks < above, ranks, LOWEST))
        above = tl.max(best)
        value, column = ranked_value(above), ranked_column(above)
        if i == 0:
            largest = value
        tl.store(value_ptr + r * stride_vr + i, value)
        if token_ids_ptr is not None:
            column = tl.load(token_ids_ptr + column)
        tl.store(id_ptr + r * stride_ir + i, column)
    shift = _finite(largest)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, TILES, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        ranks = tl.load(best_ptr + j * TOP_K, mask=j < TILES, other=LOWEST)
        sums = tl.load(sum_ptr + r * TILES + j, mask=j < TILES, other=0.0)
        scaled = sums * tl.exp(_finite(ranked_value(ranks)) - shift)
        total += tl.where(j < TILES, scaled, 0.0)
    sixteen = sum_columns(tl.reshape(total, [16, BLOCK // 16]))
    total = tl.max(sum_columns(tl.broadcast_to(sixteen[None, :], [16, 16])), 0)
    infinite = largest == float("inf")
    tl.store(logsumexp_ptr + r, tl.where(infinite, largest, tl.log(total) + shift))


class _Tier(NamedTuple):
    """Tile sizes for up to `rows` rows, each with some 80 KB of loads in flight."""

    chunk: int  # rows that are multiplied at a time
    chunks: int
    depth: int  # bytes of a row per iteration
    stages: int
    num_warps: int

    @property
    def rows(self) -> int:
        return self.chunk * self.chunks


# The sums of more than 160 rows do not fit into registers.
_TIERS = (
    _Tier(16, 1, 256, 5, 4),
    _Tier(32, 1, 256, 5, 4),
    _Tier(32, 2, 128, 6, 4),
    _Tier(32, 4, 128, 5, 8),
    _Tier(32, 5, 128, 4, 8),
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
    tiles = ceil_div(V, BLOCK_V)
    tier = next((tier for tier in _TIERS if R <= tier.rows), _TIERS[-1])
    size = hidden.element_size()
    # In float32 all inputs of a tile are in registers (`depth_tile`).
    depth = tier.depth if size == 2 or tier.rows == 16 else 128
    best = torch.empty(R, tiles * top_k, dtype=torch.int64, device=hidden.device)
    sums = torch.empty(R, tiles, dtype=torch.float32, device=hidden.device)
    # The passes over one tile are neighbours, so that they find it in the L2.
    _vocabulary_tiles_kernel[(ceil_div(R, tier.rows), tiles)](
        hidden, vocabulary, token_ids, given, best, sums, out.given, out.logits,
        R, logits_rows, n,
        hidden.stride(0), vocabulary.stride(0),
        0 if given is None else given.stride(0),
        0 if out.given is None else out.given.stride(0),
        0 if out.logits is None else out.logits.stride(0),
        V=V, E=E, TOP_K=top_k, HAS_GIVEN=n > 0, HAS_LOGITS=logits_rows > 0,
        CHUNK=tier.chunk, CHUNKS=tier.chunks,
        BLOCK_V=BLOCK_V, BLOCK_E=depth // size,
        num_warps=tier.num_warps,
        maxnreg=200,  # without a limit, ptxas spills a little to fit a further block
        num_stages=tier.stages,
        pdl=pdl,
    )  # fmt: skip
    _vocabulary_merge_kernel[(R,)](
        best, sums, token_ids, out.values, out.ids, out.logsumexp,
        out.values.stride(0), out.ids.stride(0),
        TOP_K=top_k, TILES=tiles, BLOCK=BLOCK_MERGE,
        num_warps=4, pdl=pdl,
    )  # fmt: skip
    return out
