"""The compiled program: every thread of a step runs `run_program`, phase by phase.

See `_layout` for the memory. A ticket holds the step's epoch in its high half and the next chunk of
a share in the low one, so a thread that returns late from an earlier step finds another epoch and
leaves without touching anything. The calling thread, number 0, ends a step by opening the next.
"""

from __future__ import annotations

from ._activations import norm_row
from ._attention_phases import attend_chunk, qkv_chunk, splits_of
from ._drafts import draft_tokens, pick_rows
from ._intrinsics import compiled
from ._layout import (
    ATTEND,
    BATCH,
    BLOCK_BYTES,
    BLOCKS,
    CHUNKS,
    COUNTER_WORDS,
    DONE,
    DRAFT,
    EMBED,
    EPOCH,
    EPS,
    GATE_UP,
    IDS,
    INPUTS,
    KV_HEADS,
    LENGTHS,
    LINEAR,
    NORM_W,
    OP,
    OUT,
    OUT_STRIDE,
    PHASE_TABLE,
    PHASE_WORDS,
    PHASES,
    PICK,
    PROJECT,
    QKV,
    READ,
    ROWS_OF,
    SCRATCH,
    SCRATCH_BYTES,
    SKIPPED,
    THREADS,
    TICKETS,
    TILE,
    WEIGHT,
    WINDOW_ROWS,
    X_STRIDE,
    X,
)
from ._matmul import activation_bytes, gate_up_chunk, linear_chunk, prepare
from ._memory import (
    atomic_add,
    atomic_load,
    compare_swap,
    load_f8,
    prefetch,
    store_f32,
    store_i64,
    word,
)
from ._processor import IEEE_MODE, float_mode, pause, set_float_mode, ticks, yield_core
from ._vectors import bits_float, reduce_add, splat
from ._vocabulary import embed_row, project_chunk

# Some microseconds, longer than a chunk.
SPINS = 200
# Bytes of the next weights that are fetched while a phase ends.
FETCHED = 5 * 1024


@compiled
def chunks_of(head, phase):
    if word(phase, OP) != ATTEND:
        return word(phase, CHUNKS)
    chunks = 0
    for b in range(word(head, BATCH)):
        _, splits = splits_of(phase, word(word(head, LENGTHS), b), word(head, WINDOW_ROWS))
        chunks += splits
    return chunks * word(phase, KV_HEADS)


@compiled
def grab(ticket, epoch, chunks):
    """The next chunk of a share; -1 if all are handed out, -2 if the step is over."""
    while True:
        seen = atomic_load(ticket)
        if seen >> 32 != epoch:
            return -2
        chunk = seen & 0xFFFFFFFF
        if chunk >= chunks:
            return -1
        if compare_swap(ticket, seen, seen + 1) == 1:
            return chunk


@compiled
def read_chunk(phase, chunk):
    """Sum one MiB, read as a step reads weights: for measuring bandwidth."""
    begin = word(phase, X) + (chunk << 20)
    a = splat(0.0)
    b = splat(0.0)
    c = splat(0.0)
    d = splat(0.0)
    for at in range(begin, begin + (1 << 20), 128):
        a = a + load_f8(at)
        b = b + load_f8(at + 32)
        c = c + load_f8(at + 64)
        d = d + load_f8(at + 96)
    store_f32(word(phase, OUT) + 4 * chunk, reduce_add((a + b) + (c + d)))


@compiled
def run_chunk(head, phase, rows, chunk, begin, end, scratch, work):
    op = word(phase, OP)
    if op == LINEAR:
        linear_chunk(phase, rows, chunk, scratch, work)
    elif op == QKV:
        qkv_chunk(head, phase, rows, chunk, scratch)
    elif op == ATTEND:
        attend_chunk(head, phase, chunk, begin, end, work)
    elif op == GATE_UP:
        gate_up_chunk(phase, rows, chunk, scratch, work)
    elif op == PROJECT:
        project_chunk(phase, rows, chunk, scratch, work)
    elif op == READ:
        read_chunk(phase, chunk)
    elif op == PICK:
        pick_rows(head, phase)
    elif op == DRAFT:
        draft_tokens(head, phase)
    else:
        for r in range(rows):
            out = word(phase, OUT) + 4 * word(phase, OUT_STRIDE) * r
            if op == EMBED:
                embed_row(phase, word(word(head, IDS), r), out)
            else:
                x = word(phase, X) + 4 * word(phase, X_STRIDE) * r
                eps = bits_float(word(phase, EPS))
                K = word(phase, INPUTS)
                norm_row(x, word(phase, NORM_W), eps, K, K, out)


@compiled
def begin_of(share, shares, chunks):
    """The first chunk of a share; the last share ends with the last chunk."""
    return chunks * share // shares


@compiled
def prefetch_weights(head, i, share, shares):
    """Fetch the first bytes of this thread's share of the next weights, from phase i on."""
    phases = word(head, PHASES)
    if i < phases and word(word(head, PHASE_TABLE) + 8 * PHASE_WORDS * i, OP) == ATTEND:
        i += 1
    if i >= phases:
        return
    phase = word(head, PHASE_TABLE) + 8 * PHASE_WORDS * i
    if word(phase, TILE) == 0:
        return
    first = begin_of(share, shares, word(phase, CHUNKS)) * word(phase, BLOCKS)
    begin = word(phase, WEIGHT) + first * word(phase, BLOCK_BYTES)
    for at in range(begin, begin + FETCHED, 64):
        prefetch(at)


@compiled
def run_phases(head, epoch, thread):
    """Work until the step is over -> how many ticks this thread waited for others."""
    shares = word(head, THREADS)
    scratch = word(head, SCRATCH) + word(head, SCRATCH_BYTES) * thread
    waited = 0
    for i in range(word(head, PHASES)):
        phase = word(head, PHASE_TABLE) + 8 * PHASE_WORDS * i
        own = head
        if word(phase, ROWS_OF) != 0:
            own = word(phase, ROWS_OF)
            if atomic_load(own + 8 * SKIPPED) == 1:
                continue
        rows = word(own, BATCH) * word(own, WINDOW_ROWS)
        tickets = word(head, TICKETS) + 8 * COUNTER_WORDS * shares * i
        done = word(head, DONE) + 8 * COUNTER_WORDS * i
        chunks = chunks_of(own, phase)
        work = scratch
        prepared = False
        for turn in range(shares):
            share = (thread + turn) % shares
            begin = begin_of(share, shares, chunks)
            count = begin_of(share + 1, shares, chunks) - begin
            while True:
                chunk = grab(tickets + 8 * COUNTER_WORDS * share, epoch, count)
                if chunk == -2:
                    return waited
                if chunk == -1:
                    break
                if not prepared and word(phase, TILE) != 0:
                    prepare(phase, rows, scratch)
                    work = scratch + activation_bytes(phase, rows)
                prepared = True
                run_chunk(own, phase, rows, begin + chunk, begin, begin + count, scratch, work)
                atomic_add(done, 1)
        prefetch_weights(head, i + 1, thread, shares)
        if atomic_load(done) < chunks:
            start = ticks()
            spins = 0
            while atomic_load(done) < chunks:
                if atomic_load(tickets) >> 32 != epoch:
                    return waited
                spins += 1
                # The thread that has the chunk may be waiting for this core.
                if spins < SPINS:
                    pause()
                else:
                    yield_core()
            waited += ticks() - start
    return waited


@compiled
def open_step(head, epoch):
    """Clear all counters for a step, whose helpers have not been called yet."""
    shares = word(head, THREADS)
    for i in range(word(head, PHASES)):
        store_i64(word(head, DONE) + 8 * COUNTER_WORDS * i, 0)
        for share in range(shares):
            ticket = word(head, TICKETS) + 8 * COUNTER_WORDS * (shares * i + share)
            store_i64(ticket, epoch << 32)
    store_i64(head + 8 * EPOCH, epoch)


@compiled
def run_program(head, epoch, thread):
    """Run a step's phases -> the share of the time, in thousandths, that this thread waited.

    The floating-point mode is IEEE's meanwhile; the caller's is restored.
    """
    mode = float_mode()
    set_float_mode(IEEE_MODE)
    begin = ticks()
    waited = run_phases(head, epoch, thread)
    if thread == 0 and epoch == word(head, EPOCH):
        open_step(head, (epoch + 1) & 0x7FFFFFFF)
    total = ticks() - begin
    set_float_mode(mode)
    return 1000 * waited // max(total, 1)
