"""The house rules that a reader relies on: who may import whom; the README names every file."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What reads files and settings, and is read by everything that runs a model.
FLOOR = {
    "errors",
    "validation",
    "config",
    "rope",
    "status",
    "cache",
    "checkpoints",
    "tokenizer",
} | {"chat_template"}
STEP = FLOOR | {"kernels", "ops", "model", "drafters", "decode", "graph"}
EVERYTHING = STEP | {
    "library",
    "ring",
    "request",
    "prompts",
    "nvtx_ranges",
    "threads",
    "device",
    "memory",
    "prefill",
    "runner",
    "scheduler",
    "loading",
    "warmup",
    "engine",
}

# Each room of the project, a module or a package, and the rooms that it may import. Libraries are
# free except where LIBRARIES says otherwise. "mtpkern" is the package itself, whose names are the
# public ones.
ARROWS: dict[str, set[str]] = {
    "kernels": set(),
    "errors": set(),
    "rope": set(),
    "status": set(),
    "cache": set(),
    "graph": set(),
    "nvtx_ranges": set(),
    "validation": {"errors"},
    "threads": {"validation"},
    "output_paths": {"errors"},
    "outputs": {"errors", "output_paths"},
    "config": {"errors", "rope", "validation"},
    "chat_template": {"errors", "validation", "checkpoints"},
    "tokenizer": {"config", "errors", "chat_template", "checkpoints"},
    "checkpoints": {"config", "errors", "kernels", "outputs", "rope", "status", "validation"},
    # cache, config and model as types only.
    "ops": {"errors", "kernels", "cache", "config", "model"},
    "library": {"kernels"},
    "model": {"config", "cache", "kernels", "ops", "checkpoints"},
    "drafters": {"config", "cache", "kernels", "ops", "checkpoints", "errors", "model", "rope"},
    "decode": {"config", "cache", "kernels", "ops", "model", "drafters"},
    "ring": {"kernels"},
    "request": {"config", "drafters", "errors", "ring", "tokenizer"},
    "prompts": {"config", "errors", "request", "tokenizer", "validation"},
    "device": {"errors", "kernels", "ops", "status", "validation"},
    "prefill": {"cache", "decode", "device", "drafters", "model", "ops"},
    "runner": STEP | {"device", "prefill", "request", "ring"},
    "scheduler": {"cache", "drafters", "errors", "nvtx_ranges", "request", "runner"},
    "memory": {"checkpoints", "config", "errors", "kernels"},
    "loading": STEP | {"device", "memory", "runner"},
    "warmup": STEP | {"request", "runner"},
    "engine": STEP
    | {"device", "loading", "prompts", "request", "runner", "scheduler", "threads", "warmup"},
    "reference": {"config", "checkpoints"},
    # What it converts are models and heads.
    "convert": {"config", "errors", "checkpoints", "drafters", "outputs"},
    "arguments": {"errors", "status"},
    "mtpkern": EVERYTHING,
    "train": EVERYTHING | {"mtpkern", "reference", "arguments", "outputs"},
    "integrations": EVERYTHING | {"mtpkern"},
    "cli": EVERYTHING | {"mtpkern", "arguments", "convert", "outputs", "train", "integrations"},
    "__main__": {"cli"},
}

STANDARD = {"__future__", "collections", "dataclasses", "functools", "math", "typing"}
LIBRARIES: dict[str, set[str]] = {
    "kernels": STANDARD | {"torch", "triton", "hashlib", "importlib", "sys", "types"},
    "kernels.cpu": STANDARD
    | {"torch", "numpy", "numba", "llvmlite"}
    | {"contextlib", "ctypes", "hashlib", "importlib", "itertools", "operator", "os", "pathlib"}
    | {"mmap", "platform", "queue", "re", "struct", "sys", "tempfile", "threading"},
    "graph": STANDARD | {"contextlib", "torch"},
    "reference": STANDARD | {"torch"},
}

# Inside the step nothing may travel to the host.
STEP_FILES = (
    "decode",
    "model",
    "cache",
    "graph",
    *(f"drafters/{name}" for name in ("base", "cached", "pairs", "ngram", "medusa", "hydra")),
    *(f"drafters/{name}" for name in ("layers", "mtp", "mtp_modules", "eagle3", "synthetic")),
)
HOST_READS = {"item", "tolist", "cpu", "numpy"}
# Chosen only where the host may read values inside a step.
HOST_ONLY = {"PendingPairs"}


def sources() -> list[Path]:
    return sorted([*ROOT.glob("kernels/**/*.py"), *ROOT.glob("mtpkern/**/*.py")])


def module_name(path: Path) -> str:
    """The dotted name under which a file is imported: kernels/ is mtpkern.kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("mtpkern", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """mtpkern.kernels.linear -> kernels, mtpkern.config -> config, mtpkern -> mtpkern."""
    return module.split(".")[1] if "." in module else module


def imports(source: str, module: str, is_package: bool) -> set[str]:
    """Name the modules that a file imports anywhere, in functions too, relative ones resolved."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - is_package
                package = module.split(".")[: len(module.split(".")) - up]
                base = ".".join([*package, base]).rstrip(".")
            if base in ("mtpkern", "mtpkern.kernels"):
                # `from mtpkern import ops` names a module, `from mtpkern import LLM` does not.
                found |= {f"{base}.{alias.name}" for alias in node.names}
            else:
                found.add(base)
    return found


def offences(module: str, imported: set[str]) -> list[str]:
    """Say which imports the tables forbid to a module."""
    part, wrong = part_of(module), []
    # kernels/cpu may import other libraries than its siblings.
    room = "kernels.cpu" if module.startswith("mtpkern.kernels.cpu.") else part
    for name in sorted(imported):
        top = name.split(".")[0]
        if top in ("benchmarks", "tests", "setup", "llama_layouts", "kernels"):
            wrong.append(f"{name}: nothing imports this")
        elif top == "mtpkern":
            target = part_of(name)
            if target not in ARROWS:
                target = "mtpkern"
            if target != part and target not in ARROWS[part]:
                wrong.append(f"{name}: {part} may import {sorted(ARROWS[part])} only")
        elif room in LIBRARIES and top not in LIBRARIES[room]:
            wrong.append(f"{name}: {room} may import {sorted(LIBRARIES[room])} only")
    return wrong


def host_reads(source: str) -> list[str]:
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if getattr(node, "name", None) not in HOST_ONLY]
    return [
        f"line {node.lineno}: .{node.func.attr}()"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in HOST_READS
    ]


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_every_file_imports_only_what_lies_below_it(path):
    module = module_name(path)
    part = part_of(module)
    assert part in ARROWS, f"{path.relative_to(ROOT)} is new: give {part!r} a row in ARROWS"
    imported = imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert offences(module, imported) == []


def test_no_value_travels_to_the_host_inside_a_step():
    files = [ROOT / "mtpkern" / f"{name}.py" for name in STEP_FILES]
    reads = {file.name: host_reads(file.read_text("utf-8")) for file in files}
    assert {name: lines for name, lines in reads.items() if lines} == {}


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda p: p.stem)
def test_nothing_is_imported_from_a_test_file(path):
    imported = imports(path.read_text(encoding="utf-8"), f"tests.{path.stem}", False)
    assert not [name for name in imported if name.split(".")[0].startswith("test_")]


def test_the_tree_in_the_readme_names_every_file_of_the_package_and_no_other():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("\n## The tree\n")[1].split("\n## ")[0]
    named, folders = set(), []
    for indent, name in re.findall(r"^    ( *)(\S+)", tree, re.MULTILINE):
        folders = [*folders[: len(indent) // 2], name]
        named.add("".join(folders))
    rooms = ("kernels", "mtpkern", "benchmarks")
    files = [
        path.relative_to(ROOT).as_posix() for room in rooms for path in ROOT.glob(f"{room}/**/*.py")
    ]
    listed = {file for file in files if not file.endswith(("__init__.py", "__main__.py"))}
    assert {file for file in named if file.startswith(rooms) and file.endswith(".py")} == listed


def test_nothing_makes_the_folder_kernels_a_top_level_package():
    for name in ("kernels/__init__.py", "conftest.py", "__init__.py", "tests/__init__.py"):
        assert not (ROOT / name).exists(), name


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mtpkern.kernels.linear", "from mtpkern.config import ModelConfig"),
        ("mtpkern.kernels.linear", "from ..config import ModelConfig"),
        ("mtpkern.kernels.linear", "import numpy"),
        ("mtpkern.kernels.linear", "import numba"),
        ("mtpkern.kernels.cpu.program", "import scipy"),
        ("mtpkern.kernels.cpu.program", "from mtpkern.cache import KVCache"),
        ("mtpkern.model", "def f():\n    from mtpkern import decode"),
        ("mtpkern.model", "from mtpkern import LLM"),
        ("mtpkern.model", "from . import engine"),
        ("mtpkern.cache", "import mtpkern.ops.base as ops"),
        ("mtpkern.reference", "from mtpkern.model import forward"),
        ("mtpkern.reference", "from .ops.base import DEFINITIONS"),
        ("mtpkern.graph", "from mtpkern.decode import decode_step"),
        ("mtpkern.engine", "from mtpkern.cli import main"),
        ("mtpkern.cli", "from benchmarks import bench_decode"),
        ("mtpkern.train.data", "import tests.llama_layouts"),
        ("mtpkern.ops.base", "from kernels import linear"),
    ],
)
def test_a_forbidden_import_is_seen(module, source):
    assert offences(module, imports(source, module, is_package=False))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mtpkern.kernels.linear", "import torch, triton.language as tl\nfrom . import _launch"),
        ("mtpkern.kernels.linear", "from ._launch import ceil_div"),
        ("mtpkern.kernels.cpu.program", "import numba, numpy\nfrom . import _layout"),
        ("mtpkern.ops.base", "from mtpkern.kernels import linear, accept"),
        ("mtpkern.decode", "from .model import forward\nimport numpy"),
        ("mtpkern.train.data", "from mtpkern import LLM\nfrom .losses import soft"),
    ],
)
def test_a_permitted_import_passes(module, source):
    assert offences(module, imports(source, module, is_package=False)) == []


def test_a_host_read_is_seen():
    source = "n = lengths.max().item()\nrows = x[0].tolist()\ny = x.cpu()\nz = x.sum()"
    assert len(host_reads(source)) == 3
