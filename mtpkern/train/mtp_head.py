"""The sequential MTP head as it is trained: chains of K steps, their loss, and the export.

Row j pairs the features of token j with the embedding of token j + 1 and predicts token j + 2.
The unrolled steps are EAGLE-3's training-time test (arXiv 2503.01840): a step is fed with the
hidden state of the one before, as in drafting, so the head learns on its own mistakes.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
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
    tap_layers: tuple[int, int, int]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float
    rms_norm_eps: float
    draft_vocab_size: int
    base_model: str
    max_num_speculative_tokens: int = 16
    model_type: str = "mtpkern_mtp"

    def shapes(self) -> dict[str, tuple[int, int]]:
        """The matrices, [out, in]."""
        E, F_, D = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_attention_heads * D, self.num_key_value_heads * D
        return {
            "fc": (E, 3 * E),
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
                w = torch.cat([0 * eye, 0 * eye, eye], 1)
            elif name == "input_proj":
                w = torch.cat([eye, eye], 1) / 2
            # A ParameterDict takes no dots in its names.
            self.weights[name.replace(".", "/")] = nn.Parameter(w)
        for name in NORMS:
            self.weights[name] = nn.Parameter(torch.ones(E))
        # fc sees features over their spread, lest a few large dimensions drown the rest; the export
        # divides fc's columns instead.
        self.register_buffer("spread", torch.ones(3 * E))
        ids = torch.zeros(config.draft_vocab_size, dtype=torch.int32)
        self.register_buffer("draft_vocab", ids)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name.replace(".", "/")].to(x.dtype))

    def norm(self, x: Tensor, name: str) -> Tensor:
        w = self.weights[name].to(x.dtype)
        return F.rms_norm(x, x.shape[-1:], w, self.config.rms_norm_eps)

    def rope(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x [B, Q, H, D] to positions [B, Q]."""
        D = x.shape[-1]
        angle = positions[..., None, None] * self.config.rope_theta ** -(torch.arange(0, D, 2) / D)
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
        """features [B, S, 3E], tokens [B, S + K], starts [B, Q] -> K hidden states [B, Q, E].

        Each start is a chain of its own. Its step k stands at position start + k, is fed the token
        after it, and attends to the first pass up to start and to the chain's own later steps.
        `keep` [Q'] picks the chains that go on after the first step.
        """
        (B, S, _), D = features.shape, self.config.head_dim
        Hk = self.config.num_key_value_heads
        G = self.config.num_attention_heads // Hk
        hidden = self.linear(features / self.spread.to(features.dtype), "fc")
        x = self.pairs(hidden, F.embedding(tokens[:, 1 : S + 1], embedding))
        y = self.norm(x, "input_layernorm")
        first_keys = self.rope(self.projected(y, "k"), torch.arange(S)[None]).transpose(1, 2)
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
            later = (torch.arange(S) > starts[..., None])[:, None, None]
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


class DraftLoss(torch.autograd.Function):
    """Summed cross-entropy of softmax(hidden @ table.T) and sparse targets.

    hidden [R, E], table [Vd, E] (frozen), ids [R, N] with weights [R, N] -> scalar. The gradient is
    made on the way, a few rows at a time, so that the logits [R, Vd] never exist as a whole.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, table: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gradients, total = [], torch.zeros(())
        for h, i, w in zip(hidden.split(256), ids.split(256), weights.split(256), strict=True):
            p = F.linear(h, table).softmax(-1)
            total -= (w * p.gather(1, i).float().clamp(min=1e-9).log()).sum()
            flat = i + torch.arange(len(i))[:, None] * p.shape[1]
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
    """What R rows shall predict -> draft ids and weights [R, M + 1], a row's weights summing to 1.

    The model's likeliest tokens ids [R, M] by their logits, and its own token labels [R] with the
    share `hard`, as far as to_draft [V] knows them (-1: outside); a row without any sums to 0.
    """
    inside, label = to_draft[ids], to_draft[labels][:, None]
    p = logits.masked_fill(inside < 0, float("-inf")).softmax(-1).nan_to_num(0)
    weights = torch.cat([p * (1 - hard), hard * (label >= 0)], 1)
    total = weights.sum(1, keepdim=True)
    weights = torch.where(total > 1e-6, weights / total, 0)
    return torch.cat([inside, label], 1).clamp(min=0), weights


def export_head(head: MtpHead, directory: Path) -> None:
    """Write model.safetensors (bf16) and config.json, each in one rename."""
    tensors = {f"{k.replace('/', '.')}.weight": w.detach() for k, w in head.weights.items()}
    tensors["fc.weight"] = tensors["fc.weight"] / head.spread
    tensors = {name: t.bfloat16().contiguous() for name, t in tensors.items()}
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{os.getpid()}"
    save_file(tensors | {"draft_vocab": head.draft_vocab.clone()}, temporary)
    temporary.chmod(0o644)
    temporary.replace(directory / "model.safetensors")
    temporary.write_text(json.dumps(asdict(head.config), indent=2) + "\n")
    temporary.replace(directory / "config.json")


def load_head(directory: Path) -> MtpHead:
    """A head as export_head wrote it, to measure it or to train on."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    head = MtpHead(HeadConfig(**config | {"tap_layers": tuple(config["tap_layers"])}))
    tensors = load_file(directory / "model.safetensors")
    head.draft_vocab.copy_(tensors.pop("draft_vocab"))
    with torch.no_grad():
        for name, tensor in tensors.items():
            head.weights[name.removesuffix(".weight").replace(".", "/")].copy_(tensor)
    return head
