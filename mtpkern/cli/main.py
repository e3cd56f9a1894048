"""The parser of all commands, and the entry point of the program."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mtpkern
from mtpkern.arguments import Parser, UsageError, run
from mtpkern.cli import chat, convert, doctor, fetch, generate, inspect, profile, train

_PATHS = ("DIR", "FILE", "MODEL", "HEADS")  # metavars of arguments that a shell completes as files


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command (`argv` without the program's name; None: this process's own) -> exit code.

    2 is a user's mistake, 1 a failed comparison, 130 an interrupt, 141 a closed pipe.
    """
    return run(build_parser(), argv)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mtpkern",
        description="Run Llama-style language models with multi-token prediction: several tokens "
        "per step, and exactly the tokens of plain decoding.",
        epilog="examples:\n"
        '  mtpkern generate "Why is the sky blue?"    answer one prompt\n'
        "  mtpkern chat                               have a conversation\n"
        "  mtpkern generate --help                    list the options of a command",
    )
    add = parser.add_argument
    add(
        "-V",
        "--version",
        action="version",
        version=f"mtpkern {mtpkern.__version__}",
        help="show the version and exit",
    )
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
    parser._positionals.title = "commands"
    commands = parser.add_subparsers(metavar="COMMAND")
    for command in (generate, chat, fetch, inspect, convert, train, profile, doctor):
        command.add_command(commands)
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
                    if option.type is Path or option.metavar in _PATHS:
                        option.complete = shtab.FILE
        print(shtab.complete(parser, shell))
        parser.exit()
