"""Compilation, once per machine: LLVM IR to object files in the user's cache directory.

IR comes from two places: matmul tiles are written as LLVM vectors (`_tile`), everything else is
Python that Numba translates (`_program`, `_step_end` and what they import). Both give
position-independent objects without absolute addresses. A later process loads them and imports
neither. The key is a hash of every file of this folder, the versions of llvmlite, Numba and Python,
and the CPU and its features. If the directory is not writable, objects stay in memory.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.metadata
import itertools
import os
import platform
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import llvmlite.binding as llvm

from ._tile import form_of, tile_ir

# Functions (int64, int64, int64) -> int64 that Numba translates, and the files that hold them.
ENTRIES = {"run_program": "_program", "end_step": "_step_end", "draft_ngram": "_step_end"}

# The least that kernels are compiled for on x86: fused multiply-add, AVX2, half floats.
BASELINE = {"avx2", "fma", "f16c", "bmi2"}


class Target(NamedTuple):
    """What code is compiled for: an LLVM CPU name and the features to add to it."""

    triple: str
    cpu: str
    features: str
    form: str  # of the integer tile


@cache
def host_target() -> Target:
    """This machine; ValueError if it lacks instructions that the kernels need."""
    found = llvm.get_host_cpu_features()
    names = {name for name, there in found.items() if there}
    if platform.machine().lower() in ("x86_64", "amd64") and not names >= BASELINE:
        raise ValueError(f"CPU kernels need {', '.join(sorted(BASELINE - names))}")
    form = form_of(names, platform.machine().lower())
    return Target(llvm.get_process_triple(), llvm.get_host_cpu_name(), found.flatten(), form)


def emit_object(ir: str, target: Target, *, optimise: bool) -> bytes:
    """An object file of IR; `optimise` runs LLVM's -O3 passes first."""
    module = llvm.parse_assembly(ir)
    module.verify()
    machine = target_machine(target)
    if optimise:
        builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(3))
        builder.getModulePassManager().run(module, builder)
    return machine.emit_object(module)


def target_machine(target: Target) -> llvm.TargetMachine:
    if target.triple == llvm.get_process_triple():
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
    else:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
    return llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, reloc="pic", codemodel="jitdefault"
    )


def default_cache() -> Path:
    """$XDG_CACHE_HOME/mtpkern/kernels, or ~/.cache/mtpkern/kernels."""
    root = os.environ.get("XDG_CACHE_HOME")
    base = Path(root) if root and os.path.isabs(root) else Path.home() / ".cache"
    return base / "mtpkern" / "kernels"


class Kernels:
    """Entry points by name, compiled on first use.

    `directory` keeps object files between processes (None: they are not kept). `on_compile(name)`
    is called before a unit is compiled that the directory lacks.
    """

    def __init__(
        self,
        target: Target | None = None,
        directory: Path | None = None,
        on_compile: Callable[[str], None] = lambda name: None,
    ):
        self.target = host_target() if target is None else target
        self.directory, self.on_compile = directory, on_compile
        self.compiled: list[str] = []  # units that were not in the directory
        self._key = _key(self.target)
        self._addresses: dict[str, int] = {}
        self._kept: list[object] = []
        self._lock = threading.Lock()

    def tile(self, weights: str) -> int:
        """Address of the matmul tile for a weight format."""
        return self._address(f"tile_{weights}", lambda: self._emit_tile(weights), weights)

    def entry(self, name: str) -> Callable[[int, int, int], int]:
        """A function of ENTRIES; a call leaves the interpreter to other threads."""
        address = self._address(name, lambda: self._emit_entry(name), name)
        # Numba's convention: a place for the result and one for an exception come first.
        kinds = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3
        function = ctypes.CFUNCTYPE(ctypes.c_int32, *kinds)(address)

        def call(first: int, second: int, third: int) -> int:
            places = (ctypes.c_int64 * 2)()
            address = ctypes.addressof(places)
            function(address, address + 8, first, second, third)
            return places[0]

        return call

    def compile_entries(self) -> None:
        """Compile the functions of ENTRIES that the directory lacks."""
        for name in ENTRIES:
            self.entry(name)

    def _emit_tile(self, weights: str) -> bytes:
        return emit_object(tile_ir(weights, self.target.form), self.target, optimise=False)

    def _emit_entry(self, name: str) -> bytes:
        module = importlib.import_module(f".{ENTRIES[name]}", __package__)
        translate = importlib.import_module("._translate", __package__)
        ir = translate.function_ir(getattr(module, name))
        return emit_object(ir, self.target, optimise=True)

    def _address(self, symbol: str, emit: Callable[[], bytes], unit: str) -> int:
        with self._lock:
            if symbol not in self._addresses:
                self._load(unit, self._object(unit, emit))
            return self._addresses[symbol]

    def _object(self, unit: str, emit: Callable[[], bytes]) -> bytes:
        file = None if self.directory is None else self.directory / f"{unit}-{self._key}.o"
        if file is not None:
            try:
                return _checked(file.read_bytes())
            except (OSError, ValueError):
                pass
        self.on_compile(unit)
        self.compiled.append(unit)
        made = emit()
        if file is not None:
            _write(file, made)
        return made

    def _load(self, unit: str, image: bytes) -> None:
        name = unit if unit in ENTRIES else f"tile_{unit}"
        builder = llvm.JITLibraryBuilder().add_object_img(image).add_current_process()
        builder.export_symbol(name)
        library = builder.link(_jit(), f"mtpkern_{unit}_{next(_numbers)}")
        self._kept.append(library)
        self._addresses[name] = library[name]


# Libraries of a process have distinct names.
_numbers = itertools.count()


@cache
def _jit() -> llvm.orcjit.LLJIT:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.create_lljit_compiler()


def _key(target: Target) -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    versions = [importlib.metadata.version(name) for name in ("llvmlite", "numba")]
    digest.update(repr((versions, sys.version_info[:2], target)).encode())
    return digest.hexdigest()[:24]


def _checked(content: bytes) -> bytes:
    """The object in a cache file; ValueError if the file is truncated or damaged."""
    digest, image = content[:32], content[32:]
    if hashlib.sha256(image).digest() != digest:
        raise ValueError("the object file is damaged")
    return image


def _write(file: Path, image: bytes) -> None:
    """Write atomically, by a rename; a directory that is not writable is not an error."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(hashlib.sha256(image).digest() + image)
        os.replace(name, file)
    except OSError:
        pass
