"""The contents of the installed package, from a wheel and an sdist of a copy of the tree."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = "from setuptools import build_meta as b; b.build_wheel('out'); b.build_sdist('out')"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder of both archives, built from a copy so that no build/ is left in the tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("mtpkern", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-c", BUILD], cwd=tree, check=True, capture_output=True)
    return tree / "out"


@pytest.fixture(scope="module")
def wheel(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        yield archive


def package_files() -> set[str]:
    """Every file of the package, by its name in the installation."""
    mapping = {"mtpkern": "mtpkern", "kernels": "mtpkern/kernels"}
    return {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in mapping.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != ".gitkeep"
    }


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == package_files()
    assert "mtpkern/py.typed" in names


def test_the_wheel_has_one_top_level_name(wheel):
    """A top-level `kernels` would overwrite the package of that name on PyPI."""
    tops = {PurePosixPath(name).parts[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mtpkern"}


def test_the_wheel_carries_its_licence_and_version(wheel):
    import mtpkern

    names = wheel.namelist()
    metadata = message_from_bytes(wheel.read(next(n for n in names if n.endswith("/METADATA"))))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Version"] == mtpkern.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    licence = next(name for name in names if name.endswith("/licenses/LICENSE"))
    assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_alone_can_import_its_kernels_folder(built, wheel, tmp_path):
    wheel.extractall(tmp_path)
    program = "import mtpkern.kernels as k; print(*k.__path__, sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=built, env=environment, check=True, capture_output=True
    ).stdout.decode()
    assert output.splitlines() == [str(tmp_path / "mtpkern" / "kernels")]


def test_the_sdist_can_build_the_wheel_again(built, wheel, tmp_path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        # Python 3.10.12 and later warn unless an extraction filter is named.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(tmp_path)
    (tree,) = tmp_path.iterdir()
    subprocess.run([sys.executable, "-c", BUILD], cwd=tree, check=True, capture_output=True)
    with zipfile.ZipFile(next(tree.glob("out/*.whl"))) as again:
        assert sorted(again.namelist()) == sorted(wheel.namelist())
