"""Launchers without a GPU: each says that it needs one, and names the definition that does not."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from operators import OPERATORS, arguments, moved

from mtpkern import library
from mtpkern.kernels import _launch
from mtpkern.kernels._launch import _Kernel

KERNELS = Path(_launch.__file__).parent


def launch(name: str) -> Any:
    args, options = moved(arguments()[name][0], "cpu")
    return getattr(library, name)(*args, **options)


@pytest.mark.parametrize("name", OPERATORS)
def test_cpu_tensors_are_refused_and_the_definition_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} needs tensors on a GPU, got \w+ on the CPU"):
        launch(name)
    with pytest.raises(ValueError, match=f"its definition, {name}_ref, takes those"):
        launch(name)


@pytest.mark.parametrize("name", OPERATORS)
def test_without_triton_the_definition_is_named_too(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"mtpkern.kernels.{name}")
    for value in vars(module).values():
        if isinstance(value, _Kernel):
            monkeypatch.setattr(value, "compiled", None)
    with pytest.raises(ImportError, match=f"{name} needs Triton.*; {name}_ref does not"):
        launch(name)


@pytest.mark.parametrize("path", sorted(KERNELS.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_every_kernel_names_a_definition_that_exists(path: Path) -> None:
    module = importlib.import_module(f"mtpkern.kernels.{path.stem}")
    kernels = [value for value in vars(module).values() if isinstance(value, _Kernel)]
    assert kernels, "a file of kernels has one"
    for kernel in kernels:
        assert callable(getattr(module, kernel.definition))


def test_memory_that_a_gpu_reads_is_not_refused(cuda: str) -> None:
    pinned = torch.zeros(4, 8).pin_memory()
    assert _launch._is_reachable(pinned) and not _launch._is_reachable(torch.zeros(4))


def test_triton_is_imported_by_the_first_kernel_that_is_compiled() -> None:
    pytest.importorskip("triton")
    program = """
import sys
import mtpkern.engine
from mtpkern.kernels import _ranking, linear
assert "triton" not in sys.modules and linear.tl is None
linear._linear_kernel.compiled
import triton
assert linear.tl is triton.language
assert isinstance(_ranking.LOWEST, triton.language.constexpr)
assert isinstance(_ranking.rank, triton.runtime.JITFunction)
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ)
