"""One order of logits, by value and then by lowest column, as an int64 that reductions compare."""

from __future__ import annotations

from ._launch import constant, device, tl

# Below and above the rank of every value.
LOWEST, HIGHEST = constant(-(2**63)), constant(2**63 - 1)


@device
def rank(value, column):
    """value [...] float, column [...] below 2^31 -> int64, larger for the larger value and, between
    equal values, for the lower column. NaN is larger than every number, as in torch.max.
    """
    value = value.to(tl.float32)
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(value == 0, 0, tl.where(value != value, 0x7FC00000, bits))
    # A negative float is the larger, the smaller its other 31 bits are.
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)


@device
def ranked_value(ranks):
    key = (ranks >> 32).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@device
def ranked_column(ranks):
    return 0x7FFFFFFF - (ranks & 0x7FFFFFFF)
