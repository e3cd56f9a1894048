"""Loading a model's weights: mapped from the file where possible, fused where the model needs it.

A weight that is used as it is stored remains a mapping of its file. One that changes dtype, or is
stacked with others (Q, K and V; gate and up), is read straight into its final tensor, so that no
weight is resident twice.
"""

import logging
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtpkern.checkpoints.directory import EMBEDDING, LM_HEAD, is_gguf
from mtpkern.checkpoints.llama import (
    LayerWeights,
    check_checkpoint,
    expected_tensors,
    final_norm,
    layer_parts,
    load_config,
)
from mtpkern.checkpoints.quantised import ROUNDED_FORMATS, QuantReader, vocabulary_format
from mtpkern.checkpoints.tensor_entry import (
    TORCH_DTYPES,
    Maps,
    TensorEntry,
    map_tensor,
    read_into,
    read_rows,
    release_pages,
    row_slices,
)
from mtpkern.config import ModelConfig
from mtpkern.errors import ModelLoadError
from mtpkern.kernels.cpu.quants import Quants, quantise
from mtpkern.validation import choice

_LOG = logging.getLogger("mtpkern")
# The fields of LayerWeights that are matrices.
_MATRICES = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True)
class ModelWeights:
    """All weights of a model. With tied embeddings, `lm_head` is `embedding`."""

    embedding: Tensor | Quants  # [V, E]
    layers: tuple[Any, ...]  # LayerWeights, or what `pack_layer` returned for each
    norm: Tensor  # [E]
    lm_head: Tensor | Quants  # [V, E]
    mappings: tuple[mmap.mmap, ...]  # files that some of the tensors map

    def release(self) -> None:
        """Drop the mappings' resident pages. Later accesses read them from the files again."""
        release_pages(self.mappings)


def load_model(
    directory: str | Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    weights: str | None = None,
    pack_layer: Callable[[LayerWeights], Any] = lambda layer: layer,
    dummy: bool = False,
) -> tuple[ModelConfig, ModelWeights]:
    """Load a checkpoint in `dtype` onto `device`.

    With `weights`, matrices are loaded as Quants on the CPU, and norms and biases as float32:
    "auto" quantises those of a GGUF only, and keeps the file's bits where there is a kernel for its
    format; one of ROUNDED_FORMATS rounds those of any checkpoint, the embedding and the LM head to
    at least 8 bits.

    Each layer is passed to `pack_layer` before the next is read, so that the model never resides
    in memory in two layouts. `dummy` generates random weights from config.json alone. Raises
    ModelLoadError naming the file and the tensor.
    """
    if weights is not None:
        choice("weights", weights, ("auto", *ROUNDED_FORMATS))
    config, entries = (load_config(directory), {}) if dummy else check_checkpoint(directory)
    format = None if weights == "auto" else weights
    quantised = format is not None or (weights == "auto" and is_gguf(entries))
    tensor_dtype = torch.float32 if quantised else dtype
    reader: _TensorReader | _RandomTensors
    quants: QuantReader | _RandomQuants
    if dummy:
        reader = _RandomTensors(config, tensor_dtype, torch.device(device))
        quants = _RandomQuants(reader)
    else:
        reader = _TensorReader(entries, tensor_dtype, torch.device(device))
        quants = QuantReader(entries, reader.maps)

    def read_matrix(names: list[str], format: str | None) -> Tensor | Quants:
        return quants.read(names, format) if quantised else reader.read(names)

    for remark in config.remarks:
        _LOG.warning(remark)
    layers = []
    for i in range(config.num_layers):
        fields: dict[str, Any] = {}
        for field, parts in layer_parts(config).items():
            names = [f"model.layers.{i}.{name}" for name, _ in parts]
            if field == "qkv" and quantised:
                fields[field] = quants.read_parts(names, format)
            elif field in _MATRICES:
                fields[field] = read_matrix(names, format)
            else:
                fields[field] = reader.read(names) if names else None
        layers.append(pack_layer(LayerWeights(**fields)))
        release_pages(reader.maps.values())
    embedding = read_matrix([EMBEDDING], vocabulary_format(format))
    norm = reader.read([final_norm(config)])
    lm_head = embedding
    if not config.tie_word_embeddings:
        lm_head = read_matrix([LM_HEAD], vocabulary_format(format))
    mappings = tuple(reader.maps.values())
    return config, ModelWeights(embedding, tuple(layers), norm, lm_head, mappings)


class _TensorReader:
    """Reads named tensors in one dtype onto one device, and refuses values that are not finite."""

    def __init__(self, entries: dict[str, TensorEntry], dtype: torch.dtype, device: torch.device):
        self.entries, self.dtype, self.device = entries, dtype, device
        self.maps: Maps = {}

    def read(self, names: list[str]) -> Tensor:
        """The named tensors, stacked along their first dimension."""
        parts = [self.entries[name] for name in names]
        first = parts[0]
        if len(parts) == 1 and self._is_stored_as_needed(first):
            weight = map_tensor(first, self.maps)
            self._check_finite(weight, first)
            return weight
        rows = sum(part.shape[0] for part in parts)
        weight = torch.empty((rows, *first.shape[1:]), dtype=self.dtype, device=self.device)
        row = 0
        for part in parts:
            target = weight[row : row + part.shape[0]]
            if self._is_stored_as_needed(part):
                read_into(part, target)
            elif not part.is_plain:
                for some_rows in row_slices(part):
                    target[some_rows].copy_(read_rows(part, self.maps, some_rows))
            else:
                staging = torch.empty(part.shape, dtype=TORCH_DTYPES[part.dtype])
                read_into(part, staging)
                target.copy_(staging)
            self._check_finite(target, part)
            row += part.shape[0]
        return weight

    def _is_stored_as_needed(self, entry: TensorEntry) -> bool:
        """Whether the file's bytes are the tensor that is needed."""
        if not entry.is_plain or self.device.type != "cpu":
            return False
        return TORCH_DTYPES[entry.dtype] == self.dtype

    def _check_finite(self, weight: Tensor, entry: TensorEntry) -> None:
        # The extremes reveal infinities, and NaN since it propagates, in one pass over the data.
        low, high = torch.aminmax(weight)
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            raise ModelLoadError(f"{entry} holds values that are not finite in {self.dtype}")


class _RandomTensors:
    """Stands in for `_TensorReader` where there are no weights: random ones of the right shapes."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device):
        self.shapes, self.dtype, self.device = dict(expected_tensors(config)), dtype, device
        self.maps: Maps = {}

    def read(self, names: list[str]) -> Tensor:
        """Random tensors for these names, stacked. Matrices preserve the scale of their input."""
        shapes = [self.shapes[name] for name in names]
        rows = sum(shape[0] for shape in shapes)
        weight = torch.empty((rows, *shapes[0][1:]), dtype=self.dtype, device=self.device)
        if weight.dim() == 1:
            return weight.fill_(1.0 if "norm" in names[0] else 0.0)
        return weight.normal_(std=weight.shape[1] ** -0.5)


class _RandomQuants:
    """Stands in for `QuantReader`: random matrices, rounded."""

    def __init__(self, tensors: _RandomTensors):
        self.tensors = tensors

    def read(self, names: list[str], format: str | None) -> Quants:
        assert format is not None, "random weights have no file whose format could be kept"
        return quantise(self.tensors.read(names), format)

    def read_parts(self, names: list[str], format: str | None) -> list[Quants]:
        return [self.read(names, format)]
