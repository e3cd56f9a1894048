"""Medusa and Hydra heads as they are trained: all K drafts of a row from its final hidden state.

Both are initialised as the identity: every head predicts what the model predicts from the row.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ParallelConfig:
    """The config.json of heads with one block each, through the model's own LM head."""

    hidden_size: int
    tap_layers: tuple[int, ...]  # the last one
    num_heads: int
    draft_vocab_size: int
    base_model: str
    base_model_fingerprint: str
    model_type: str
    num_layers: int = 1

    @property
    def is_hydra(self) -> bool:
        return self.model_type == "mtpkern_hydra"


class ParallelHeads(nn.Module):
    """Head i: z = [h, e_1 .. e_i+1] in Hydra, h in Medusa; x = R z + silu(W z + c), with R = 1 in
    Medusa (Cai et al. 2024; Ankner et al. 2024). Float32 weights, computing in the inputs' dtype.
    """

    draft_vocab: Tensor

    def __init__(self, config: ParallelConfig):
        super().__init__()
        self.config, E = config, config.hidden_size
        self.weights = nn.ParameterDict()
        for h in range(config.num_heads):
            width = (h + 2) * E if config.is_hydra else E
            # Not zero, where the gate's gradient would vanish.
            self.weights[f"{h}/0/linear/weight"] = nn.Parameter(torch.randn(E, width) * 0.01)
            self.weights[f"{h}/0/linear/bias"] = nn.Parameter(torch.zeros(E))
            if config.is_hydra:
                self.weights[f"{h}/residual/weight"] = nn.Parameter(torch.eye(E, width))
                self.weights[f"{h}/residual/bias"] = nn.Parameter(torch.zeros(E))
        ids = torch.zeros(config.draft_vocab_size, dtype=torch.int32)
        self.register_buffer("draft_vocab", ids)

    def forward(
        self,
        features: Tensor,
        tokens: Tensor,
        starts: Tensor,
        embedding: Tensor,
        K: int,
        keep: Tensor | None = None,
    ) -> list[Tensor]:
        """As MtpHead.forward, for K up to `num_heads`; features [B, S, E]."""
        if K > self.config.num_heads:
            raise ValueError(f"K must be at most num_heads={self.config.num_heads}, got {K}")
        E = self.config.hidden_size
        hidden = features.gather(1, starts[..., None].expand(-1, -1, E))
        known, out = [hidden], []
        for k in range(K):
            if k == 1 and keep is not None:
                known, starts = [part[:, keep] for part in known], starts[:, keep]
            if self.config.is_hydra:
                known.append(F.embedding(tokens.gather(1, starts + k + 1), embedding))
            z = torch.cat(known, -1)
            passed = self.linear(z, f"{k}/residual") if self.config.is_hydra else known[0]
            out.append(passed + F.silu(self.linear(z, f"{k}/0/linear")))
        return out

    def linear(self, x: Tensor, name: str) -> Tensor:
        w, b = (self.weights[f"{name}/{part}"].to(x.dtype) for part in ("weight", "bias"))
        return F.linear(x, w, b)

    def prepare(self, spread: Tensor) -> None:
        """Do nothing: no weight depends on the features' scale."""

    rescale = prepare

    def tensors(self) -> dict[str, Tensor]:
        """The weights under their names in a heads directory."""
        tensors = {k.replace("/", "."): w.detach() for k, w in self.weights.items()}
        return tensors | ({"draft_vocab": self.draft_vocab} if self.config.is_hydra else {})

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Set all weights from what `tensors` returns."""
        with torch.no_grad():
            everything = torch.arange(len(self.draft_vocab))
            self.draft_vocab.copy_(tensors.pop("draft_vocab", everything))
            for name, tensor in tensors.items():
                self.weights[name.replace(".", "/")].copy_(tensor)
