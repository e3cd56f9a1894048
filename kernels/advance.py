"""The end of a step in one launch: accept, commit, note what was emitted, and tell the host.

    accepted = longest prefix of drafts that equals the targets;  lengths += (accepted + 1) * active
    tokens[lengths + 1 + t] = target[t];  window[0] = target[accepted]

A sequence stops advancing after a token that ends it, or at its limit. A row whose largest logit
is not finite (a NaN among logits is their largest) chooses no token: no draft after it is accepted,
and if it gives the bonus, the sequence is broken and ends.

The host reads a ring of 64-bit words in pinned memory. A word carries the step's number in its
upper and 32 bits of content in its lower half, so that each shows by itself whether it has arrived,
in whatever order they do. Word 0 of a sequence packs accepted, drafted, source and active + 2
broken, a byte each; the T targets follow, then their T log-probabilities as float32 bits.

Bytes moved, per sequence: 8 (5 T + 14 + n) of ids, counts and words, for n tokens that end it, 4 T
of largest logits and 4 T of log-probabilities. `kv_rollback` moves the keys and values of a tree.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import check_dtype, check_shape, jit, power_of_two, tl, wait_for_producer
from .accept import accept_ref, accepted_prefix

# Step numbers in the ring wrap at this; the host never runs that far ahead.
STEP_MASK = 2**31 - 1


class Progress(NamedTuple):
    """The state of B sequences; a step changes all but `limits` and `ends` in place."""

    tokens: Tensor  # [B, max_length + T] int64; tokens[b, : lengths[b] + 1] are known
    lengths: Tensor  # [B] int64, tokens whose K and V are committed
    active: Tensor  # [B] int64, 1 or 0: a finished sequence does not advance
    limits: Tensor  # [B] int64: a sequence ends when it has that many tokens
    ends: Tensor  # [B, n] int64, tokens that end a sequence, filled up with -1
    source: Tensor  # [B] int64, which drafter the window's drafts are from
    drafted: Tensor  # [B] int64, how many of them are drafts, not fillers
    clock: Tensor  # [B] int64, steps taken so far: the same number for all
    ring: Tensor  # [slots, B, 1 + 2 T or more] int64, where the host can read it


def advance_ref(
    window: Tensor,
    target: Tensor,
    largest: Tensor,
    logprobs: Tensor | None,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """End a step; see `advance`."""
    p, T = progress, window.shape[1]
    finite = largest.isfinite()
    agreeing, _ = accept_ref(window, target)
    accepted = torch.minimum(agreeing, finite.long().cumprod(1).sum(1))
    bonus = target.gather(1, accepted[:, None])[:, 0]
    broken = p.active * ~finite.gather(1, accepted[:, None])[:, 0]
    count = (accepted + 1) * p.active
    p.clock.add_(1)
    words = torch.zeros_like(p.ring[0, :, : 1 + 2 * T])
    words[:, 0] = accepted | p.drafted << 8 | p.source << 16 | (p.active + 2 * broken) << 24
    words[:, 1 : 1 + T] = target
    if logprobs is not None:
        words[:, 1 + T :] = logprobs.float().view(torch.int32).long() & 0xFFFFFFFF
    words |= ((p.clock & STEP_MASK) << 32)[:, None]
    slot = p.clock % p.ring.shape[0]
    p.ring[slot, torch.arange(len(slot), device=slot.device), : 1 + 2 * T] = words

    place = p.lengths[:, None] + 1 + torch.arange(T, device=window.device)
    known = p.tokens.gather(1, place)
    p.tokens.scatter_(1, place, torch.where(p.active[:, None] != 0, target, known))
    window[:, 0] = torch.where(p.active != 0, bonus, window[:, 0])
    p.lengths.add_(count)
    emitted = torch.arange(T, device=window.device) < count[:, None]
    ended = ((target[:, :, None] == p.ends[:, None]).any(-1) & emitted).any(-1)
    p.active.mul_(~ended & (broken == 0) & (p.lengths + 1 < p.limits))
    p.drafted.zero_()
    p.source.zero_()
    return accepted, count


_STRIDES = tuple(f"stride_{name}" for name in ("wb", "gb", "ab", "lb", "tb", "eb", "rs", "rb"))


@jit("BLOCK_T", do_not_specialize=("ends_count", "ring_slots", *_STRIDES))
def _advance_kernel(
    window_ptr, target_ptr, largest_ptr, logprobs_ptr,  # [B, T]
    tokens_ptr, lengths_ptr, active_ptr, limits_ptr, ends_ptr,  # as in `Progress`
    source_ptr, drafted_ptr, clock_ptr, ring_ptr,
    accepted_ptr, count_ptr,  # [B]
    T, ends_count, ring_slots,
    stride_wb, stride_gb, stride_ab, stride_lb, stride_tb, stride_eb, stride_rs, stride_rb,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: a sequence."""
    if PDL:
        wait_for_producer()
    b = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    in_window, in_drafts = t < T, t + 1 < T
    draft = tl.load(window_ptr + b * stride_wb + t + 1, mask=in_drafts, other=0)
    target = tl.load(target_ptr + b * stride_gb + t, mask=in_window, other=0)
    largest = tl.load(largest_ptr + b * stride_ab + t, mask=in_window, other=0.0)
    finite = tl.abs(largest) < float("inf")  # which NaN is not
    active = tl.load(active_ptr + b)
    length = tl.load(lengths_ptr + b)
    accepted = accepted_prefix(in_drafts & (draft == target) & finite, t).to(tl.int64)
    broken = tl.max(((t == accepted) & ~finite).to(tl.int64)) * active
    count = (accepted + 1) * active
    bonus = tl.sum(tl.where(t == accepted, target, 0))
    emitted = t < count

    clock = tl.load(clock_ptr + b) + 1
    step = (clock & 0x7FFFFFFF) << 32
    ring_ptr += clock % ring_slots * stride_rs + b * stride_rb
    drafted, source = tl.load(drafted_ptr + b), tl.load(source_ptr + b)
    counts = accepted | (drafted << 8) | (source << 16) | ((active + 2 * broken) << 24)
    tl.store(ring_ptr, step | counts, cache_modifier=".wt")
    tl.store(ring_ptr + 1 + t, step | target, mask=in_window, cache_modifier=".wt")
    if logprobs_ptr is not None:
        logprob = tl.load(logprobs_ptr + b * stride_lb + t, mask=in_window, other=0.0)
        bits = logprob.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        tl.store(ring_ptr + 1 + T + t, step | bits, mask=in_window, cache_modifier=".wt")

    ended = tl.zeros([BLOCK_T], tl.int1)
    for i in range(ends_count):
        ended |= emitted & (target == tl.load(ends_ptr + b * stride_eb + i))
    length += count
    goes_on = (tl.max(ended.to(tl.int32)) == 0) & (length + 1 < tl.load(limits_ptr + b))
    goes_on &= broken == 0
    lives = active != 0
    # Several threads load the same scalars: all must have done so before any stores one.
    tl.debug_barrier()
    place = tokens_ptr + b * stride_tb + length - count + 1 + t
    tl.store(place, target, mask=in_window & lives)
    tl.store(window_ptr + b * stride_wb, bonus, mask=lives)
    tl.store(lengths_ptr + b, length)
    tl.store(active_ptr + b, active * goes_on.to(tl.int64))
    tl.store(clock_ptr + b, clock)
    tl.store(drafted_ptr + b, 0)
    tl.store(source_ptr + b, 0)
    tl.store(accepted_ptr + b, accepted)
    tl.store(count_ptr + b, count)


def advance(
    window: Tensor,
    target: Tensor,
    largest: Tensor,
    logprobs: Tensor | None,
    progress: Progress,
    *,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """End a step: window [B, T] int64 and target [B, T] int64, T <= 64, largest [B, T] float32, the
    largest logit of each row, logprobs [B, T] float32 or None -> (accepted [B], count [B]) int64,
    count = accepted + 1, or 0 for a finished sequence.

    In place: tokens, lengths, active, clock and ring of `progress`; source and drafted are set to 0
    and left to the drafter; the bonus token goes to window[:, 0]. Tokens must fit into 32 bits,
    counts into a byte. `pdl`: see `linear`.
    """
    (B, T), p = window.shape, progress
    check_shape("window", window, "[B, T]", B, T)
    check_shape("target", target, "[B, T]", B, T)
    check_shape("largest", largest, "[B, T]", B, T)
    check_dtype("largest", largest, torch.float32)
    check_shape("tokens", p.tokens, "[B, max_length + T]", B, p.tokens.shape[1])
    check_shape("ends", p.ends, "[B, n]", B, p.ends.shape[1])
    check_shape("ring", p.ring, "[slots, B, words]", p.ring.shape[0], B, p.ring.shape[2])
    for name in ("lengths", "active", "limits", "source", "drafted", "clock"):
        check_shape(name, getattr(p, name), "[B]", B)
        check_dtype(name, getattr(p, name), torch.int64)
    for name, tensor in (("window", window), ("target", target), ("tokens", p.tokens)):
        check_dtype(name, tensor, torch.int64)
    if not 1 <= T <= 64 or p.ring.shape[2] < 1 + 2 * T:
        raise ValueError(
            f"window must be [B, T] with T=1..64 and ring hold 1 + 2 T words a sequence, "
            f"got {list(window.shape)} and {list(p.ring.shape)}"
        )
    if logprobs is not None:
        check_shape("logprobs", logprobs, "[B, T]", B, T)
        check_dtype("logprobs", logprobs, torch.float32)
    accepted, count = window.new_empty(B), window.new_empty(B)
    if B:
        _advance_kernel[(B,)](
            window, target, largest, logprobs,
            *p,
            accepted, count,
            T, p.ends.shape[1], p.ring.shape[0],
            window.stride(0), target.stride(0), largest.stride(0),
            0 if logprobs is None else logprobs.stride(0),
            p.tokens.stride(0), p.ends.stride(0), *p.ring.stride()[:2],
            BLOCK_T=power_of_two(T),
            num_warps=1, pdl=pdl,
        )  # fmt: skip
    return accepted, count
