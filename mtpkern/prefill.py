"""A prompt's pass through the model, and the drafts that its first step verifies.

The prompt runs without its last token, which is the first step's window[0].
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mtpkern.cache import KVCache
from mtpkern.decode import DecodeState, draft
from mtpkern.device import DeviceSettings
from mtpkern.drafters.base import Drafter, DraftInput, Drafts
from mtpkern.model import Llama
from mtpkern.ops.base import Ops


class LastRow(NamedTuple):
    """The hidden states of a prompt's last token but one."""

    hidden: Tensor  # [1, E], before the final norm
    tapped: list[Tensor]  # [1, E] each, after the layers that the drafter taps


def run_prompt(
    model: Llama,
    prompt: Tensor,
    start: int,
    cache: KVCache,
    ops: Ops,
    drafter: Drafter,
    *,
    slot: int,
    settings: DeviceSettings,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> LastRow | None:
    """Fill the cache of one sequence, in `slot`, with prompt[start:-1]; prompt [n] int64 is on the
    host, and the cache holds prompt[:start].

    Chunks end at absolute multiples of settings.chunk, so that K and V do not depend on where the
    prompt is resumed. The drafter sees all rows but the last, which is returned; None where there
    are no rows. on_tokens(count) is called after each chunk.
    """
    layers, device = model.config.num_layers, cache.lengths.device
    inner = [tap for tap in drafter.taps if tap < layers]
    count, multiple = len(prompt) - 1, settings.row_multiple
    last, begin = None, start
    while begin < count:
        chunk = prompt[begin : min(begin - begin % settings.chunk + settings.chunk, count)]
        padded = torch.zeros(1, -(-len(chunk) // multiple) * multiple, dtype=torch.int64)
        padded[0, : len(chunk)] = chunk
        at = cache.at(torch.tensor([begin]))
        hidden, tapped = ops.prefill(model, padded.to(device), at, inner)
        known = len(chunk)
        if begin + known == count:
            known -= 1
            last = LastRow(hidden[known : known + 1], [tap[known : known + 1] for tap in tapped])
        if drafter.taps and known:
            normed = ops.rms_norm(hidden, model.norm, model.config.rms_norm_eps)
            features = ops.join_taps(drafter.taps, tapped, normed, layers)[:known]
            drafter.prefill(slot, features, prompt[begin + 1 : begin + 1 + known].to(device))
        begin += len(chunk)
        on_tokens(len(chunk))
    cache.lengths.fill_(count)
    return last


def first_drafts(
    state: DecodeState,
    model: Llama,
    last: LastRow,
    drafter: Drafter,
    ops: Ops,
    *,
    slot: int,
    use_heads: bool,
    use_ngram: bool,
    min_probability: float,
) -> Drafts:
    """Draft the first window of the one sequence of `state`, which is in `slot`.

    For the drafter, the prompt's last row is a committed step whose bonus token is window[0].
    `use_heads`, `use_ngram` and `min_probability` are as in `decode_step`.
    """
    # The vocabulary is read for parallel heads alone, and the norm for heads.
    normed, projected, heads = last.hidden, None, drafter.parallel_heads
    eps = model.config.rms_norm_eps
    if heads is not None:
        normed, projected = ops.project(last.hidden, model.norm, eps, model.vocabulary, heads)
    elif drafter.taps:
        normed = ops.rms_norm(last.hidden, model.norm, eps)
    features = ops.join_taps(drafter.taps, last.tapped, normed, model.config.num_layers)
    one = torch.ones(1, dtype=torch.int64, device=state.window.device)
    step = DraftInput(
        features=features[None],
        projected=projected,
        target=state.window[:, :1].clone(),  # the drafter may keep it beyond the next step
        tokens=state.progress.tokens,
        lengths=state.progress.lengths,
        page_table=state.cache.page_table,
        accepted=one - 1,
        advance=one,
        sampling=state.sampling,
        first=slot,
        use_heads=use_heads,
        use_ngram=use_ngram,
        min_probability=min_probability,
    )
    return draft(state, drafter, step)
