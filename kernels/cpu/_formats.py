"""Formats of weights; `_tile` has their layouts.

A new format needs its values in quants.py, its packing in weights.py, its multiplication in `_tile`
and `_dot_products`, and its embedding rows in `_vocabulary`.
"""

from __future__ import annotations

GROUP = 32
QUANTISED = ("q4_0", "q4_1", "q8_0", "q8", "q6_k", "q4_k")
FLOATS = ("bf16", "fp16", "fp32")
FORMATS = QUANTISED + FLOATS
# Bytes of an activation group's statistics: dx, sx = dx * sum(xq), and int32 sums of its halves.
STATS_BYTES = 16
# Bytes of a group of 8 outputs: integers, and the scales that every group has.
GROUP_BYTES = {
    "q4_0": 144,
    "q4_1": 160,
    "q8_0": 272,
    "q8": 256,
    "q6_k": 208,
    "q4_k": 144,
    "bf16": 512,
    "fp16": 512,
    "fp32": 1024,
}
