"""Files on disk -> named tensors: safetensors, one file or many, straight into their layout.

Everything is checked from the headers, before any weight is read: names, shapes and dtypes against
the config. A weight that is used as it is stays a mapping of the file; one that changes dtype, or
is fused with others (Q, K and V; gate and up), is read straight into its place, so that a weight is
never resident twice.
"""

import hashlib
import json
import math
import mmap
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtpkern.config import ModelConfig, ModelLoadError, printable, read_json_object


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Biases are None where the model has none."""

    input_norm: Tensor | None  # [E]
    qkv: Tensor  # [(Hq+2Hk)*D, E]
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [D], of each head before it is rotated
    k_norm: Tensor | None  # [D]
    o: Tensor  # [E, Hq*D]
    o_bias: Tensor | None
    post_attention_norm: Tensor  # [E]
    gate_up: Tensor  # [2F, E]
    gate_up_bias: Tensor | None
    down: Tensor  # [E, F]
    down_bias: Tensor | None


@dataclass(frozen=True)
class ModelWeights:
    """All weights of a model; `lm_head` is the `embedding` itself where they are tied."""

    embedding: Tensor  # [V, E]
    layers: tuple[Any, ...]  # LayerWeights, or what `pack_layer` made of each
    norm: Tensor  # [E]
    lm_head: Tensor  # [V, E]
    mappings: tuple[mmap.mmap, ...]  # the files behind tensors that were not copied

    def release(self) -> None:
        """Let go of the mappings' resident pages; what is still used is read again when touched."""
        _release(self.mappings)


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: the file, and the bytes in it."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{printable(self.file)}: tensor {printable(self.name)}"


_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_WEIGHT_DTYPES = ("F32", "BF16", "F16")
_PICKLED = (".bin", ".pt", ".pth")  # what `mtpkern convert` reads
# Buffers that some exporters saved and that the config already says.
# Computed here, or heads that a trunk does without (MiMo, mtp_llama).
_IGNORED = re.compile(
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|model\.mtp_(layers|heads|norms)\..*"
)


def load_config(directory: str | Path) -> ModelConfig:
    """The config of a checkpoint directory, with its generation_config.json merged in."""
    directory = _checked_directory(directory)
    if not (directory / "config.json").is_file():
        for file in sorted(directory.glob("*.gguf"))[:1]:
            raise ModelLoadError(f"{printable(directory)} holds a GGUF: {conversion(file)}")
        raise ModelLoadError(f"{printable(directory)} has no config.json: not a model directory")
    return ModelConfig.from_json(directory)


def check_checkpoint(directory: str | Path) -> tuple[ModelConfig, dict[str, TensorEntry]]:
    """Config and tensors, checked against each other from the headers: no weight is read."""
    config = load_config(directory)
    entries = read_entries(directory)
    _check_entries(config, entries, _checked_directory(directory))
    return config, entries


def load_model(
    directory: str | Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    pack_layer: Callable[[LayerWeights], Any] = lambda layer: layer,
    dummy: bool = False,
) -> tuple[ModelConfig, ModelWeights]:
    """Load a checkpoint in `dtype` onto `device`; ModelLoadError names the file and the tensor.

    Each layer goes through `pack_layer` before the next is read, so that a layout of the caller's
    own never stands in memory beside a second copy of all the weights. `dummy` makes up weights
    for a directory that holds a config.json alone.
    """
    place: _Placer | _Inventor
    if dummy:
        config = load_config(directory)
        place = _Inventor(config, dtype, torch.device(device))
    else:
        config, entries = check_checkpoint(directory)
        place = _Placer(entries, dtype, torch.device(device))
    layers = []
    for i in range(config.num_layers):
        fields: dict[str, Any] = {
            field: place([f"model.layers.{i}.{name}" for name, _ in named]) if named else None
            for field, named in layer_parts(config).items()
        }
        layers.append(pack_layer(LayerWeights(**fields)))
        _release(place.maps.values())
    embedding = place(["model.embed_tokens.weight"])
    norm = place([final_norm(config)])
    lm_head = embedding if config.tie_word_embeddings else place(["lm_head.weight"])
    mappings = tuple(place.maps.values())
    return config, ModelWeights(embedding, tuple(layers), norm, lm_head, mappings)


def load_tensors(directory: str | Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Memory-mapped tensors of a directory (or one file) under their own names, as they are."""
    entries = read_entries(directory)
    wanted = list(entries) if names is None else list(names)
    for name in wanted:
        if name not in entries:
            raise ModelLoadError(f"{printable(directory)}: tensor {printable(name)} is missing")
        if entries[name].dtype not in _TORCH_DTYPES:
            raise _dtype_error(entries[name], tuple(_TORCH_DTYPES))
    maps: dict[Path, mmap.mmap] = {}
    return {name: _mapped(entries[name], maps) for name in wanted}


def fingerprint(directory: str | Path) -> str:
    """SHA-256 of sixteen values of every weight of a checkpoint, spread evenly, as float32.

    Enough to tell a model from another of its shape, or from what fine-tuning made of it, at the
    price of a page a value instead of the whole file.
    """
    config, entries = check_checkpoint(directory)
    maps: dict[Path, mmap.mmap] = {}
    digest = hashlib.sha256()
    for name, _ in sorted(expected_tensors(config)):
        flat = _mapped(entries[name], maps).view(-1)
        picked = flat[torch.linspace(0, len(flat) - 1, 16, dtype=torch.float64).long()]
        digest.update(name.encode() + picked.float().numpy().tobytes())
    return digest.hexdigest()


def layer_parts(config: ModelConfig) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Field of LayerWeights -> the checkpoint's tensors, with shapes, that are stacked into it.

    This is the table of key names of the Llama layout; an absent field has an empty list.
    """
    E, F = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = [("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)]
    mlp = [("mlp.gate_proj", F), ("mlp.up_proj", F)]
    mlp_biased, per_head = config.mlp_bias, (config.head_dim,)
    return {
        "input_norm": [("input_layernorm.weight", (E,))],
        "qkv": [(f"{name}.weight", (rows, E)) for name, rows in attention],
        "qkv_bias": [(f"{name}.bias", (rows,)) for name, rows in attention if config.qkv_bias],
        "o": [("self_attn.o_proj.weight", (E, q))],
        "q_norm": [("self_attn.q_norm.weight", per_head)] if config.qk_norm else [],
        "k_norm": [("self_attn.k_norm.weight", per_head)] if config.qk_norm else [],
        "o_bias": [("self_attn.o_proj.bias", (E,))] if config.o_bias else [],
        "post_attention_norm": [("post_attention_layernorm.weight", (E,))],
        "gate_up": [(f"{name}.weight", (rows, E)) for name, rows in mlp],
        "gate_up_bias": [(f"{name}.bias", (rows,)) for name, rows in mlp if mlp_biased],
        "down": [("mlp.down_proj.weight", (E, F))],
        "down_bias": [("mlp.down_proj.bias", (E,))] if mlp_biased else [],
    }


def final_norm(config: ModelConfig) -> str:
    """What the norm before the LM head is called."""
    return "model.mtp_norms.0.weight" if config.model_type == "mtp_llama" else "model.norm.weight"


def expected_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor name that the config calls for, with its shape."""
    embedding = (config.vocab_size, config.hidden_size)
    yield "model.embed_tokens.weight", embedding
    for i in range(config.num_layers):
        for named in layer_parts(config).values():
            for name, shape in named:
                yield f"model.layers.{i}.{name}", shape
    yield final_norm(config), (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", embedding


def read_entries(directory: str | Path) -> dict[str, TensorEntry]:
    """Every tensor of a directory's safetensors (or of one such file), from the headers alone."""
    path = Path(directory)
    if path.is_file():
        return _read_header(path)
    path = _checked_directory(path)
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if index.is_file():
        return _read_shards(path, index)
    if not single.is_file():
        pickled = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLED)
        if pickled:
            raise _pickle_error(path / pickled[0])
        raise ModelLoadError(f"{printable(path)} has no model.safetensors and no index of shards")
    return _read_header(single)


def _checked_directory(directory: str | Path) -> Path:
    directory = Path(directory)
    if directory.suffix in _PICKLED and directory.is_file():
        raise _pickle_error(directory)
    if not directory.is_dir():
        raise ModelLoadError(f"{printable(directory)} is not a directory")
    return directory


def conversion(file: Path) -> str:
    """How to make a loadable directory of a file that is not loaded as it is."""
    command = shlex.join(["mtpkern", "convert", printable(file)])
    return f"`{command} NEW_DIRECTORY` makes a directory that loads"


def _pickle_error(file: Path) -> ModelLoadError:
    return ModelLoadError(
        f"{printable(file)}: pickled weights can run code and are not loaded; {conversion(file)}"
    )


def _read_shards(directory: Path, index: Path) -> dict[str, TensorEntry]:
    weight_map = read_json_object(index).get("weight_map")
    where = printable(index)
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{where} has no weight_map")
    files = sorted({str(file) for file in weight_map.values()})
    for file in files:
        plain = re.fullmatch(r"[^/\\\0]+\.safetensors", file) and not file.startswith(".")
        if not plain or ":" in file:
            raise ModelLoadError(
                f"{where}: shard {printable(file)} must be a plain file name ending in .safetensors"
            )
        if not (directory / file).is_file():
            raise ModelLoadError(f"{where}: shard {printable(file)} is missing")
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in _read_header(directory / file).items():
            if name in entries:
                raise ModelLoadError(f"{entry} is in {printable(entries[name].file.name)} too")
            if weight_map.get(name) != file:
                raise ModelLoadError(f"{entry} is not where {printable(index.name)} says")
            entries[name] = entry
    for name, file in weight_map.items():
        if name not in entries:
            raise ModelLoadError(
                f"{printable(directory / file)}: tensor {printable(name)} is missing"
            )
    return entries


def _read_header(file: Path) -> dict[str, TensorEntry]:
    if file.suffix != ".safetensors":
        raise ModelLoadError(f"{printable(file)} is not a .safetensors file")
    try:
        # The library proves the header sound (sizes, gaps, overlaps), so that it can be trusted.
        with safe_open(file, framework="numpy"):
            pass
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise ModelLoadError(
            f"{printable(file)} is not a whole safetensors file ({reason})"
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


def _check_entries(config: ModelConfig, entries: dict[str, TensorEntry], directory: Path) -> None:
    expected = dict(expected_tensors(config))
    for name, shape in expected.items():
        entry = entries.get(name)
        if entry is None:
            raise ModelLoadError(f"{printable(directory)}: tensor {name} is missing")
        if entry.dtype not in _WEIGHT_DTYPES:
            raise _dtype_error(entry, _WEIGHT_DTYPES)
        if entry.shape != shape:
            raise ModelLoadError(
                f"{entry} must be {list(shape)} to match config.json, got {list(entry.shape)[:8]}"
            )
    for name, entry in entries.items():
        tied = name == "lm_head.weight" and config.tie_word_embeddings
        if name not in expected and not tied and not _IGNORED.fullmatch(name):
            raise ModelLoadError(f"{entry} has no place in the model that config.json describes")


def _dtype_error(entry: TensorEntry, supported: tuple[str, ...]) -> ModelLoadError:
    return ModelLoadError(
        f"{entry} has dtype {printable(entry.dtype)}; supported: {', '.join(supported)}"
    )


def _mapped(entry: TensorEntry, maps: dict[Path, mmap.mmap]) -> Tensor:
    dtype = _TORCH_DTYPES[entry.dtype]
    count = math.prod(entry.shape)
    if count == 0:
        return torch.empty(entry.shape, dtype=dtype)
    if entry.file not in maps:
        with open(entry.file, "rb") as stream:
            # A private copy-on-write mapping: torch wants it writable, the file stays untouched.
            maps[entry.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    flat = torch.frombuffer(maps[entry.file], dtype=dtype, count=count, offset=entry.offset)
    return flat.view(entry.shape)


def _release(mappings: Iterable[mmap.mmap]) -> None:
    if hasattr(mmap, "MADV_DONTNEED"):
        for mapping in mappings:
            mapping.madvise(mmap.MADV_DONTNEED)


class _Placer:
    """Brings named tensors to their final dtype, layout and device; refuses what is not finite."""

    def __init__(self, entries: dict[str, TensorEntry], dtype: torch.dtype, device: torch.device):
        self.entries, self.dtype, self.device = entries, dtype, device
        self.maps: dict[Path, mmap.mmap] = {}

    def __call__(self, names: list[str]) -> Tensor:
        """The tensors under these names, stacked along their first dimension."""
        parts = [self.entries[name] for name in names]
        first = parts[0]
        same = _TORCH_DTYPES[first.dtype] == self.dtype and self.device.type == "cpu"
        if len(parts) == 1 and same:
            weight = _mapped(first, self.maps)
            self.check_finite(weight, first)
            return weight
        rows = sum(part.shape[0] for part in parts)
        weight = torch.empty((rows, *first.shape[1:]), dtype=self.dtype, device=self.device)
        row = 0
        for part in parts:
            target = weight[row : row + part.shape[0]]
            if _TORCH_DTYPES[part.dtype] == self.dtype and self.device.type == "cpu":
                _read_into(part, target)
            else:
                staging = torch.empty(part.shape, dtype=_TORCH_DTYPES[part.dtype])
                _read_into(part, staging)
                target.copy_(staging)
            self.check_finite(target, part)
            row += part.shape[0]
        return weight

    def check_finite(self, weight: Tensor, entry: TensorEntry) -> None:
        # The extremes show both NaN (it propagates) and infinity, at the speed of reading.
        low, high = torch.aminmax(weight)
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            raise ModelLoadError(f"{entry} holds values that are not finite in {self.dtype}")


class _Inventor:
    """Stands in for `_Placer` where there are no weights: random ones of the right shapes."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device):
        self.shapes, self.dtype, self.device = dict(expected_tensors(config)), dtype, device
        self.maps: dict[Path, mmap.mmap] = {}

    def __call__(self, names: list[str]) -> Tensor:
        """Random tensors under these names, stacked: rows of a matrix keep their input's size."""
        shapes = [self.shapes[name] for name in names]
        rows = sum(shape[0] for shape in shapes)
        weight = torch.empty((rows, *shapes[0][1:]), dtype=self.dtype, device=self.device)
        if weight.dim() == 1:
            return weight.fill_(1.0 if "norm" in names[0] else 0.0)
        return weight.normal_(std=weight.shape[1] ** -0.5)


def _read_into(entry: TensorEntry, target: Tensor) -> None:
    """Fill a contiguous CPU tensor with the file's bytes, without a mapping or a buffer between."""
    left = target.view(-1).view(torch.uint8).numpy().data
    with open(entry.file, "rb", buffering=0) as stream:
        stream.seek(entry.offset)
        while left:
            got = stream.readinto(left)
            if not got:
                raise ModelLoadError(f"{entry} ends early: {os.path.getsize(entry.file)} bytes")
            left = left[got:]
