"""Multi-token prediction from the start: a tiny Llama of bytes, trained together with its heads.

    python -m mtpkern.train.joint --out tiny

H heads stand in place of the last layer, all fed with the states below it, and head i learns the
token i further on; the losses are added up (Gloeckle et al. 2024, section 2). It learns Python from
the standard library's sources in a few minutes on a CPU and is written as an mtp_llama checkpoint
with its tokenizer. The last lines say how much of its answers was drafted, and how to ask it more.
"""

import argparse
import json
import random
import shlex
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from mtpkern.arguments import Parser, at_least, run
from mtpkern.checkpoints.vocabulary import BYTE_OF
from mtpkern.errors import UserError, printable
from mtpkern.outputs import FORCE, output_directory, writing
from mtpkern.status import SILENT, Status
from mtpkern.train.budget import fastest_dtype
from mtpkern.train.muon import Muon
from mtpkern.train.prompts import python_files

VOCABULARY = 256
QUESTION = "def main(argv=None):"
FILES = ("config.json", "model.safetensors", "tokenizer.json")


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


class Norm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Layer(nn.Module):
    """A Llama layer over whole sequences x [B, S, E], under the names of Hugging Face's layout."""

    def __init__(self, s: Sizes):
        super().__init__()
        E, wide = s.hidden_size, s.intermediate_size
        self.sizes = s
        self.self_attn = nn.ModuleDict(
            {f"{n}_proj": nn.Linear(E, E, bias=False) for n in "qkvo"},
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(E, wide, bias=False),
                "up_proj": nn.Linear(E, wide, bias=False),
                "down_proj": nn.Linear(wide, E, bias=False),
            }
        )
        self.input_layernorm = Norm(E, s.eps)
        self.post_attention_layernorm = Norm(E, s.eps)

    def forward(self, x: Tensor) -> Tensor:
        y = self.input_layernorm(x)
        q, k, v = (
            self.self_attn[f"{n}_proj"](y).unflatten(-1, (self.sizes.num_heads, -1)).transpose(1, 2)
            for n in "qkv"
        )
        q, k = (rotate(t, self.sizes.rope_theta) for t in (q, k))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.self_attn["o_proj"](o.transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(x)
        gated = F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y)
        return x + self.mlp["down_proj"](gated)


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotate x [B, H, S, D] by its positions 0..S-1 (Su et al. 2021)."""
    S, D = x.shape[-2:]
    angle = torch.arange(S)[:, None] * theta ** -(torch.arange(0, D, 2) / D)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class JointLlama(nn.Module):
    """The trunk and its heads; forward gives the logits of every head."""

    def __init__(self, s: Sizes):
        super().__init__()
        self.sizes = s
        self.embed_tokens = nn.Embedding(VOCABULARY, s.hidden_size)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.num_layers))
        self.mtp_heads = nn.ModuleList(Layer(s) for _ in range(s.heads - 1))
        self.mtp_norms = nn.ModuleList(Norm(s.hidden_size, s.eps) for _ in range(s.heads))
        for w in self.parameters():
            if w.dim() == 2:
                nn.init.normal_(w, std=0.02)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """tokens [B, S] -> H logits [B, S, V]; head i predicts the token i + 1 after each."""
        x = self.embed_tokens(tokens)
        for layer in self.layers[:-1]:
            x = layer(x)
        last = [self.layers[-1], *self.mtp_heads]
        normed = (norm(layer(x)) for layer, norm in zip(last, self.mtp_norms, strict=True))
        return [F.linear(y, self.embed_tokens.weight) for y in normed]

    def save(self, directory: Path) -> None:
        """Write the checkpoint and its tokenizer; the embedding is the LM head too."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{n}": t.detach().contiguous() for n, t in self.named_parameters()}
        with writing(directory / "model.safetensors"):
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
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
    matrices = [w for n, w in model.named_parameters() if w.dim() == 2 and "embed" not in n]
    rest = [w for n, w in model.named_parameters() if w.dim() == 1 or "embed" in n]
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
                raise UserError(f"the loss of step {len(losses) + 1} is no number")
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command -> exit code, as `mtpkern.arguments.run` has it."""
    p = Parser(
        prog="python -m mtpkern.train.joint",
        description="Train a tiny Llama together with its heads",
    )
    p.set_defaults(run=_train)
    add = p.add_argument
    add("--out", type=Path, required=True, help="directory of the checkpoint")
    add("--force", action="store_true", help=FORCE)
    add("--text", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="Python files")
    add("--steps", type=at_least(1), default=600)
    add("--batch", type=at_least(1), default=8)
    add("--lr", type=at_least(0.0), default=5e-3)
    add("--seed", type=at_least(0), default=0)
    return run(p, argv)


def _train(a: argparse.Namespace) -> int:
    torch.manual_seed(a.seed)
    with output_directory(a.out, FILES, force=a.force, sources=[a.text]) as directory:
        with a.status.phase("reading Python files"):
            learned, asked = read_sources(a.text, a.seed)
        model = JointLlama(Sizes())
        learn(model, learned, a.steps, a.batch, a.lr, a.status)
        with writing(a.out):
            model.save(directory)

    from mtpkern import LLM, SamplingParams

    K = model.sizes.heads - 1
    llm = LLM(a.out, ngram=False, num_speculative_tokens=K, status=a.status)
    prompts = [asked[at : at + 200].tolist() for at in range(0, len(asked) - 200, len(asked) // 20)]
    params = SamplingParams(max_tokens=200)
    with a.status.phase("answering with drafts"):
        drafted = llm.generate(prompts, params)
    with a.status.phase("answering without"):
        plain = llm.generate(prompts, params, speculate=False)
    same = sum(d.token_ids == p.token_ids for d, p in zip(drafted, plain, strict=True))
    tokens, steps = (sum(getattr(d.stats, n) for d in drafted) for n in ("new_tokens", "steps"))
    print(bytes(prompts[0][-80:]).decode(errors="replace"), end="")
    print(bytes(drafted[0].token_ids).decode(errors="replace"))
    print(
        f"{tokens / steps:.2f} tokens per step, K = {K}; tokens identical on {same} of "
        f"{len(prompts)}"
    )
    print("To ask it more, give it the beginning of a Python file:")
    command = ["python", "-m", "mtpkern", "generate", "--model", str(a.out), QUESTION]
    print(f"  {shlex.join(command)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
