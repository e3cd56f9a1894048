"""The command mtpkern: main.py has the parser, and each subcommand a module of its own name.

A user's mistake is one line on stderr and exit code 2. torch is imported by the subcommands that
need it, when they run, so that `mtpkern --help` answers at once.
"""

from mtpkern.cli.main import main

__all__ = ["main"]
