"""A model's name -> its directory: the default model, a local path, or a Hugging Face hub id."""

import difflib
import importlib.util
import re
from pathlib import Path

from mtpkern.checkpoints.default_model import fetch_default_model
from mtpkern.checkpoints.directory import (
    PICKLE_SUFFIXES,
    conversion_hint,
    no_config_error,
    read_entries,
)
from mtpkern.checkpoints.gguf_cache import cached_gguf
from mtpkern.checkpoints.model_cache import DEFAULT_MODEL, default_model_directory
from mtpkern.errors import ModelLoadError, UserError, printable
from mtpkern.status import SILENT, Status
from mtpkern.validation import location

_HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


def resolve_model(name: str | Path | None, *, status: Status = SILENT) -> Path:
    """The directory of a model.

    `name` is None for the default model, a name, a directory, a GGUF, or a hub id. For a GGUF, or
    a directory with one and no config.json, it is a directory in the cache. Raises UserError if
    there is no such model.
    """
    name = None if name is None else location("model", name)
    if name is None or name == DEFAULT_MODEL:
        return fetch_default_model(status=status)
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # "~user" for a user that does not exist
        path = Path(name)
    if path.is_dir():
        return _local_model(path, status)
    if path.suffix == ".gguf" and path.is_file():
        return cached_gguf(path, status)
    if path.exists():
        raise _file_error(path)
    if re.fullmatch(_HUB_ID, name) and not path.parent.is_dir():
        with status.phase(f"getting {name} from the hub"):
            return _hub_snapshot(name)
    if re.search(r"[/\\~]", name):
        raise _missing_error(name, path)
    raise UserError(
        f"model {printable(name)} is neither a directory, nor a hub id (organisation/name), "
        f"nor {DEFAULT_MODEL}"
    )


def fetch_model(name: str | Path | None, *, status: Status = SILENT) -> Path:
    """The directory of a model that has its weights, verified if it is the default model.

    Raises UserError as `resolve_model`, ModelLoadError if there are no weights or their files are
    malformed.
    """
    if name is None or str(name) == DEFAULT_MODEL:
        return fetch_default_model(status=status, verify=True)
    directory = resolve_model(name, status=status)
    if not (directory / "config.json").is_file():
        raise no_config_error(directory)
    read_entries(directory)
    return directory


def model_name(directory: Path) -> str:
    """The name under which heads for a model ship: the default model's, or its directory's."""
    return DEFAULT_MODEL if directory == default_model_directory() else directory.resolve().name


def _local_model(directory: Path, status: Status) -> Path:
    """The directory itself, or the model directory of the only GGUF in it."""
    if (directory / "config.json").exists():
        return directory
    ggufs = sorted(directory.glob("*.gguf"))
    if len(ggufs) > 1:
        raise UserError(
            f"model {printable(directory)} holds {len(ggufs)} GGUFs: give one of them, "
            f"{printable(ggufs[0])} for instance"
        )
    if not ggufs:
        raise no_config_error(directory)
    return cached_gguf(ggufs[0], status)


def _file_error(path: Path) -> UserError:
    """Why a file is not a model, and how to make one of it."""
    if path.suffix in PICKLE_SUFFIXES:
        return UserError(f"model {printable(path)} is a file; {conversion_hint(path)}")
    return UserError(
        f"model {printable(path)} is a file; give the directory that holds config.json "
        "and the .safetensors"
    )


def _missing_error(name: str, path: Path) -> UserError:
    """Which part of a path does not exist, and a similar directory that does.

    The hub is not asked for anything that looks like a path, or for a name in an existing
    directory.
    """
    missing = next(part for part in [*reversed(path.parents), path] if not part.is_dir())
    siblings = sorted(entry.name for entry in missing.parent.iterdir() if entry.is_dir())
    similar = difflib.get_close_matches(missing.name, siblings, 1)
    message = f"model {printable(name)}: no such directory"
    if missing != path:
        message += f" ({printable(missing)} does not exist)"
    if similar:
        return UserError(f"{message}; did you mean {printable(missing.parent / similar[0])}?")
    if re.fullmatch(_HUB_ID, name):
        return UserError(
            f"{message}; it is not taken as a hub id, since a directory "
            f"{printable(path.parent)} exists here"
        )
    return UserError(message)


def _hub_snapshot(name: str) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError(
            f"model {printable(name)}: no such directory; to get it from the Hugging Face hub, "
            "pip install 'mtpkern[hub]'"
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]
        # Subdirectories and "consolidated" files hold the same weights in other layouts.
        duplicates = ["*/*", "consolidated*"]
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=duplicates))
    except Exception as error:  # any error of the hub's client is one line for the user
        text = str(error).strip()
        reason = printable(text.splitlines()[0] if text else error)
        raise ModelLoadError(f"cannot get {printable(name)} from the hub: {reason}") from None
