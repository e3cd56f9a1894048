"""Where commands write: no file of the user's is overwritten, and errors are found before the work.

One rule for every command: it writes to a new place, continues its own unfinished run of the same
settings, or with --force replaces what the same command wrote before. A place that holds anything
else is refused. Results are written beside their destination and renamed when complete, a file lock
excludes a second run, and directories created on the way are removed if the command fails.

This module does not import torch.
"""

import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from mtpkern.errors import UserError, printable
from mtpkern.output_paths import (
    PREFIX,
    absolute,
    claimed,
    created,
    file_mode,
    is_special_file,
    locked,
    prepared,
    refusal,
    work_path,
)

FORCE = "replace an earlier result"
# Lists the name patterns that a command owns in a directory it wrote. --force needs it.
_MARK = f"{PREFIX}result"


@contextmanager
def output_file(
    target: Path, *, force: bool = False, sources: Iterable[str | Path | None] = ()
) -> Iterator[Path]:
    """Claim a file within the context -> a path to write to, which is renamed to it at the end.

    If nothing was written, nothing is renamed. A device or a pipe is written directly. `sources`
    are the command's inputs, which are never replaced. Raises UserError if the target exists or
    cannot be written; later errors are named by `writing`.
    """
    if is_special_file(target):
        yield target
        return
    with reserve(target, force=force, sources=sources) as place:
        work = work_path(place, "partial")
        try:
            work.unlink(missing_ok=True)  # left by a killed run
            yield work
            if work.exists():
                with writing(target):
                    work.replace(place)
        finally:
            work.unlink(missing_ok=True)


@contextmanager
def reserve(
    target: Path, *, force: bool = False, sources: Iterable[str | Path | None] = ()
) -> Iterator[Path]:
    """Claim a file that another program will write -> its absolute path.

    Raises as `output_file`.
    """

    def check(place: Path) -> None:
        keep_apart(target, sources)
        mode = file_mode(place)
        if mode is not None and stat.S_ISDIR(mode):
            raise refusal(target, "it is a directory; give the name of a file")
        if mode is not None and not force:
            raise refusal(
                target, "it exists already; choose another name, or replace it with --force"
            )

    with claimed(target, check, lambda place: place) as place:
        yield place


@contextmanager
def output_directory(
    target: Path,
    owned: Collection[str],
    *,
    force: bool = False,
    sources: Iterable[str | Path | None] = (),
) -> Iterator[Path]:
    """Claim a directory -> an empty one to write to, whose files are moved to it at the end.

    The target is new or empty, or with `force` an earlier result that holds only files matching
    `owned`, the names that the command writes. config.json, without which a directory is neither a
    model nor heads, is moved last. `sources` are the command's inputs, which the target must not
    contain. Raises UserError if the target holds anything else or cannot be written.
    """

    def check(place: Path) -> None:
        keep_apart(target, sources)
        _check_contents(place, target, owned, force)

    def anchor(place: Path) -> Path:
        # An existing target may be a mount point, which files can only be renamed within.
        return place / "x" if place.is_dir() else place

    with claimed(target, check, anchor) as place:
        work = work_path(anchor(place), "partial")
        shutil.rmtree(work, ignore_errors=True)  # left by a killed run
        try:
            with writing(target):
                work.mkdir()
            yield work
            with writing(target):
                _publish(work, place, owned)
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def run_directory(
    target: Path,
    runs: Collection[str],
    *,
    work: str = "",
    sources: Iterable[str | Path | None] = (),
) -> Iterator[None]:
    """Claim the directory of a resumable run, which exists within the context.

    The target is new or empty, or holds one of the files `runs`, which describe the run that wrote
    it; the caller compares them with its own settings. `work` is the subdirectory that an
    unfinished run uses, by default all of it; it is removed if the run fails before it has produced
    anything. Otherwise as `output_directory`.
    """

    def check(place: Path) -> None:
        keep_apart(target, sources)
        if not any((place / name).is_file() for name in runs):
            _check_contents(place, target, (), False)

    with prepared(target, check) as place, created(place, target), locked(place / "x", target):
        check(place)  # again, since a run that has just ended may have written it
        root = place / work
        fresh = not root.is_dir() or not _contents(root)
        try:
            yield
        except BaseException:
            if fresh and not any(_results(root)):
                clear(root, ["*"])
                if work and root.is_dir():
                    root.rmdir()
            raise


def clear(directory: Path, owned: Collection[str]) -> None:
    """Remove a directory's contents. Raises UserError if some of them do not match `owned`."""
    contents = _contents(directory) if directory.is_dir() else []
    if others := _not_of(contents, owned):
        raise refusal(
            directory,
            f"it holds {_some(others)} too, which this command did not write; choose another "
            "directory",
        )
    for name in contents:
        path = directory / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def keep_apart(target: Path, sources: Iterable[str | Path | None]) -> None:
    """Raise UserError if `target` is one of the sources, or a directory that contains one.

    A source that is not a file or directory, such as a model's name, is ignored.
    """
    place = absolute(target)
    for source in (absolute(Path(name)) for name in sources if name and os.path.exists(name)):
        if place == source or place in source.parents:
            what = "is" if place == source else f"holds {printable(source)},"
            raise refusal(target, f"it {what} what this command reads; choose another place")


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turn errors of writing, from whichever library, into an OSError with a file name.

    On a full disk, torch and safetensors raise their own exceptions, and Python's has no file name.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = _error_number(error)
        named = getattr(error, "filename", None) or ""
        # The name of an unfinished result means nothing to the user.
        if number is None or (named and PREFIX not in str(named)):
            raise
        raise OSError(number, os.strerror(number), str(file)) from error


def _error_number(error: BaseException | None) -> int | None:
    """The operating system's error number that caused an exception."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        # safetensors states the number in the message only.
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            return int(found[1])
        error = error.__context__  # torch.save raises another error while it closes its file
    return None


def _check_contents(place: Path, target: Path, owned: Collection[str], force: bool) -> None:
    """Raise UserError if a directory is not empty, except for an earlier result with `force`."""
    mode = file_mode(place)
    if mode is None:
        return
    if not stat.S_ISDIR(mode):
        raise refusal(target, "it is a file; give the name of a directory")
    contents = _contents(place)
    mark = place / _MARK
    own = mark.is_file() and mark.read_text() == " ".join(owned)
    others = _not_of(contents, owned if own else ())
    if others:
        raise refusal(
            target,
            f"it holds {_some(others)}, which this command did not write; choose a new directory",
        )
    if contents and not force:
        raise refusal(
            target,
            f"it holds {_some(contents)} already; choose a new directory, or replace what is there "
            "with --force",
        )


def _publish(work: Path, place: Path, owned: Collection[str]) -> None:
    (work / _MARK).write_text(" ".join(owned))
    if file_mode(place) is None:
        work.rename(place)
        return
    names = sorted(os.listdir(work), key=lambda name: (name == "config.json", name))
    for name in names:
        (work / name).replace(place / name)
    for name in set(_contents(place)) - set(names):
        if not _not_of([name], owned):
            (place / name).unlink()


def _results(root: Path) -> Iterator[Path]:
    """Non-empty files under `root` other than JSON, in which runs keep their settings."""
    for path in root.rglob("*"):
        if path.is_file() and path.suffix != ".json" and path.stat().st_size:
            yield path


def _contents(directory: Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if not name.startswith(PREFIX))


def _not_of(names: Iterable[str], owned: Collection[str]) -> list[str]:
    return [name for name in names if not any(fnmatch(name, pattern) for pattern in owned)]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(map(printable, names[:2])) + more
