"""The command mtpkern: generate, train, fetch, inspect, convert, profile, doctor.

A user's mistake is one line on stderr and exit code 2. torch is imported by the subcommands that
need it, so that `mtpkern --help` answers at once.
"""

import argparse
from collections.abc import Sequence

import mtpkern
from mtpkern.cli import checkpoints, generate, machine, train
from mtpkern.command import Parser, run

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command (`argv` without the program's name; None: this process's own) -> exit code.

    2 is a user's mistake, 1 a comparison that failed, 130 an interrupt, 141 a reader gone away.
    """
    return run(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mtpkern",
        description="Llama-style language models decoded several tokens per step, "
        "with the same tokens as one at a time.",
    )
    parser.add_argument("--version", action="version", version=f"mtpkern {mtpkern.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    generate.add_command(commands)
    checkpoints.add_commands(commands)
    train.add_command(commands)
    machine.add_commands(commands)
    return parser
