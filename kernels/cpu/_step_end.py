"""The end of a step, compiled: `advance_ref` and `ngram_ref` on the memory of a decode state.

A step has few of these numbers, but after a pass over the model's weights neither the numbers nor
the interpreter's code are in any cache: a few hundred bytes of machine code take a tenth of the
time of a page of Python. `_layout` names the int64 words that a caller fills in: addresses, and
strides in elements.
"""

from __future__ import annotations

from ._intrinsics import compiled
from ._layout import (
    ACCEPTED,
    ACTIVE,
    CLOCK,
    COMMITTED,
    COPIED,
    COUNT,
    DRAFTED,
    ENDS,
    ENDS_COUNT,
    ENDS_STRIDE,
    FOUND,
    LARGEST,
    LARGEST_STEP,
    LARGEST_STRIDE,
    LIMITS,
    LOGPROBS,
    RING,
    RING_SLOTS,
    RING_STEP,
    RING_STRIDE,
    SIZE,
    SOURCE,
    TARGET,
    TARGET_STEP,
    TARGET_STRIDE,
    TEXT,
    TEXT_LENGTHS,
    TEXT_STRIDE,
    TOKENS,
    TOKENS_STRIDE,
    WINDOW,
    WINDOW_STRIDE,
)
from ._memory import load_f32, load_i32, load_i64, store_byte, store_i64, word

# Step numbers in the ring wrap at this, as in kernels/advance.py.
STEP_MASK = 2**31 - 1


@compiled
def is_finite(value):
    return value - value == value - value


@compiled
def end_step(at, batch, rows):
    """End a step of B = `batch` sequences with T = `rows` rows -> 0."""
    for b in range(batch):
        window = word(at, WINDOW) + 8 * b * word(at, WINDOW_STRIDE)
        target = word(at, TARGET) + 8 * b * word(at, TARGET_STRIDE)
        largest = word(at, LARGEST) + 4 * b * word(at, LARGEST_STRIDE)
        step, large = 8 * word(at, TARGET_STEP), 4 * word(at, LARGEST_STEP)
        active = word(word(at, ACTIVE), b)
        n = 0
        while (
            n + 1 < rows
            and is_finite(load_f32(largest + n * large))
            and word(window, n + 1) == load_i64(target + n * step)
        ):
            n += 1
        broken = active
        if is_finite(load_f32(largest + n * large)):
            broken = 0
        count = (n + 1) * active
        store_i64(word(at, ACCEPTED) + 8 * b, n)
        store_i64(word(at, COUNT) + 8 * b, count)
        _report(at, b, rows, n, active + 2 * broken, target, step)
        if active:
            _commit(at, b, rows, n, broken, window, target, step)
        store_i64(word(at, DRAFTED) + 8 * b, 0)
        store_i64(word(at, SOURCE) + 8 * b, 0)
    return 0


@compiled
def _report(at, b, rows, accepted, state, target, step):
    """Write a sequence's words of the ring."""
    clock = word(at, CLOCK) + 8 * b
    number = load_i64(clock) + 1
    store_i64(clock, number)
    slot = number % word(at, RING_SLOTS)
    ring = word(at, RING) + 8 * (slot * word(at, RING_STRIDE) + b * word(at, RING_STEP))
    above = (number & STEP_MASK) << 32
    facts = accepted | word(word(at, DRAFTED), b) << 8 | word(word(at, SOURCE), b) << 16
    store_i64(ring, above | facts | state << 24)
    for t in range(rows):
        logprob = 0
        if word(at, LOGPROBS):
            logprob = load_i32(word(at, LOGPROBS) + 4 * (b * rows + t)) & 0xFFFFFFFF
        store_i64(ring + 8 * (1 + t), above | load_i64(target + t * step))
        store_i64(ring + 8 * (1 + rows + t), above | logprob)


@compiled
def _commit(at, b, rows, accepted, broken, window, target, step):
    """Append a sequence's tokens, and stop it where one of them ends it or its limit is reached."""
    length = word(word(at, COMMITTED), b)
    tokens = word(at, TOKENS) + 8 * (b * word(at, TOKENS_STRIDE) + length + 1)
    ends = word(at, ENDS) + 8 * b * word(at, ENDS_STRIDE)
    active = 1 - (broken != 0)
    for t in range(rows):
        token = load_i64(target + t * step)
        store_i64(tokens + 8 * t, token)
        if t <= accepted:
            for i in range(word(at, ENDS_COUNT)):
                if word(ends, i) == token:
                    active = 0
    store_i64(window, load_i64(target + accepted * step))
    length += accepted + 1
    store_i64(word(at, COMMITTED) + 8 * b, length)
    if length + 1 >= word(word(at, LIMITS), b):
        active = 0
    store_i64(word(at, ACTIVE) + 8 * b, active)


@compiled
def draft_ngram(at, batch, drafts):
    """Copy K = `drafts` tokens after the latest match for each of B sequences -> how many match."""
    size, matches = word(at, SIZE), 0
    for b in range(batch):
        text = word(at, TEXT) + 8 * b * word(at, TEXT_STRIDE)
        known = word(word(at, TEXT_LENGTHS), b) + 1
        pattern = text + 8 * (known - size)
        start = known - size - 1
        while start >= 0:
            i = 0
            while i < size and word(text, start + i) == word(pattern, i):
                i += 1
            if i == size:
                break
            start -= 1
        found = start >= 0
        matches += found
        store_byte(word(at, FOUND) + b, found)
        begin = start + size
        for i in range(drafts):
            token = 0
            if found:
                token = word(text, begin + i % (known - begin))
            store_i64(word(at, COPIED) + 8 * (b * drafts + i), token)
    return matches
