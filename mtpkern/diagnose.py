"""What a checkpoint is and what this machine can do with it, as rows of (name, value).

The roofline: a decode step reads every weight once, so that memory bandwidth over bytes per step
is the most steps per second that any runtime can make, and plain decoding's most tokens per second.
"""

import math
import os
import platform
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

import mtpkern
from mtpkern.checkpoints.directory import has_weights, is_gguf, read_entries
from mtpkern.checkpoints.llama import check_checkpoint, expected_tensors, load_config
from mtpkern.checkpoints.model_cache import default_model_directory, is_complete
from mtpkern.checkpoints.resolve import model_name
from mtpkern.checkpoints.tokenizer_files import has_tokenizer
from mtpkern.config import ModelConfig, resolve_dtype
from mtpkern.drafters.load import find_heads
from mtpkern.engine import LLM, resolve_device
from mtpkern.kernels.cpu._compile import host_target
from mtpkern.tokenizer import Tokenizer

_MIB = 1 << 20
_PROBE_BYTES = 64 * _MIB, 1024 * _MIB
_PROBE_REPEATS = 5
# Memory that loading takes, over the weights' own: they are packed one by one.
_LOADING = 1.3
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


def describe_checkpoint(directory: Path, dtype: str = "auto") -> Iterator[tuple[str, str]]:
    """Rows about a model's directory. Raises ModelLoadError at the first reason not to run it."""
    yield "directory", str(directory)
    config = load_config(directory)
    as_run, own_bits = resolve_dtype(dtype, config), _keeps_bits(directory, dtype)
    yield "family", f"{config.model_type}, {config.num_layers} layers"
    yield (
        "sizes",
        f"hidden {config.hidden_size}, feed-forward {config.intermediate_size}, "
        f"{config.num_heads} query and {config.num_kv_heads} KV heads of {config.head_dim}, "
        f"vocabulary {config.vocab_size}{' (tied)' if config.tie_word_embeddings else ''}",
    )
    yield "positions", f"{config.max_position_embeddings}, RoPE {_rope(config)}"
    run = "run in these on a CPU, " if own_bits else "run "
    yield (
        "dtype",
        f"{_dtypes_on_disk(directory)}{run}in {_name(as_run)}" + (" on a GPU" if own_bits else ""),
    )
    parameters = sum(math.prod(shape) for _, shape in expected_tensors(config))
    yield "parameters", f"{parameters / 1e6:.1f} million"
    step_bytes = bytes_per_step(directory, config, dtype)
    yield "bytes per step", f"{step_bytes / 1e6:.1f} MB of weights, whatever the number of drafts"
    itemsize = 2 if own_bits else as_run.itemsize
    kv_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    yield "KV per token", f"{kv_bytes / 1e3:.1f} kB, read in every step after it"
    heads = find_heads("auto", model_name(directory), directory)
    yield "heads", heads.name if heads else "none ship for this model; n-gram drafts only"
    for remark in config.remarks:
        yield "remark", remark
    check_checkpoint(directory)
    yield "tokenizer", _tokenizer(directory, config)
    yield "will run", "yes (names, shapes, dtypes and tokenizer checked; weights not read)"
    bandwidth = measure_read_bandwidth(step_bytes)
    yield "read bandwidth", f"{bandwidth / 1e9:.1f} GB/s, measured on {_device()}"
    yield (
        "roofline",
        f"{bandwidth / step_bytes:.0f} steps/s at that bandwidth: the bound of plain decoding in "
        "tok/s",
    )
    yield from describe_steps(directory, dtype, step_bytes, bandwidth)


def describe_steps(
    directory: Path, dtype: str, step_bytes: int, bandwidth: float
) -> Iterator[tuple[str, str]]:
    """Rows about what steps of a model take on this CPU, measured on the model itself."""
    available = _available_memory()
    if available is not None and step_bytes * _LOADING > available:
        yield (
            "plain step",
            f"not measured: the weights take {step_bytes / 1e9:.1f} GB, and "
            f"{available / 1e9:.1f} GB of memory are free",
        )
        return
    llm = LLM(directory, heads="none", device="cpu", dtype=dtype, max_batch=1, max_length=64)
    seconds = llm.time_steps()
    plain, rows = seconds[1], max(seconds)
    share = step_bytes / plain / bandwidth
    yield (
        "plain step",
        f"{plain * 1e3:.1f} ms, {1 / plain:.1f} tok/s: {share:.0%} of the roofline, measured",
    )
    ratio = seconds[rows] / plain
    yield (
        f"window of {rows}",
        f"{seconds[rows] * 1e3:.1f} ms, {ratio:.2f} times a plain step, measured: drafts pay where "
        f"they bring more than {ratio:.2f} tokens per step",
    )


def describe_machine() -> Iterator[tuple[str, str]]:
    """Rows about versions, the CPU, the GPU, and what runs where."""
    yield "mtpkern", mtpkern.__version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for name in _PACKAGES:
        yield name, _version(name) or "not installed"
    for name in _OPTIONAL:
        yield name, _version(name) or "not installed (optional)"
    yield "cpu", f"{cpu_model()}, {os.cpu_count()} cores, torch uses {_threads()}"
    flags = _cpu_flags()
    yield "cpu flags", " ".join(f for f in _CPU_FLAGS if f in flags) or "unknown"
    yield "cpu kernels", _tile()
    bandwidth = measure_read_bandwidth(_PROBE_BYTES[1])
    yield "read bandwidth", f"{bandwidth / 1e9:.1f} GB/s, measured on {_device()}"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            yield "gpu", f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
    else:
        built_for = torch.version.cuda or torch.version.hip
        yield "gpu", "none found" if built_for else "none: this torch is a CPU build"
    _, ops = resolve_device("auto")
    on_gpu = "runs on the GPU, on the Triton kernels, greedy only"
    yield "generate", "runs on the CPU, on kernels compiled for it" if ops.host_may_read else on_gpu
    directory = default_model_directory()
    fetched = is_complete(directory)
    yield "default model", str(directory) if fetched else "not here yet: mtpkern fetch"
    if fetched:
        config = load_config(directory)
        step_bytes = bytes_per_step(directory, config, "auto")
        yield from describe_steps(directory, "auto", step_bytes, bandwidth)


def bytes_per_step(directory: Path, config: ModelConfig, dtype: str) -> int:
    """Weight bytes that a step reads: all but the rows of the embedding that it does not look up.

    A tied embedding is read whole, as the LM head. Weights in their own bits count as they are on
    disk.
    """
    sizes = {name: math.prod(shape) for name, shape in expected_tensors(config)}
    if not config.tie_word_embeddings:
        del sizes["model.embed_tokens.weight"]
    if not _keeps_bits(directory, dtype):
        return sum(sizes.values()) * resolve_dtype(dtype, config).itemsize
    entries = read_entries(directory)
    return sum(entries[name].size for name in sizes)


def _keeps_bits(directory: Path, dtype: str) -> bool:
    """Whether a CPU runs a checkpoint in the bits of its file."""
    return dtype == "auto" and has_weights(directory) and is_gguf(read_entries(directory))


def _tile() -> str:
    """The form of the matmul of 8-bit integers that this CPU runs, and why."""
    try:
        form = host_target().form
    except ValueError as error:
        return f"none: {error}"
    why = {
        "vnni": "dot products of bytes in one instruction (VNNI)",
        "avx2": "256-bit vectors; this CPU has no dot products of bytes (VNNI)",
        "neon": "dot products of bytes in one instruction",
        "portable": "no vector instructions that the others need",
    }
    return f"{form}: {why[form]}"


def measure_read_bandwidth(working_set: int) -> float:
    """Bytes a second at which all threads read `working_set` bytes, best of a few passes.

    The buffer is as large as one step's weights (64 MiB to 1 GiB), so that it lies where they
    would lie: weights that fit the last cache do not come from memory.
    """
    low, high = _PROBE_BYTES
    buffer = torch.ones(max(low, min(high, working_set)) // 4, dtype=torch.float32)
    best = math.inf
    for _ in range(1 + _PROBE_REPEATS):
        started = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - started)
    return buffer.nbytes / best


def _available_memory() -> int | None:
    """Bytes of free memory; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # only Linux has it
        return None
    (free,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(free) * 1024


def cpu_model() -> str:
    """The CPU's own name, where the system says it."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    return next((set(line.split()) for line in _cpuinfo() if line.startswith("flags")), set())


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # only Linux has it
        return []


def _device() -> str:
    return f"the CPU with {_threads()}"


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count != 1 else ''}"


def _tokenizer(directory: Path, config: ModelConfig) -> str:
    if not has_tokenizer(directory):
        return "none: prompts must be token ids"
    tokenizer = Tokenizer.from_directory(directory)
    tokenizer.check_against(config)
    template = "with" if tokenizer.has_chat_template else "without"
    return f"{tokenizer.vocab_size} tokens, {template} chat template"


def _dtypes_on_disk(directory: Path) -> str:
    """The weights' own dtypes, whatever config.json says."""
    names = sorted({entry.dtype for entry in read_entries(directory).values()})
    return f"{', '.join(names)} on disk, "


def _rope(config: ModelConfig) -> str:
    rope = config.rope
    stretched = "" if rope.kind == "default" else f", factor {rope.factor:g}"
    return f"{rope.kind}, theta {rope.theta:g}{stretched}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
