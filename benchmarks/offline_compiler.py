"""Compiles what launchers launch for a GPU that is not there, and reads what the binaries use."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

# mma.sync and wgmma in machine code.
MULTIPLICATION = re.compile(r"\bHG?MMA\b")


class Device:
    """A driver for a GPU that is not there, with the answers that the compiler needs."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def launches_compiled() -> Iterator[list[tuple[str, Any, dict[str, Any], Any]]]:
    """Compile launches instead of running them -> a list that grows by one entry per launch:
    the kernel's name, its binary, its arguments by name, and its grid."""
    launched: list[tuple[str, Any, dict[str, Any], Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binary = run(self, *args, grid=grid, warmup=True, **options)
        # Triton 3.6 may compile in the background and return a future.
        binary = binary.result() if hasattr(binary, "result") else binary
        given = dict(zip(self.arg_names, args, strict=False)) | options
        launched.append((op_name(self.__name__), binary, given, grid))

    JITFunction.run = compile_only
    try:
        yield launched
    finally:
        JITFunction.run = run


def op_name(function: str) -> str:
    return function.strip("_").removesuffix("_kernel")


def first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[-1].strip()


def measure(binary: Any) -> dict[str, Any]:
    """What one compiled kernel uses, from its machine code and its PTX."""
    return {
        "symbol": binary.metadata.name,
        "binary": binary.hash,
        "stages": binary.metadata.num_stages,
        "shared": binary.metadata.shared,
        **resources(binary.asm["cubin"]),
        **instructions(binary.asm["ptx"]),
        **issued(binary.asm["cubin"]),
    }


def instructions(ptx: str) -> dict[str, Any]:
    """The widths of a kernel's loads and copies, and its tensor-core instructions."""
    # An asynchronous copy gives its bytes after its addresses; a load its lanes and their width.
    copies = re.findall(r"cp\.async\.c[ag]\S* \[.*?\], \[.*?\], (\w+)", ptx)
    copied = [int(size, 0) for size in copies]
    loads = re.findall(r"ld\.global(?:\.\w+|::\w+)*?(?:\.v(\d))?\.[bfus](\d+)", ptx)
    loaded = [int(lanes or 1) * int(bits) // 8 for lanes, bits in loads]
    mma = re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*?(\.m\d+n\d+k\d+|[\s;])", ptx)
    kinds = ["".join(kind).strip(" \t\n;") for kind in mma]
    return {
        "wide": sum(size >= 16 for size in copied + loaded),
        "narrow": 100 * sum(size for size in copied if size < 16) // max(1, sum(copied)),
        "mma": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
    }


def run_tool(name: str, option: str, cubin: bytes) -> str:
    """The output of one of the CUDA tools that ship with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread and bytes of stack."""
    text = run_tool("cuobjdump", "--dump-resource-usage", cubin)
    return {
        name: int(re.findall(rf"{word}:(\d+)", text)[0])
        for name, word in (("registers", "REG"), ("stack", "STACK"))
    }


def issued(cubin: bytes) -> dict[str, int]:
    """Instructions of a warp that multiplies: `loop`, in one pass of its loop, or `unrolled`, in
    all passes if there is no loop. Both are 0 if nothing is multiplied."""
    sass = run_tool("nvdisasm", "-c", cubin)
    loop = multiplying_loop(sass)
    return {"loop": loop, "unrolled": 0 if loop else unrolled_passes(sass)}


def parsed(sass: str) -> tuple[list[str], dict[str, int]]:
    """The instructions, and the index of the instruction after each label."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    return instructions, labels


def unrolled_passes(sass: str) -> int:
    """The number of instructions from the first load from memory to the last multiplication."""
    instructions, _ = parsed(sass)
    loads = [i for i, instruction in enumerate(instructions) if re.search(r"\bLDG", instruction)]
    dots = [i for i, instruction in enumerate(instructions) if MULTIPLICATION.search(instruction)]
    return max(0, dots[-1] + 1 - loads[0]) if loads and dots else 0


def multiplying_loop(sass: str) -> int:
    """The length in instructions of the longest loop that multiplies on tensor cores."""
    instructions, labels = parsed(sass)
    longest = 0
    for end, instruction in enumerate(instructions):
        jump = re.search(r"\bBRA[^`]*`\((\.L_x_\d+)\)", instruction)
        begin = labels.get(jump[1], end + 1) if jump else end + 1
        if any(MULTIPLICATION.search(body) for body in instructions[begin : end + 1]):
            longest = max(longest, end + 1 - begin)
    return longest
