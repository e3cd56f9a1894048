"""Record a model's answers to prompts, for several heads to learn from the same: `mtpkern train
--answers`. A recording that was killed goes on with the same command.

    python -m mtpkern.train.record --prompts texts.jsonl --families mtp medusa --out answers
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mtpkern.checkpoint import load_config
from mtpkern.command import Parser, at_least, run
from mtpkern.engine import resolve_device
from mtpkern.fetch import resolve_model
from mtpkern.outputs import FORCE, run_directory
from mtpkern.tokenizer import Tokenizer
from mtpkern.train import FAMILIES
from mtpkern.train.dataset import ANSWER_FILES
from mtpkern.train.distill import LONGEST_PROMPT, Trunk, digest, read_prompts, record
from mtpkern.train.families import family_taps


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command -> exit code, as `mtpkern.command.run` has it."""
    p = Parser(
        prog="python -m mtpkern.train.record", description="Record a model's answers to prompts"
    )
    p.set_defaults(run=_record)
    add, count = p.add_argument, at_least(1)
    add("--model", help="directory of the model; the default model without it")
    add("--prompts", type=Path, nargs="+", required=True, help="JSONL with `turns`")
    add("--out", type=Path, required=True, help="a directory for `train --answers`")
    add("--force", action="store_true", help=FORCE)
    add("--families", nargs="+", default=["mtp"], choices=FAMILIES, help="whose heads")
    add("--limit", type=count, help="answer so many prompts")
    add("--temperature", type=at_least(0.0), default=0.6, help="of every other; 0: greedy only")
    add("--max-new", type=count, default=192, help="longest answer in tokens")
    add("--slots", type=count, default=128, help="sequences at a time")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--seed", type=at_least(0), default=0)
    return run(p, argv)


def _record(a: argparse.Namespace) -> int:
    with run_directory(
        a.out, ANSWER_FILES, ["layout.json"], force=a.force, sources=[a.model, *a.prompts]
    ):
        return _answer(a)


def _answer(a: argparse.Namespace) -> int:
    device, _ = resolve_device(a.device)
    directory = resolve_model(a.model)
    layers = load_config(directory).num_layers
    taps = {tap for family in a.families for tap in family_taps(family, layers)}
    jobs = read_prompts(a.prompts, Tokenizer.from_directory(directory), a.seed)
    trunk = Trunk(directory, a.slots, LONGEST_PROMPT + a.max_new, device, sorted(taps))
    record(
        trunk,
        jobs[: a.limit],
        a.out,
        max_new=a.max_new,
        temperature=a.temperature,
        seed=a.seed,
        prompts=digest(jobs),
        force=a.force,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
