"""mtpkern inspect: what a checkpoint is, whether it runs, and how fast it can run.

The roofline: a decode step reads every weight once, so memory bandwidth over bytes per step is the
most steps per second that any runtime can reach, and the most tokens per second of plain decoding.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpkern.cli.display import print_table
from mtpkern.status import SILENT, Status

if TYPE_CHECKING:
    from mtpkern.config import ModelConfig


def add_command(commands: Any) -> None:
    command = commands.add_parser(
        "inspect",
        help="show what a checkpoint is, whether it runs, and how fast",
        description="Show what a checkpoint is, which heads there are for it, whether it will run, "
        "how many bytes a step reads, and what steps take on this CPU, as measured. Exits with "
        "code 2 and the reason if it will not run.",
        epilog="example:\n  mtpkern inspect path/to/model",
    )
    command.add_argument(
        "model", metavar="MODEL", help="a model's directory or .gguf file, its name, or a hub id"
    )
    command.add_argument(
        "--dtype", default="auto", metavar="DTYPE", help="auto, bfloat16, float16 or float32"
    )
    command.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    with args.status.phase("starting"):  # importing torch takes a second or two
        from mtpkern.checkpoints.resolve import resolve_model

    directory = resolve_model(args.model, status=args.status)
    print_table(describe_checkpoint(directory, args.dtype, args.status))
    return 0


def describe_checkpoint(
    directory: Path, dtype: str = "auto", status: Status = SILENT
) -> Iterator[tuple[str, str]]:
    """Rows about a model's directory. Raises ModelLoadError at the first reason not to run it."""
    from mtpkern.checkpoints.llama import check_checkpoint, expected_tensors, load_config
    from mtpkern.checkpoints.resolve import model_name
    from mtpkern.cli.machine import describe_bandwidth, measure_read_bandwidth
    from mtpkern.config import resolve_dtype
    from mtpkern.drafters.load import find_heads

    yield "directory", str(directory)
    config = load_config(directory)
    as_run, own_bits = resolve_dtype(dtype, config), _keeps_bits(directory, dtype)
    name = str(as_run).removeprefix("torch.")
    yield "family", f"{config.model_type}, {config.num_layers} layers"
    yield (
        "sizes",
        f"hidden {config.hidden_size}, feed-forward {config.intermediate_size}, "
        f"{config.num_heads} query and {config.num_kv_heads} KV heads of {config.head_dim}, "
        f"vocabulary {config.vocab_size}{' (tied)' if config.tie_word_embeddings else ''}",
    )
    yield "positions", f"{config.max_position_embeddings}, RoPE {_rope(config)}"
    runs = f"runs in these on a CPU, in {name} on a GPU" if own_bits else f"runs in {name}"
    yield "dtype", f"{_dtypes_on_disk(directory)} on disk, {runs}"
    parameters = sum(math.prod(shape) for _, shape in expected_tensors(config))
    yield "parameters", f"{parameters / 1e6:.1f} million"
    step_bytes = bytes_per_step(directory, config, dtype)
    yield "bytes per step", f"{step_bytes / 1e6:.1f} MB of weights, whatever the number of drafts"
    itemsize = 2 if own_bits else as_run.itemsize
    kv_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    yield "KV per token", f"{kv_bytes / 1e3:.1f} kB, read in every later step"
    heads = find_heads("auto", model_name(directory), directory)
    yield "heads", heads.name if heads else "none ship for this model; n-gram drafts only"
    for remark in config.remarks:
        yield "remark", remark
    check_checkpoint(directory)
    yield "tokenizer", _tokenizer(directory, config)
    yield "will run", "yes (names, shapes, dtypes and tokenizer checked; weights not read)"
    bandwidth = measure_read_bandwidth(step_bytes)
    yield "read bandwidth", describe_bandwidth(bandwidth)
    yield (
        "roofline",
        f"{bandwidth / step_bytes:.0f} steps/s at that bandwidth: the upper bound of plain "
        "decoding in tok/s",
    )
    yield from describe_steps(directory, dtype, step_bytes, bandwidth, status)


def describe_steps(
    directory: Path, dtype: str, step_bytes: int, bandwidth: float, status: Status = SILENT
) -> Iterator[tuple[str, str]]:
    """Rows about how long a model's steps take on this CPU, measured on the model itself.

    `step_bytes`: weight bytes per step; `bandwidth`: bytes read per second.
    """
    from mtpkern.engine import LLM
    from mtpkern.memory import OutOfMemory

    try:
        llm = LLM(
            directory,
            heads="none",
            device="cpu",
            dtype=dtype,
            max_batch=1,
            max_length=64,
            status=status,
        )
    except OutOfMemory as error:
        yield "plain step", f"not measured: {error}"
        return
    with status.phase("timing steps"):
        seconds = llm.time_steps()
    plain, rows = seconds[1], max(seconds)
    share = step_bytes / plain / bandwidth
    verdict = (
        f"{share:.0%} of the roofline, measured"
        if share <= 1
        else "measured; above the roofline, since bandwidth was measured while the machine was "
        "busier"
    )
    yield "plain step", f"{plain * 1e3:.1f} ms, {1 / plain:.1f} tok/s: {verdict}"
    ratio = seconds[rows] / plain
    yield (
        f"window of {rows}",
        f"{seconds[rows] * 1e3:.1f} ms, {ratio:.2f} times a plain step, measured: "
        f"drafts pay off above {ratio:.2f} tokens per step",
    )


def bytes_per_step(directory: Path, config: "ModelConfig", dtype: str) -> int:
    """Weight bytes that a step reads: all but the embedding, of which it looks up single rows.

    A tied embedding is read whole, as the LM head. Weights that run in the file's own format count
    as they are on disk.
    """
    from mtpkern.checkpoints.directory import read_entries
    from mtpkern.checkpoints.llama import expected_tensors
    from mtpkern.config import resolve_dtype

    sizes = {name: math.prod(shape) for name, shape in expected_tensors(config)}
    if not config.tie_word_embeddings:
        del sizes["model.embed_tokens.weight"]
    if not _keeps_bits(directory, dtype):
        return sum(sizes.values()) * resolve_dtype(dtype, config).itemsize
    entries = read_entries(directory)
    return sum(entries[name].size for name in sizes)


def _keeps_bits(directory: Path, dtype: str) -> bool:
    """Whether a CPU runs a checkpoint's weights in the file's own format."""
    from mtpkern.checkpoints.directory import has_weights, is_gguf, read_entries

    return dtype == "auto" and has_weights(directory) and is_gguf(read_entries(directory))


def _tokenizer(directory: Path, config: "ModelConfig") -> str:
    from mtpkern.checkpoints.tokenizer_files import has_tokenizer
    from mtpkern.tokenizer import Tokenizer

    if not has_tokenizer(directory):
        return "none: prompts must be token ids (generate --token-ids)"
    tokenizer = Tokenizer.from_directory(directory)
    tokenizer.check_against(config)
    template = "with a" if tokenizer.has_chat_template else "without a"
    return f"{tokenizer.vocab_size} tokens, {template} chat template"


def _dtypes_on_disk(directory: Path) -> str:
    """The dtypes of the weight files, whatever config.json says."""
    from mtpkern.checkpoints.directory import read_entries

    return ", ".join(sorted({entry.dtype for entry in read_entries(directory).values()}))


def _rope(config: "ModelConfig") -> str:
    rope = config.rope
    scaling = "" if rope.kind == "default" else f", factor {rope.factor:g}"
    return f"{rope.kind}, theta {rope.theta:g}{scaling}"
