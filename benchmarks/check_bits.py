"""Whether drafts change a bit: the same tokens and log-probabilities with them and without.

    python benchmarks/check_bits.py --model llama-3.2-1b --tokens 2000

Weights are random, of real shapes: a difference in rounding shows in random logits as well as in
others. Half of the tokens come from one sequence, half from a batch of four. The drafter is the
n-gram drafter. The exit code is 1 if anything differs; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import Finish, environment, first_line, gpu_environment, gpu_first_line, run
from dummy_models import write_config
from model_shapes import MODELS, TINY

from mtpkern.arguments import Parser, at_least
from mtpkern.config import SamplingParams
from mtpkern.engine import LLM
from mtpkern.request import Completion

BATCH = 4


def main(argv: list[str] | None = None) -> int:
    return run(parser(), check, argv)


def parser() -> Parser:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add(
        "--model",
        choices=["tiny", *MODELS],
        default="llama-3.2-1b",
        metavar="MODEL",
        help=f"one of {', '.join(['tiny', *MODELS])}",
    )
    add("--tokens", type=at_least(2 * BATCH), default=2000, metavar="N", help="tokens in total")
    add("-K", type=at_least(1), default=4, metavar="K", help="drafts per step")
    return parser


def check(args: argparse.Namespace, finish: Finish) -> int:
    on_gpu = torch.cuda.is_available()
    facts = gpu_environment() if on_gpu else environment()
    print(gpu_first_line(facts) if on_gpu else first_line(facts))
    alone = args.tokens // 2
    # A repetitive prompt, so that the n-gram drafter has something to copy.
    prompt = [5, 9, 33, 7, 7, 12] * 5
    with tempfile.TemporaryDirectory() as work:
        directory = write_config(({"tiny": TINY} | MODELS)[args.model], Path(work) / args.model)
        llm = LLM(
            directory,
            load_format="dummy",
            heads="none",
            num_speculative_tokens=args.K,
            max_batch=BATCH,
            max_length=alone + 64,
            status=args.status,
        )
    rows: list[dict[str, Any]] = []
    for batch, count in ((1, alone), (BATCH, (args.tokens - alone) // BATCH)):
        params = SamplingParams(max_tokens=count, ignore_eos=True, logprobs=True)
        prompts = [prompt[: 30 - 5 * i] for i in range(batch)]
        drafted, plain = (llm.generate(prompts, params, speculate=s) for s in (True, False))
        rows.append(
            {
                "batch": batch,
                "tokens": sum(len(one.token_ids) for one in plain),
                "accepted": sum(sum(map(sum, one.stats.accepted.values())) for one in drafted),
                "first_differences": [
                    first_difference(*pair) for pair in zip(drafted, plain, strict=True)
                ],
            }
        )
        differing = sum(at is not None for at in rows[-1]["first_differences"])
        print(
            f"batch {batch}: {rows[-1]['tokens']} tokens, {rows[-1]['accepted']} drafts accepted, "
            f"sequences that differ: {differing}"
        )
    same = all(at is None for row in rows for at in row["first_differences"])
    print("every token and log-probability is the same" if same else "RED: drafts changed a bit")
    return finish({"schema": 1, "environment": facts, "rows": rows, "identical": same}, 1 - same)


def first_difference(a: Completion, b: Completion) -> int | None:
    """The first index at which two completions differ, in a token or its log-probability."""
    pairs = [list(zip(one.token_ids, one.logprobs or [], strict=True)) for one in (a, b)]
    differing = (i for i, (x, y) in enumerate(zip(*pairs, strict=True)) if x != y)
    return next(differing, None)


if __name__ == "__main__":
    sys.exit(main())
