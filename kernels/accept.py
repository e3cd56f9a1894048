"""Acceptance of a chain: the longest prefix of drafts that equals the targets.

    accepted = the number of t with window[1 .. t + 1] = target[0 .. t];  bonus = target[accepted]

Row t's target is the model's own choice after window row t, so that this is what plain decoding
gives (Leviathan et al. 2023, section 2, with a deterministic target). For engines that keep their
own tokens and lengths; the step of this package accepts in `advance`.

Bytes moved: 8 B (2 T - 1) of ids read, 16 B written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launch import check_dtype, check_shape, device, jit, power_of_two, tl, wait_for_producer


def accept_ref(window: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Compare window [B, T] and target [B, T], int64 -> (accepted [B] in 0..K, bonus [B])."""
    if window.shape != target.shape:
        raise ValueError(
            f"target must be [B, T]={list(window.shape)} to match window, got {list(target.shape)}"
        )
    accepted = (window[:, 1:] == target[:, :-1]).long().cumprod(1).sum(1)
    return accepted, target.gather(1, accepted[:, None])[:, 0]


@jit("BLOCK_T")
def _accept_kernel(
    window_ptr, target_ptr, accepted_ptr, bonus_ptr,  # [B, T] [B, T] [B] [B]
    T,
    stride_wb, stride_tb,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: a sequence."""
    if PDL:
        wait_for_producer()
    b = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    in_drafts = t + 1 < T
    draft = tl.load(window_ptr + b * stride_wb + t + 1, mask=in_drafts, other=0)
    target = tl.load(target_ptr + b * stride_tb + t, mask=t < T, other=0)
    accepted = accepted_prefix(in_drafts & (draft == target), t)
    tl.store(accepted_ptr + b, accepted.to(tl.int64))
    tl.store(bonus_ptr + b, tl.load(target_ptr + b * stride_tb + accepted))


@device
def accepted_prefix(agrees, t):
    """The number of accepted drafts: the first row t of a window that does not agree, since row
    t + 1 is not a draft or differs from target t. agrees [BLOCK_T] bool; t = 0..BLOCK_T-1."""
    return tl.min(tl.where(agrees, agrees.shape[0], t))


def accept(
    window: Tensor,
    target: Tensor,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compare window [B, T] and target [B, T], int64 -> (accepted [B] in 0..K, bonus [B]), int64.

    `out` is where these two go. `pdl`: see `linear`.
    """
    B, T = window.shape
    check_shape("target", target, "[B, T]", B, T)
    check_shape("window", window, "[B, T]", B, T)
    for name, tensor in (("window", window), ("target", target)):
        check_dtype(name, tensor, torch.int64)
    accepted, bonus = (window.new_empty(B), window.new_empty(B)) if out is None else out
    for name, tensor in (("accepted", accepted), ("bonus", bonus)):
        check_shape(name, tensor, "[B]", B)
        check_dtype(name, tensor, torch.int64)
    if B and T:
        _accept_kernel[(B,)](
            window, target, accepted, bonus, T, window.stride(0), target.stride(0),
            BLOCK_T=power_of_two(T),
            num_warps=1, pdl=pdl,
        )  # fmt: skip
    return accepted, bonus
