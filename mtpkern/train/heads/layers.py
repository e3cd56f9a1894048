"""Heads with a decoder layer for each draft, as they are trained: over whole sequences.

Row j of layer k attends to the rows up to its own and predicts token j + 2 + k. Rows are fed the
text's tokens and never drafts, so that one pass trains all rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtpkern.rope import RopeConfig
from mtpkern.train.heads.layer import Layer, rows
from mtpkern.train.heads.mtp import HeadConfig, MtpHead


@dataclass(frozen=True)
class LayersConfig:
    """The config.json of heads that replace the model's last layer."""

    hidden_size: int
    tap_layers: tuple[int, ...]  # the one below the last
    num_heads: int
    head_dim: int
    rope: RopeConfig
    rms_norm_eps: float
    draft_vocab_size: int
    base_model: str
    base_model_fingerprint: str
    model_type: str = "mtpkern_layers"


class LayersHead(nn.Module):
    """Layers in place of the last one, each followed by a norm (Gloeckle et al. 2024):
    o_k = norm_k(layer_k(h)), where h is the last layer's input."""

    draft_vocab: Tensor

    def __init__(self, config: LayersConfig, tensors: Mapping[str, Tensor]):
        """`tensors` are the initial weights, with the names of `drafters.shapes.layers_shapes`."""
        super().__init__()
        self.config, eps = config, config.rms_norm_eps
        self.layers = nn.ModuleList(
            Layer(config.head_dim, config.rope, eps, _of(h, tensors))
            for h in range(config.num_heads)
        )
        ids = tensors.get("draft_vocab", torch.zeros(config.draft_vocab_size))
        self.register_buffer("draft_vocab", ids.int())

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
        _check_drafts(K, self.config.num_heads)
        out: list[Tensor] = []
        for k in range(K):
            if k == 1 and keep is not None:
                starts = starts[:, keep]
            layer: Layer = self.layers[k]  # type: ignore[assignment]
            out.append(layer.norm(layer.run(features, starts), "norm"))
        return out

    def prepare(self, spread: Tensor) -> None:
        """Do nothing: no weight depends on the features' scale."""

    rescale = prepare

    def tensors(self) -> dict[str, Tensor]:
        return _numbered(self.layers) | {"draft_vocab": self.draft_vocab}


class ModulesHead(nn.Module):
    """An MTP module of its own for each draft, fed by the one before (DeepSeek-V3, section 2.2):
    o^k_j = module_k(o^{k-1}_j, e_{j+1+k}), o^{-1} being the model's final hidden state."""

    draft_vocab: Tensor

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.config = config
        # All modules share one vocabulary.
        one = replace(config, num_heads=None, draft_vocab_size=0)
        self.depths = nn.ModuleList(MtpHead(one) for _ in range(config.num_heads or 0))
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
        _check_drafts(K, len(self.depths))
        S, hidden, out = features.shape[1], features, []
        for k in range(K):
            if k == 1 and keep is not None:
                starts = starts[:, keep]
            module: MtpHead = self.depths[k]  # type: ignore[assignment]
            x, y = module.pairs(hidden, F.embedding(tokens[:, k + 1 : k + 1 + S], embedding))
            # The next module is fed all rows of this one.
            at = None if k + 1 < K else starts
            hidden = module.norm(module.over(x, y, at), "final_layernorm")
            out.append(rows(hidden, starts) if k + 1 < K else hidden)
        return out

    def prepare(self, spread: Tensor) -> None:
        for module in self.depths:
            module.prepare(spread)  # type: ignore[operator]

    def rescale(self, spread: Tensor) -> None:
        for module in self.depths:
            module.rescale(spread)  # type: ignore[operator]

    def tensors(self) -> dict[str, Tensor]:
        return _numbered(self.depths) | {"draft_vocab": self.draft_vocab}

    def load(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.draft_vocab.copy_(tensors["draft_vocab"])
            for d, module in enumerate(self.depths):
                module.set_weights(_of(d, tensors))  # type: ignore[operator]


def _of(number: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one layer, without its number in their names."""
    prefix = f"{number}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _numbered(layers: nn.ModuleList) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(layers):
        tensors |= {f"{i}.{name}": t for name, t in layer.named().items()}  # type: ignore[operator]
    return tensors


def _check_drafts(K: int, heads: int) -> None:
    if K > heads:
        raise ValueError(f"K must be at most num_heads={heads}, got {K}")
