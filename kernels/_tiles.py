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
    gain_ptr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """w [BLOCK_N, K] times rows x [R, K] -> float32 sums [BLOCK_N, ROWS] and, of the tail's rows,
    [BLOCK_N, TAIL]; then the rows' sums of squares [ROWS] and [TAIL].

    w_ptrs [BLOCK_N] point at the beginnings of the weights' rows, of which in_n exist. With NORM, x
    is multiplied by gain [K] on its way. What is missing from an RMS norm then, a factor per row,
    commutes with the multiplication: the caller makes it of the squares, and one pass over x is
    enough.
    """
    x_ptrs = x_ptr + r.to(tl.int64)[None, :] * stride_xr
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    squares = tl.zeros([16, ROWS], tl.float32)
    # Without a tail these only fill their places.
    tail_ptrs, tail_acc, tail_squares = x_ptrs, acc, squares
    if TAIL > 0:
        tail_ptrs = x_ptr + tail_r.to(tl.int64)[None, :] * stride_xr
        tail_acc = tl.zeros([BLOCK_N, TAIL], tl.float32)
        tail_squares = tl.zeros([16, TAIL], tl.float32)
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
        if NORM:
            gain = tl.load(gain_ptr + k, mask=in_k, other=0.0).to(tl.float32)
            squares = add_squares(squares, x)
            x = (x.to(tl.float32) * gain[:, None]).to(x.dtype)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        if TAIL > 0:
            in_x = (tail_r < R)[None, :] & in_k[:, None]
            x = tl.load(tail_ptrs + k[:, None], mask=in_x, other=0.0)
            if NORM:
                tail_squares = add_squares(tail_squares, x)
                x = (x.to(tl.float32) * gain[:, None]).to(x.dtype)
            tail_acc = tl.dot(w, x, tail_acc, input_precision="ieee")
    return acc, tail_acc, tl.max(squares, 0), tl.max(tail_squares, 0)


@device
def add_squares(squares, x):
    """squares [16, rows] + the sum of x^2 over x [k, rows], in each of the 16 rows alike.

    By multiplication with ones: the order of tl.sum changes with the tile's shape, that of mma does
    not. A square of two bfloat16 is the sum of two, exactly.
    """
    wide = x.to(tl.float32)
    square = wide * wide
    if x.dtype == tl.float32:
        ones = tl.full([16, x.shape[0]], 1.0, tl.float32)
        return tl.dot(ones, square, squares, input_precision="ieee")
    ones = tl.full([16, x.shape[0]], 1.0, tl.bfloat16)
    high = square.to(tl.bfloat16)
    squares = tl.dot(ones, high, squares)
    return tl.dot(ones, (square - high.to(tl.float32)).to(tl.bfloat16), squares)


@device
def sum_columns(x):
    """Sum x [rows, n] float32 over n -> [rows], by multiplication with ones like add_squares.

    A float32 is the sum of three bfloat16, exactly.
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
