"""Between two passes of a head that drafts: the row that drafts, and the token that it drafts.

    pick    out[b] = x[ids[b]]
    draft   token = token_ids[argmax logits];  p = exp(max logits - logsumexp)

Each draft has a program head of its own (see `_layout`), side by side in memory. A draft fills the
next one: the same batch, and for each sequence the drafted token and the next position. Where, in
every sequence, the probability that all drafts so far are accepted is below LEAST, all later heads
are marked SKIPPED.

Bytes moved: a row, or a few words, per sequence.
"""

from __future__ import annotations

from ._elementary import exp
from ._intrinsics import compiled
from ._layout import (
    BATCH,
    BEST,
    CHOSEN,
    HEAD_WORDS,
    IDS,
    INPUTS,
    LEAST,
    LENGTHS,
    OUT,
    OUT_STRIDE,
    PAGE_TABLE,
    PROBABILITIES,
    SKIPPED,
    TABLE_STRIDE,
    TOKEN_IDS,
    X_STRIDE,
    X,
)
from ._memory import (
    atomic_load,
    atomic_store,
    load_f8,
    load_f32,
    store_f8,
    store_f32,
    store_i64,
    word,
)
from ._vectors import bits_float, reduce_max, splat


@compiled
def pick_rows(head, phase):
    """One row of x per sequence, numbers padded to whole lanes."""
    for b in range(word(head, BATCH)):
        x = word(phase, X) + 4 * word(phase, X_STRIDE) * word(word(head, IDS), b)
        out = word(phase, OUT) + 4 * word(phase, OUT_STRIDE) * b
        for k in range(0, 4 * word(phase, INPUTS), 32):
            store_f8(out + k, load_f8(x + k))


@compiled
def draft_tokens(head, phase):
    """Each sequence's draft, its probability in PROBABILITIES, and in OUT the product of those so
    far (X: before this draft, or 0)."""
    least, worthwhile = bits_float(word(head, LEAST)), 0
    following = head + 8 * HEAD_WORDS
    store_i64(following + 8 * BATCH, word(head, BATCH))
    store_i64(following + 8 * PAGE_TABLE, word(head, PAGE_TABLE))
    store_i64(following + 8 * TABLE_STRIDE, word(head, TABLE_STRIDE))
    store_i64(following + 8 * LEAST, word(head, LEAST))
    for b in range(word(head, BATCH)):
        best = word(phase, BEST) + 24 * b
        token = word(word(phase, TOKEN_IDS), word(best, 0))
        logit, total = bits_float(word(best, 1)), bits_float(word(best, 2))
        probability = reduce_max(exp(splat(logit - total)))
        reached = probability
        if word(phase, X) != 0:
            reached = load_f32(word(phase, X) + 4 * b) * probability
        if not reached < least:
            worthwhile = 1
        store_i64(word(phase, CHOSEN) + 8 * b, token)
        store_f32(word(phase, PROBABILITIES) + 4 * b, probability)
        store_f32(word(phase, OUT) + 4 * b, reached)
        store_i64(word(following, IDS) + 8 * b, token)
        store_i64(word(following, LENGTHS) + 8 * b, word(word(head, LENGTHS), b) + 1)
    if worthwhile == 0:
        # All drafts after this one.
        while atomic_load(following + 8 * SKIPPED) == 0:
            atomic_store(following + 8 * SKIPPED, 1)
            following += 8 * HEAD_WORDS
