"""Files on disk -> named tensors: safetensors, one file or many, or a GGUF, straight into place.

Everything is checked from the headers, before any weight is read: names, shapes and dtypes against
the config. A weight that is used as it is stays a mapping of the file; one that changes dtype, or
is fused with others (Q, K and V; gate and up), is read straight into its place, so that a weight is
never resident twice.
"""

import hashlib
import json
import logging
import math
import mmap
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtpkern.checkpoints.gguf_file import GGUF_FILE, POINTER_FILE, pointed_to, read_gguf
from mtpkern.checkpoints.quantised import ROUNDED_FORMATS, Quantiser, vocabulary_format
from mtpkern.checkpoints.tensor_files import (
    TORCH_DTYPES,
    Maps,
    TensorEntry,
    expanded,
    is_expandable,
    mapped,
    read_into,
    release,
    row_slices,
)
from mtpkern.config import ModelConfig, ModelLoadError, printable, read_json_object, reason
from mtpkern.kernels.cpu.quants import Quants, quantise
from mtpkern.validation import choice

_LOG = logging.getLogger("mtpkern")


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Biases are None where the model has none."""

    input_norm: Tensor | None  # [E]
    qkv: Tensor | Quants  # [(Hq+2Hk)*D, E]
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [D], of each head before it is rotated
    k_norm: Tensor | None  # [D]
    o: Tensor | Quants  # [E, Hq*D]
    o_bias: Tensor | None
    post_attention_norm: Tensor  # [E]
    gate_up: Tensor | Quants  # [2F, E]
    gate_up_bias: Tensor | None
    down: Tensor | Quants  # [E, F]
    down_bias: Tensor | None


@dataclass(frozen=True)
class ModelWeights:
    """All weights of a model; `lm_head` is the `embedding` itself where they are tied."""

    embedding: Tensor | Quants  # [V, E]
    layers: tuple[Any, ...]  # LayerWeights, or what `pack_layer` made of each
    norm: Tensor  # [E]
    lm_head: Tensor | Quants  # [V, E]
    mappings: tuple[mmap.mmap, ...]  # the files behind tensors that were not copied

    def release(self) -> None:
        """Let go of the mappings' resident pages; what is still used is read again when touched."""
        release(self.mappings)


_WEIGHT_DTYPES = ("F32", "BF16", "F16")
_PICKLED = (".bin", ".pt", ".pth")  # what `mtpkern convert` reads
# What a trunk does without: buffers that trainers save and that are computed here, and heads.
_IGNORED = re.compile(
    r"(.+\.)?rotary_emb\.((original_)?inv_freq|(cos|sin)_cached)"
    r"|model\.layers\.\d+\.self_attn\.(masked_bias|bias)|(.+\.)?(causal_mask|position_ids)"
    r"|model\.mtp_(layers|heads|norms)\..*|rope_freqs\.weight"
)
# What wrappers of a model put into the names of its tensors: DDP and PEFT before them, torch's
# compiler, FSDP and activation checkpointing anywhere.
_WRAPPERS = re.compile(
    r"^(module\.|base_model\.model\.)+"
    r"|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# The names of a trunk that was saved without its LM head, and nothing else.
_BARE_TRUNK = re.compile(
    r"(embed_tokens|norm)\.weight|lm_head\.weight|rotary_emb\..+"
    r"|layers\.\d+\.((input|post_attention)_layernorm\.weight|mlp\.(gate|up|down)_proj\.\w+"
    r"|self_attn\.([qkvo]_proj\.\w+|[qk]_norm\.weight|rotary_emb\..+|masked_bias|bias))"
)
_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Fields of LayerWeights that are matrices.
_MATRICES = ("qkv", "o", "gate_up", "down")


def load_config(directory: str | Path) -> ModelConfig:
    """The config of a checkpoint directory, completed by its other files.

    generation_config.json says where text ends, and the tensors what config.json leaves open: the
    dtype, where it names none, and whether an LM head that it calls tied is one of its own.
    """
    directory = _checked_directory(directory)
    if not (directory / "config.json").is_file():
        for file in sorted(directory.glob("*.gguf"))[:1]:
            raise ModelLoadError(
                f"{printable(directory)} holds a GGUF without a config.json: give the file "
                f"{printable(file)} itself"
            )
        raise ModelLoadError(f"{printable(directory)} has no config.json: not a model directory")
    config = ModelConfig.from_json(directory)
    if not has_weights(directory):
        return config
    return _completed(config, read_entries(directory), directory)


def has_weights(directory: Path) -> bool:
    """Whether there are files of weights that `read_entries` reads."""
    return bool(_weight_files(directory))


def check_checkpoint(directory: str | Path) -> tuple[ModelConfig, dict[str, TensorEntry]]:
    """Config and tensors, checked against each other from the headers.

    No weight is read but an LM head beside an embedding that it is said to be tied to.
    """
    config = load_config(directory)
    entries = read_entries(directory)
    if config.tie_word_embeddings and _EMBEDDING not in entries and _LM_HEAD in entries:
        entries[_EMBEDDING] = entries.pop(_LM_HEAD)
    check_entries(config, entries, _checked_directory(directory))
    return config, entries


def _completed(
    config: ModelConfig, entries: Mapping[str, TensorEntry], directory: Path
) -> ModelConfig:
    """The config with what only the tensors say."""
    remarks = list(config.remarks)
    dtype, tied = config.dtype, config.tie_word_embeddings
    if dtype is None:
        floats = [TORCH_DTYPES[e.dtype] for e in entries.values() if e.dtype in _WEIGHT_DTYPES]
        dtype = floats[0] if floats else None
    if tied and _EMBEDDING in entries and _LM_HEAD in entries:
        if not _is_equal(entries[_EMBEDDING], entries[_LM_HEAD]):
            tied = False
            remarks.append(
                f"{entries[_LM_HEAD]} differs from the embedding and is used, although config.json "
                "says tie_word_embeddings"
            )
    read, *unread = _weight_files(directory)
    for file in unread:
        remarks.append(f"{printable(read)} is read, {file.name} beside it is not")
    return replace(config, dtype=dtype, tie_word_embeddings=tied, remarks=tuple(remarks))


def _is_equal(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two matrices have the same values, some rows at a time."""
    if one.shape != other.shape or not all(_is_weight(entry) for entry in (one, other)):
        return False
    maps: Maps = {}
    # In one dtype a comparison needs no copies.
    same = one.dtype == other.dtype

    def is_equal(rows: slice) -> bool:
        a, b = (expanded(entry, maps, rows) for entry in (one, other))
        return torch.equal(a, b) if same else torch.equal(a.float(), b.float())

    equal = all(is_equal(rows) for rows in row_slices(one))
    release(maps.values())
    return equal


def load_model(
    directory: str | Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    weights: str | None = None,
    pack_layer: Callable[[LayerWeights], Any] = lambda layer: layer,
    dummy: bool = False,
) -> tuple[ModelConfig, ModelWeights]:
    """Load a checkpoint in `dtype` onto `device`; ModelLoadError names the file and the tensor.

    `weights` makes Quants of the matrices, on the CPU, beside norms and biases in float32: "auto"
    those of a GGUF, in the file's own bits where there are kernels for them; a format (of
    ROUNDED_FORMATS) those of any checkpoint, rounded, embedding and LM head to 8 bits at least.
    What is no Quants is a tensor in `dtype`.

    Each layer goes through `pack_layer` before the next is read, so that a layout of the caller's
    own never stands in memory beside a second copy of all the weights. `dummy` makes up weights
    for a directory that holds a config.json alone.
    """
    if weights is not None:
        choice("weights", weights, ("auto", *ROUNDED_FORMATS))
    config, entries = (load_config(directory), {}) if dummy else check_checkpoint(directory)
    format = None if weights == "auto" else weights
    quantised = format is not None or (weights == "auto" and is_gguf(entries))
    kept = torch.float32 if quantised else dtype
    place: _Placer | _Inventor
    quants: Callable[[list[str], str | None], Quants]
    if dummy:
        place = invent = _Inventor(config, kept, torch.device(device))
        quants = invent.quants
    else:
        place = _Placer(entries, kept, torch.device(device))
        quants = Quantiser(entries, place.maps)

    def matrix(names: list[str], format: str | None) -> Tensor | Quants:
        return quants(names, format) if quantised else place(names)

    for remark in config.remarks:
        _LOG.warning(remark)
    layers = []
    for i in range(config.num_layers):
        fields: dict[str, Any] = {}
        for field, named in layer_parts(config).items():
            names = [f"model.layers.{i}.{name}" for name, _ in named]
            if field in _MATRICES:
                fields[field] = matrix(names, format)
            else:
                fields[field] = place(names) if names else None
        layers.append(pack_layer(LayerWeights(**fields)))
        release(place.maps.values())
    outer = vocabulary_format(format)
    embedding = matrix([_EMBEDDING], outer)
    norm = place([final_norm(config)])
    lm_head = embedding if config.tie_word_embeddings else matrix([_LM_HEAD], outer)
    mappings = tuple(place.maps.values())
    return config, ModelWeights(embedding, tuple(layers), norm, lm_head, mappings)


def load_tensors(directory: str | Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a directory (or one file) under their own names, as they are.

    They are mapped from the file, but for what of a GGUF is quantised, which is expanded to
    float32, or has its rows in another order.
    """
    entries = read_entries(directory)
    wanted = list(entries) if names is None else list(names)
    for name in wanted:
        if name not in entries:
            raise ModelLoadError(f"{printable(directory)}: tensor {printable(name)} is missing")
        if entries[name].dtype not in TORCH_DTYPES and not is_expandable(entries[name].dtype):
            raise _dtype_error(entries[name], tuple(TORCH_DTYPES))
    maps: Maps = {}
    return {
        name: mapped(entry, maps) if entry.is_plain else _expanded_whole(entry, maps)
        for name, entry in ((name, entries[name]) for name in wanted)
    }


def fingerprint(directory: str | Path) -> str:
    """SHA-256 of sixteen values of every weight of a checkpoint, spread evenly, as float32.

    Enough to tell a model from another of its shape, or from what fine-tuning made of it, at the
    price of a page a value instead of the whole file. A GGUF has the fingerprint of its conversion:
    its values are rounded to bfloat16 first.
    """
    config, entries = check_checkpoint(directory)
    maps: Maps = {}
    digest = hashlib.sha256()
    rounded_first = is_gguf(entries)
    for name, shape in sorted(expected_tensors(config)):
        spread = torch.linspace(0, math.prod(shape) - 1, 16, dtype=torch.float64).long()
        width = math.prod(shape[1:])
        rows = expanded(entries[name], maps, (spread // width).numpy())
        picked = rows.reshape(16, width)[torch.arange(16), spread % width]
        picked = picked.bfloat16() if rounded_first else picked
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
    yield _EMBEDDING, embedding
    for i in range(config.num_layers):
        for named in layer_parts(config).values():
            for name, shape in named:
                yield f"model.layers.{i}.{name}", shape
    yield final_norm(config), (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield _LM_HEAD, embedding


def read_entries(directory: str | Path) -> dict[str, TensorEntry]:
    """Every tensor of a directory's safetensors or GGUF (or of one such file), from the headers.

    The names are those of the model itself: without what wrappers put into them, and with "model."
    before those of a trunk that was saved alone. Of a single file, an index
    and a GGUF, the first counts.
    """
    path = Path(directory)
    if path.is_file():
        return read_gguf(path) if path.suffix == ".gguf" else _unwrapped(_read_header(path))
    path = _checked_directory(path)
    for file in _weight_files(path)[:1]:
        return (
            read_entries(file) if file.suffix != ".json" else _unwrapped(_read_shards(path, file))
        )
    pickled = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLED)
    other = sorted(p.name for p in path.glob("*.safetensors"))
    if pickled and not other:
        raise _pickle_error(path / pickled[0])
    beside = f", only {printable(other[0])}" if other else ""
    adapter = " (an adapter: merge it into its model)" if "adapter" in beside else ""
    raise ModelLoadError(
        f"{printable(path)} has no model.safetensors, no index of shards and no model.gguf"
        f"{beside}{adapter}"
    )


def _weight_files(directory: Path) -> list[Path]:
    """A directory's files of weights; the first is read."""
    names = ("model.safetensors", "model.safetensors.index.json", GGUF_FILE)
    found = [directory / name for name in names if (directory / name).is_file()]
    pointer = directory / POINTER_FILE
    return [*found, pointed_to(pointer)] if pointer.is_file() else found


def _unwrapped(entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The entries under the model's own names; ModelLoadError where two would have the same."""
    own: dict[str, TensorEntry] = {}
    for raw, entry in entries.items():
        name = _WRAPPERS.sub("", raw)
        if name in own:
            raise ModelLoadError(f"{entry} and {printable(own[name].name)} are both {name}")
        own[name] = entry
    if "embed_tokens.weight" in own and all(map(_BARE_TRUNK.fullmatch, own)):
        own = {n if n == _LM_HEAD else f"model.{n}": entry for n, entry in own.items()}
    return own


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


def check_entries(config: ModelConfig, entries: Mapping[str, TensorEntry], place: Path) -> None:
    """ModelLoadError where the tensors in `place` are not those that a config calls for."""
    expected = dict(expected_tensors(config))
    for name, shape in expected.items():
        entry = entries.get(name)
        if entry is None:
            says = _flag_behind(name, "true")
            raise ModelLoadError(f"{printable(place)}: tensor {name} is missing{says}")
        if not _is_weight(entry):
            raise _dtype_error(entry, _WEIGHT_DTYPES)
        if entry.shape != shape:
            raise ModelLoadError(
                f"{entry} must be {list(shape)} to match config.json, got {list(entry.shape)[:8]}"
            )
    for name, entry in entries.items():
        tied = name == _LM_HEAD and config.tie_word_embeddings
        if name not in expected and not tied and not _IGNORED.fullmatch(name):
            says = _flag_behind(name, "not true")
            raise ModelLoadError(
                f"{entry} has no place in the model that config.json describes{says}"
            )


def _flag_behind(name: str, value: str) -> str:
    """What in config.json makes a tensor wanted, or unwanted, where that is easily said."""
    if ".lora_" in name or ".base_layer." in name:
        return " (an adapter's: merge it into its model)"
    if name == _LM_HEAD:
        return " (tie_word_embeddings is not true there)"
    if re.search(r"self_attn\.[qkvo]_proj\.bias$", name):
        return f" (attention_bias is {value} there, or the architecture's own)"
    if re.search(r"mlp\.\w+_proj\.bias$", name):
        return f" (mlp_bias is {value} there)"
    return ""


def _is_weight(entry: TensorEntry) -> bool:
    return entry.dtype in _WEIGHT_DTYPES or is_expandable(entry.dtype)


def is_gguf(entries: Mapping[str, TensorEntry]) -> bool:
    """Whether a checkpoint's tensors lie in a GGUF."""
    return any(entry.file.suffix == ".gguf" for entry in entries.values())


def _expanded_whole(entry: TensorEntry, maps: Maps) -> Tensor:
    """A tensor of a GGUF, expanded some rows at a time."""
    return torch.cat([expanded(entry, maps, rows) for rows in row_slices(entry)])


def _dtype_error(entry: TensorEntry, supported: tuple[str, ...]) -> ModelLoadError:
    return ModelLoadError(
        f"{entry} has dtype {printable(entry.dtype)}; supported: {', '.join(supported)}"
    )


class _Placer:
    """Brings named tensors to their final dtype, layout and device; refuses what is not finite."""

    def __init__(self, entries: dict[str, TensorEntry], dtype: torch.dtype, device: torch.device):
        self.entries, self.dtype, self.device = entries, dtype, device
        self.maps: Maps = {}

    def __call__(self, names: list[str]) -> Tensor:
        """The tensors under these names, stacked along their first dimension."""
        parts = [self.entries[name] for name in names]
        first = parts[0]
        if len(parts) == 1 and self.is_as_stored(first):
            weight = mapped(first, self.maps)
            self.check_finite(weight, first)
            return weight
        rows = sum(part.shape[0] for part in parts)
        weight = torch.empty((rows, *first.shape[1:]), dtype=self.dtype, device=self.device)
        row = 0
        for part in parts:
            target = weight[row : row + part.shape[0]]
            if self.is_as_stored(part):
                read_into(part, target)
            elif not part.is_plain:
                for some in row_slices(part):
                    target[some].copy_(expanded(part, self.maps, some))
            else:
                staging = torch.empty(part.shape, dtype=TORCH_DTYPES[part.dtype])
                read_into(part, staging)
                target.copy_(staging)
            self.check_finite(target, part)
            row += part.shape[0]
        return weight

    def is_as_stored(self, part: TensorEntry) -> bool:
        """Whether the file holds what is wanted, byte for byte."""
        if not part.is_plain or self.device.type != "cpu":
            return False
        return TORCH_DTYPES[part.dtype] == self.dtype

    def check_finite(self, weight: Tensor, entry: TensorEntry) -> None:
        # The extremes show both NaN (it propagates) and infinity, at the speed of reading.
        low, high = torch.aminmax(weight)
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            raise ModelLoadError(f"{entry} holds values that are not finite in {self.dtype}")


class _Inventor:
    """Stands in for `_Placer` where there are no weights: random ones of the right shapes."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device):
        self.shapes, self.dtype, self.device = dict(expected_tensors(config)), dtype, device
        self.maps: Maps = {}

    def __call__(self, names: list[str]) -> Tensor:
        """Random tensors under these names, stacked: rows of a matrix keep their input's size."""
        shapes = [self.shapes[name] for name in names]
        rows = sum(shape[0] for shape in shapes)
        weight = torch.empty((rows, *shapes[0][1:]), dtype=self.dtype, device=self.device)
        if weight.dim() == 1:
            return weight.fill_(1.0 if "norm" in names[0] else 0.0)
        return weight.normal_(std=weight.shape[1] ** -0.5)

    def quants(self, names: list[str], format: str | None) -> Quants:
        """The same, rounded."""
        assert format is not None, "there is no file whose format could be kept"
        return quantise(self(names), format)
