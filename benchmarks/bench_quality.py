"""What the weights' bits and rounded activations cost: perplexity, and KL divergence from float32.

    python benchmarks/bench_quality.py                            # the default model, 20,000 tokens
    python benchmarks/bench_quality.py --llama-python PYTHON      # llama.cpp beside it
    python benchmarks/bench_quality.py --weights q4_0 --tokens 2000

The text is cut into windows of 512 tokens (or the model's context, if that is shorter); each
position predicts the next token from the window so far. The truth is the same file expanded to
float32, with keys and values in float32. llama.cpp reports its 1,000 most likely tokens at every
tenth position (more would take hours); all other tokens count as one, for both engines, and the
difference of the two divergences is given with its standard error over the positions.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import torch
from common import Finish, environment, first_line, run
from peer_process import Failed, visit
from torch import Tensor

from mtpkern import LLM, UserError
from mtpkern.arguments import Parser, at_least
from mtpkern.cache import KVCache
from mtpkern.checkpoints.resolve import resolve_model
from mtpkern.errors import printable

WINDOW = 512
ROWS = 128
EVERY = 10  # positions of which llama.cpp is asked one
LIKELIEST = 1000


class Quality:
    """Distributions beside the exact ones, position by position."""

    def __init__(self) -> None:
        self.likelihoods: list[Tensor] = []  # negative logarithms, where the next token is known
        self.divergences: list[Tensor] = []  # KL(float32 || these bits)
        self.agreeing: list[Tensor] = []  # whether the most likely token is the same

    def add(self, exact: Tensor, one: Tensor, after: Tensor | None = None) -> None:
        """Add rows [R, V] of log-probabilities, of which `after` [R] came."""
        exact, one = exact.double(), one.double()
        if after is not None:
            self.likelihoods.append(-one.gather(1, after[:, None])[:, 0])
        self.divergences.append((exact.exp() * (exact - one)).sum(-1))
        self.agreeing.append(exact.argmax(-1) == one.argmax(-1))

    def divergence(self) -> Tensor:
        return torch.cat(self.divergences)

    def summary(self) -> dict[str, Any]:
        found = {
            "positions": len(self.divergence()),
            "mean_kl": round(float(self.divergence().mean()), 6),
            "same_top": round(float(torch.cat(self.agreeing).double().mean()), 4),
        }
        if self.likelihoods:
            found["perplexity"] = round(float(torch.cat(self.likelihoods).mean().exp()), 4)
        return found


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", metavar="FILE", help="a GGUF or a directory (default: the default model)")
    add("--weights", default="auto", metavar="FORMAT", help="round the weights to this format")
    add("--text", type=Path, metavar="FILE", help="default: the help topics of this Python")
    add("--tokens", type=at_least(2), default=20_000, metavar="N", help="tokens of the text")
    add("--llama-python", metavar="PYTHON", help="a Python that has xllamacpp; needs a GGUF")
    return run(parser, measure, argv)


def measure(args: argparse.Namespace, finish: Finish) -> int:
    facts = environment()
    print(first_line(facts))
    options: dict[str, Any] = {"heads": "none", "ngram": False, "num_speculative_tokens": 0}
    options |= {"max_batch": 1, "device": "cpu"}
    ours = LLM(args.model, weights=args.weights, **options)
    truth = LLM(args.model, weights="fp32", dtype="float32", **options)
    windows = text_windows(args, ours)
    theirs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    if args.llama_python:
        theirs = llama_answers(args, windows)
    quality = {name: Quality() for name in ("float32", ours.weights)}
    sampled = {name: Quality() for name in (ours.weights, "llama.cpp")}
    with args.status.phase("comparing", sum(map(len, windows)), "tokens") as phase:
        for number, window in enumerate(windows):
            pairs = zip(logprobs(truth, window), logprobs(ours, window), strict=True)
            for begin, (exact, mine) in zip(range(0, len(window), ROWS), pairs, strict=True):
                after = torch.tensor(window[begin + 1 : begin + 1 + ROWS])
                for name, one in (("float32", exact), (ours.weights, mine)):
                    quality[name].add(exact[: len(after)], one[: len(after)], after)
                for at in range(len(after)):
                    if (number, begin + at) in theirs:
                        ids, values = theirs[number, begin + at]
                        for name, one in ((ours.weights, mine[at, ids]), ("llama.cpp", values)):
                            sampled[name].add(lumped(exact[at, ids])[None], lumped(one)[None])
                phase.advance(len(exact))
    rows = [{"weights": name} | one.summary() for name, one in quality.items()]
    if theirs:
        rows += [{"sampled": name} | one.summary() for name, one in sampled.items()]
        gap = sampled[ours.weights].divergence() - sampled["llama.cpp"].divergence()
        error = float(gap.std()) / math.sqrt(len(gap))
        rows[-1] |= {"mean_kl_of_ours_minus_this": round(float(gap.mean()), 6)}
        rows[-1] |= {"standard_error": round(error, 6)}
    for row in rows:
        print(" ".join(f"{key} {value}" for key, value in row.items()))
    return finish({"schema": 1, "environment": facts, "rows": rows}, 0)


def text_windows(args: argparse.Namespace, llm: LLM) -> list[list[int]]:
    """The text's first tokens, cut into windows."""
    if args.text is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics.values())
    else:
        try:
            text = args.text.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{printable(args.text)} is not UTF-8 text") from None
    if llm.tokenizer is None:
        raise UserError("the model has no tokenizer for a text")
    ids = llm.tokenizer.encode(text)[: args.tokens]
    if len(ids) < args.tokens:
        raise UserError(f"the text has {len(ids)} tokens, fewer than --tokens {args.tokens}")
    size = min(WINDOW, llm.config.max_position_embeddings)
    return [ids[i : i + size] for i in range(0, len(ids), size)]


@torch.inference_mode()
def logprobs(llm: LLM, window: list[int]) -> Iterator[Tensor]:
    """Log-probabilities [rows, V] of a window's positions, at most ROWS at a time."""
    config = llm.config
    frequencies, scaling = config.rope.inverse_frequencies(config.head_dim)
    cache = KVCache.empty(
        layers=config.num_layers,
        pages=1,
        page_size=WINDOW,
        page_table=torch.ones(1, 1, dtype=torch.int32),
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        inverse_frequencies=frequencies,
        rope_scaling=scaling,
        dtype=llm.dtype,
        padded_dim=llm.ops.padded_dim,
    )
    for begin in range(0, len(window), ROWS):
        ids = torch.tensor([window[begin : begin + ROWS]])
        at = cache.at(torch.tensor([begin]))
        hidden, _ = llm.ops.layers(llm.trunk, ids, at)
        trunk = llm.trunk
        eps = config.rms_norm_eps
        _, projected = llm.ops.project(hidden, trunk.norm, eps, trunk.vocabulary, None)
        yield projected.logits.log_softmax(-1)  # type: ignore[attr-defined]


def lumped(values: Tensor) -> Tensor:
    """Log-probabilities of some tokens [n] -> [n + 1], all others as one."""
    rest = (1 - values.double().exp().sum()).clamp_(min=1e-9).log()
    return torch.cat([values.double(), rest[None]])


def llama_answers(
    args: argparse.Namespace, windows: list[list[int]]
) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """llama.cpp's most likely tokens, (ids [n], log-probabilities [n]), by window and position."""
    model = Path(args.model) if args.model else resolve_model(None) / "model.gguf"
    if not model.is_file():
        raise UserError("--llama-python needs a GGUF as --model")
    places = [(n, at) for n, w in enumerate(windows) for at in range(EVERY - 1, len(w), EVERY)]
    job: dict[str, Any] = {
        "model": str(model),
        "threads": torch.get_num_threads(),
        "context": WINDOW + 8,
        "settings": {"flash_attention": True, "likeliest": LIKELIEST},
        "prompts": [windows[n][: at + 1] for n, at in places],
        "prefill": [],
        "max_tokens": 1,
        "warm_up": False,
        "seconds": 36_000,
    }
    script = Path(__file__).with_name("peer_llama.py")
    with args.status.phase("asking llama.cpp", len(places), "positions"):
        try:
            answers = visit([args.llama_python, str(script)], job).answers
        except (Failed, OSError) as error:
            raise UserError(f"llama.cpp: {error}") from None
    found = {}
    for place, answer in zip(places, answers, strict=True):
        ids, values = zip(*answer.likeliest, strict=True)
        found[place] = torch.tensor(ids), torch.tensor(values)
    return found


if __name__ == "__main__":
    sys.exit(main())
