"""mtpkern doctor: the versions installed, this machine, and what runs where."""

import argparse
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import mtpkern
from mtpkern.cli.display import print_table
from mtpkern.cli.inspect import bytes_per_step, describe_steps
from mtpkern.errors import counted
from mtpkern.status import SILENT, Status

_PACKAGES = (
    "torch",
    "triton",
    "numba",
    "llvmlite",
    "numpy",
    "safetensors",
    "tokenizers",
    "sentencepiece",
    "jinja2",
)
_OPTIONAL = ("gguf", "transformers", "huggingface_hub")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
# How each form of the CPU's matmul of 8-bit integers works.
_FORMS = {
    "vnni": "byte dot products in one instruction (VNNI)",
    "avx2": "256-bit vectors; this CPU has no byte dot products (VNNI)",
    "neon": "byte dot products in one instruction",
    "portable": "no special vector instructions",
}


def add_command(commands: Any) -> None:
    command = commands.add_parser(
        "doctor",
        help="show versions, this machine, and what runs where",
        description="Show the versions installed, the CPU and the GPU, and which of them runs "
        "models. Memory bandwidth is measured, and so is the default model once it is fetched.",
        epilog="example:\n  mtpkern doctor",
    )
    command.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    print_table(describe_machine(args.status))
    return 0


def describe_machine(status: Status = SILENT) -> Iterator[tuple[str, str]]:
    """Rows about versions, the CPU, the GPU, and what runs where."""
    yield "mtpkern", mtpkern.__version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for name in _PACKAGES:
        yield name, _version(name) or "not installed"
    for name in _OPTIONAL:
        yield name, _version(name) or "not installed (optional)"
    with status.phase("starting"):  # importing torch takes a second or two
        import torch

        from mtpkern.checkpoints.llama import load_config
        from mtpkern.checkpoints.model_cache import default_model_directory, is_complete
        from mtpkern.cli import machine
        from mtpkern.device import compile_kernels, resolve_device

    cores = counted(os.cpu_count() or 1, "core")
    yield "cpu", f"{machine.cpu_model()}, {cores}, torch uses {machine.describe_threads()}"
    flags = machine.cpu_flags()
    yield "cpu flags", " ".join(flag for flag in _CPU_FLAGS if flag in flags) or "unknown"
    yield "cpu kernels", _integer_matmul()
    bandwidth = machine.measure_read_bandwidth(machine.LARGEST_BUFFER)
    yield "read bandwidth", machine.describe_bandwidth(bandwidth)
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            yield "gpu", f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
    else:
        built_for = torch.version.cuda or torch.version.hip
        yield "gpu", "none found" if built_for else "none: this torch is a CPU build"
    _, ops = resolve_device("auto")
    compile_kernels(ops, status)
    on_cpu, on_gpu = "the CPU, with kernels compiled for it", "the GPU, greedy decoding only"
    yield "generate", f"runs on {on_cpu if ops.host_may_read else on_gpu}"
    directory = default_model_directory()
    fetched = is_complete(directory)
    yield "default model", str(directory) if fetched else "not fetched yet: run mtpkern fetch"
    if fetched:
        step_bytes = bytes_per_step(directory, load_config(directory), "auto")
        yield from describe_steps(directory, "auto", step_bytes, bandwidth, status)


def _integer_matmul() -> str:
    """The form of the 8-bit integer matmul that this CPU runs, and why."""
    from mtpkern.kernels.cpu._compile import host_target

    try:
        form = host_target().form
    except ValueError as error:
        return f"none: {error}"
    return f"{form}: {_FORMS[form]}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
