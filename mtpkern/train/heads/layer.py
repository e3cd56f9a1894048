"""A decoder layer as it is trained: float32 weights, computing in the input's dtype."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtpkern.rope import RopeConfig


class Layer(nn.Module):
    """A Llama layer, and what all heads with a decoder layer share.

    `weights` holds matrices and norms under the checkpoint's names, without ".weight" and with "/"
    for ".", which a ParameterDict does not allow.
    """

    frequencies: Tensor

    def __init__(
        self,
        head_dim: int,
        rope: RopeConfig,
        eps: float,
        tensors: Mapping[str, Tensor] | None = None,
    ):
        """`tensors` are initial weights, under their names in a checkpoint."""
        super().__init__()
        self.head_dim, self.eps = head_dim, eps
        frequencies, self.rope_scaling = rope.inverse_frequencies(head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.weights = nn.ParameterDict()
        for name, tensor in (tensors or {}).items():
            self.weights[_key(name)] = nn.Parameter(tensor.to(torch.float32, copy=True))

    def named(self) -> dict[str, Tensor]:
        """The weights under their names in a checkpoint."""
        names = ((k, k if k.endswith("/bias") else f"{k}/weight") for k in self.weights)
        return {name.replace("/", "."): self.weights[k].detach() for k, name in names}

    def set_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy weights, under their names in a checkpoint."""
        for name, tensor in tensors.items():
            self.weights[_key(name)].data.copy_(tensor)

    def linear(self, x: Tensor, name: str) -> Tensor:
        key = _key(name)
        bias = self.weights[f"{key}/bias"].to(x.dtype) if f"{key}/bias" in self.weights else None
        return F.linear(x, self.weights[key].to(x.dtype), bias)

    def norm(self, x: Tensor, name: str) -> Tensor:
        w = self.weights[_key(name)].to(x.dtype)
        return F.rms_norm(x, x.shape[-1:], w, self.eps)

    def rope(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x [B, Q, H, D] to positions [B, Q]."""
        angle = positions[..., None, None] * self.frequencies
        cos, sin = angle.cos() * self.rope_scaling, angle.sin() * self.rope_scaling
        rotated = x.roll(x.shape[-1] // 2, -1) * torch.cat([-sin, sin], -1).to(x.dtype)
        return x * torch.cat([cos, cos], -1).to(x.dtype) + rotated

    def projected(self, y: Tensor, name: str) -> Tensor:
        """y [B, Q, E] -> queries, keys or values [B, Q, H, D]."""
        heads = self.linear(y, f"self_attn.{name}_proj").unflatten(-1, (-1, self.head_dim))
        normed = f"self_attn/{name}_norm" in self.weights
        return self.norm(heads, f"self_attn.{name}_norm") if normed else heads

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Output projection and MLP: x [B, Q, E], attended [B, Q, Hq*D] -> [B, Q, E]."""
        x = x + self.linear(attended, "self_attn.o_proj")
        y = self.norm(x, "post_attention_layernorm")
        y = F.silu(self.linear(y, "mlp.gate_proj")) * self.linear(y, "mlp.up_proj")
        return x + self.linear(y, "mlp.down_proj")

    def run(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        """The whole layer over sequences x [B, S, E]; `at` as in `over`."""
        return self.over(x, self.norm(x, "input_layernorm"), at)

    def over(self, x: Tensor, y: Tensor, at: Tensor | None = None) -> Tensor:
        """The layer over sequences x [B, S, E], whose attention reads y [B, S, .] -> its output
        [B, Q, E] in the rows `at` [B, Q], or in all S."""
        positions = torch.arange(x.shape[1], device=x.device)[None]
        k = self.rope(self.projected(y, "k"), positions).transpose(1, 2)
        v = self.projected(y, "v").transpose(1, 2)
        visible = None
        if at is not None:
            x, y = rows(x, at), rows(y, at)
            visible = (positions[:, None] <= at[..., None])[:, None]
        q = self.rope(self.projected(y, "q"), positions if at is None else at).transpose(1, 2)
        o = F.scaled_dot_product_attention(
            q, k, v, visible, is_causal=visible is None, enable_gqa=True
        )
        return self.finish(x, o.transpose(1, 2).flatten(2))


def _key(name: str) -> str:
    return name.removesuffix(".weight").replace(".", "/")


def rows(x: Tensor, at: Tensor) -> Tensor:
    """The rows `at` [B, Q] of x [B, S, E]: [B, Q, E]."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))
