"""Whether drafts ever make decoding slower on a CPU, where K is chosen while running.

    python benchmarks/bench_adaptive.py --limit 12

Each prompt is decoded with drafts and without in turn, `--alternations` times each, in one process:
with the model's heads and n-grams, and with hostile ones, whose drafts are all wrong at the same
confidence; one prompt at a time, then three together. Tokens must be equal: a difference is red,
exit code 1 and no speed. A row is one prompt (or three): the median ratio of the two rates, the
first ratio, and the share of the steps that each K had. The last line is one JSON object.
"""

import argparse
import sys
from collections import Counter
from statistics import median
from typing import Any

from common import Finish, add_prompts, encode, environment, first_line, load, read_prompts, run

from mtpkern import LLM, SamplingParams, Stats
from mtpkern.arguments import Parser, at_least
from mtpkern.drafters.base import Drafter, DraftInput, Drafts
from mtpkern.drafters.ngram import CompanionDrafter
from mtpkern.status import Phase

TOGETHER = 3


class Spoiled:
    """A drafter whose drafts are each replaced by the next token id."""

    def __init__(self, inner: Drafter, vocabulary: int):
        self.inner, self.vocabulary = inner, vocabulary

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def guess(self, step: DraftInput, count: int) -> Drafts:
        drafts = self.inner.guess(step, count)
        return drafts._replace(tokens=(drafts.tokens + 1) % self.vocabulary)


def main(argv: list[str] | None = None) -> int:
    return run(parser(), measure, argv)


def measure(args: argparse.Namespace, finish: Finish) -> int:
    facts = environment()
    print(first_line(facts))
    prompts = read_prompts(args.prompts, args.limit)
    kinds = {"heads": False, "hostile": True}
    runs = 2 * args.alternations * (len(prompts) + -(-len(prompts) // TOGETHER))
    rows: list[dict[str, Any]] = []
    for kind, hostile in kinds.items():
        llm = LLM(args.model, heads=args.heads, threads=args.threads, max_batch=TOGETHER)
        if hostile:
            spoil(llm)
        ids = [encode(llm, prompt["turns"][0]) for prompt in prompts]
        groups = [[i] for i in range(len(ids))]
        groups += [list(range(i, min(i + 3, len(ids)))) for i in range(0, len(ids), TOGETHER)]
        with args.status.phase(f"decoding, {kind}", runs) as phase:
            for group in groups:
                row = alternate(llm, [ids[i] for i in group], args, phase)
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
    add_prompts(parser, limit=12)
    add("--alternations", type=at_least(1), default=5, metavar="N", help="turns of each kind")
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


def alternate(
    llm: LLM, prompts: list[list[int]], args: argparse.Namespace, phase: Phase
) -> dict[str, Any]:
    """Decode prompts with drafts and without in turn -> a row of the report."""
    params = SamplingParams(max_tokens=args.max_tokens)
    ratios, same, chosen = [], True, Counter[int]()
    for turn in range(args.alternations):
        rates, tokens = {}, {}
        for speculate in (turn % 2 == 0, turn % 2 == 1):
            completions = llm.generate(prompts, params, speculate=speculate)
            stats = [completion.stats for completion in completions]
            rates[speculate] = rate(stats)
            tokens[speculate] = [completion.token_ids for completion in completions]
            if speculate:
                for one in stats:
                    chosen.update(one.steps_by_k)
            phase.advance(note=f"{len(prompts)} at a time, {'drafts' if speculate else 'plain'}")
        ratios.append(rates[True] / rates[False])
        same = same and tokens[True] == tokens[False]
    steps = sum(chosen.values())
    return {
        "identical": same,
        "ratio": median(ratios),
        "first_ratio": ratios[0],
        "plain_tokens_per_second": rates[False],
        "share_of_steps_by_k": {str(k): chosen[k] / steps for k in sorted(chosen)},
    }


def rate(stats: list[Stats]) -> float:
    """Tokens per second of sequences decoded together."""
    return sum(one.new_tokens for one in stats) / max(one.decode_seconds for one in stats)


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
