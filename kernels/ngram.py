"""N-gram drafting: the tokens that followed the latest earlier occurrence of a sequence's end.

    start = the largest s with tokens[s .. s + size - 1] = the last `size` tokens, s < known - size
    drafts[k] = tokens[start + size + k], periodically from the end on

Prompt lookup (Saxena 2023): without weights, and strong where an answer repeats its prompt or
itself. Each block searches BLOCK starts; a second launch takes the latest match of all blocks, and
copies.

Bytes moved, per sequence: 8 known, each token read once per token of the pattern, from the L1 but
for the first time; 8 ceil(known / BLOCK) written and read for the blocks' matches; 16 K for the
copy. Blocks: ceil(known / BLOCK) that work, of ceil(max_length / BLOCK).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launch import ceil_div, check_dtype, check_shape, jit, power_of_two, tl, wait_for_producer

# Starts of a match that a block searches.
BLOCK = 1024


def ngram_ref(tokens: Tensor, known: Tensor, drafts: int, size: int = 3) -> tuple[Tensor, Tensor]:
    """Draft by copying: tokens [B, max_length] int64, of which the first known [B] are valid.

    -> (drafts [B, K], found [B] bool). The copy starts after the latest match of the last `size`
    tokens that ends before the sequence does; from the sequence's end it continues periodically. If
    nothing matches, found is False and the drafts are 0, a filler.
    """
    batch, length = tokens.shape
    starts = torch.arange(length - size + 1)
    ends = (known[:, None] - size + torch.arange(size)).clamp_(min=0)
    pattern = tokens.gather(1, ends)
    match = starts < (known[:, None] - size)
    for i in range(size):
        match &= tokens[:, i : length - size + 1 + i] == pattern[:, i : i + 1]
    latest = torch.where(match, starts, -1).amax(1)
    found = latest >= 0
    period = (known - size - latest).clamp_(min=1)
    copied = (latest + size)[:, None] + torch.arange(drafts) % period[:, None]
    drafted = tokens.gather(1, copied.clamp_(0, length - 1))
    return torch.where(found[:, None], drafted, 0), found


@jit("SIZE", do_not_specialize=("blocks",))
def _latest_match_kernel(
    tokens_ptr, known_ptr, latest_ptr,  # [B, max_length] [B] [B, blocks]
    blocks,
    stride_tb,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: the latest match among BLOCK starts of a sequence, or -1."""
    if PDL:
        wait_for_producer()
    block, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tokens_ptr += b * stride_tb
    pattern = tl.load(known_ptr + b) - SIZE  # its first token
    start = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if block * BLOCK >= pattern:
        return
    match = start < pattern
    for i in tl.static_range(SIZE):
        token = tl.load(tokens_ptr + start + i, mask=start < pattern, other=0)
        match &= token == tl.load(tokens_ptr + pattern + i)
    tl.store(latest_ptr + b * blocks + block, tl.max(tl.where(match, start, -1)))


@jit("SIZE", "BLOCK_K", do_not_specialize=("K", "blocks", "stride_db"))
def _ngram_kernel(
    tokens_ptr, known_ptr, latest_ptr,  # [B, max_length] [B] [B, blocks]
    drafts_ptr, found_ptr,  # [B, K] [B]
    K, blocks,
    stride_tb, stride_db,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: a sequence's drafts, from the latest match of all blocks."""
    if PDL:
        wait_for_producer()
    b = tl.program_id(0).to(tl.int64)
    tokens_ptr += b * stride_tb
    pattern = tl.load(known_ptr + b) - SIZE
    searched = tl.cdiv(tl.maximum(pattern, 0), BLOCK)
    latest = tl.full([], -1, tl.int64)
    for first in range(0, searched, 128):
        block = first + tl.arange(0, 128)
        found = tl.load(latest_ptr + b * blocks + block, mask=block < searched, other=-1)
        latest = tl.maximum(latest, tl.max(found))
    k = tl.arange(0, BLOCK_K)
    period = tl.maximum(pattern - latest, 1)
    copied = latest + SIZE + k % period
    draft = tl.load(tokens_ptr + copied, mask=(latest >= 0) & (k < K), other=0)
    tl.store(drafts_ptr + b * stride_db + k, draft, mask=k < K)
    tl.store(found_ptr + b, latest >= 0)


def ngram(
    tokens: Tensor,
    known: Tensor,
    drafts: int,
    size: int = 3,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """Draft by copying: tokens [B, max_length] int64, of which the first known [B] int64 are valid
    -> (drafts [B, K] int64, found [B] bool), as `ngram_ref` defines them, or into `out`.

    `size` is 1 or more. `pdl`: see `linear`.
    """
    B, length = tokens.shape
    check_shape("tokens", tokens, "[B, max_length]", B, length)
    check_shape("known", known, "[B]", B)
    for name, tensor in (("tokens", tokens), ("known", known)):
        check_dtype(name, tensor, torch.int64)
    if size < 1 or drafts < 0:
        raise ValueError(f"size must be 1 or more and drafts 0 or more, got {size} and {drafts}")
    if out is None:
        out = tokens.new_empty(B, drafts), torch.empty(B, dtype=torch.bool, device=tokens.device)
    drafted, found = out
    check_shape("drafts", drafted, "[B, K]", B, drafts)
    check_dtype("drafts", drafted, torch.int64)
    check_shape("found", found, "[B]", B)
    check_dtype("found", found, torch.bool)
    if B:
        blocks = ceil_div(length, BLOCK)
        latest = tokens.new_empty(B, blocks)
        _latest_match_kernel[(blocks, B)](
            tokens, known, latest, blocks, tokens.stride(0),
            SIZE=size, BLOCK=BLOCK,
            num_warps=4, pdl=pdl,
        )  # fmt: skip
        _ngram_kernel[(B,)](
            tokens, known, latest, drafted, found, drafts, blocks,
            tokens.stride(0), drafted.stride(0),
            SIZE=size, BLOCK=BLOCK, BLOCK_K=power_of_two(max(drafts, 1)),
            num_warps=4, pdl=pdl,
        )  # fmt: skip
    return drafted, found
