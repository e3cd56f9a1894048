"""How many drafts would be accepted: greedy chains replayed on recorded answers.

Drafts count up to the first wrong one, and until then the head is fed its own drafts, which are the
answer's tokens. So one teacher-forced pass over an answer gives every chain that decoding could
start.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.train.dataset import Dataset
from mtpkern.train.heads.families import Head


def lookup(tokens: Sequence[int], end: int, K: int, size: int = 3) -> list[int]:
    """What followed the latest earlier occurrence of the `size` tokens that end at `end`.

    K tokens, repeated periodically where the copy reaches `end`, as kernels/ngram.py drafts; empty
    without an occurrence. Tokens after `end` are not read.
    """
    key = tokens[end - size + 1 : end + 1]
    for at in range(end - 1, size - 2, -1):
        if tokens[at - size + 1 : at + 1] == key:
            return [tokens[at + 1 + k % (end - at)] for k in range(K)]
    return []


def loop_free_length(tokens: Sequence[int], prompt: int, size: int = 8) -> int:
    """The number of tokens before the answer's first repeated n-gram, or of all tokens, as in
    benchmarks/bench_decode.py."""
    seen = set()
    for end in range(prompt + size, len(tokens) + 1):
        gram = tuple(tokens[end - size : end])
        if gram in seen:
            return end - size
        seen.add(gram)
    return len(tokens)


class Tally:
    """Tokens and steps, and drafts offered and accepted by position."""

    def __init__(self, K: int):
        self.tokens, self.steps = 0, 0
        self.offered, self.accepted = [0] * K, [0] * K

    def replay(
        self, tokens: Sequence[int], prompt: int, end: int, drafts: Sequence, hybrid: bool
    ) -> None:
        """Decode tokens[prompt:] and count the steps that do not pass `end`; drafts[i] are the
        head's K guesses after token prompt - 1 + i. `hybrid` copies after a 3-gram match."""
        K, last = len(self.offered), prompt - 1
        while last < end - 1:
            guess = lookup(tokens, last, K) if hybrid else []
            guess = guess or drafts[last + 1 - prompt]
            n = 0
            left = len(tokens) - 1 - last
            while n < min(len(guess), left) and guess[n] == tokens[last + 1 + n]:
                n += 1
            advance = min(n + 1, left)
            if last + advance >= end:
                return
            for position in range(min(len(guess), advance)):
                self.offered[position] += 1
                self.accepted[position] += position < n
            self.tokens, self.steps, last = self.tokens + advance, self.steps + 1, last + advance

    def summary(self) -> dict[str, Any]:
        by_position = [
            round(a / max(o, 1), 4) for a, o in zip(self.accepted, self.offered, strict=True)
        ]
        return {
            "tokens": self.tokens,
            "mean_acceptance_length": round(self.tokens / max(self.steps, 1), 4),
            "acceptance_by_position": by_position,
        }


@torch.inference_mode()
def evaluate(
    head: Head,
    embedding: Tensor,
    lm_head: Tensor,
    data: Dataset,
    K: int,
) -> dict[str, dict[str, Any]]:
    """Replay answers -> summaries by kind (head, hybrid, each also with _loop_free) and category.

    Hybrid copies after a 3-gram match, else drafts the head's chain.
    """
    vocab = head.draft_vocab.long()
    table = lm_head[vocab]
    tallies: dict[str, dict[str, Tally]] = defaultdict(lambda: defaultdict(lambda: Tally(K)))
    for at in range(0, len(data), 8):
        batch = range(at, min(at + 8, len(data)))
        x = {name: t.to(embedding.device) for name, t in data.collate(batch, K).items()}
        features = x["features"].to(embedding.dtype)
        states = head(features, x["tokens"], x["starts"], embedding, K)
        drafts = torch.stack([vocab[F.linear(o, table).argmax(-1)] for o in states], -1).tolist()
        for b, i in enumerate(batch):
            row, tokens = data.sequences[i][1], data.read(i, "tokens").tolist()
            prompt = row["prompt"]
            ends = {"": len(tokens), "_loop_free": loop_free_length(tokens, prompt)}
            for suffix, end in ends.items():
                for kind in ("head", "hybrid"):
                    for category in ("overall", row["category"]):
                        tally = tallies[kind + suffix][category]
                        tally.replay(tokens, prompt, end, drafts[b], kind == "hybrid")
    return {
        kind: {category: tally.summary() for category, tally in sorted(rows.items())}
        for kind, rows in tallies.items()
    }
