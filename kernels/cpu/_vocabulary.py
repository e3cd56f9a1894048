"""Vocabulary phases: rows of the embedding, and the LM head with its argmax and log-sum-exp.

    best = argmax_n logits[n], ties to the lowest n;  logsumexp = m + log(sum_n exp(logits[n] - m))

Maxima and sums of exponentials are taken per chunk of columns and merged in ascending order by the
thread that finishes the last chunk.

Bytes moved: the vocabulary matrix once; 16 per row and chunk of partial results.
"""

from __future__ import annotations

import numpy as np

from ._elementary import exp, log
from ._formats import FORMATS
from ._intrinsics import compiled
from ._layout import (
    ALL_BLOCKS,
    BEST,
    BLOCK_BYTES,
    BLOCKS,
    CHUNKS,
    GROUPS,
    INPUTS,
    MERGES,
    OUT,
    OUT_STRIDE,
    OUTPUTS,
    PARTIALS,
    WEIGHT,
    WEIGHT_FORMAT,
    WRITE_LOGITS,
)
from ._matmul import multiply
from ._memory import (
    atomic_add,
    atomic_store,
    load_byte,
    load_f8,
    load_f32,
    load_half,
    store_f32,
    store_i64,
    word,
)
from ._vectors import (
    bits_float,
    float_bits,
    fma,
    key_value,
    lane_ids,
    lowest_where,
    mask_outside,
    order_key,
    reduce_add,
    reduce_max,
    reduce_max_i,
    select_greater,
    splat,
    splat_i,
)

F32 = np.float32
Q4_0, Q4_1, Q8_0, Q8, Q6_K, Q4_K, BFLOAT, HALF, FLOAT = range(9)
assert FORMATS == ("q4_0", "q4_1", "q8_0", "q8", "q6_k", "q4_k", "bf16", "fp16", "fp32")
INT_MIN = -(2**31)


@compiled
def project_chunk(phase, rows, chunk, scratch, work):
    """Logits of a chunk's columns; per row, the largest one and the sum of exponentials."""
    first = chunk * word(phase, BLOCKS)
    blocks = min(word(phase, BLOCKS), word(phase, ALL_BLOCKS) - first)
    out, stride = work, 8 * blocks
    if word(phase, WRITE_LOGITS) == 1:
        out, stride = word(phase, OUT) + 32 * first, word(phase, OUT_STRIDE)
    multiply(phase, rows, scratch, first, blocks, out, stride)
    columns = word(phase, OUTPUTS) - 8 * first
    for r in range(rows):
        y = out + 4 * stride * r
        best = splat_i(INT_MIN)
        ids = splat_i(0)
        for n in range(blocks):
            key = order_key(mask_outside(load_f8(y + 32 * n), 0, columns - 8 * n))
            ids = select_greater(key, best, splat_i(n), ids)
            best = select_greater(key, best, key, best)
        key = reduce_max_i(best)
        m = key_value(key)
        shift = splat(m if m > F32(-np.inf) else F32(0.0))
        z = splat(0.0)
        for n in range(blocks):
            z = z + exp(mask_outside(load_f8(y + 32 * n), 0, columns - 8 * n) - shift)
        lane = lowest_where(best, ids * splat_i(8) + lane_ids(), key)
        part = word(phase, PARTIALS) + 16 * (word(phase, CHUNKS) * r + chunk)
        # One word of key and id, one of the sum.
        store_i64(part, (key << 32) | (8 * first + lane))
        store_f32(part + 8, reduce_add(z))
    if atomic_add(word(phase, MERGES), 1) == word(phase, CHUNKS) - 1:
        atomic_store(word(phase, MERGES), 0)
        for r in range(rows):
            merge_project(phase, r)


@compiled
def merge_project(phase, r):
    """One row's argmax, its logit, and log(sum(exp(logits)))."""
    chunks = word(phase, CHUNKS)
    parts = word(phase, PARTIALS) + 16 * chunks * r
    best = word(parts, 0)
    for chunk in range(1, chunks):
        part = word(parts, 2 * chunk)
        if part >> 32 > best >> 32:
            best = part
    m = key_value(best >> 32)
    shift = m if m > F32(-np.inf) else F32(0.0)
    z = splat(0.0)
    for chunk in range(chunks):
        weight = exp(splat(key_value(word(parts, 2 * chunk) >> 32) - shift))
        z = fma(splat(load_f32(parts + 16 * chunk + 8)), weight, z)
    sum_exp = reduce_max(z)
    if not sum_exp == sum_exp:
        m = sum_exp  # NaN if a logit is NaN or infinite
    out = word(phase, BEST) + 24 * r
    store_i64(out, best & 0xFFFFFFFF)
    store_i64(out + 8, float_bits(m))
    store_i64(out + 16, float_bits(shift + log(sum_exp)))


@compiled
def embed_row(phase, token, out):
    """Row `token` of a packed matrix [V, K], as float32 [K]."""
    K, groups, kind = word(phase, INPUTS), word(phase, GROUPS), word(phase, WEIGHT_FORMAT)
    block = word(phase, WEIGHT) + token // 8 * word(phase, BLOCK_BYTES)
    lane = token % 8
    for k in range(K):
        group, j = k // 32, k % 32
        quad = 4 * lane + j % 4 + 32 * (j // 4 % 4)  # of 16 inputs
        if kind == BFLOAT:
            bits = load_byte(block + 16 * k + 2 * lane + 1) << 8
            value = bits_float((bits | load_byte(block + 16 * k + 2 * lane)) << 16)
        elif kind == HALF:
            value = load_half(block + 16 * k + 2 * lane)
        elif kind == FLOAT:
            value = load_f32(block + 32 * k + 4 * lane)
        elif kind == Q8_0 or kind == Q8:
            q = load_byte(block + 256 * group + quad + 128 * (j // 16))
            q -= (q & 128) << 1
            scales = block + 256 * groups
            if kind == Q8:
                value = F32(q) * load_f32(scales + 4 * lane)
            else:
                value = F32(q) * load_half(scales + 16 * group + 2 * lane)
        elif kind == Q6_K:
            at = block + 192 * group
            q = (load_byte(at + quad) >> (4 * (j // 16))) & 15
            high = load_byte(at + 128 + 32 * (j // 16) + 4 * lane + j % 4)
            q |= ((high >> (2 * (j // 4 % 4))) & 3) << 4
            scale = load_byte(block + 192 * groups + 16 * group + 8 * (j // 16) + lane)
            scale -= (scale & 128) << 1
            d = load_half(block + 208 * groups + 16 * (group // 8) + 2 * lane)
            value = F32((q - 32) * scale) * d
        else:
            q = (load_byte(block + 128 * group + quad) >> (4 * (j // 16))) & 15
            scales = block + 128 * groups
            if kind == Q4_1:
                d = load_half(scales + 32 * group + 2 * lane)
                value = F32(q) * d + load_half(scales + 32 * group + 16 + 2 * lane)
            elif kind == Q4_K:
                both = scales + 16 * groups + 32 * (group // 8) + 2 * lane
                d = load_half(both) * F32(load_byte(scales + 16 * group + lane))
                m = load_half(both + 16) * F32(load_byte(scales + 16 * group + 8 + lane))
                value = F32(q) * d - m
            else:
                value = F32(q - 8) * load_half(scales + 16 * group + 2 * lane)
        store_f32(out + 4 * k, value)
