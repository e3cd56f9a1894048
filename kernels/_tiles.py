"""The inner loop of every skinny matmul here: a tile of weights against all rows, read once.

The weights are the left operand, in tiles of 16 or 32 output columns: too few for wgmma, so that
every tier of rows and every architecture multiplies with mma.sync m16n8k16 in the same order of k,
and a row's bits do not depend on how many rows there are.
"""

from __future__ import annotations

from ._launch import device, tl


@device
def multiply_rows(
    w_ptrs,
    in_n,
    x_ptr,
    stride_xr,
    r,
    tail_r,
    R,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """w [BLOCK_N, K] times rows x [R, K] -> float32 sums [BLOCK_N, ROWS] and, of the tail's rows,
    [BLOCK_N, TAIL].

    w_ptrs [BLOCK_N] point at the beginnings of the weights' rows, of which in_n exist.
    """
    x_ptrs = x_ptr + r.to(tl.int64)[None, :] * stride_xr
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    # Without a tail these only fill their places.
    tail_ptrs, tail_acc = x_ptrs, acc
    if TAIL > 0:
        tail_ptrs = x_ptr + tail_r.to(tl.int64)[None, :] * stride_xr
        tail_acc = tl.zeros([BLOCK_N, TAIL], tl.float32)
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        in_k = k < K
        w = tl.load(
            w_ptrs[:, None] + k[None, :],
            mask=in_n[:, None] & in_k[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        x = tl.load(x_ptrs + k[:, None], mask=(r < R)[None, :] & in_k[:, None], other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        if TAIL > 0:
            in_x = (tail_r < R)[None, :] & in_k[:, None]
            x = tl.load(tail_ptrs + k[:, None], mask=in_x, other=0.0)
            tail_acc = tl.dot(w, x, tail_acc, input_precision="ieee")
    return acc, tail_acc


@device
def sum_columns(x):
    """Sum x [rows, n] float32 over n -> [rows], by multiplication with ones.

    The order of tl.sum changes with the tile's shape, that of mma does not. A float32 is the sum of
    three bfloat16, exactly.
    """
    ones = tl.full([x.shape[1], 16], 1.0, tl.bfloat16)
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    total = tl.dot((rest - middle.to(tl.float32)).to(tl.bfloat16), ones)
    return tl.max(tl.dot(high, ones, tl.dot(middle, ones, total)), 1)


@device
def split_pairs(acc):
    """acc [2n, rows] -> its even and its odd rows, each as [rows, n]."""
    pairs = tl.reshape(tl.trans(acc), [acc.shape[1], acc.shape[0] // 2, 2])
    return tl.split(pairs)
