"""The command mtpkern: generate, chat, train, fetch, inspect, convert, profile, doctor.

A user's mistake is one line on stderr and exit code 2. torch is imported by the subcommands that
need it, so that `mtpkern --help` answers at once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mtpkern
from mtpkern.arguments import Parser, UsageError, run
from mtpkern.cli import chat, checkpoints, generate, machine, train

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
        epilog="examples:\n"
        '  mtpkern generate "Why is the sky blue?"    an answer\n'
        "  mtpkern chat                               a conversation\n"
        "  mtpkern generate --help                    a command's options",
    )
    add = parser.add_argument
    add("-V", "--version", action="version", version=f"mtpkern {mtpkern.__version__}")
    add(
        "--print-completion",
        action=_PrintCompletion,
        default=argparse.SUPPRESS,
        metavar="SHELL",
        help="print a script that completes commands and options in bash, zsh, fish ...",
    )

    def show_help(args: argparse.Namespace) -> int:
        parser.print_help()
        return 0

    parser.set_defaults(run=show_help)
    commands = parser.add_subparsers(metavar="COMMAND")
    generate.add_command(commands)
    chat.add_command(commands)
    checkpoints.add_commands(commands)
    train.add_command(commands)
    machine.add_commands(commands)
    return parser


class _PrintCompletion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        try:
            import shtab
        except ImportError:
            raise UsageError(
                "--print-completion needs shtab: pip install 'mtpkern[completion]'"
            ) from None
        _, shell, *_ = rest
        if shell not in shtab.SUPPORTED_SHELLS:
            raise UsageError(
                f"--print-completion must be one of {', '.join(shtab.SUPPORTED_SHELLS)}"
            )
        assert parser._subparsers is not None, "the command has subcommands"
        for action in parser._subparsers._group_actions:
            for command in dict(action.choices or ()).values():
                for option in command._actions:
                    if option.type is Path or option.metavar in ("DIR", "FILE"):
                        option.complete = shtab.FILE
        print(shtab.complete(parser, shell))
        parser.exit()
