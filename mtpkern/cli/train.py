"""mtpkern train: heads for a frozen model."""

import argparse
import sys
from pathlib import Path
from typing import Any

from mtpkern.arguments import above_zero, at_least
from mtpkern.outputs import FORCE
from mtpkern.train import DEFAULT_MINUTES, FAMILIES


def add_command(commands: Any) -> None:
    command = commands.add_parser(
        "train",
        usage="mtpkern train --prompts FILE ... --out DIR [OPTION ...]",
        help="train heads for a model",
        description="Train heads for a frozen model on its own answers to prompts, and write them "
        "with their card, README.md, to a directory that --heads takes. The speed of answering and "
        "learning on this machine is measured first; without --steps, the dtype and the number of "
        "rows, slots, prompts and steps are then chosen so that the run fits --minutes. Ctrl-C "
        "saves and says how to continue; a run that was killed continues with the same command.",
        epilog="example:\n  mtpkern train --model path/to/model --prompts texts.jsonl --out heads",
    )
    command.set_defaults(run=_train)
    count, level = at_least(1), at_least(0.0)

    add = command.add_argument_group("model, data and result").add_argument
    add(
        "--model",
        metavar="MODEL",
        help="the frozen model: a directory, a hub id or a name (default: the model of mtpkern "
        "fetch)",
    )
    add(
        "--prompts",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="JSONL, each line with `turns`, a list of texts",
    )
    add(
        "--answers",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="answers recorded by python -m mtpkern.train.record, instead of prompts",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="where to write the heads")
    add("--force", action="store_true", help=FORCE)

    group = command.add_argument_group("length of the run")
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes",
        type=above_zero,
        metavar="N",
        help=f"how long the run may take, roughly (default: {DEFAULT_MINUTES:g})",
    )
    length.add_argument(
        "--steps",
        type=count,
        metavar="N",
        help="optimiser steps, on answers to all prompts (default: as --minutes allows)",
    )

    add = command.add_argument_group("heads").add_argument
    add("--family", default="mtp", choices=FAMILIES, metavar="FAMILY", help=", ".join(FAMILIES))
    add(
        "-K",
        "--num-speculative-tokens",
        type=count,
        default=4,
        metavar="K",
        help="drafts per step to learn",
    )
    add(
        "--draft-vocab-size",
        type=count,
        default=16384,
        metavar="N",
        help="size of the draft vocabulary, the most frequent tokens",
    )
    add(
        "--init",
        type=Path,
        metavar="HEADS",
        help="heads to start from, a name or a directory; the result averages their weights with "
        "those at the end of learning",
    )

    add = command.add_argument_group("answers").add_argument
    add("--max-new", type=count, default=192, metavar="N", help="longest answer in tokens")
    add(
        "--temperature",
        type=level,
        default=0.6,
        metavar="T",
        help="of every other answer, the rest being greedy; 0 makes all of them greedy",
    )
    add(
        "--round-prompts",
        type=count,
        default=1024,
        metavar="N",
        help="prompts to answer between two rounds of learning",
    )
    add("--held-out", type=count, metavar="N", help="prompts to evaluate on (default: at most 64)")
    add("--slots", type=count, metavar="N", help="answers to write at a time (default: measured)")

    add = command.add_argument_group("learning").add_argument
    add(
        "--rows",
        type=count,
        metavar="N",
        help="answer tokens per step (default: measured; 1024 with --steps)",
    )
    add(
        "--optimizer",
        default="muon",
        choices=("muon", "adamw"),
        metavar="NAME",
        help="muon or adamw, for the matrices; all else learns with adamw",
    )
    add("--lr", type=level, default=8e-3, metavar="RATE", help="learning rate")
    add("--seed", type=at_least(0), default=0, metavar="N", help="of all random numbers")

    add = command.add_argument_group("machine").add_argument
    add("--device", default="auto", metavar="DEVICE", help="auto, cpu or cuda")
    add(
        "--threads",
        type=count,
        metavar="N",
        help="CPU threads (default: one per physical core)",
    )


def _train(args: argparse.Namespace) -> int:
    with args.status.phase("starting"):  # importing torch takes a second or two
        from mtpkern.threads import use_threads
        from mtpkern.train.fit import Recipe
        from mtpkern.train.run import Plan, train

    use_threads(args.threads)
    plan = Plan(
        out=args.out,
        model=args.model,
        prompts=tuple(args.prompts),
        answers=tuple(args.answers),
        init=args.init,
        family=args.family,
        draft_vocab_size=args.draft_vocab_size,
        round_prompts=args.round_prompts,
        held_out=args.held_out or 0,
        temperature=args.temperature,
        max_new=args.max_new,
        slots=args.slots or 0,
        device=args.device,
        minutes=args.minutes or 0.0,
        force=args.force,
    )
    recipe = Recipe(
        steps=args.steps or 0,
        rows=args.rows or 0,
        K=args.num_speculative_tokens,
        optimizer=args.optimizer,
        lr=args.lr,
        seed=args.seed,
    )
    try:
        train(plan, recipe, status=args.status)
    except (KeyboardInterrupt, SystemExit):
        if (args.out / ".train").is_dir():
            print(f"stopped; to go on:\n  {args.command_line}", file=sys.stderr)
        raise
    print(args.out)
    return 0
