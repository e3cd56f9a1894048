"""Checks of public functions' arguments. Each returns the value as a built-in Python type.

Numbers may be numpy's, or torch's 0-d tensors. The UserError names the argument, what it must be,
and the value given.
"""

import math
import operator
import os
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from mtpkern.errors import UserError, printable


def integer(name: str, value: Any, low: int, high: int) -> int:
    """An integer in low..high."""
    number = _index(value)
    if number is None or not low <= number <= high:
        _refuse(name, f"an integer in {low}..{high}", value)
    return number


def at_least(name: str, value: Any, low: int) -> int:
    """An integer of `low` or more."""
    number = _index(value)
    if number is None or number < low:
        _refuse(name, f"an integer of at least {low}", value)
    return number


def real(name: str, value: Any, low: float, high: float) -> float:
    """A number in low..high."""
    number = _float(value)
    # Written so that NaN fails the check.
    if number is None or not low <= number <= high:
        _refuse(name, f"a number in {low:g}..{high:g}", value)
    return number


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool | np.bool_):
        _refuse(name, "True or False", value)
    return bool(value)


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of `choices`."""
    if not isinstance(value, str) or value not in choices:
        _refuse(name, f"{', '.join(choices[:-1])} or {choices[-1]}", value)
    return value


def location(name: str, value: Any) -> str:
    """A name or a path, as str or os.PathLike."""
    try:
        text = os.fspath(value)
    except TypeError:
        text = None
    if not isinstance(text, str):
        _refuse(name, "a name or a path", value)
    if not text:
        raise UserError(f"{name} is empty: give a name or a path")
    if "\0" in text:
        raise UserError(f"{name} must not contain a null character")
    if any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in text.split("/")):
        raise UserError(f"{name} is too long for a file name, got {shown(text)}")
    return text


def shown(value: Any) -> str:
    """A value's repr, shortened for an error message."""
    try:
        text = printable(repr(value))
    except Exception:  # __repr__ of a user's class
        text = "?"
    return text if len(text) <= 60 else f"{text[:60]}... ({type(value).__name__})"


def _index(value: Any) -> int | None:
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def _float(value: Any) -> float | None:
    if isinstance(value, bool | str | bytes) or getattr(value, "shape", ()) != ():
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return None if math.isnan(number) else number


def _refuse(name: str, expected: str, value: Any) -> NoReturn:
    raise UserError(f"{name} must be {expected}, got {shown(value)}")
