"""The Llama trunk: window [B, T] -> hidden states, K and V appended to the cache.

    x = embedding[token];  each layer: x += o(attention(qkv(norm(x)))), x += down(gate_up(norm(x)))

(Touvron et al. 2023.) `Ops.layer` and `Ops.layers` (ops/base.py) run them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtpkern.checkpoints.llama import LayerWeights, load_config
from mtpkern.checkpoints.model_weights import load_model
from mtpkern.config import ModelConfig
from mtpkern.kernels.cpu.quants import Quants
from mtpkern.ops.base import Ops


class DecoderLayer(NamedTuple):
    """One layer's weights, packed by `ops.pack`."""

    input_norm: Tensor | None  # [E]; None if the attention's input is already normed
    qkv: Any  # [(Hq + 2 Hk) * D, E]
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    o: Any  # [E, Hq * D]
    post_attention_norm: Tensor  # [E]
    gate_up: Any  # [2F, E]
    down: Any  # [E, F]


@dataclass(frozen=True)
class Llama:
    """A model ready to run: its config and its packed weights."""

    config: ModelConfig
    embedding: Any  # [V, E], packed for `ops.embed`
    layers: tuple[DecoderLayer, ...]
    norm: Tensor  # [E]
    lm_head: Tensor | Quants  # [V, E], as loaded
    vocabulary: Any  # [V, E], the LM head packed
    dtype: torch.dtype  # of the weights that are not quantised
    release: Callable[[], None]  # drops resident pages of files, which `lm_head` may be a view of

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        dtype: torch.dtype,
        ops: Ops,
        device: str | torch.device = "cpu",
        dummy: bool = False,
        weights: str | None = None,
        on_layer: Callable[[], object] = lambda: None,
    ) -> "Llama":
        """Load a checkpoint in `dtype` and pack it layer by layer, so that no weight is in memory
        twice.

        `dummy` makes up weights of the shapes in config.json; `weights` is as in `load_model`, and
        needs `ops.takes_quants`; `on_layer` is called after each layer.
        """

        def pack(layer: LayerWeights) -> DecoderLayer:
            packed = pack_layer(layer, head_dim, ops)
            on_layer()
            return packed

        head_dim = load_config(directory).head_dim
        config, w = load_model(
            directory,
            dtype=dtype,
            device=device,
            dummy=dummy,
            weights=weights,
            pack_layer=pack,
        )
        vocabulary = ops.pack(w.lm_head)
        tied = vocabulary if w.lm_head is w.embedding else None
        embedding = ops.pack_embedding(w.embedding, tied)
        # Packed weights are copies: the file's pages need not stay resident.
        w.release()
        return cls(config, embedding, w.layers, w.norm, w.lm_head, vocabulary, dtype, w.release)


def pack_layer(layer: LayerWeights, head_dim: int, ops: Ops) -> DecoderLayer:
    """Pack one layer's weights into the layout of `ops`."""
    return DecoderLayer(
        layer.input_norm,
        ops.pack_qkv(layer.qkv, layer.qkv_bias, head_dim),
        layer.q_norm,
        layer.k_norm,
        ops.pack_o(layer.o, layer.o_bias, head_dim),
        layer.post_attention_norm,
        ops.pack_gate_up(layer.gate_up, layer.gate_up_bias),
        ops.pack(layer.down, layer.down_bias),
    )
