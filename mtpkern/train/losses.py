"""What a draft is trained on: cross-entropy with the model's own distribution and its own token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.train.heads.families import Head


def batch_loss(
    head: Head,
    embedding: Tensor,
    table: Tensor,
    to_draft: Tensor,
    x: dict[str, Tensor],
    keep: Tensor,
    weights: Tensor,
    hard: float,
) -> tuple[Tensor, Tensor]:
    """The batch's loss, with the K steps weighted by weights [K], and each step's own loss [K]."""
    K, parts = len(weights), []
    states = head(x["features"], x["tokens"], x["starts"], embedding, K, keep)
    for k, state in enumerate(states):
        chains = keep if k else slice(None)
        live, starts = x["live"][k][:, chains], x["starts"][:, chains]
        labels = x["tokens"].gather(1, starts + 2 + k)[live]
        ids, logits = x["top_ids"][k][:, chains][live], x["top_logits"][k][:, chains][live]
        targets = draft_targets(ids, logits, labels, to_draft, hard)
        parts.append(DraftLoss.apply(state[live], table, *targets) / max(len(labels), 1))
    steps = torch.stack(parts)
    return (steps * weights).sum(), steps.detach()


class DraftLoss(torch.autograd.Function):
    """Summed cross-entropy of softmax(hidden @ table.T) and sparse targets.

    hidden [R, E], table [Vd, E] (frozen), ids [R, N] with weights [R, N] -> scalar. The forward
    pass computes the gradient too, 256 rows at a time, so that no logits [R, Vd] are stored.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, table: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gradients, total = [], torch.zeros((), device=hidden.device)
        for h, i, w in zip(hidden.split(256), ids.split(256), weights.split(256), strict=True):
            p = F.linear(h, table).softmax(-1)
            total -= (w * p.gather(1, i).float().clamp(min=1e-9).log()).sum()
            flat = i + torch.arange(len(i), device=i.device)[:, None] * p.shape[1]
            p *= w.sum(-1, keepdim=True).to(p.dtype)
            p.view(-1).index_add_(0, flat.view(-1), -w.to(p.dtype).view(-1))
            gradients.append(p @ table)
        ctx.save_for_backward(torch.cat(gradients) if gradients else torch.zeros_like(hidden))
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (hidden_gradient,) = ctx.saved_tensors
        return hidden_gradient * gradient.to(hidden_gradient.dtype), None, None, None


def draft_targets(
    ids: Tensor, logits: Tensor, labels: Tensor, to_draft: Tensor, hard: float
) -> tuple[Tensor, Tensor]:
    """Targets of R rows -> draft ids and weights [R, M + 1]; a row's weights sum to 1.

    A target mixes the model's M likeliest tokens ids [R, M], by their logits, with its chosen token
    labels [R], which gets the share `hard`. to_draft [V] maps tokens to draft ids, -1 outside of
    the draft vocabulary; a row without any token inside has weights 0.
    """
    inside, label = to_draft[ids], to_draft[labels][:, None]
    p = logits.masked_fill(inside < 0, float("-inf")).softmax(-1).nan_to_num(0)
    weights = torch.cat([p * (1 - hard), hard * (label >= 0)], 1)
    total = weights.sum(1, keepdim=True)
    weights = torch.where(total > 1e-6, weights / total, 0)
    return torch.cat([inside, label], 1).clamp(min=0), weights
