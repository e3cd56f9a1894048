"""Sequential heads with one module, MTP and EAGLE-3, as they are trained: on chains of K steps.

Row j pairs the features of token j with the embedding of token j + 1 and predicts token j + 2.
The unrolled steps are EAGLE-3's training-time test (arXiv 2503.01840): each step is fed the hidden
state of the one before, as in drafting, so that the head learns on its own outputs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtpkern.rope import RopeConfig
from mtpkern.train.heads.layer import Layer, rows

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
    model_type: str = "mtpkern_mtp"
    num_heads: int | None = None  # the number of modules if each drafts one position

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


class MtpHead(Layer):
    """One MTP module.

    It is initialised as the identity: fc passes on the model's final hidden state, the layer's
    input is the mean of that and the embedding, and the layer adds nothing.
    """

    norms: tuple[str, ...] = NORMS
    spread: Tensor
    draft_vocab: Tensor

    def __init__(self, config: HeadConfig):
        super().__init__(config.head_dim, RopeConfig(theta=config.rope_theta), config.rms_norm_eps)
        self.config, E = config, config.hidden_size
        eye = torch.eye(E)
        for name, shape in config.shapes().items():
            w = torch.randn(shape) * shape[1] ** -0.5
            if name in ("self_attn.o_proj", "mlp.down_proj"):
                w = torch.zeros(shape)
            elif name == "fc":
                w = torch.cat([*(0 * eye for _ in config.tap_layers[1:]), eye], 1)
            elif name == "input_proj":
                w = torch.cat([eye, eye], 1) / 2
            self.weights[name.replace(".", "/")] = nn.Parameter(w)
        for name in self.norms:
            self.weights[name] = nn.Parameter(torch.ones(E))
        # fc is fed features divided by their spread, so that a few large dimensions do not
        # dominate; exported heads have fc's columns divided instead.
        self.register_buffer("spread", torch.ones(len(config.tap_layers) * E))
        ids = torch.zeros(config.draft_vocab_size, dtype=torch.int32)
        self.register_buffer("draft_vocab", ids)

    def prepare(self, spread: Tensor) -> None:
        """Scale the initial weights by the features' root mean squares [n*E]."""
        self.rescale(spread)
        with torch.no_grad():
            if (self.weights["final_layernorm"] == 1).all():
                # Half the model's scale: predictions further ahead are less certain.
                size = spread[-self.config.hidden_size :].pow(2).mean().sqrt()
                self.weights["final_layernorm"].fill_(size / 2)

    def rescale(self, spread: Tensor) -> None:
        """Divide the features by `spread` and multiply fc by it. No draft changes, and an
        optimiser's step then has the same effect in every column."""
        with torch.no_grad():
            if "fc" in self.weights:
                self.weights["fc"].mul_(spread / self.spread)
            self.spread.copy_(spread)

    def tensors(self) -> dict[str, Tensor]:
        """The weights under their names in a heads directory."""
        tensors = self.named()
        if "fc.weight" in tensors:
            tensors["fc.weight"] = tensors["fc.weight"] / self.spread
        return tensors | {"draft_vocab": self.draft_vocab}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Set all weights from what `tensors` returns."""
        self.draft_vocab.copy_(tensors.pop("draft_vocab"))
        self.set_weights(tensors)

    def pairs(self, hidden: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """hidden, embedded [B, Q, E] -> the layer's input [B, Q, E], and its attention's input."""
        hidden, embedded = (
            self.norm(hidden, "hidden_layernorm"),
            self.norm(embedded, "token_layernorm"),
        )
        x = self.linear(torch.cat([hidden, embedded], -1), "input_proj")
        return x, self.norm(x, "input_layernorm")

    def paired_next(self, x: Tensor, normed: Tensor) -> Tensor:
        """The hidden state of the chain's next step, made of the layer's output x and its normed
        output."""
        return normed

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

        Each start is a chain of its own. Its step k is at position start + k, is fed the token
        after that, and attends to the first pass up to start and to the chain's own steps 1..k.
        `keep` [Q'] selects the chains that continue after the first step.
        """
        (B, S, _), D = features.shape, self.config.head_dim
        Hk = self.config.num_key_value_heads
        G = self.config.num_attention_heads // Hk
        hidden = features
        if "fc" in self.weights:
            hidden = self.linear(hidden / self.spread.to(hidden.dtype), "fc")
        x, y = self.pairs(hidden, F.embedding(tokens[:, 1 : S + 1], embedding))
        positions = torch.arange(S, device=features.device)
        first_keys = self.rope(self.projected(y, "k"), positions[None]).transpose(1, 2)
        first_values = self.projected(y, "v").transpose(1, 2)
        x, y = rows(x, starts), rows(y, starts)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        out: list[Tensor] = []
        for k in range(K):
            if k:
                hidden = self.paired_next(x, out[-1])
                if k == 1 and keep is not None:
                    hidden, starts = hidden[:, keep], starts[:, keep]
                x, y = self.pairs(hidden, F.embedding(tokens.gather(1, starts + k + 1), embedding))
                keys.append(self.rope(self.projected(y, "k"), starts + k))
                values.append(self.projected(y, "v"))
            Q = x.shape[1]
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
            x = self.finish(x, o.reshape(B, Q, -1))
            out.append(self.norm(x, "final_layernorm"))
        return out


@dataclass(frozen=True)
class Eagle3Config(HeadConfig):
    """The config.json of an EAGLE-3 head as published, with our own keys besides."""

    model_type: str = "llama"
    architectures: tuple[str, ...] = ("LlamaForCausalLMEagle3",)
    vocab_size: int = 0  # the model's
    max_position_embeddings: int = 2048
    num_hidden_layers: int = 1
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    torch_dtype: str = "bfloat16"

    def shapes(self) -> dict[str, tuple[int, int]]:
        shapes = super().shapes()
        del shapes["input_proj"]
        for name in ("q_proj", "k_proj", "v_proj"):
            name = f"self_attn.{name}"
            shapes[name] = (shapes[name][0], 2 * self.hidden_size)
        return shapes


class Eagle3Head(MtpHead):
    """EAGLE-3 (Li et al. 2025): attention reads both halves of a pair side by side, and the next
    step continues from the layer's output before the norm.

    It is initialised as the model cut off after the last tapped layer.
    """

    norms = tuple(name for name in NORMS if name != "input_layernorm")
    # Ours -> the published name; all others are midlayer's.
    published = {
        "fc": "fc",
        "token_layernorm": "midlayer.input_layernorm",
        "hidden_layernorm": "midlayer.hidden_norm",
        "final_layernorm": "norm",
    }

    def prepare(self, spread: Tensor) -> None:
        """As MtpHead.prepare. fc scales the last tap's features to a mean square of one, so that
        what the layer adds is not small beside them."""
        self.rescale(spread)
        with torch.no_grad():
            self.weights["fc"].div_(spread[-self.config.hidden_size :].pow(2).mean().sqrt())

    def tensors(self) -> dict[str, Tensor]:
        """The weights under their published names, without the vocabulary."""
        tensors = super().tensors()
        del tensors["draft_vocab"]
        return {self._published(name): tensor for name, tensor in tensors.items()}

    def vocabulary(self, lm_head: Tensor) -> dict[str, Tensor]:
        """The rows of the model's lm_head [V, E] for the draft vocabulary, and its tables: draft id
        i is token i + d2t[i], and t2d [V] marks the tokens in the vocabulary."""
        ids = self.draft_vocab.long()
        known = torch.zeros(len(lm_head), dtype=torch.bool, device=ids.device)
        return {
            "lm_head.weight": lm_head[ids],
            "d2t": ids - torch.arange(len(ids), device=ids.device),
            "t2d": known.index_fill(0, ids, True),
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        ids = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
        own = {f"{name.replace('/', '.')}.weight" for name in self.weights}
        super().load({name: tensors[self._published(name)] for name in own} | {"draft_vocab": ids})

    def pairs(self, hidden: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        halves = self.norm(embedded, "token_layernorm"), self.norm(hidden, "hidden_layernorm")
        return hidden, torch.cat(halves, -1)

    def paired_next(self, x: Tensor, normed: Tensor) -> Tensor:
        return x

    def _published(self, name: str) -> str:
        stem = name.removesuffix(".weight")
        return self.published.get(stem, f"midlayer.{stem}") + ".weight"
