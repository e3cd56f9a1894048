"""What a caller can mend: one kind of error, which the command line prints as a single line."""

from pathlib import Path


class UserError(ValueError):
    """A mistake of the user's (file, argument, unsupported model): one line, exit code 2.

    Messages name arguments as Python spells them (`max_length`); the command line shows its flags
    instead.
    """


class ModelLoadError(UserError):
    """A checkpoint that is broken or not supported; the message names the file and the thing."""


def printable(name: object) -> str:
    """A name out of a file, safe to print: control characters escaped, at most 200 characters."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))
    return text if len(text) <= 200 else text[:200] + "..."


def reason(error: BaseException, file: Path) -> str:
    """What a library says of a file, as one printable line that does not repeat the file's path."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return printable(text.splitlines()[0].replace(str(file), file.name))


def counted(count: int, noun: str) -> str:
    """1 token, 2 tokens."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
