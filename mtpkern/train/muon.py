"""Muon, for matrices: momentum with orthogonalised updates (Jordan et al. 2024).

The same as torch.optim.Muon with Nesterov momentum and adjust_lr_fn="match_rms_adamw", except that
the iteration runs in a given dtype. torch's always runs in bfloat16, which on a CPU without
bfloat16 instructions takes a minute per step where float32 takes half a second.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Approximate U V^T of the singular value decomposition by Newton-Schulz: [m, n] -> [m, n]."""
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
    """`dtype` is that of the iteration; the momentum has the parameters' own."""

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
        """Update every parameter that has a gradient."""
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
