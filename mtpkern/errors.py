"""Errors that the user can correct. The command line prints them as a single line."""

from pathlib import Path


class UserError(ValueError):
    """A mistake of the user: a file, an argument, an unsupported model. One line, exit code 2.

    Messages spell arguments as in Python (`max_length`); the command line replaces them with its
    flags.
    """


class ModelLoadError(UserError):
    """A checkpoint that is malformed or not supported. The message names the file and the item."""


def printable(name: object) -> str:
    """A name from a file, safe to print: control characters escaped, at most 200 characters."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))
    return text if len(text) <= 200 else text[:200] + "..."


def reason(error: BaseException, file: Path) -> str:
    """A library's error about a file, as one printable line without the file's directory."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return printable(text.splitlines()[0].replace(str(file), file.name))


def counted(count: int, noun: str) -> str:
    """A count with its noun: "1 token", "2 tokens"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
