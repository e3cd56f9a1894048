"""Whether drafts ever make decoding slower on a CPU, where K is chosen while running.

    python benchmarks/bench_adaptive.py --limit 12

Two models in one process decode each prompt side by side, a few tokens each in turn, one with
drafts and one without: the machine's speed drifts by more within a second than drafts may cost.
Then they change sides, since where its memory lies makes one of two equal models up to 1 % faster.
They do so `--alternations` times, more often if the answers are short, with drafts from the model's
heads and n-grams, with hostile ones, whose drafts are all wrong at the same confidence, and as a
control with none on either side; one prompt at a time, then three together.

Tokens must be equal: a difference is red, exit code 1 and no speed. A row is one prompt (or three):
the ratio of the two rates (of both sides' medians, the geometric mean), the first ratio, and the
share of the steps that each K had. The last line is one JSON object.
"""

import argparse
import sys
import time
from collections import Counter
from itertools import islice
from statistics import geometric_mean, median
from typing import Any

from common import (
    Finish,
    add_names,
    add_prompts,
    encode,
    environment,
    first_line,
    load,
    read_prompts,
    run,
)

from mtpkern import LLM, Completion, SamplingParams
from mtpkern.arguments import Parser, at_least
from mtpkern.drafters.base import Drafter, DraftInput, Drafts
from mtpkern.drafters.ngram import CompanionDrafter

TOGETHER = 3
# Tokens per sequence that one model decodes before the other's turn.
BLOCK = 4
KINDS = ("heads", "hostile", "plain")


class Spoiled:
    """A drafter whose drafts are each replaced by the next token id."""

    def __init__(self, inner: Drafter, vocabulary: int):
        self.inner, self.vocabulary = inner, vocabulary

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def guess(self, step: DraftInput, count: int) -> Drafts:
        drafts = self.inner.guess(step, count)
        if drafts.empty:
            return drafts
        return drafts._replace(tokens=(drafts.tokens + 1) % self.vocabulary)


def main(argv: list[str] | None = None) -> int:
    return run(parser(), measure, argv)


def measure(args: argparse.Namespace, finish: Finish) -> int:
    facts = environment()
    print(first_line(facts))
    prompts = read_prompts(args.prompts, args.limit)
    rows: list[dict[str, Any]] = []
    options: dict[str, Any] = {"threads": args.threads, "max_batch": TOGETHER}
    groups = [[i] for i in range(len(prompts))]
    groups += [list(range(i, min(i + 3, len(prompts)))) for i in range(0, len(prompts), TOGETHER)]
    for kind in args.drafts or KINDS:
        models = [LLM(args.model, heads=args.heads, **options) for _ in range(2)]
        ids = [encode(models[0], prompt["turns"][0]) for prompt in prompts]
        if kind == "hostile":
            for llm in models:
                spoil(llm)
        with args.status.phase(f"decoding, {kind}", len(groups)) as phase:
            for group in groups:
                row = alternate(models, [ids[i] for i in group], kind, args)
                phase.advance(note=f"{len(group)} at a time")
                rows.append({"drafter": kind, "prompts": group, "batch": len(group), **row})
    report = {"schema": 1, "environment": facts | {"load_after": load()}, "rows": rows}
    red = [row for row in rows if not row["identical"]]
    if red:
        print(f"RED: tokens differ in {len(red)} of {len(rows)} rows; no speed is reported")
        return finish(report | {"rows": []}, 1)
    print(table(rows))
    return finish(report, 0)


def parser() -> Parser:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", help="a directory, a hub id or a name (default: SmolLM2-135M-Instruct)")
    add("--heads", default="auto", help="auto, none, a name or a directory")
    add_names(parser, "--drafts", KINDS)
    add_prompts(parser, limit=12)
    add("--alternations", type=at_least(1), default=5, metavar="N", help="turns on each side")
    add("--threads", type=at_least(1), metavar="N", help="default: one per physical core")
    return parser


def spoil(llm: LLM) -> None:
    """Replace the drafts of an LLM's heads and n-grams by wrong ones."""
    vocabulary = llm.config.vocab_size
    drafter = llm.drafter
    if isinstance(drafter, CompanionDrafter):
        heads, copies = Spoiled(drafter.drafter, vocabulary), Spoiled(drafter.ngram, vocabulary)
        llm.drafter = CompanionDrafter(copies, heads, llm.ops)
        llm.runner.ngram = copies  # what searches while the heads rest
    else:
        llm.drafter = Spoiled(drafter, vocabulary)


class Decoding:
    """Prompts being decoded by one model, some tokens at a time, and the time that this takes."""

    def __init__(
        self, llm: LLM, prompts: list[list[int]], params: SamplingParams, speculate: bool
    ) -> None:
        self.events = llm.stream_batch(prompts, params, speculate=speculate)
        self.completions: dict[int, Completion] = {}
        self.count = len(prompts)
        self._seconds = 0.0

    @property
    def running(self) -> bool:
        return len(self.completions) < self.count

    def advance(self, tokens: int) -> None:
        begin = time.perf_counter()
        for i, event in islice(self.events, tokens):
            if event.completion is not None:
                self.completions[i] = event.completion
        self._seconds += time.perf_counter() - begin

    def tokens(self) -> list[list[int]]:
        return [self.completions[i].token_ids for i in range(self.count)]

    def rate(self) -> float:
        """Tokens per second, reading the prompts left out."""
        stats = [completion.stats for completion in self.completions.values()]
        seconds = self._seconds - sum(one.prefill_seconds for one in stats)
        return sum(one.new_tokens for one in stats) / seconds


def alternate(
    models: list[LLM], prompts: list[list[int]], kind: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Decode prompts on both models in turn -> a row of the report."""
    params = SamplingParams(max_tokens=args.max_tokens)
    ratios, same, chosen, tokens = [], True, Counter[int](), 0
    # Short answers more often: a hiccup of 1 ms is 2 % of 16 tokens.
    turns = 2 * args.alternations
    while len(ratios) < turns or tokens < turns * args.max_tokens or len(ratios) % 2:
        turn = len(ratios)
        with_drafts = Decoding(models[turn % 2], prompts, params, kind != "plain")
        without = Decoding(models[1 - turn % 2], prompts, params, False)
        order = [with_drafts, without]
        if turn // 2 % 2:
            order.reverse()
        while any(one.running for one in order):
            for one in order:
                if one.running:
                    one.advance(BLOCK * len(prompts))
            order.reverse()
        ratios.append(with_drafts.rate() / without.rate())
        same = same and with_drafts.tokens() == without.tokens()
        for completion in with_drafts.completions.values():
            chosen.update(completion.stats.steps_by_k)
            tokens += completion.stats.new_tokens
    steps = sum(chosen.values())
    return {
        "identical": same,
        "ratio": geometric_mean(median(ratios[side::2]) for side in (0, 1)),
        "first_ratio": ratios[0],
        "plain_tokens_per_second": without.rate(),
        "share_of_steps_by_k": {str(k): chosen[k] / steps for k in sorted(chosen)},
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["drafter  batch  prompts  ratio  first  plain tok/s  K: share of steps"]
    for row in rows:
        shares = " ".join(f"{k}: {n:.0%}" for k, n in row["share_of_steps_by_k"].items())
        named = ",".join(map(str, row["prompts"]))
        lines.append(
            f"{row['drafter']:<8} {row['batch']:>5}  {named:<7} {row['ratio']:>6.3f} "
            f"{row['first_ratio']:>6.3f} {row['plain_tokens_per_second']:>12.1f}  {shares}"
        )
    worst = min(rows, key=lambda row: row["ratio"])
    lines.append(f"worst: {worst['ratio']:.3f} ({worst['drafter']}, batch {worst['batch']})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
