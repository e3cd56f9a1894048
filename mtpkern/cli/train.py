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
        epilog="example:\n  mtpkern train --model path/to/model --prompts texts.jsonl --out heads",
        help="train heads for a model",
        description="Train heads for a frozen model on its own answers to prompts. A run that was "
        "killed goes on with the same command. The directory then holds the heads, which --heads "
        "takes, and their card, README.md. How fast this machine answers and learns is measured "
        f"first; without --steps, the run is made to fit --minutes, {DEFAULT_MINUTES:g} unless "
        "given: dtype, rows, slots, how many prompts are answered and how many steps are taken. "
        "Ctrl-C saves and says how to go on.",
    )
    command.set_defaults(run=_train)
    add = command.add_argument
    add("--model", help="the frozen model: a directory, a hub id or a name")
    add("--prompts", type=Path, nargs="+", default=[], metavar="FILE", help="JSONL with `turns`")
    add("--answers", type=Path, nargs="+", default=[], metavar="DIR", help="recorded before")
    add("--out", type=Path, required=True, metavar="DIR", help="where the heads go")
    add("--force", action="store_true", help=FORCE)
    add(
        "--init",
        type=Path,
        metavar="HEADS",
        help="heads to go on from, a name or a directory; what is written is the mean of their "
        "weights and of those at which learning ends",
    )
    add("--family", default="mtp", choices=FAMILIES, help="the kind of heads")
    count, level = at_least(1), at_least(0.0)
    length = command.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes",
        type=above_zero,
        metavar="N",
        help=f"how long it may take, roughly (default {DEFAULT_MINUTES:g})",
    )
    length.add_argument(
        "--steps", type=count, metavar="N", help="optimiser steps, on answers to all prompts"
    )
    add(
        "--rows",
        type=count,
        metavar="N",
        help="answer rows per step (default: measured; 1024 with --steps)",
    )
    add(
        "-K", "--num-speculative-tokens", type=count, default=4, metavar="K", help="drafts to learn"
    )
    add("--draft-vocab-size", type=count, default=16384, metavar="N", help="tokens to draft from")
    add("--optimizer", default="muon", choices=("muon", "adamw"), help="of the matrices")
    add("--lr", type=level, default=8e-3, metavar="RATE", help="learning rate")
    add("--temperature", type=level, default=0.6, help="of every other answer; 0: greedy ones only")
    add("--max-new", type=count, default=192, metavar="N", help="longest answer in tokens")
    add("--round-prompts", type=count, default=1024, metavar="N", help="answered before learning")
    add("--held-out", type=count, metavar="N", help="prompts to measure on (default: at most 64)")
    add("--slots", type=count, metavar="N", help="answers written at a time (default: measured)")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--threads", type=count, metavar="N", help="CPU threads (default: physical cores)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="of everything drawn at random")


def _train(args: argparse.Namespace) -> int:
    from mtpkern.threads import use_threads
    from mtpkern.train.fit import Recipe
    from mtpkern.train.interrupt import terminable
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
        with terminable():
            train(plan, recipe, status=args.status)
    except KeyboardInterrupt:
        if (args.out / ".train").is_dir():
            print(f"stopped; to go on:\n  {args.command_line}", file=sys.stderr)
        raise
    print(args.out)
    return 0
