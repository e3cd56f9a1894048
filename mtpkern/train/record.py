"""Record a model's answers to prompts, so that several heads can learn from the same answers with
`mtpkern train --answers`. A recording that was killed continues with the same command.

    python -m mtpkern.train.record --prompts texts.jsonl --families mtp medusa --out answers
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mtpkern.arguments import Parser, at_least, run
from mtpkern.outputs import FORCE, run_directory
from mtpkern.train import FAMILIES


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command -> exit code, as `mtpkern.arguments.run` has it."""
    p = Parser(
        prog="python -m mtpkern.train.record", description="Record a model's answers to prompts"
    )
    p.set_defaults(run=_record)
    add, count = p.add_argument, at_least(1)
    add("--model", help="directory of the model; the default model without it")
    add("--prompts", type=Path, nargs="+", required=True, help="JSONL with `turns`")
    add("--out", type=Path, required=True, help="a directory for `train --answers`")
    add("--force", action="store_true", help=FORCE)
    add("--families", nargs="+", default=["mtp"], choices=FAMILIES, help="heads that will learn")
    add("--limit", type=count, help="answer at most this many prompts")
    add(
        "--temperature",
        type=at_least(0.0),
        default=0.6,
        help="of every other answer; 0: all greedy",
    )
    add("--max-new", type=count, default=192, help="longest answer in tokens")
    add("--slots", type=count, help="sequences at a time (default: measured)")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--seed", type=at_least(0), default=0)
    return run(p, argv)


def _record(a: argparse.Namespace) -> int:
    with run_directory(a.out, ["layout.json"], sources=[a.model, *a.prompts]):
        return _answer(a)


def _answer(a: argparse.Namespace) -> int:
    # torch is imported here, so that --help answers at once.
    from mtpkern.checkpoints.llama import load_config
    from mtpkern.checkpoints.resolve import resolve_model
    from mtpkern.device import resolve_device
    from mtpkern.errors import UserError
    from mtpkern.threads import use_threads
    from mtpkern.tokenizer import Tokenizer
    from mtpkern.train.budget import measure_answers
    from mtpkern.train.distill import check_prompts, digest, read_prompts, record, slot_size
    from mtpkern.train.heads.families import family_taps
    from mtpkern.train.teacher import Teacher

    use_threads(None)
    device, _ = resolve_device(a.device)
    check_prompts(a.prompts)
    directory = resolve_model(a.model, status=a.status)
    config = load_config(directory)
    taps = {tap for family in a.families for tap in family_taps(family, config.num_layers)}
    context = config.max_position_embeddings
    with a.status.phase("reading prompts"):
        jobs = read_prompts(a.prompts, Tokenizer.from_directory(directory), a.seed, context)
    if not jobs:
        raise UserError("there is no usable prompt")
    some = jobs[: a.limit]
    capacity = slot_size(some, a.max_new, config, a.status)
    teacher = Teacher(directory, capacity, device, sorted(taps), a.status)
    slots = a.slots
    if slots is None:
        with a.status.phase("measuring how fast it goes"):
            slots = measure_answers(teacher, some, a.max_new, 0).best_slots(len(some))
    record(
        teacher,
        some,
        a.out,
        slots=slots,
        max_new=a.max_new,
        temperature=a.temperature,
        seed=a.seed,
        prompts=digest(jobs),
        force=a.force,
        status=a.status,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
