"""model.gguf.json: a model directory's pointer to a GGUF elsewhere.

A user's GGUF is not copied into the cache: gguf_cache.py writes a directory with its settings, its
tokenizer and this pointer.
"""

from pathlib import Path

from mtpkern.checkpoints.json_files import read_json_object, write_json
from mtpkern.errors import ModelLoadError, printable, reason

POINTER_FILE = "model.gguf.json"


def write_pointer(pointer: Path, file: Path) -> None:
    """Record where a GGUF is, with its size and modification time."""
    facts = file.stat()
    write_json(pointer, {"file": str(file), "size": facts.st_size, "mtime_ns": facts.st_mtime_ns})


def read_pointer(pointer: Path) -> Path:
    """The GGUF that a pointer refers to. Raises ModelLoadError if it has moved or changed since."""
    content = read_json_object(pointer)
    file = Path(str(content.get("file")))
    try:
        facts = file.stat()
    except OSError as error:
        raise ModelLoadError(
            f"{printable(file)}, whose tokenizer and settings are in {printable(pointer.parent)}, "
            f"is gone ({reason(error, file)})"
        ) from None
    if (facts.st_size, facts.st_mtime_ns) != (content.get("size"), content.get("mtime_ns")):
        raise ModelLoadError(
            f"{printable(file)} has changed since its tokenizer and settings were written to "
            f"{printable(pointer.parent)}: give the file itself as the model"
        )
    return file


def is_current(pointer: Path) -> bool:
    """Whether a pointer exists and its GGUF has neither moved nor changed."""
    try:
        read_pointer(pointer)
    except ModelLoadError:
        return False
    return True
