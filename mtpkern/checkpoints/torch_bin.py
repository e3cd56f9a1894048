"""Pickled model checkpoints -> safetensors: pytorch_model.bin, one file or many with an index.

Torch's weights-only loader runs no code of the file's. Files are converted one by one, so that
memory holds no more than one of them; what lies beside them (config.json, tokenizer) is copied.
"""

import json
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mtpkern.checkpoints.llama import check_checkpoint
from mtpkern.config import read_json_object
from mtpkern.errors import ModelLoadError, printable

INDEX_FILE = "pytorch_model.bin.index.json"
_EMBEDDING = "model.embed_tokens.weight"
_BESIDE = ("*.json", "*.jinja", "tokenizer.model", "merges.txt")


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The named tensors of a pickle that holds nothing else."""
    try:
        # Files of the older format cannot be mapped.
        mapped = zipfile.is_zipfile(file)
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever a broken or hostile file makes the loader raise
        reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise ModelLoadError(f"{printable(file)} is not a file of weights: {reason}") from None
    if not isinstance(content, Mapping) or not content:
        raise ModelLoadError(f"{printable(file)} must hold tensors by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ModelLoadError(f"{printable(file)}: {printable(name)} is not a tensor")
    return dict(content)


def is_model(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are a model's weights, under Hugging Face's names, and not heads alone."""
    return _EMBEDDING in tensors or any(name.startswith("model.layers.") for name in tensors)


def convert_bin(files: list[Path], directory: Path) -> None:
    """Write the model in `files`, all of one directory, into an existing `directory`.

    Raises ModelLoadError where the result would not load as a model.
    """
    source = files[0].parent
    if not (source / "config.json").is_file():
        raise ModelLoadError(f"{printable(source)} has no config.json beside its weights")
    for pattern in _BESIDE:
        for beside in source.glob(pattern):
            if beside.name != INDEX_FILE and not beside.name.endswith(".safetensors.index.json"):
                shutil.copyfile(beside, directory / beside.name)
    weight_map: dict[str, str] = {}
    total = 0
    for number, file in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        name = "model.safetensors" if len(files) == 1 else name
        # Each with memory of its own: tied weights are one tensor under two names.
        tensors = {key: tensor.contiguous().clone() for key, tensor in read_pickle(file).items()}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=1)
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    try:
        check_checkpoint(directory)
    except ModelLoadError as error:
        message = str(error).replace(printable(directory), printable(source))
        raise ModelLoadError(message) from None


def shards(source: Path) -> list[Path]:
    """The files that a directory's pytorch_model.bin.index.json names; none without an index."""
    index = source / INDEX_FILE
    if not index.is_file():
        return []
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{printable(index)} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if not re.fullmatch(r"[^/\\\0:.][^/\\\0:]*\.bin", name):
            raise ModelLoadError(
                f"{printable(index)}: shard {printable(name)} must be a plain file name in .bin"
            )
        if not (source / name).is_file():
            raise ModelLoadError(f"{printable(index)}: shard {printable(name)} is missing")
    return [source / name for name in names]
