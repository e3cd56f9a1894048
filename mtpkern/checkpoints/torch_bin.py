"""Pickled model checkpoints -> safetensors: pytorch_model.bin, in one file or in shards.

torch's weights-only loader never runs code from a file. Shards are converted one at a time, so that
memory holds at most one of them. Other files of the model (config.json, tokenizer) are copied.
"""

import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mtpkern.checkpoints.directory import EMBEDDING
from mtpkern.checkpoints.json_files import write_json
from mtpkern.checkpoints.llama import check_checkpoint
from mtpkern.checkpoints.safetensors_files import read_weight_map
from mtpkern.errors import ModelLoadError, printable

INDEX_FILE = "pytorch_model.bin.index.json"
_COPIED = ("*.json", "*.jinja", "tokenizer.model", "merges.txt")


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict. Raises ModelLoadError if it contains anything else."""
    try:
        # torch's older, non-zip format cannot be mapped.
        mmap = zipfile.is_zipfile(file)
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a broken or hostile file makes the loader raise almost anything
        reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise ModelLoadError(f"{printable(file)} is not a file of weights: {reason}") from None
    if not isinstance(content, Mapping) or not content:
        raise ModelLoadError(f"{printable(file)} must hold tensors by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ModelLoadError(f"{printable(file)}: {printable(name)} is not a tensor")
    return dict(content)


def is_model(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors, under Hugging Face's names, include those of a model's trunk."""
    return EMBEDDING in tensors or any(name.startswith("model.layers.") for name in tensors)


def convert_bin(files: list[Path], directory: Path) -> None:
    """Convert the model in `files`, which share a directory, into an existing `directory`.

    Raises ModelLoadError if the result would not load as a model.
    """
    source = files[0].parent
    if not (source / "config.json").is_file():
        raise ModelLoadError(f"{printable(source)} has no config.json beside its weights")
    for pattern in _COPIED:
        for path in source.glob(pattern):
            if path.name != INDEX_FILE and not path.name.endswith(".safetensors.index.json"):
                shutil.copyfile(path, directory / path.name)
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, file in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        name = "model.safetensors" if len(files) == 1 else name
        # Tied weights share memory, which safetensors does not allow.
        tensors = {key: tensor.contiguous().clone() for key, tensor in read_pickle(file).items()}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)
    try:
        check_checkpoint(directory)
    except ModelLoadError as error:
        message = str(error).replace(printable(directory), printable(source))
        raise ModelLoadError(message) from None


def shards(source: Path) -> list[Path]:
    """The files listed in a directory's pytorch_model.bin.index.json, empty without an index."""
    index = source / INDEX_FILE
    return sorted(set(read_weight_map(index, ".bin").values())) if index.is_file() else []
