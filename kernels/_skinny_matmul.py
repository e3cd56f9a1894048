"""The inner loops of the skinny matmuls: a tile of weights, read once, times all rows.

For up to 16 rows an op is one launch: `multiply_rows` computes a block's columns, and the op's
epilogue follows in registers. For more rows the blocks are wider, since each reads all of x. There
are fewer of them, so that the segments of K go to different blocks: `partial_sums`, then a launch
that adds the parts and runs the epilogue.

The weights are the left operand, and all tiers of rows multiply with mma.sync m16n8k16 in the same
order of k: tiles of 16 or 32 output columns per warp are too few for wgmma. On sm_90 more than 16
rows are multiplied with wgmma, whose sums have the same bits. How K is split depends on the
weight's shape alone (`segments`), and every tier adds the same parts in the same order. So a row's
bits do not depend on how many rows there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launch import (
    CHUNK_OF_K,
    FILL,
    ceil_div,
    column_tile,
    depth_tile,
    device,
    few_rows_stages,
    has_wgmma,
    jit,
    prefetch_l2,
    row_tier,
    segments,
    tl,
    wait_for_producer,
)


@device
def multiply_rows(
    x_ptr, w_ptr, n, in_n,  # [R, K] [N, K] [BLOCK_N] [BLOCK_N]
    R, stride_xr, stride_wn,
    K: tl.constexpr, SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Rows n of w, of which in_n exist, times R <= ROWS rows of x -> float32 sums [BLOCK_N, ROWS].

    Includes the prologue of a dependent launch: weights are prefetched, then x is waited for.
    """
    if PDL:
        prefetch_l2(w_ptr, n, in_n, stride_wn, tl.arange(0, 4) * 64, K)
        wait_for_producer()
    r = tl.arange(0, ROWS)
    w_rows, x_rows = n.to(tl.int64) * stride_wn, r.to(tl.int64) * stride_xr
    if SEGMENTS == 1:
        # The warps side by side over the columns.
        total = tl.zeros([BLOCK_N, ROWS], tl.float32)
        for begin in range(0, K, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            in_k = k < K
            w = tl.load(
                w_ptr + w_rows[:, None] + k[None, :],
                mask=in_n[:, None] & in_k[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            in_x = (r < R)[None, :] & in_k[:, None]
            x = tl.load(x_ptr + x_rows[None, :] + k[:, None], mask=in_x, other=0.0)
            total = tl.dot(w, x, total, input_precision="ieee")
    else:
        # All segments side by side, a warp each.
        s = tl.arange(0, SEGMENTS)
        acc = tl.zeros([SEGMENTS, BLOCK_N, ROWS], tl.float32)
        for begin in range(0, K, SEGMENTS * BLOCK_K):
            k = begin + s[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
            in_k = k < K
            w = tl.load(
                w_ptr + w_rows[None, :, None] + k[:, None, :],
                mask=in_n[None, :, None] & in_k[:, None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            in_x = (r < R)[None, None, :] & in_k[:, :, None]
            x = tl.load(x_ptr + x_rows[None, None, :] + k[:, :, None], mask=in_x, other=0.0)
            acc = tl.dot(w, x, acc, input_precision="ieee")
        tl.static_assert(SEGMENTS == 4)
        parts = tl.reshape(tl.permute(acc, (1, 2, 0)), [BLOCK_N, ROWS, 2, 2])
        even, odd = tl.split(parts)
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        total = first + second + third + fourth
    return total


@jit("ROWS", "TAIL", "N", "K", "SEGMENTS", definition="linear_ref")
def _partial_sums_kernel(
    x_ptr, w_ptr, partial_ptr,  # [H, R, K] [H, N, K] [SEGMENTS, R, H * N]
    R,
    stride_xr, stride_xh, stride_wh, stride_wn, stride_ps, stride_pr,
    N: tl.constexpr, K: tl.constexpr, SEGMENTS: tl.constexpr, DEPTH: tl.constexpr,
    ROWS: tl.constexpr, TAIL: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: the sums of ROWS + TAIL rows and BLOCK_N columns over one segment of K, whose
    chunks have DEPTH elements."""
    first_n = tl.program_id(1) * BLOCK_N
    segment, h = tl.program_id(2) % SEGMENTS, (tl.program_id(2) // SEGMENTS).to(tl.int64)
    w_ptr += h * stride_wh
    if PDL:
        all_n = first_n + tl.arange(0, BLOCK_N)
        lines = tl.arange(0, 16) * 64
        lines = (lines // DEPTH * SEGMENTS + segment) * DEPTH + lines % DEPTH
        prefetch_l2(w_ptr, all_n, all_n < N, stride_wn, lines, K)
        wait_for_producer()
    x_ptr += h * stride_xh
    r = tl.program_id(0) * (ROWS + TAIL) + tl.arange(0, ROWS)
    tail_r = tl.program_id(0) * (ROWS + TAIL) + ROWS + tl.arange(0, TAIL if TAIL > 0 else 1)
    x_ptrs = x_ptr + r.to(tl.int64)[None, :] * stride_xr
    tail_ptrs = x_ptr + tail_r.to(tl.int64)[None, :] * stride_xr
    # Without wgmma, columns in chunks of fewer than there are rows: Triton then lays out its warps
    # along the rows. Otherwise it lays them out along the columns, which are too few for all warps.
    CHUNKS: tl.constexpr = BLOCK_N // CHUNK
    accs = (tl.zeros([CHUNK, ROWS], tl.float32),) * CHUNKS
    tail_accs = accs  # without a tail, a placeholder
    if TAIL > 0:
        tail_accs = (tl.zeros([CHUNK, TAIL], tl.float32),) * CHUNKS
    tl.static_assert(DEPTH % BLOCK_K == 0)
    first_k = segment * DEPTH
    for i in range(BLOCK_K, tl.cdiv(K, SEGMENTS * DEPTH) * DEPTH + BLOCK_K, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)
        # To the next block of the chunk, or to the segment's next chunk.
        first_k += tl.where(i % DEPTH == 0, BLOCK_K + (SEGMENTS - 1) * DEPTH, BLOCK_K)
        in_k = k < K
        x = tl.load(x_ptrs + k[:, None], mask=(r < R)[None, :] & in_k[:, None], other=0.0)
        tail_x = x
        if TAIL > 0:
            in_x = (tail_r < R)[None, :] & in_k[:, None]
            tail_x = tl.load(tail_ptrs + k[:, None], mask=in_x, other=0.0)
        sums, tail_sums = (), ()
        for c in tl.static_range(CHUNKS):
            n = first_n + c * CHUNK + tl.arange(0, CHUNK)
            w = tl.load(
                w_ptr + n.to(tl.int64)[:, None] * stride_wn + k[None, :],
                mask=(n < N)[:, None] & in_k[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            acc = tl.dot(w, x, accs[c], input_precision="ieee")
            sums = sums + (acc,)  # type: ignore[assignment]
            if TAIL > 0:
                tail_acc = tl.dot(w, tail_x, tail_accs[c], input_precision="ieee")
                tail_sums = tail_sums + (tail_acc,)  # type: ignore[assignment]
        accs = sums
        if TAIL > 0:
            tail_accs = tail_sums
    partial_ptr += segment.to(tl.int64) * stride_ps + h * N
    for i in tl.static_range(CHUNKS):
        n = first_n + i * CHUNK + tl.arange(0, CHUNK)
        _store_sums(accs[i], r, n, partial_ptr, R, stride_pr, N)
        if TAIL > 0:
            _store_sums(tail_accs[i], tail_r, n, partial_ptr, R, stride_pr, N)


@device
def _store_sums(acc, r, n, partial_ptr, R, stride_pr, N: tl.constexpr):
    ptrs = partial_ptr + r.to(tl.int64)[None, :] * stride_pr + n[:, None]
    tl.store(ptrs, acc, mask=(n < N)[:, None] & (r < R)[None, :])


def partial_sums(x: Tensor, w: Tensor, *, pdl: bool) -> Tensor:
    """Multiply rows: x [R, K] or [H, R, K], w [H, N, K] -> float32 [segments, R, H * N].

    For more than 16 rows, in one pass over w per 192 rows. The launch that finishes the op adds the
    segments of K in ascending order (`add_segments`).
    """
    (H, N, K), R, size = w.shape, x.shape[-2], w.element_size()
    tier, parts = row_tier(R), segments(H * N, K)
    block_n = column_tile(H * N, K, tier, size)
    depth, stages = depth_tile(tier, size)
    rows = min(tier, 128)  # the remaining rows of a larger tier are the tail
    tail, chunk, num_warps = tier - rows, min(32, rows // 2), 4 if tier * size <= 128 else 8
    max_registers = _max_registers(tier, block_n, size)
    if has_wgmma(size) and block_n >= 64:
        tail = 32 if 128 < R <= 160 else tail
        chunk, num_warps, max_registers = block_n, block_n // 16, None
        # A buffer per stage, in the shared memory of one of two blocks on a multiprocessor, or of
        # the only one.
        blocks = ceil_div(H * N, block_n) * parts
        kilobytes = 108 if blocks > FILL else 128
        stages = kilobytes * 1024 // ((block_n + rows + tail) * depth)
    partial = torch.empty(parts, R, H * N, dtype=torch.float32, device=x.device)
    # Passes over the same tile of weights are adjacent blocks, so that they share it in the L2.
    _partial_sums_kernel[(ceil_div(R, rows + tail), ceil_div(N, block_n), parts * H)](
        x, w, partial, R,
        x.stride(-2), x.stride(0) if x.dim() == 3 else 0, *w.stride()[:2], *partial.stride()[:2],
        N=N, K=K, SEGMENTS=parts, DEPTH=CHUNK_OF_K[size],
        ROWS=rows, TAIL=tail, CHUNK=chunk,
        BLOCK_N=block_n, BLOCK_K=depth // size,
        num_warps=num_warps,
        maxnreg=max_registers,
        num_stages=stages,
        pdl=pdl,
    )  # fmt: skip
    return partial


def tile_of_few(w: Tensor, N: int, R: int) -> tuple[int, dict[str, int | None]]:
    """Output columns per block for R <= 16 rows of a matmul with N columns, and the options with
    which `multiply_rows` reads w."""
    size, tier, K = w.element_size(), row_tier(R), w.shape[-1]
    block_n, parts = column_tile(N, K, tier, size), segments(N, K)
    stage = parts * (block_n + tier) * CHUNK_OF_K[size] * size
    return block_n, {
        "SEGMENTS": parts,
        "ROWS": tier,
        "BLOCK_K": CHUNK_OF_K[size],
        # With four, Triton would multiply 64 columns with wgmma.
        "num_warps": 4 if parts > 1 else 2,
        "num_stages": few_rows_stages(ceil_div(N, block_n), stage),
        "maxnreg": _max_registers(tier, block_n, size),
    }


def _max_registers(tier: int, block_n: int, element_size: int) -> int | None:
    """Without a limit, even of all registers, ptxas spills a little to fit a further block: at some
    tiles of 16-bit elements, and at most of float32."""
    if element_size == 4:
        return 255
    return {(64, 32): 255, (192, 64): 216, (192, 128): 216}.get((tier, block_n))


@device
def add_segments(partial_ptr, offsets, mask, stride_ps, SEGMENTS: tl.constexpr):
    """Add the segments' partial sums at `offsets`, in ascending order."""
    total = tl.zeros(offsets.shape, tl.float32)
    for i in tl.static_range(SEGMENTS):
        total += tl.load(partial_ptr + i * stride_ps + offsets, mask=mask, other=0.0)
    return total


@device
def add_exactly(ones, x):
    """Multiply `ones` [16, n], bfloat16 zeros and ones, by x [n, columns] float32.

    The order of tl.sum depends on the tile's shape; that of mma does not. A float32 is exactly the
    sum of three bfloat16.
    """
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    total = tl.dot(ones, (rest - middle.to(tl.float32)).to(tl.bfloat16))
    return tl.dot(ones, high, tl.dot(ones, middle, total))


@device
def sum_columns(x):
    """Sum x [rows, n] float32 over n -> [rows], in an order that depends on n only."""
    ones = tl.full([16, x.shape[1]], 1.0, tl.bfloat16)
    return tl.max(add_exactly(ones, tl.trans(x)), 0)


@device
def split_pairs(acc):
    """acc [2n, rows] -> its even rows and its odd rows, each transposed to [rows, n]."""
    pairs = tl.reshape(tl.trans(acc), [acc.shape[1], acc.shape[0] // 2, 2])
    return tl.split(pairs)
