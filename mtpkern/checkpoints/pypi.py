"""Downloading one wheel from the Python package index that the user's pip is configured for."""

import base64
import configparser
import html
import http.client
import importlib.util
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from mtpkern.errors import UserError, printable
from mtpkern.status import Phase, Status

_PUBLIC_INDEX = "https://pypi.org/simple"
_TIMEOUT_SECONDS = 60
_POLL_SECONDS = 0.1


def download_wheel(
    project: str, version: str, file: str, directory: Path, *, size: int, status: Status
) -> Path:
    """Download `file` of a project, of about `size` bytes, into `directory`, and return its path.

    The caller verifies the content. pip is used if it is installed; otherwise a partial file that
    an earlier call left in the directory is resumed, if the server supports ranges. pip's settings
    for indexes, proxies and certificates apply in both cases. Raises UserError if the download
    fails.
    """
    with status.phase(f"downloading {project} {version}", size, "B") as phase:
        if not resumes_downloads():
            if leftovers := list(directory.iterdir()):
                status.say("an earlier download was interrupted; pip restarts it")
            for path in leftovers:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            _download_with_pip(project, version, directory, size, phase)
        else:
            _download_from_simple_index(project, file, directory / file, phase, status)
    if not (directory / file).is_file():
        raise UserError(f"cannot download {project} {version}: the index gave another file")
    return directory / file


def resumes_downloads() -> bool:
    """Whether `download_wheel` resumes what an interrupted call downloaded: pip starts over."""
    return importlib.util.find_spec("pip") is None


def _download_with_pip(
    project: str, version: str, directory: Path, size: int, phase: Phase
) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(directory), "--quiet"]
    command += ["--progress-bar=off", f"{project}=={version}"]
    # pip downloads to its temporary directory, which is here so that progress can be measured.
    with (
        tempfile.TemporaryDirectory(dir=directory) as temporary,
        open(Path(temporary) / "errors", "w+b") as errors,
    ):
        places = {name: temporary for name in ("TMPDIR", "TEMP", "TMP")}
        pip = subprocess.Popen(
            command, env=os.environ | places, stdout=subprocess.DEVNULL, stderr=errors
        )
        try:
            while pip.poll() is None:
                # pip briefly has two copies: the temporary file and the final one.
                phase.done = min(size, max(phase.done, _bytes_below(directory)))
                time.sleep(_POLL_SECONDS)
        finally:
            pip.kill()
            pip.wait()
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
    if pip.returncode:
        reasons = [line for line in lines if line.startswith("ERROR")] or lines or ["pip failed"]
        raise UserError(f"cannot download {project} {version}: {_no_secrets(reasons[-1])}")


def _bytes_below(directory: Path) -> int:
    """The total size of all files below a directory that another process is writing to."""
    total = 0
    for root, _, names in os.walk(directory):  # skips directories that have been removed
        for name in names:
            try:
                total += os.path.getsize(os.path.join(root, name))
            except OSError:  # moved or removed since
                continue
    return total


def _download_from_simple_index(
    project: str, file: str, target: Path, phase: Phase, status: Status
) -> None:
    """Find the file's link on the project's page (PEP 503) and download it."""
    index = _index_url().rstrip("/") + f"/{project}/"
    try:
        with _open(index) as response:
            page = response.read().decode(errors="replace")
        links = [html.unescape(link) for link in re.findall(r'href\s*=\s*["\']([^"\']+)', page)]
        named = [link for link in links if unquote(urlsplit(link).path).endswith("/" + file)]
        if not named:
            raise UserError(f"cannot download {file}: {_no_secrets(index)} does not list it")
        _download(urljoin(index, named[0]), target, phase, status)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = _no_secrets(printable(error))
        raise UserError(f"cannot download {file}: {reason} ({_no_secrets(index)})") from None


def _download(url: str, target: Path, phase: Phase, status: Status) -> None:
    """Download a file, resuming a partial one with a range request (RFC 9110, section 14)."""
    part = target.with_name(target.name + ".part")
    begin = part.stat().st_size if part.exists() else 0
    try:
        response = _open(url, begin)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        response = _open(url)
    with response:
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {begin}-")
        if begin and resumed:
            status.say(f"resuming an interrupted download after {begin / 1e6:.1f} MB")
            phase.advance(begin)
        elif begin:
            status.say("an earlier download was interrupted, and the server restarts it")
        left = int(response.headers.get("Content-Length") or 0)
        with open(part, "ab" if resumed else "wb") as stream:
            while block := response.read1(1 << 18):
                stream.write(block)
                phase.advance(len(block))
                left -= len(block)
    if left > 0:
        raise ConnectionError(f"the connection ended {left} bytes before the end of the file")
    part.replace(target)


def _open(url: str, begin: int = 0) -> Any:
    """The HTTP response for a URL, which may contain a login, from byte `begin` on."""
    parts = urlsplit(url)
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=parts.netloc.split("@")[-1])))
    if begin:
        request.add_header("Range", f"bytes={begin}-")
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        basic = "Basic " + base64.b64encode(login.encode()).decode()
        # Not sent to a server that the index redirects to.
        request.add_unredirected_header("Authorization", basic)
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))
    return urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS, context=context)


def _index_url() -> str:
    return next(_configured_indexes(), _PUBLIC_INDEX)


def _configured_indexes() -> Iterator[str]:
    for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        if os.environ.get(name):
            yield os.environ[name]
    home = Path.home()
    files = [
        Path(os.environ.get("PIP_CONFIG_FILE") or os.devnull),
        Path(sys.prefix) / "pip.conf",
        Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / "pip.conf",
        home / ".pip" / "pip.conf",
        Path("/etc/pip.conf"),
    ]
    for file in files:
        settings = configparser.RawConfigParser()
        try:
            settings.read(file, encoding="utf-8")
        except (configparser.Error, OSError, UnicodeDecodeError):
            continue
        if url := settings.get("global", "index-url", fallback=""):
            yield url.strip()


def _no_secrets(text: str) -> str:
    """The text without the login that an index's URL may contain."""
    return printable(re.sub(r"//[^/@\s]*@", "//", text))
