"""A tiny Llama of bytes that is trained together with its heads.

H heads take the place of the last layer, all fed with the states below it, and head i learns the
token i + 1 further on; the losses are added up (Gloeckle et al. 2024, section 2).
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from mtpkern.checkpoints.vocabulary import BYTE_OF
from mtpkern.errors import UserError, printable
from mtpkern.outputs import writing
from mtpkern.rope import RopeConfig
from mtpkern.status import SILENT, Status
from mtpkern.train.budget import fastest_dtype
from mtpkern.train.heads.layer import Layer
from mtpkern.train.muon import Muon
from mtpkern.train.prompts import python_files

VOCABULARY = 256
INITIAL_STD = 0.02


@dataclass(frozen=True)
class Sizes:
    """A Llama's sizes; num_layers counts the last layer, which is head 0."""

    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 4
    heads: int = 4  # tokens predicted at once
    context: int = 192
    rope_theta: float = 10000.0
    eps: float = 1e-5


def _new_layer(s: Sizes) -> Layer:
    """A Llama layer with as many KV heads as query heads."""
    E, F_ = s.hidden_size, s.intermediate_size
    shapes = {f"self_attn.{name}_proj.weight": (E, E) for name in "qkvo"}
    shapes |= {f"mlp.{name}_proj.weight": (F_, E) for name in ("gate", "up")}
    shapes["mlp.down_proj.weight"] = E, F_
    tensors = {name: torch.randn(shape) * INITIAL_STD for name, shape in shapes.items()}
    tensors["input_layernorm.weight"] = tensors["post_attention_layernorm.weight"] = torch.ones(E)
    return Layer(E // s.num_heads, RopeConfig(theta=s.rope_theta), s.eps, tensors)


class JointLlama(nn.Module):
    """The trunk and its heads; forward gives the logits of every head."""

    def __init__(self, s: Sizes):
        super().__init__()
        self.sizes = s
        self.embedding = nn.Parameter(torch.randn(VOCABULARY, s.hidden_size) * INITIAL_STD)
        self.layers = nn.ModuleList(_new_layer(s) for _ in range(s.num_layers))
        self.heads = nn.ModuleList(_new_layer(s) for _ in range(s.heads - 1))
        self.norms = nn.ParameterList(torch.ones(s.hidden_size) for _ in range(s.heads))

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """tokens [B, S] -> H logits [B, S, V]; head i predicts the token i + 1 after each."""
        x = F.embedding(tokens, self.embedding)
        for layer in self.layers[:-1]:
            x = layer.run(x)  # type: ignore[operator]
        heads = [self.layers[-1], *self.heads]
        last = (head.run(x) for head in heads)  # type: ignore[operator]
        shape, eps = (self.sizes.hidden_size,), self.sizes.eps
        normed = (F.rms_norm(y, shape, w, eps) for y, w in zip(last, self.norms, strict=True))
        return [F.linear(y, self.embedding) for y in normed]

    def tensors(self) -> dict[str, Tensor]:
        """The weights under the names of an mtp_llama checkpoint."""
        tensors = {"model.embed_tokens.weight": self.embedding.detach()}
        for i, w in enumerate(self.norms):
            tensors[f"model.mtp_norms.{i}.weight"] = w.detach()
        for name, layers in (("layers", self.layers), ("mtp_heads", self.heads)):
            for i, layer in enumerate(layers):
                assert isinstance(layer, Layer)
                tensors |= {f"model.{name}.{i}.{n}": w for n, w in layer.named().items()}
        return tensors

    def save(self, directory: Path) -> None:
        """Write the checkpoint and its tokenizer; the embedding is the LM head too."""
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / "model.safetensors"
        with writing(file):
            save_file(self.tensors(), file, metadata={"format": "pt"})
        s = self.sizes
        config = {
            "architectures": ["MTPLlamaForCausalLM"],
            "model_type": "mtp_llama",
            "prediction_heads": s.heads,
            "vocab_size": VOCABULARY,
            "hidden_size": s.hidden_size,
            "intermediate_size": s.intermediate_size,
            "num_hidden_layers": s.num_layers,
            "num_attention_heads": s.num_heads,
            "rms_norm_eps": s.eps,
            "rope_theta": s.rope_theta,
            "max_position_embeddings": 4 * s.context,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
        }
        with writing(directory):
            (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            byte_tokenizer().save(str(directory / "tokenizer.json"))


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose ids are a text's bytes."""
    tokenizer = Tokenizer(models.BPE(vocab=BYTE_OF, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def read_sources(root: Path, seed: int) -> tuple[Tensor, Tensor]:
    """Bytes of the Python files under root, to learn from and, one file in twenty, to ask about.

    Raises UserError where there are too few.
    """
    files = [path for path in python_files(root) if "test" not in path.parts]
    random.Random(seed).shuffle(files)
    split = max(1, len(files) // 20)
    parts = [
        b"\n".join(path.read_bytes() for path in some) for some in (files[split:], files[:split])
    ]
    if min(map(len, parts)) < 1000:
        raise UserError(f"too little Python under {printable(root)} to learn from")
    learned, asked = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return learned, asked


def learn(
    model: JointLlama, text: Tensor, steps: int, batch: int, lr: float, status: Status = SILENT
) -> list[float]:
    """Train on random windows of text -> every step's loss, a mean over heads in nats a byte."""
    s, losses = model.sizes, list[float]()
    weights = [w for w in model.parameters() if w is not model.embedding]
    matrices = [w for w in weights if w.dim() == 2]
    rest = [model.embedding, *(w for w in weights if w.dim() == 1)]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=lr, weight_decay=0.01, dtype=fastest_dtype("cpu")),
        torch.optim.AdamW(rest, lr=lr / 2, weight_decay=0.0),
    ]
    rates = [o.param_groups[0]["lr"] for o in optimizers]
    with status.phase("learning", steps, "steps") as phase:
        for step in range(steps):
            begins = torch.randint(len(text) - s.context - s.heads, (batch, 1))
            window = text[begins + torch.arange(s.context + s.heads)].long()
            logits = model(window[:, : s.context])
            parts = [
                F.cross_entropy(own.flatten(0, 1), window[:, i + 1 : i + 1 + s.context].flatten())
                for i, own in enumerate(logits)
            ]
            loss = torch.stack(parts).mean()
            if not loss.isfinite():
                raise UserError(f"the loss of step {len(losses) + 1} is NaN or infinite")
            loss.backward()
            for optimizer, rate in zip(optimizers, rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * min(
                    1, (step + 1) / 20, 1.05 - step / steps
                )
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            by_head = " ".join(f"{part.item():.2f}" for part in parts)
            phase.advance(1, f"loss by head {by_head}")
    return losses
