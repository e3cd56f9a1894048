"""One step: verify a window, keep the agreeing prefix and one corrected token, draft the next.

Speculation is not a mode. Plain decoding is this step with K = 0, a window of one row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtpkern.cache import KVCache
from mtpkern.heads import NONE, Drafter, DraftInput
from mtpkern.model import Llama, run_trunk
from mtpkern.ops import Ops, SamplingRows


@dataclass
class DecodeState:
    """Everything a step reads and changes, for B sequences with K drafts each.

    `tokens[b, :cache.lengths[b] + 1]` are known; the last of them is `window[b, 0]`, which has no
    K/V yet. What `tokens` holds behind them is garbage.
    """

    tokens: Tensor  # [B, max_length + K + 1] int64
    window: Tensor  # [B, K + 1] int64
    source: Tensor  # [B] int64, where the window's drafts came from (heads.SOURCES)
    active: Tensor  # [B] int64, 1 or 0: a finished sequence does not advance
    sampling: SamplingRows
    cache: KVCache

    @classmethod
    def empty(cls, cache: KVCache, max_length: int, num_speculative_tokens: int) -> "DecodeState":
        """No sequence active, sampling greedy."""
        batch, k = cache.lengths.shape[0], num_speculative_tokens
        zeros = torch.zeros(batch)
        return cls(
            tokens=torch.zeros(batch, max_length + k + 1, dtype=torch.int64),
            window=torch.zeros(batch, k + 1, dtype=torch.int64),
            source=torch.full((batch,), NONE),
            active=torch.zeros(batch, dtype=torch.int64),
            sampling=SamplingRows(zeros, zeros.long(), zeros + 1, zeros.clone(), zeros.long()),
            cache=cache,
        )


@dataclass(frozen=True)
class StepOutput:
    """What a step decided: sequence b emits target[b, : accepted[b] + 1]."""

    target: Tensor  # [B, T] int64
    accepted: Tensor  # [B] int64, 0..K
    source: Tensor  # [B] int64, where the drafts that were verified came from
    logits: Tensor  # [B, T, V], the model's own, before sampling


def decode_step(state: DecodeState, model: Llama, drafter: Drafter, ops: Ops) -> StepOutput:
    """Advance every active sequence of `state` by 1 to K + 1 tokens, in place."""
    config, cache = model.config, state.cache
    batch, rows = state.window.shape

    inner = [tap for tap in drafter.taps if tap < config.num_layers]
    hidden, tapped = run_trunk(model, state.window, cache, ops, inner)
    normed, logits = ops.multi_head_projection(
        hidden, model.norm, config.rms_norm_eps, model.vocabulary, drafter.blocks
    )
    logits = logits.view(batch, rows, logits.shape[1], -1)

    position = cache.lengths[:, None] + 1 + torch.arange(rows)
    target = ops.sample(logits[:, :, 0], position, state.sampling)
    accepted, bonus = ops.accept(state.window, target)

    state.tokens.scatter_(1, position, target)
    advance = (accepted + 1) * state.active
    cache.commit(advance)

    step = DraftInput(
        features=torch.cat([*tapped, normed], -1).view(batch, rows, -1),
        head_logits=logits[:, :, 1:],
        tokens=state.tokens,
        lengths=cache.lengths,
        accepted=accepted,
        advance=advance,
        sampling=state.sampling,
    )
    drafter.observe(step)
    drafts = drafter.guess(step, rows - 1)
    output = StepOutput(target, accepted, state.source, logits[:, :, 0])
    state.window = torch.cat([bonus[:, None], drafts.tokens], 1)
    state.source = drafts.source
    return output
