"""mtpkern train: heads for a frozen model."""

import argparse
from pathlib import Path
from typing import Any

from mtpkern.command import at_least
from mtpkern.outputs import FORCE
from mtpkern.train import FAMILIES


def add_command(commands: Any) -> None:
    command = commands.add_parser(
        "train",
        epilog="example:\n  mtpkern train --model path/to/model --prompts texts.jsonl --out heads",
        help="train heads for a model",
        description="Train heads for a frozen model on its own answers to prompts. A run that was "
        "killed goes on with the same command. The directory then holds the heads, which --heads "
        "takes, and their card, README.md.",
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
    add("--steps", type=count, default=4000, metavar="N", help="optimiser steps (default 4000)")
    add("--rows", type=count, default=1024, metavar="N", help="answer rows a step (default 1024)")
    add(
        "-K", "--num-speculative-tokens", type=count, default=4, metavar="K", help="drafts to learn"
    )
    add("--draft-vocab-size", type=count, default=16384, metavar="N", help="tokens to draft from")
    add("--optimizer", default="muon", choices=("muon", "adamw"), help="of the matrices")
    add("--lr", type=level, default=8e-3, metavar="RATE", help="learning rate")
    add("--temperature", type=level, default=0.6, help="of every other answer; 0: greedy ones only")
    add("--max-new", type=count, default=192, metavar="N", help="longest answer in tokens")
    add("--round-prompts", type=count, default=1024, metavar="N", help="answered before learning")
    add("--held-out", type=count, default=64, metavar="N", help="prompts to measure on")
    add("--slots", type=count, default=128, metavar="N", help="answers written at a time")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--seed", type=at_least(0), default=0, metavar="N", help="of everything drawn at random")


def _train(args: argparse.Namespace) -> int:
    from mtpkern.train.fit import Recipe
    from mtpkern.train.run import Plan, train

    plan = Plan(
        out=args.out,
        model=args.model,
        prompts=tuple(args.prompts),
        answers=tuple(args.answers),
        init=args.init,
        family=args.family,
        draft_vocab_size=args.draft_vocab_size,
        round_prompts=args.round_prompts,
        held_out=args.held_out,
        temperature=args.temperature,
        max_new=args.max_new,
        slots=args.slots,
        device=args.device,
        force=args.force,
    )
    recipe = Recipe(
        steps=args.steps,
        rows=args.rows,
        K=args.num_speculative_tokens,
        optimizer=args.optimizer,
        lr=args.lr,
        seed=args.seed,
    )
    train(plan, recipe)
    print(args.out)
    return 0
