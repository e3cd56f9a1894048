"""Safetensors files, single or sharded -> tensor entries, read from the headers alone."""

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mtpkern.checkpoints.json_files import read_json_object
from mtpkern.checkpoints.tensor_entry import TensorEntry
from mtpkern.errors import ModelLoadError, printable, reason


def read_safetensors(file: Path) -> dict[str, TensorEntry]:
    """Every tensor of one file by name. Raises ModelLoadError if the file is malformed."""
    if file.suffix != ".safetensors":
        raise ModelLoadError(f"{printable(file)} is not a .safetensors file")
    try:
        # The library validates the header (sizes, gaps, overlaps): no further checks are needed.
        with safe_open(file, framework="numpy"):
            pass
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelLoadError(
            f"{printable(file)} is not a whole safetensors file ({reason(error, file)})"
        ) from None
    header.pop("__metadata__", None)
    entries = {}
    for name, item in header.items():
        begin, end = item["data_offsets"]
        shape = tuple(item["shape"])
        entries[name] = TensorEntry(
            file, name, item["dtype"], shape, 8 + length + begin, end - begin
        )
    return entries


def read_sharded_safetensors(index: Path) -> dict[str, TensorEntry]:
    """Every tensor of the shards that a model.safetensors.index.json lists, by name.

    Raises ModelLoadError where the index and the shards beside it disagree.
    """
    entries: dict[str, TensorEntry] = {}
    weight_map = read_weight_map(index, ".safetensors")
    for file in sorted(set(weight_map.values())):
        for name, entry in read_safetensors(file).items():
            if name in entries:
                raise ModelLoadError(f"{entry} is in {printable(entries[name].file.name)} too")
            if weight_map.get(name) != file:
                raise ModelLoadError(f"{entry} is not where {printable(index.name)} says")
            entries[name] = entry
    for name, file in weight_map.items():
        if name not in entries:
            raise ModelLoadError(f"{printable(file)}: tensor {printable(name)} is missing")
    return entries


def read_weight_map(index: Path, suffix: str) -> dict[str, Path]:
    """Tensor name -> shard, from an index of shards with a common suffix.

    Raises ModelLoadError if the index is malformed, if a shard is outside its directory, or if
    one is missing.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{printable(index)} has no weight_map")
    for file in sorted({str(file) for file in weight_map.values()}):
        if not re.fullmatch(rf"[^/\\\0:.][^/\\\0:]*{re.escape(suffix)}", file):
            raise ModelLoadError(
                f"{printable(index)}: shard {printable(file)} must be a plain file name ending in "
                f"{suffix}"
            )
        if not index.with_name(file).is_file():
            raise ModelLoadError(f"{printable(index)}: shard {printable(file)} is missing")
    return {name: index.with_name(str(file)) for name, file in weight_map.items()}
