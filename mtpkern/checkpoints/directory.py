"""A checkpoint directory (or one file of weights) -> its tensors by name.

The first of these that exists is read: model.safetensors, model.safetensors.index.json with its
shards, model.gguf, and model.gguf.json, which points to a GGUF elsewhere.
"""

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mtpkern.checkpoints.gguf_file import GGUF_FILE, read_gguf
from mtpkern.checkpoints.gguf_pointer import POINTER_FILE, read_pointer
from mtpkern.checkpoints.safetensors_files import read_safetensors, read_sharded_safetensors
from mtpkern.checkpoints.tensor_entry import (
    TORCH_DTYPES,
    Maps,
    TensorEntry,
    is_dequantisable,
    map_tensor,
    read_rows,
    row_slices,
)
from mtpkern.errors import ModelLoadError, printable

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")  # converted by `mtpkern convert`, never loaded

# Parts of tensor names that wrappers add: DDP and PEFT as a prefix; torch.compile, FSDP and
# activation checkpointing anywhere.
_WRAPPERS = re.compile(
    r"^(module\.|base_model\.model\.)+"
    r"|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# The tensor names of a model saved without its LM head (LlamaModel): no prefix "model.".
_HEADLESS_NAMES = re.compile(
    r"(embed_tokens|norm)\.weight|lm_head\.weight|rotary_emb\..+"
    r"|layers\.\d+\.((input|post_attention)_layernorm\.weight|mlp\.(gate|up|down)_proj\.\w+"
    r"|self_attn\.([qkvo]_proj\.\w+|[qk]_norm\.weight|rotary_emb\..+|masked_bias|bias))"
)


def has_weights(directory: Path) -> bool:
    """Whether a directory has a file of weights that `read_entries` reads."""
    return bool(weight_files(directory))


def weight_files(directory: Path) -> list[Path]:
    """A directory's files of weights in order of precedence. Only the first is read."""
    names = ("model.safetensors", "model.safetensors.index.json", GGUF_FILE)
    found = [directory / name for name in names if (directory / name).is_file()]
    pointer = directory / POINTER_FILE
    return [*found, read_pointer(pointer)] if pointer.is_file() else found


def read_entries(directory: str | Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint directory or file, from the headers alone.

    Names are Hugging Face's: parts added by wrappers such as DDP are removed, and "model." is added
    where a model was saved without its LM head. Raises ModelLoadError if there are no weights or a
    file is malformed.
    """
    path = Path(directory)
    if path.is_file():
        return _read_file(path)
    path = checked_directory(path)
    for file in weight_files(path)[:1]:
        return _read_file(file)
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLE_SUFFIXES)
    others = sorted(p.name for p in path.glob("*.safetensors"))
    if pickles and not others:
        raise _pickle_error(path / pickles[0])
    found = f", only {printable(others[0])}" if others else ""
    adapter = " (an adapter: merge it into its model)" if "adapter" in found else ""
    raise ModelLoadError(
        f"{printable(path)} has no model.safetensors, no index of shards and no model.gguf"
        f"{found}{adapter}"
    )


def load_tensors(directory: str | Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a checkpoint directory or file under their own names, all of them by default.

    They are mapped from the file; those of a GGUF that are quantised or interleaved are read, as
    float32 and in model order. Raises ModelLoadError for a missing tensor or unsupported dtype.
    """
    entries = read_entries(directory)
    selected = list(entries) if names is None else list(names)
    for name in selected:
        if name not in entries:
            raise ModelLoadError(f"{printable(directory)}: tensor {printable(name)} is missing")
        if entries[name].dtype not in TORCH_DTYPES and not is_dequantisable(entries[name].dtype):
            raise dtype_error(entries[name], tuple(TORCH_DTYPES))
    maps: Maps = {}

    def load(entry: TensorEntry) -> Tensor:
        if entry.is_plain:
            return map_tensor(entry, maps)
        return torch.cat([read_rows(entry, maps, rows) for rows in row_slices(entry)])

    return {name: load(entries[name]) for name in selected}


def is_gguf(entries: Mapping[str, TensorEntry]) -> bool:
    """Whether a checkpoint's tensors are in a GGUF."""
    return any(entry.file.suffix == ".gguf" for entry in entries.values())


def checked_directory(directory: str | Path) -> Path:
    """The path of a directory. Raises ModelLoadError if it is not one."""
    directory = Path(directory)
    if directory.suffix in PICKLE_SUFFIXES and directory.is_file():
        raise _pickle_error(directory)
    if not directory.is_dir():
        raise ModelLoadError(f"{printable(directory)} is not a directory")
    return directory


def conversion_hint(file: Path) -> str:
    """How to turn a file that cannot be loaded directly into a directory that can."""
    command = shlex.join(["mtpkern", "convert", printable(file)])
    return f"`{command} NEW_DIRECTORY` makes a directory that loads"


def no_config_error(directory: Path) -> ModelLoadError:
    return ModelLoadError(f"{printable(directory)} has no config.json: not a model directory")


def dtype_error(entry: TensorEntry, supported: Iterable[str]) -> ModelLoadError:
    return ModelLoadError(
        f"{entry} has dtype {printable(entry.dtype)}; supported: {', '.join(supported)}"
    )


def _pickle_error(file: Path) -> ModelLoadError:
    return ModelLoadError(
        f"{printable(file)}: pickled weights can run code and are not loaded; "
        f"{conversion_hint(file)}"
    )


def _read_file(file: Path) -> dict[str, TensorEntry]:
    if file.suffix == ".gguf":
        return read_gguf(file)
    is_index = file.name.endswith(".safetensors.index.json")
    return _with_model_names((read_sharded_safetensors if is_index else read_safetensors)(file))


def _with_model_names(entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The entries under Hugging Face's names. Raises ModelLoadError if two have the same name."""
    named: dict[str, TensorEntry] = {}
    for name_in_file, entry in entries.items():
        name = _WRAPPERS.sub("", name_in_file)
        if name in named:
            raise ModelLoadError(f"{entry} and {printable(named[name].name)} are both {name}")
        named[name] = entry
    if "embed_tokens.weight" in named and all(map(_HEADLESS_NAMES.fullmatch, named)):
        return {n if n == LM_HEAD else f"model.{n}": entry for n, entry in named.items()}
    return named
