"""Muon: momentum whose update is made orthogonal (Jordan et al. 2024), for matrices.

The same as torch.optim.Muon with nesterov momentum and adjust_lr_fn="match_rms_adamw", but the
iteration runs in a dtype of choice. torch's is always in bfloat16, which on a CPU without
instructions for it takes a minute per step where float32 takes half a second.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """U V^T of the singular value decomposition, nearly: [m, n] -> [m, n], by Newton-Schulz."""
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype, copy=True)
    if matrix.shape[0] > matrix.shape[1]:
        x = x.T
    x.div_(x.norm().clamp(min=1e-7))
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """`dtype` is what the iteration computes in; the momentum has the parameters' own."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        *,
        dtype: torch.dtype,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for w in group["params"]:
                if w.grad is None:
                    continue
                state = self.state[w]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(w.grad)
                state["momentum_buffer"].lerp_(w.grad, 1 - momentum)
                update = orthogonalize(w.grad.lerp(state["momentum_buffer"], momentum), self.dtype)
                w.mul_(1 - lr * group["weight_decay"])
                w.add_(update, alpha=-lr * 0.2 * max(w.shape) ** 0.5)
