"""The sequential MTP head as it is trained: chains of K steps.

Row j pairs the features of token j with the embedding of token j + 1 and predicts token j + 2.
The unrolled steps are EAGLE-3's training-time test (arXiv 2503.01840): a step is fed with the
hidden state of the one before, as in drafting, so the head learns on its own mistakes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = (
    "token_layernorm",
    "hidden_layernorm",
    "input_layernorm",
    "post_attention_layernorm",
    "final_layernorm",
)


@dataclass(frozen=True)
class HeadConfig:
    """A head's config.json. Taps are layers counted from 1; the last one is post-norm."""

    hidden_size: int
    tap_layers: tuple[int, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float
    rms_norm_eps: float
    draft_vocab_size: int
    base_model: str
    base_model_fingerprint: str = ""
    max_num_speculative_tokens: int = 16
    model_type: str = "mtpkern_mtp"

    def shapes(self) -> dict[str, tuple[int, int]]:
        """The matrices, [out, in]."""
        E, F_, D = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_attention_heads * D, self.num_key_value_heads * D
        return {
            **({"fc": (E, len(self.tap_layers) * E)} if len(self.tap_layers) > 1 else {}),
            "input_proj": (E, 2 * E),
            "self_attn.q_proj": (q, E),
            "self_attn.k_proj": (kv, E),
            "self_attn.v_proj": (kv, E),
            "self_attn.o_proj": (E, q),
            "mlp.gate_proj": (F_, E),
            "mlp.up_proj": (F_, E),
            "mlp.down_proj": (E, F_),
        }


class MtpHead(nn.Module):
    """A head with float32 weights that computes in its inputs' dtype.

    It starts as the identity: the hidden state is the model's final one, the layer's input the mean
    of it and the embedding, the layer adds nothing.
    """

    spread: Tensor
    draft_vocab: Tensor

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.config, E = config, config.hidden_size
        eye = torch.eye(E)
        self.weights = nn.ParameterDict()
        for name, shape in config.shapes().items():
            w = torch.randn(shape) * E**-0.5
            if name in ("self_attn.o_proj", "mlp.down_proj"):
                w = torch.zeros(shape)
            elif name == "fc":
                w = torch.cat([*(0 * eye for _ in config.tap_layers[1:]), eye], 1)
            elif name == "input_proj":
                w = torch.cat([eye, eye], 1) / 2
            # A ParameterDict takes no dots in its names.
            self.weights[name.replace(".", "/")] = nn.Parameter(w)
        for name in NORMS:
            self.weights[name] = nn.Parameter(torch.ones(E))
        # fc sees features over their spread, lest a few large dimensions drown the rest; the export
        # divides fc's columns instead.
        self.register_buffer("spread", torch.ones(len(config.tap_layers) * E))
        ids = torch.zeros(config.draft_vocab_size, dtype=torch.int32)
        self.register_buffer("draft_vocab", ids)

    def prepare(self, spread: Tensor) -> None:
        """Take in what the features are like (root mean squares [n*E]): before training begins."""
        with torch.no_grad():
            E = self.config.hidden_size
            if "fc" in self.weights:
                self.weights["fc"].mul_(spread / self.spread)
            self.spread.copy_(spread)
            if (self.weights["final_layernorm"] == 1).all():
                # Half as sure of itself as the model is of the token before.
                self.weights["final_layernorm"].fill_(spread[-E:].pow(2).mean().sqrt() / 2)

    def tensors(self) -> dict[str, Tensor]:
        """The head as head_checkpoint names it."""
        tensors = {f"{k.replace('/', '.')}.weight": w.detach() for k, w in self.weights.items()}
        if "fc.weight" in tensors:
            tensors["fc.weight"] = tensors["fc.weight"] / self.spread
        return tensors | {"draft_vocab": self.draft_vocab}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave."""
        with torch.no_grad():
            self.draft_vocab.copy_(tensors.pop("draft_vocab"))
            for name, tensor in tensors.items():
                self.weights[name.removesuffix(".weight").replace(".", "/")].copy_(tensor)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name.replace(".", "/")].to(x.dtype))

    def norm(self, x: Tensor, name: str) -> Tensor:
        w = self.weights[name].to(x.dtype)
        return F.rms_norm(x, x.shape[-1:], w, self.config.rms_norm_eps)

    def rope(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x [B, Q, H, D] to positions [B, Q]."""
        D = x.shape[-1]
        steps = torch.arange(0, D, 2, device=x.device) / D
        angle = positions[..., None, None] * self.config.rope_theta**-steps
        cos, sin = angle.cos(), angle.sin()
        rotated = x.roll(D // 2, -1) * torch.cat([-sin, sin], -1).to(x.dtype)
        return x * torch.cat([cos, cos], -1).to(x.dtype) + rotated

    def pairs(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """hidden, embedded [B, Q, E] -> the decoder layer's input [B, Q, E]."""
        hidden, embedded = (
            self.norm(hidden, "hidden_layernorm"),
            self.norm(embedded, "token_layernorm"),
        )
        return self.linear(torch.cat([hidden, embedded], -1), "input_proj")

    def projected(self, y: Tensor, name: str) -> Tensor:
        """y [B, Q, E] -> queries, keys or values [B, Q, H, D]."""
        return self.linear(y, f"self_attn.{name}_proj").unflatten(-1, (-1, self.config.head_dim))

    def forward(
        self,
        features: Tensor,
        tokens: Tensor,
        starts: Tensor,
        embedding: Tensor,
        K: int,
        keep: Tensor | None = None,
    ) -> list[Tensor]:
        """features [B, S, n*E], tokens [B, S + K], starts [B, Q] -> K hidden states [B, Q, E].

        Each start is a chain of its own. Its step k stands at position start + k, is fed the token
        after it, and attends to the first pass up to start and to the chain's own later steps.
        `keep` [Q'] picks the chains that go on after the first step.
        """
        (B, S, _), D = features.shape, self.config.head_dim
        Hk = self.config.num_key_value_heads
        G = self.config.num_attention_heads // Hk
        where = features.device
        hidden = features
        if "fc" in self.weights:
            hidden = self.linear(hidden / self.spread.to(hidden.dtype), "fc")
        x = self.pairs(hidden, F.embedding(tokens[:, 1 : S + 1], embedding))
        y = self.norm(x, "input_layernorm")
        positions = torch.arange(S, device=where)
        first_keys = self.rope(self.projected(y, "k"), positions[None]).transpose(1, 2)
        first_values = self.projected(y, "v").transpose(1, 2)
        x = x.gather(1, starts[..., None].expand(-1, -1, x.shape[-1]))
        keys: list[Tensor] = []
        values: list[Tensor] = []
        out: list[Tensor] = []
        for k in range(K):
            if k:
                hidden = out[-1]
                if k == 1 and keep is not None:
                    hidden, starts = hidden[:, keep], starts[:, keep]
                x = self.pairs(hidden, F.embedding(tokens.gather(1, starts + k + 1), embedding))
            y, Q = self.norm(x, "input_layernorm"), x.shape[1]
            if k:
                keys.append(self.rope(self.projected(y, "k"), starts + k))
                values.append(self.projected(y, "v"))
            q = self.rope(self.projected(y, "q"), starts + k).unflatten(2, (Hk, G)) * D**-0.5
            scores = q.permute(0, 2, 3, 1, 4).reshape(B, Hk, G * Q, D) @ first_keys.mT
            later = (positions > starts[..., None])[:, None, None]
            scores = scores.float().view(B, Hk, G, Q, S).masked_fill(later, float("-inf"))
            if k:
                own = torch.stack([(q * key[:, :, :, None]).sum(-1) for key in keys], -1)
                scores = torch.cat([scores, own.permute(0, 2, 3, 1, 4).float()], -1)
            p = scores.softmax(-1).to(x.dtype)
            o = p[..., :S].reshape(B, Hk, G * Q, S) @ first_values
            o = o.view(B, Hk, G, Q, D).permute(0, 3, 1, 2, 4)
            for m, value in enumerate(values):
                o = o + p[..., S + m].permute(0, 3, 1, 2)[..., None] * value[:, :, :, None]
            x = x + self.linear(o.reshape(B, Q, -1), "self_attn.o_proj")
            y = self.norm(x, "post_attention_layernorm")
            y = F.silu(self.linear(y, "mlp.gate_proj")) * self.linear(y, "mlp.up_proj")
            x = x + self.linear(y, "mlp.down_proj")
            out.append(self.norm(x, "final_layernorm"))
        return out
