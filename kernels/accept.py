"""Greedy acceptance of a chain: the longest prefix of drafts that equals the targets.

Row t's target is the token that the model itself puts after window row t, so draft t + 1 stands
iff it equals target t and all before it stood; the target after the last one standing is the bonus
token (Leviathan et al. 2023, section 2, with a deterministic target).

Bytes moved: 2 * B * T ids.
"""

from torch import Tensor


def accept_ref(window: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Compare window [B, T] and target [B, T], int64 -> (accepted [B] in 0..K, bonus [B])."""
    if window.shape != target.shape:
        raise ValueError(
            f"target must be [B, T]={list(window.shape)} to match window, got {list(target.shape)}"
        )
    standing = (window[:, 1:] == target[:, :-1]).long().cumprod(1)
    accepted = standing.sum(1)
    return accepted, target.gather(1, accepted[:, None])[:, 0]
