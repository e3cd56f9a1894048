"""One order of logits, by value and then by lowest column, as an int64 that reductions compare."""

from __future__ import annotations

from ._launch import constant, device, tl

# Below and above the rank of every value, and below the key of every value.
LOWEST, HIGHEST = constant(-(2**63)), constant(2**63 - 1)
LOWEST_KEY = constant(-(2**31))


@device
def sort_key(value):
    """value [...] float -> int32, in the order of the values. NaN is larger than every number, as
    in torch.max, and -0 equals 0.
    """
    value = value.to(tl.float32)
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(value == 0, 0, tl.where(value != value, 0x7FC00000, bits))
    # A negative float is the larger, the smaller its other 31 bits are.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@device
def key_value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@device
def rank(value, column):
    """value [...] float, column [...] below 2^31 -> int64, larger for the larger value and, between
    equal values, for the lower column."""
    return (sort_key(value).to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)


@device
def ranked_key(ranks):
    return (ranks >> 32).to(tl.int32)


@device
def ranked_value(ranks):
    return key_value(ranked_key(ranks))


@device
def ranked_column(ranks):
    return 0x7FFFFFFF - (ranks & 0x7FFFFFFF)
