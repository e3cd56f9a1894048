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
160 rows and 0.59 at 161, and two reads of few rows take 0.50: hence `ONE_READ_ROWS`. Measured
there, the vocabulary of an 8B model takes 0.25 ms at 5 rows, 0.29 at 40, 0.52 at 160, 0.76 at 200.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import (
    ceil_div,
    check_shape,
    has_wgmma,
    jit,
    power_of_two,
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
)
from ._skinny_matmul import sum_columns
from ._vocabulary_tiles import _vocabulary_tiles_kernel, finite
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
    shift = finite(largest)
    scaled = tl.where(tile < TILES, sums * tl.exp(finite(key_value(keys)) - shift), 0.0)
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
        maxnreg=None if tier.wgmma else 240,
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
