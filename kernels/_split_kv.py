"""Split-KV: how the keys of a sequence are split between blocks, and how the parts are merged.

A granule of KEYS keys has a softmax of its own (Milakov and Gimelshein 2018), and granules are
merged in a tree that is fixed by the absolute key index: FAN of them in ascending order, FAN of the
results likewise, and once more; beyond TOP keys the results form a chain. The keys are split
between blocks (Flash-Decoding, Dao et al. 2023) at nodes of that tree, so that a row's bits do not
depend on how large the splits are: each sequence has the largest splits, of 1, FAN or FAN^2
granules, of which it has `fill` or more. `_verify_attention_kernel` merges up to the level of the
splits, the kernel here from there on; each of its iterations loads FAN splits, then merges them.
"""

from __future__ import annotations

from torch import Tensor

from ._launch import device, jit, power_of_two, tl, wait_for_producer
from .window_slots import node_depth

# Keys of a granule, which are multiplied at a time; FEW_KEYS where a key has more than KEY_BYTES
# bytes, and for float32, which is multiplied in registers.
KEYS, FEW_KEYS = 128, 64
KEY_BYTES = 256
# Nodes of the tree that are merged into one.
FAN = 4


def granule(D: int, element_size: int) -> int:
    """Keys of a granule. The rows play no part, so that a row's bits do not depend on them."""
    small = element_size == 2 and power_of_two(D) * element_size <= KEY_BYTES
    return KEYS if small else FEW_KEYS


@device
def split_layout(length, T, fill, WINDOW: tl.constexpr, KEYS: tl.constexpr, FAN: tl.constexpr):
    """The first key that some row of a sequence sees, and the keys of its splits: as many as leave
    `fill` splits, so that short sequences occupy the device and long ones write few partials.
    """
    first = tl.maximum(length + 1 - WINDOW, 0) if WINDOW else 0
    granules = tl.cdiv(length + T, KEYS) - first // KEYS
    size = tl.where(granules >= FAN * fill, FAN * KEYS, KEYS)
    return first, tl.where(granules >= FAN * FAN * fill, FAN * FAN * KEYS, size)


@device
def merged(m, z, acc, m_next, z_next, acc_next):
    """Merge two softmaxes over different keys, each its maximum m [rows], its sum of exponentials z
    [rows] and its weighted values acc [rows, D]. An empty one (`nothing`) leaves the other's bits.
    Which product is fused is spelled out: the two kernels must round alike.
    """
    m_new = tl.maximum(m, m_next)
    # Where nothing was seen so far, -inf - -inf would be NaN.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    decay, weight = tl.exp2(m - shift), tl.exp2(m_next - shift)
    z = tl.fma(z_next, weight, z * decay)
    acc = tl.fma(acc_next, tl.broadcast_to(weight[:, None], acc.shape), acc * decay[:, None])
    return m_new, z, acc


@device
def nothing(ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The softmax over no keys."""
    m = tl.full([ROWS], float("-inf"), tl.float32)
    return m, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, BLOCK_D], tl.float32)


@jit("D", "WINDOW", do_not_specialize=("splits", "fill"), definition="verify_attention_ref")
def _merge_splits_kernel(
    acc_ptr, m_ptr, z_ptr,  # [B, T, Hq, splits, D] [B, T, Hq, splits] [B, T, Hq, splits]
    lengths_ptr, tree_ptr, out_ptr,  # [B] [B, T] [B, T, Hq, D]
    splits, fill,
    stride_tb, stride_ob, stride_ot, stride_oh,
    D: tl.constexpr, WINDOW: tl.constexpr, HAS_TREE: tl.constexpr,
    KEYS: tl.constexpr, FAN: tl.constexpr, TOP: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: a query head of a row, over all its splits."""
    if PDL:
        wait_for_producer()
    h, t, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    HEADS, T = tl.num_programs(0), tl.num_programs(1)
    length = tl.load(lengths_ptr + b).to(tl.int32)
    last, position = length + t, length + t
    if HAS_TREE:
        last = length + T - 1
        if WINDOW:
            position = length + node_depth(tl.load(tree_ptr + b * stride_tb + t))
    first_of_all, split_size = split_layout(length, T, fill, WINDOW, KEYS, FAN)
    first = tl.maximum(position + 1 - WINDOW, 0) if WINDOW else 0
    first, last = first // split_size, last // split_size

    row = ((b * T + t) * HEADS + h) * splits - first_of_all // split_size
    d = tl.arange(0, BLOCK_D)
    # Of up to FAN times FAN splits, of up to TOP keys, and of all before those.
    m_few, z_few, acc_few = nothing(1, BLOCK_D)
    m_many, z_many, acc_many = nothing(1, BLOCK_D)
    m_all, z_all, acc_all = nothing(1, BLOCK_D)
    tl.static_assert(FAN == 4)  # written out, so that all loads come before the first use
    for begin in range(first // FAN * FAN, last + 1, FAN):
        m_0, z_0, acc_0 = _partial(m_ptr, z_ptr, acc_ptr, row, begin, first, last, d, D)
        m_1, z_1, acc_1 = _partial(m_ptr, z_ptr, acc_ptr, row, begin + 1, first, last, d, D)
        m_2, z_2, acc_2 = _partial(m_ptr, z_ptr, acc_ptr, row, begin + 2, first, last, d, D)
        m_3, z_3, acc_3 = _partial(m_ptr, z_ptr, acc_ptr, row, begin + 3, first, last, d, D)
        m, z, acc = merged(m_0, z_0, acc_0, m_1, z_1, acc_1)
        m, z, acc = merged(m, z, acc, m_2, z_2, acc_2)
        m, z, acc = merged(m, z, acc, m_3, z_3, acc_3)
        m_few, z_few, acc_few = merged(m_few, z_few, acc_few, m, z, acc)
        end = (begin + FAN) * split_size
        if (split_size < TOP // FAN) & (end % (FAN * FAN * split_size) == 0):
            m_many, z_many, acc_many = merged(m_many, z_many, acc_many, m_few, z_few, acc_few)
            m_few, z_few, acc_few = nothing(1, BLOCK_D)
            if (split_size < TOP // FAN // FAN) & (end % TOP == 0):
                m_all, z_all, acc_all = merged(m_all, z_all, acc_all, m_many, z_many, acc_many)
                m_many, z_many, acc_many = nothing(1, BLOCK_D)
    m, z, acc = merged(m_many, z_many, acc_many, m_few, z_few, acc_few)
    m, z, acc = merged(m_all, z_all, acc_all, m, z, acc)
    # A row that sees nothing, such as a filler of a tree, is zero.
    out = acc / tl.where(z == 0.0, 1.0, z)[:, None]
    out_ptr += b * stride_ob + t.to(tl.int64) * stride_ot + h.to(tl.int64) * stride_oh
    tl.store(out_ptr + d[None, :], out.to(out_ptr.dtype.element_ty), mask=(d < D)[None, :])


@device
def _partial(m_ptr, z_ptr, acc_ptr, row, split, first, last, d, D: tl.constexpr):
    """A split's m, z [1] and acc [1, D], or those of `nothing` if the row sees no key of it."""
    place = (row + split) + tl.arange(0, 1)
    seen = (split >= first) & (split <= last) & (tl.arange(0, 1) == 0)
    m = tl.load(m_ptr + place, mask=seen, other=float("-inf"))
    z = tl.load(z_ptr + place, mask=seen, other=0.0)
    in_acc = seen[:, None] & (d < D)[None, :]
    return m, z, tl.load(acc_ptr + place[:, None] * D + d[None, :], mask=in_acc, other=0.0)


def merge_splits(
    acc: Tensor,
    m: Tensor,
    z: Tensor,
    lengths: Tensor,
    tree: Tensor | None,
    out: Tensor,
    splits: int,
    fill: int,
    window: int,
    keys: int,
    *,
    pdl: bool,
) -> None:
    """Merge the parts that `_verify_attention_kernel` left into out [B, T, Hq, D]."""
    B, T, Hq, D = out.shape
    _merge_splits_kernel[(Hq, T, B)](
        acc, m, z, lengths, tree, out, splits, fill,
        0 if tree is None else tree.stride(0), *out.stride()[:3],
        D=D, WINDOW=window, HAS_TREE=tree is not None,
        KEYS=keys, FAN=FAN, TOP=FAN**3 * keys, BLOCK_D=power_of_two(D),
        num_warps=1, pdl=pdl,
    )  # fmt: skip
