"""Where commands write: nothing of the user's is lost, and an unwritable target is found first.

One rule for every command. What it writes is new, or goes on with its own unfinished run of the
same settings, or replaces with --force what the same command wrote before. Anything else that lies
there is refused before any work. Results are written beside their place and renamed when they are
whole, a file lock keeps a second run out, and directories made on the way are removed when the
command fails.

No torch is imported here.
"""

import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout

from mtpkern.errors import UserError, printable

FORCE = "replace an earlier result"
# Of locks, unfinished results and marks, which are never the user's.
_PREFIX = ".mtpkern-"
# In a directory that a command wrote, what it owns there: without it --force replaces nothing.
_MARK = f"{_PREFIX}result"


@contextmanager
def output_file(
    target: Path, *, force: bool = False, sources: Iterable[str | Path | None] = ()
) -> Iterator[Path]:
    """Claim a file for as long as the context lasts -> a path to write to, renamed at its end.

    Where nothing was written, nothing is renamed. A device or a pipe is written as it is. `sources`
    are what the command reads, and are never replaced. Raises UserError where the target is taken
    or cannot be written; what fails later is named by `writing`.
    """
    if _is_special(target):
        yield target
        return
    with reserve(target, force=force, sources=sources) as place:
        work = _beside(place, "partial")
        try:
            work.unlink(missing_ok=True)  # of a killed run
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
    """Claim a file that something else will write -> its absolute path. Raises as `output_file`."""

    def check(place: Path) -> None:
        keep_apart(target, sources)
        mode = _mode(place)
        if mode is not None and stat.S_ISDIR(mode):
            raise _refused(target, "it is a directory; give the name of a file")
        if mode is not None and not force:
            raise _refused(
                target, "it exists already; choose another name, or replace it with --force"
            )

    with _prepared(target, check) as place, _locked(place, target):
        check(place)  # again: a run that has just ended may have made it
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

    The target is new or empty; or, with `force`, was written so before and holds nothing but files
    that match `owned`, the names that the command writes. config.json, without which a directory is
    no model and no heads, is moved last. `sources` are what the command reads: the target neither
    is nor holds one of them. Raises UserError where it is taken or cannot be written.
    """

    def check(place: Path) -> None:
        keep_apart(target, sources)
        _check_contents(place, target, owned, force)

    with _prepared(target, check) as place:
        # A target that is there may be a mount of its own: only within it can be renamed.
        within = place / "x" if place.is_dir() else place
        with _locked(within, target):
            check(place)  # again: a run that has just ended may have made it
            work = _beside(within, "partial")
            shutil.rmtree(work, ignore_errors=True)  # of a killed run
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
    """Claim the directory of a run that can be gone on with; it is there inside the context.

    The target is new or empty, or holds one of the files `runs`, which say what run wrote it; that
    the caller compares. `work` is what of it an unfinished run uses, all of it by default; it is
    removed when the run fails before anything was made. Otherwise as `output_directory`.
    """

    def check(place: Path) -> None:
        keep_apart(target, sources)
        if not any((place / name).is_file() for name in runs):
            _check_contents(place, target, (), False)

    with _prepared(target, check) as place, _made(place, target), _locked(place / "x", target):
        check(place)  # again: a run that has just ended may have made it
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
    """Remove a directory's contents. Raises UserError where there are others than `owned`."""
    contents = _contents(directory) if directory.is_dir() else []
    if others := _not_of(contents, owned):
        raise _refused(
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
    """Raise UserError where `target` is one of the sources or a directory around one of them.

    A source that is no file or directory, such as a model's name, is passed over.
    """
    place = _absolute(target)
    for source in (_absolute(Path(name)) for name in sources if name and os.path.exists(name)):
        if place == source or place in source.parents:
            what = "is" if place == source else f"holds {printable(source)},"
            raise _refused(target, f"it {what} what this command reads; choose another place")


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Around what writes a file and prints nothing: what the operating system refuses becomes an
    OSError with a name, that of `file` where it has none, whichever library reports it.

    torch and safetensors raise errors of their own where a disk is full, and Python's has no name.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = _error_number(error)
        named = getattr(error, "filename", None) or ""
        # The name of an unfinished result tells nobody anything.
        if number is None or (named and _PREFIX not in str(named)):
            raise
        raise OSError(number, os.strerror(number), str(file)) from error


def _error_number(error: BaseException | None) -> int | None:
    """The operating system's error number behind an exception."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        # What safetensors says; its exceptions have no number.
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            return int(found[1])
        error = error.__context__  # torch.save raises another error while it closes its file
    return None


@contextmanager
def _prepared(target: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """The absolute target, checked, with its parents; those made for it go again on failure."""
    try:
        place = _absolute(target)
        check(place)
    except OSError as error:
        raise _unwritable(target, error) from None
    with _made(place.parent, target):
        try:
            _mode(place)  # too long a name is refused only where its parent is there
        except OSError as error:
            raise _unwritable(target, error) from None
        yield place


@contextmanager
def _made(directory: Path, target: Path | None = None) -> Iterator[None]:
    """Make a directory and its parents; what was made goes again on failure, where it is empty."""
    made: list[Path] = []
    try:
        try:
            for path in reversed([directory, *directory.parents]):
                if _mode(path) is None:
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
def _locked(place: Path, target: Path) -> Iterator[None]:
    file = _beside(place, "lock", str(_absolute(target)))
    try:
        lock = FileLock(file, timeout=0)
        lock.acquire()
    except Timeout:
        raise _refused(
            target, "another run is writing it; wait for it, or choose another place"
        ) from None
    except OSError as error:
        raise _unwritable(target, error) from None
    try:
        yield
    finally:
        try:
            file.unlink(missing_ok=True)  # while it is held: nobody else's is removed
        except OSError:
            pass  # Windows removes no open file, and an empty one does no harm
        lock.release()


def _check_contents(place: Path, target: Path, owned: Collection[str], force: bool) -> None:
    """Raise UserError where a directory has contents, but for an earlier result with `force`."""
    mode = _mode(place)
    if mode is None:
        return
    if not stat.S_ISDIR(mode):
        raise _refused(target, "it is a file; give the name of a directory")
    contents = _contents(place)
    mark = place / _MARK
    own = mark.is_file() and mark.read_text() == " ".join(owned)
    others = _not_of(contents, owned if own else ())
    if others:
        raise _refused(
            target,
            f"it holds {_some(others)}, which this command did not write; choose a new directory",
        )
    if contents and not force:
        raise _refused(
            target,
            f"it holds {_some(contents)} already; choose a new directory, or replace what is there "
            "with --force",
        )


def _publish(work: Path, place: Path, owned: Collection[str]) -> None:
    (work / _MARK).write_text(" ".join(owned))
    if _mode(place) is None:
        work.rename(place)
        return
    names = sorted(os.listdir(work), key=lambda name: (name == "config.json", name))
    for name in names:
        (work / name).replace(place / name)
    for name in set(_contents(place)) - set(names):
        if not _not_of([name], owned):
            (place / name).unlink()


def _results(root: Path) -> Iterator[Path]:
    """Files under `root` that hold something, and more than the settings of a run, in JSON."""
    for path in root.rglob("*"):
        if path.is_file() and path.suffix != ".json" and path.stat().st_size:
            yield path


def _contents(directory: Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if not name.startswith(_PREFIX))


def _not_of(names: Iterable[str], owned: Collection[str]) -> list[str]:
    return [name for name in names if not any(fnmatch(name, pattern) for pattern in owned)]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(map(printable, names[:2])) + more


def _beside(place: Path, kind: str, identity: str | None = None) -> Path:
    """A file beside a place; its name is short and the same for each run into that place."""
    digest = hashlib.sha256((identity or str(place)).encode(errors="surrogateescape"))
    return place.with_name(f"{_PREFIX}{digest.hexdigest()[:12]}.{kind}")


def _absolute(path: Path) -> Path:
    return Path(os.path.realpath(path.expanduser()))


def _mode(path: Path) -> int | None:
    """A file's mode, None where there is none. Raises OSError where there can be none."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _is_special(target: Path) -> bool:
    """Whether the target is there and is neither a file nor a directory: a device, a pipe."""
    try:
        mode = target.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _unwritable(target: Path, error: OSError) -> UserError:
    return _refused(target, str(error.strerror or error))


def _refused(target: Path, reason: str) -> UserError:
    return UserError(f"cannot write {printable(target)}: {reason}")
