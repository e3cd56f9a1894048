"""Sampling by coupling: the target is the argmax of the logits plus Gumbel noise.

    argmax_v (logits_v / temperature + g_v),  g_v = -log(-log u_v)

draws exactly from softmax(logits / temperature) (the Gumbel-max trick, Gumbel 1954). The noise is a
hash of (seed, the prompt's tokens, index of the completion, position, token id) and of nothing
else. A position gets the same token in plain decoding and in the verification of a draft, so that
acceptance remains equality; and heads that draft with the same noise predict the sampled token, not
the most likely one.

Filters (top-k, top-p, min-p) are in `_filtered_out`, and their settings in `SamplingRows`; requests
state them in mtpkern/config.py, from where mtpkern/runner.py writes them into a slot.

The kernel is the greedy case, for engines that have logits; the step of this package chooses in
`multi_head_projection`, which does not write them.

Bytes moved: R * V logits once; the noise is computed, not read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import check_dtype, check_shape, jit, tl, wait_for_producer
from ._ranking import LOWEST, rank, ranked_column

# Below this temperature the most likely token is chosen, the lowest id among equals (as in vLLM).
GREEDY = 1e-5


class SamplingRows(NamedTuple):
    """Sampling settings of B sequences."""

    temperature: Tensor  # [B] float32, >= 0; below GREEDY the rest is ignored
    top_k: Tensor  # [B] int64, 0 = all
    top_p: Tensor  # [B] float32 in (0, 1]
    min_p: Tensor  # [B] float32 in [0, 1)
    key: Tensor  # [B] int64, made by `sampling_key`


def sampling_key(seed: int, index: int, prompt: Sequence[int] = ()) -> int:
    """A 63-bit noise key from a request's seed, the index of a completion within it, and the token
    ids of its prompt, so that different prompts with one seed draw different noise.

    The same on every platform and in every process. Without a prompt, the sequences of one seed
    differ in `index` alone.
    """
    x = seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + 1
    if prompt:
        tokens = b"".join(token.to_bytes(8, "little", signed=True) for token in prompt)
        x += int.from_bytes(hashlib.blake2b(tokens, digest_size=8).digest(), "little")
    x &= 2**64 - 1
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        x = ((x ^ (x >> 30)) * factor) & (2**64 - 1)
    return (x ^ (x >> 31)) >> 1


def gumbel_ref(key: Tensor, position: Tensor, token_ids: Tensor) -> Tensor:
    """Gumbel noise: key [R] and position [R] int64, token_ids [n] int64 -> [R, n] float32."""
    low = (key ^ (position * 0x632BE5AB)).view(-1, 1)
    high = ((key >> 32) + position * 0x85157AF5).view(-1, 1)
    x = _mix(token_ids * 0x9E3779B1 + (low & 0xFFFFFFFF))
    x = _mix(x + (high & 0xFFFFFFFF))
    # 24 bits, shifted by half a unit, so that u is neither 0 nor 1.
    uniform = ((x >> 8).float() + 0.5) * 2.0**-24
    return uniform.log_().neg_().log_().neg_()


def sample_ref(logits: Tensor, token_ids: Tensor | None = None) -> Tensor:
    """Choose the most likely tokens: logits [R, n] -> [R] int64; see `sample`."""
    columns = logits.max(-1).indices  # between equal logits the lowest; twice as fast as argmax
    return columns if token_ids is None else token_ids[columns]


def gumbel_sample(
    logits: Tensor, position: Tensor, rows: SamplingRows, token_ids: Tensor | None = None
) -> Tensor:
    """Sample tokens: logits [B, T, n], position [B, T] of the token to choose -> [B, T] int64.

    token_ids [n] are the ids of the columns, 0..V-1 by default (a reduced draft vocabulary). Ties
    go to the lowest column.
    """
    greedy = bool((rows.temperature < GREEDY).all())
    columns = sample_ref(logits) if greedy else _sampled(logits, position, rows, token_ids)
    return columns if token_ids is None else token_ids[columns]


def _sampled(
    logits: Tensor, position: Tensor, rows: SamplingRows, token_ids: Tensor | None
) -> Tensor:
    batch, width, count = logits.shape
    ids = torch.arange(count) if token_ids is None else token_ids
    chosen = []
    for b in range(batch):
        temperature = rows.temperature[b]
        if temperature < GREEDY:
            chosen.append(sample_ref(logits[b]))
            continue
        # From the largest down: neither overflows nor loses the likely tokens' low bits.
        scaled = logits[b].float()
        scaled = (scaled - scaled.amax(-1, keepdim=True)) / temperature
        noise = gumbel_ref(rows.key[b].expand(width), position[b], ids)
        noise.masked_fill_(_filtered_out(scaled, rows, b), float("-inf"))
        chosen.append(sample_ref(scaled + noise))
    return torch.stack(chosen)


def _filtered_out(scaled: Tensor, rows: SamplingRows, b: int) -> Tensor:
    """Columns [T, n] that top-k, then top-p of the rest, or min-p remove; at least one remains."""
    top_k, top_p, min_p = int(rows.top_k[b]), float(rows.top_p[b]), float(rows.min_p[b])
    out = scaled < scaled.amax(-1, keepdim=True) + torch.tensor(min_p).log()
    if 0 < top_k < scaled.shape[-1] or top_p < 1:
        order = torch.sort(scaled, dim=-1, descending=True, stable=True)
        ranked = order.values.clone()
        if 0 < top_k < scaled.shape[-1]:
            ranked[:, top_k:] = float("-inf")
        probability = ranked.softmax(-1)
        # The token with which the sum exceeds top_p still belongs to the set.
        beyond = probability.cumsum(-1) - probability >= top_p
        beyond |= ranked == float("-inf")
        beyond[:, 0] = False
        out |= torch.zeros_like(out).scatter_(-1, order.indices, beyond)
    return out


def _mix(x: Tensor) -> Tensor:
    """The 32-bit finaliser of MurmurHash3 (Appleby), on int64 that holds unsigned 32-bit values."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


@jit("BLOCK")
def _sample_kernel(
    logits_ptr, token_ids_ptr, out_ptr,  # [R, columns] [columns] [R]
    columns,
    stride_lr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: a row."""
    if PDL:
        wait_for_producer()
    r = tl.program_id(0).to(tl.int64)
    best = tl.full([BLOCK], LOWEST, tl.int64)
    for begin in range(0, columns, BLOCK):
        v = begin + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + r * stride_lr + v, mask=v < columns, other=0.0)
        best = tl.maximum(best, tl.where(v < columns, rank(logits, v), LOWEST))
    token = ranked_column(tl.max(best))
    if token_ids_ptr is not None:
        token = tl.load(token_ids_ptr + token)
    tl.store(out_ptr + r, token)


def sample(
    logits: Tensor,
    token_ids: Tensor | None = None,
    *,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Choose the most likely tokens: logits [R, n] -> [R] int64. Ties go to the lowest column.

    token_ids [n] int64 are the ids of the columns, 0..n-1 by default. Temperature 0 only. `pdl`:
    see `linear`.
    """
    R, n = logits.shape
    check_shape("logits", logits, "[R, n]", R, n)
    if n == 0:
        raise ValueError(f"logits must be [R, n] with n >= 1, got {list(logits.shape)}")
    if token_ids is not None:
        check_shape("token_ids", token_ids, "[n]", n)
        check_dtype("token_ids", token_ids, torch.int64)
    out = torch.empty(R, dtype=torch.int64, device=logits.device) if out is None else out
    check_shape("out", out, "[R]", R)
    check_dtype("out", out, torch.int64)
    if R:
        _sample_kernel[(R,)](
            logits, token_ids, out, n, logits.stride(0), BLOCK=4096, num_warps=8, pdl=pdl
        )
    return out
