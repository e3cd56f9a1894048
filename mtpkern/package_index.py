"""One file from the Python package index that the user's pip would take it from."""

import base64
import configparser
import html
import http.client
import importlib.util
import os
import re
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from tqdm import tqdm

from mtpkern.config import UserError, printable

_PUBLIC_INDEX = "https://pypi.org/simple"
_TIMEOUT_SECONDS = 60


def download_wheel(
    project: str, version: str, file: str, directory: Path, *, progress: bool
) -> Path:
    """Put `file` of a project into `directory`, by pip where there is pip; the caller checks it.

    Proxies, mirrors and certificates are the user's: pip's settings count either way. UserError
    when the file cannot be had.
    """
    if importlib.util.find_spec("pip") is not None:
        _by_pip(project, version, directory, progress)
    else:
        _by_simple_index(project, file, directory / file, progress)
    if not (directory / file).is_file():
        raise UserError(f"cannot download {project} {version}: the index gave another file")
    return directory / file


def _by_pip(project: str, version: str, directory: Path, progress: bool) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(directory)]
    command += [f"{project}=={version}"] + ([] if progress else ["--quiet"])
    # pip draws its bar on stdout, which belongs to the caller's output.
    result = subprocess.run(
        command, stdout=sys.stderr if progress else subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    if result.returncode:
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        reasons = [line for line in lines if line.startswith("ERROR")] or lines or ["pip failed"]
        raise UserError(f"cannot download {project} {version}: {_no_secrets(reasons[-1])}")


def _by_simple_index(project: str, file: str, target: Path, progress: bool) -> None:
    """The simple repository interface, PEP 503: a page of links, one of which is the file's."""
    index = _index_url().rstrip("/") + f"/{project}/"
    try:
        with _open(index) as response:
            page = response.read().decode(errors="replace")
        links = [html.unescape(link) for link in re.findall(r'href\s*=\s*["\']([^"\']+)', page)]
        named = [link for link in links if unquote(urlsplit(link).path).endswith("/" + file)]
        if not named:
            raise UserError(f"cannot download {file}: {_no_secrets(index)} does not list it")
        with _open(urljoin(index, named[0])) as response, open(target, "wb") as stream:
            size = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(
                total=size, desc="downloading", unit="B", unit_scale=True, disable=not progress
            ) as bar:
                while block := response.read(1 << 20):
                    stream.write(block)
                    bar.update(len(block))
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = _no_secrets(printable(error))
        raise UserError(f"cannot download {file}: {reason} ({_no_secrets(index)})") from None


def _open(url: str):  # type: ignore[no-untyped-def]
    parts = urlsplit(url)
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=parts.netloc.split("@")[-1])))
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        basic = "Basic " + base64.b64encode(login.encode()).decode()
        # Not for whom the index redirects to.
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
    """The text without the name and password that an index address may carry."""
    return printable(re.sub(r"//[^/@\s]*@", "//", text))
