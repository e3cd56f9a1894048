"""A user's GGUF -> a model directory in the cache, with its settings, tokenizer, and a pointer."""

import hashlib
import os
import shutil
from pathlib import Path

from mtpkern.checkpoints.gguf import describe_gguf
from mtpkern.checkpoints.gguf_pointer import POINTER_FILE, is_current, write_pointer
from mtpkern.checkpoints.model_cache import CONVERSION, flush_to_disk, gguf_cache_directory, locked
from mtpkern.status import SILENT, Status


def cached_gguf(file: Path, status: Status = SILENT) -> Path:
    """The model directory of a GGUF, written if there is none or the file has changed since.

    Raises ModelLoadError for a GGUF that is not supported, UserError if the cache cannot be
    written.
    """
    # Links are kept, since the blobs that they refer to in the hub's cache have no suffix.
    file = Path(os.path.abspath(file))
    key = hashlib.sha256(f"{CONVERSION} {file}".encode("utf-8", "surrogateescape")).hexdigest()
    directory = gguf_cache_directory() / key[:16] / file.stem
    if is_current(directory / POINTER_FILE):
        return directory
    with locked(directory, status), status.phase("reading the tokenizer"):
        if not is_current(directory / POINTER_FILE):  # another process may have written it
            _write_directory(file, directory)
    return directory


def _write_directory(file: Path, directory: Path) -> None:
    work = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    new = work / "new"
    new.mkdir(parents=True)
    try:
        # The pointer is written first, so that a change while the file is read is detected.
        write_pointer(new / POINTER_FILE, file)
        describe_gguf(file, new)
        flush_to_disk(*new.iterdir(), new)
        if directory.exists():
            os.rename(directory, work / "old")
        os.rename(new, directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)
