"""What a Llama checkpoint consists of: its configuration, and the tensors it must have.

Everything is checked from the headers, before any weight is read: names, shapes and dtypes against
config.json. model_weights.py loads the weights.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mtpkern.checkpoints.directory import (
    EMBEDDING,
    LM_HEAD,
    checked_directory,
    dtype_error,
    has_weights,
    is_gguf,
    no_config_error,
    read_entries,
    weight_files,
)
from mtpkern.checkpoints.hf_config import read_hf_config
from mtpkern.checkpoints.tensor_entry import (
    TORCH_DTYPES,
    Maps,
    TensorEntry,
    is_dequantisable,
    read_rows,
    release_pages,
    row_slices,
)
from mtpkern.config import ModelConfig
from mtpkern.errors import ModelLoadError, printable
from mtpkern.kernels.cpu.quants import Quants


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Biases and head norms are None in a model without them."""

    input_norm: Tensor | None  # [E]; None if the input of attention is already normed
    qkv: Tensor | Quants | list[Quants]  # [(Hq+2Hk)*D, E]; a list is cut where the format changes
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [D], applied to each head before RoPE
    k_norm: Tensor | None  # [D]
    o: Tensor | Quants  # [E, Hq*D]
    o_bias: Tensor | None
    post_attention_norm: Tensor  # [E]
    gate_up: Tensor | Quants  # [2F, E]
    gate_up_bias: Tensor | None
    down: Tensor | Quants  # [E, F]
    down_bias: Tensor | None


_WEIGHT_DTYPES = ("F32", "BF16", "F16")
# Tensors that a checkpoint may have and a trunk does not use: buffers that are computed here, and
# prediction heads, which are loaded separately.
_UNUSED = re.compile(
    r"(.+\.)?rotary_emb\.((original_)?inv_freq|(cos|sin)_cached)"
    r"|model\.layers\.\d+\.self_attn\.(masked_bias|bias)|(.+\.)?(causal_mask|position_ids)"
    r"|model\.mtp_(layers|heads|norms)\..*|rope_freqs\.weight"
)


def load_config(directory: str | Path) -> ModelConfig:
    """The configuration of a checkpoint directory.

    The end-of-text ids come from generation_config.json if it has any. The tensors decide the dtype
    if config.json states none, and whether an LM head declared as tied differs from the embedding.
    Raises ModelLoadError for a directory without a supported config.json.
    """
    directory = checked_directory(directory)
    if not (directory / "config.json").is_file():
        for file in sorted(directory.glob("*.gguf"))[:1]:
            raise ModelLoadError(
                f"{printable(directory)} holds a GGUF without a config.json: give the file "
                f"{printable(file)} itself"
            )
        raise no_config_error(directory)
    config = read_hf_config(directory)
    if not has_weights(directory):
        return config
    return _with_facts_from_tensors(config, read_entries(directory), directory)


def check_checkpoint(directory: str | Path) -> tuple[ModelConfig, dict[str, TensorEntry]]:
    """Configuration and tensors of a checkpoint, checked against each other from the headers.

    No weights are read, except to compare an LM head with the embedding it is declared tied to.
    """
    config = load_config(directory)
    entries = read_entries(directory)
    if config.tie_word_embeddings and EMBEDDING not in entries and LM_HEAD in entries:
        entries[EMBEDDING] = entries.pop(LM_HEAD)
    check_entries(config, entries, checked_directory(directory))
    return config, entries


def fingerprint(directory: str | Path) -> str:
    """SHA-256 over 16 evenly spaced values of every weight of a checkpoint, as float32.

    It distinguishes models of the same shape, and a model from its fine-tuned versions, while
    reading one page per value instead of whole files. A GGUF has the fingerprint of its conversion:
    its values are rounded to bfloat16 first.
    """
    config, entries = check_checkpoint(directory)
    maps: Maps = {}
    digest = hashlib.sha256()
    round_first = is_gguf(entries)
    for name, shape in sorted(expected_tensors(config)):
        positions = torch.linspace(0, math.prod(shape) - 1, 16, dtype=torch.float64).long()
        width = math.prod(shape[1:])
        rows = read_rows(entries[name], maps, (positions // width).numpy())
        values = rows.reshape(16, width)[torch.arange(16), positions % width]
        values = values.bfloat16() if round_first else values
        digest.update(name.encode() + values.float().numpy().tobytes())
    return digest.hexdigest()


def layer_parts(config: ModelConfig) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Field of LayerWeights -> names and shapes of the tensors stacked into it, per layer.

    Names lack the prefix "model.layers.{i}.". A field that the model does not have has none.
    """
    E, F = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = [("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)]
    mlp = [("mlp.gate_proj", F), ("mlp.up_proj", F)]
    mlp_bias, per_head = config.mlp_bias, (config.head_dim,)
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
        "gate_up_bias": [(f"{name}.bias", (rows,)) for name, rows in mlp if mlp_bias],
        "down": [("mlp.down_proj.weight", (E, F))],
        "down_bias": [("mlp.down_proj.bias", (E,))] if mlp_bias else [],
    }


def final_norm(config: ModelConfig) -> str:
    """The name of the norm before the LM head."""
    return "model.mtp_norms.0.weight" if config.model_type == "mtp_llama" else "model.norm.weight"


def expected_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that a model of this configuration has."""
    vocabulary_matrix = (config.vocab_size, config.hidden_size)
    yield EMBEDDING, vocabulary_matrix
    for i in range(config.num_layers):
        for parts in layer_parts(config).values():
            for name, shape in parts:
                yield f"model.layers.{i}.{name}", shape
    yield final_norm(config), (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield LM_HEAD, vocabulary_matrix


def check_entries(config: ModelConfig, entries: Mapping[str, TensorEntry], source: Path) -> None:
    """Raise ModelLoadError unless the tensors of `source` are those of a model of this config."""
    expected = dict(expected_tensors(config))
    for name, shape in expected.items():
        entry = entries.get(name)
        if entry is None:
            hint = _config_hint(name, "true")
            raise ModelLoadError(f"{printable(source)}: tensor {name} is missing{hint}")
        if not _is_weight(entry):
            raise dtype_error(entry, _WEIGHT_DTYPES)
        if entry.shape != shape:
            raise ModelLoadError(
                f"{entry} must be {list(shape)} to match config.json, got {list(entry.shape)[:8]}"
            )
    for name, entry in entries.items():
        tied = name == LM_HEAD and config.tie_word_embeddings
        if name not in expected and not tied and not _UNUSED.fullmatch(name):
            hint = _config_hint(name, "not true")
            raise ModelLoadError(
                f"{entry} has no place in the model that config.json describes{hint}"
            )


def _config_hint(name: str, value: str) -> str:
    """Which key of config.json makes a tensor expected or unexpected, if there is such a key."""
    if ".lora_" in name or ".base_layer." in name:
        return " (an adapter's: merge it into its model)"
    if name == LM_HEAD:
        return " (tie_word_embeddings is not true there)"
    if re.search(r"self_attn\.[qkvo]_proj\.bias$", name):
        return f" (attention_bias is {value} there, or the architecture's own)"
    if re.search(r"mlp\.\w+_proj\.bias$", name):
        return f" (mlp_bias is {value} there)"
    return ""


def _with_facts_from_tensors(
    config: ModelConfig, entries: Mapping[str, TensorEntry], directory: Path
) -> ModelConfig:
    """The config with its dtype and tie_word_embeddings as the tensors show them, and remarks."""
    remarks = list(config.remarks)
    dtype, tied = config.dtype, config.tie_word_embeddings
    if dtype is None:
        floats = [TORCH_DTYPES[e.dtype] for e in entries.values() if e.dtype in _WEIGHT_DTYPES]
        dtype = floats[0] if floats else None
    if tied and EMBEDDING in entries and LM_HEAD in entries:
        if not _are_equal(entries[EMBEDDING], entries[LM_HEAD]):
            tied = False
            remarks.append(
                f"{entries[LM_HEAD]} differs from the embedding and is used, although config.json "
                "says tie_word_embeddings"
            )
    used, *ignored = weight_files(directory)
    for file in ignored:
        remarks.append(f"{printable(used)} is used and {file.name} beside it is ignored")
    return replace(config, dtype=dtype, tie_word_embeddings=tied, remarks=tuple(remarks))


def _are_equal(a: TensorEntry, b: TensorEntry) -> bool:
    """Whether two matrices have the same values."""
    if a.shape != b.shape or not (_is_weight(a) and _is_weight(b)):
        return False
    maps: Maps = {}
    same_dtype = a.dtype == b.dtype  # then no conversion is needed

    def rows_are_equal(rows: slice) -> bool:
        x, y = (read_rows(entry, maps, rows) for entry in (a, b))
        return torch.equal(x, y) if same_dtype else torch.equal(x.float(), y.float())

    equal = all(rows_are_equal(rows) for rows in row_slices(a))
    release_pages(maps.values())
    return equal


def _is_weight(entry: TensorEntry) -> bool:
    return entry.dtype in _WEIGHT_DTYPES or is_dequantisable(entry.dtype)
