"""Paths that commands write to: created, locked for one run at a time, named in errors."""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mtpkern.errors import UserError, printable

# The names of locks, unfinished results and marks.
PREFIX = ".mtpkern-"


@contextmanager
def claimed(
    target: Path, check: Callable[[Path], None], anchor: Callable[[Path], Path]
) -> Iterator[Path]:
    """Prepare and lock a target, with its lock beside `anchor(place)` -> the place."""
    with prepared(target, check) as place, locked(anchor(place), target):
        check(place)  # again, since a run that has just ended may have written it
        yield place


@contextmanager
def prepared(target: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """The absolute path of a checked target, with its parents created. See `created`."""
    try:
        place = absolute(target)
        check(place)
    except OSError as error:
        raise _unwritable(target, error) from None
    with created(place.parent, target):
        try:
            file_mode(place)  # a name that is too long is detected only if its parent exists
        except OSError as error:
            raise _unwritable(target, error) from None
        yield place


@contextmanager
def created(directory: Path, target: Path | None = None) -> Iterator[None]:
    """Create a directory and its parents. On failure, those created here are removed if empty."""
    made: list[Path] = []
    try:
        try:
            for path in reversed([directory, *directory.parents]):
                if file_mode(path) is None:
                    path.mkdir()
                    made.append(path)
            if not directory.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if not os.access(directory, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise _unwritable(target or directory, error) from None
        yield
    except BaseException:
        for path in reversed(made):
            try:
                path.rmdir()
            except OSError:
                break
        raise


@contextmanager
def locked(place: Path, target: Path) -> Iterator[None]:
    file = work_path(place, "lock", str(absolute(target)))
    try:
        lock = FileLock(file, timeout=0)
        lock.acquire()
    except Timeout:
        raise refusal(
            target, "another run is writing it; wait for it, or choose another place"
        ) from None
    except OSError as error:
        raise _unwritable(target, error) from None
    try:
        yield
    finally:
        try:
            file.unlink(missing_ok=True)  # while held, so that no other process's is removed
        except OSError:
            pass  # Windows cannot remove an open file; an empty one is harmless
        lock.release()


def work_path(place: Path, kind: str, identity: str | None = None) -> Path:
    """A path beside `place` with a short name, which is the same for every run into that place."""
    digest = hashlib.sha256((identity or str(place)).encode(errors="surrogateescape"))
    return place.with_name(f"{PREFIX}{digest.hexdigest()[:12]}.{kind}")


def absolute(path: Path) -> Path:
    return Path(os.path.realpath(path.expanduser()))


def file_mode(path: Path) -> int | None:
    """A file's mode, None if it does not exist. Raises OSError if it cannot exist."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def is_special_file(target: Path) -> bool:
    """Whether the target exists and is neither a file nor a directory, such as a pipe."""
    try:
        mode = target.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _unwritable(target: Path, error: OSError) -> UserError:
    return refusal(target, str(error.strerror or error))


def refusal(target: Path, reason: str) -> UserError:
    return UserError(f"cannot write {printable(target)}: {reason}")
