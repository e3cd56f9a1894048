"""The parser and the error handling of all the package's command lines.

A user's mistake, and what the operating system refuses (a path, a permission, a full disk, a closed
stream), is one line on stderr and exit code 2. No torch is imported here, so that --help answers at
once.
"""

import argparse
import errno
import io
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn, TypeVar

from mtpkern import status
from mtpkern.errors import UserError, printable

USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141

Number = TypeVar("Number", int, float)


class UsageError(Exception):
    """A mistake in a command line, or in what it names."""


class HelpFormatter(argparse.HelpFormatter):
    """Help texts that end with the option's default, and epilogs that keep their lines."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        takes_value = action.option_strings and action.nargs != 0 and not action.required
        if not takes_value or action.default is argparse.SUPPRESS or "default" in text:
            return text
        default = "none" if action.default in (None, []) else "%(default)s"
        return f"{text} (default: {default})".lstrip()

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example") else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """A parser with --quiet and --verbose.

    Raises UsageError where argparse would print its usage and exit, and OSError if a help text
    cannot be printed.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"formatter_class": HelpFormatter} | kwargs)
        self._positionals.title = "arguments"
        # argparse would say "invalid int value", with the type's name in Python.
        self.register("type", int, integer)
        self.register("type", float, number)
        status.add_options(self)
        # A subcommand's parser replaces the command's: it is the one whose flags messages name.
        self.set_defaults(parser=self)

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def run(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Parse `argv` (None: this process's own) and call the function `args.run` -> exit code.

    The function takes the arguments and finds the Status of --quiet and --verbose in `args.status`.
    2 is a user's mistake, 130 an interrupt (Ctrl-C, SIGTERM, SIGHUP), 141 a closed pipe, all others
    are the function's own.
    """
    if not _open_streams():
        return _complain(parser, UsageError("standard output is closed"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the encoding lacks becomes a question mark, not a traceback.
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            args = _parse(parser, argv)
            args.command_line = _command_line(parser, argv)
            with _terminable(), status.from_arguments(args) as args.status:
                code = _call(args)
        except SystemExit as stop:  # --help, --version and signals
            code = stop.code if isinstance(stop.code, int) else 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard(sys.stdout)
        return BROKEN_PIPE
    except (UsageError, UserError) as error:
        return _complain(parser, error)
    except OSError as error:
        if error.errno is None:  # raised by a library, possibly a bug of ours
            raise
        return _complain(parser, _refusal(error))


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. Raises UsageError for surplus ones, most often an unquoted prompt's."""
    args, surplus = parser.parse_known_args(argv)
    strange = [text for text in surplus if text.startswith("-")]
    prompt = getattr(args, "prompt", None)
    if surplus and not strange and prompt is not None:
        whole = " ".join([prompt, *surplus])
        raise UsageError(
            f"the prompt is {len(surplus) + 1} words: quote it, as in "
            f"{args.parser.prog} {shlex.quote(whole)}"
        )
    if surplus:
        args.parser.error(f"unrecognized arguments: {' '.join(strange or surplus)}")
    return args


@contextmanager
def _terminable() -> Iterator[None]:
    """Within the block, SIGTERM and SIGHUP raise SystemExit, so that locks and unfinished results
    are removed. A signal that is ignored, as under nohup, stays so."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(INTERRUPTED)

    handled: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, end)
                handled.append(number)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _call(args: argparse.Namespace) -> int:
    """Run the command. Python arguments that a UserError names are shown as flags."""
    try:
        code: int = args.run(args)
    except UserError as error:
        raise UsageError(as_flags(str(error), args.parser)) from error
    return code


def as_flags(message: str, parser: argparse.ArgumentParser) -> str:
    """Replace the names of Python arguments in a message with the parser's flags.

    A name with an underscore is replaced everywhere. Others are English words too, and are replaced
    at the beginning of the message and before "=" only.
    """
    for action in parser._actions:
        flag = next((f for f in action.option_strings if f.startswith("--")), None)
        if flag is None:
            continue
        anywhere = rf"(?<![\w/.-]){action.dest}"
        place = anywhere if "_" in action.dest else rf"\A{action.dest}|{anywhere}(?==)"
        message = re.sub(rf"(?:{place})(?![\w/.-])", flag, message)
    return message


def integer(text: str) -> int:
    """A type for argparse: an integer. `Parser` uses it for `int`."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {printable(text)!r}") from None


def number(text: str) -> float:
    """A type for argparse: a number. `Parser` uses it for `float`."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {printable(text)!r}") from None


def at_least(least: Number) -> Callable[[str], Number]:
    """A type for argparse: a finite number of the same type as `least`, and no smaller."""
    kind = type(least)
    convert = integer if kind is int else number

    def parse(text: str) -> Number:
        value = kind(convert(text))
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be {least} or more, got {text}")
        return value

    return parse


def above_zero(text: str) -> float:
    """A type for argparse: a finite number above zero."""
    value = number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _command_line(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> str:
    """The line that runs the same command again in a shell."""
    if argv is None and Path(sys.argv[0]).name == "__main__.py":
        return shlex.join(sys.orig_argv)  # python -m
    return f"{parser.prog} {shlex.join(sys.argv[1:] if argv is None else argv)}"


def _open_streams() -> bool:
    """Give closed standard streams a descriptor -> whether standard output was open.

    Otherwise the next file to be opened would take the descriptor and receive what is printed.
    Without a stderr, errors are discarded.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.dup(descriptor)
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    return sys.stdout is not None


def _refusal(error: OSError) -> UsageError:
    """An error of the operating system, in words."""
    what = str(error.strerror or error)
    try:
        sys.stdout.flush()
    except OSError as pending:
        # Its buffer cannot be written, whatever else failed.
        _discard(sys.stdout)
        return UsageError(f"cannot write standard output: {pending.strerror}")
    if error.filename is not None:
        return UsageError(f"{printable(error.filename)}: {what}")
    # An error without a file's name comes from an unbuffered standard output: mtpkern.outputs names
    # the files that it writes.
    unwritable = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
    return UsageError(f"cannot write standard output: {what}" if unwritable else what)


def _discard(stream: IO[str]) -> None:
    """Discard a stream's buffer, which the interpreter would flush once more on exit."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, stream.fileno())
    os.close(descriptor)


def _complain(parser: argparse.ArgumentParser, error: Exception) -> int:
    try:
        line = f"{parser.prog}: error: {' '.join(str(error).split())}"
        print(status.wrapped(line, sys.stderr, indent=2), file=sys.stderr)
    except OSError:
        _discard(sys.stderr)
    return USER_ERROR
