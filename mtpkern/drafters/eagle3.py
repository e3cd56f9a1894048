"""EAGLE-3 (Li et al. 2025): a sequential head whose layer is fed both halves of a pair, unmixed.

    x_j = h_j;  o_j = layer(x_j), with Q, K and V from [norm(e_{j+1}), norm(h_j)]
    draft = argmax(norm(o_j) V^T)

The next pair continues from o_j before that norm. With `norm_before_residual`, x_j is norm(h_j).
"""

from torch import Tensor

from mtpkern.drafters.mtp import MtpDrafter, MtpWeights


class Eagle3Drafter(MtpDrafter):
    """An EAGLE-3 head, for all depths."""

    def _join(
        self, w: MtpWeights, hidden: Tensor, tokens: Tensor, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        eps, E = w.config.rms_norm_eps, hidden.shape[1]
        pair = hidden.new_empty(len(hidden), 2 * E)
        self.ops.rms_norm(self.embedding, w.token_norm, eps, ids=tokens, out=pair[:, :E])
        self.ops.rms_norm(hidden, w.hidden_norm, eps, out=pair[:, E:])
        return pair[:, E:].contiguous() if w.norm_before_residual else hidden, pair

    def _output(self, w: MtpWeights, x: Tensor) -> Tensor:
        return x

    def _to_score(self, hidden: Tensor) -> Tensor:
        w = self.weights
        return self.ops.rms_norm(hidden, w.final_norm, w.config.rms_norm_eps)
