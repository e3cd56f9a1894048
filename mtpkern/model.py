"""The Llama trunk: window [B, T] -> hidden states, K and V appended to the cache.

    x = embedding[token];  each layer: x += o(attention(qkv(norm(x)))), x += down(gate_up(norm(x)))

(Touvron et al. 2023.) A layer is also what a sequential head is made of, so it stands alone here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtpkern.cache import KVCache
from mtpkern.checkpoints.llama import LayerWeights, load_config, load_model
from mtpkern.config import ModelConfig
from mtpkern.kernels.cpu.weights import Quants
from mtpkern.ops.base import Ops


class DecoderLayer(NamedTuple):
    """One layer's weights, packed by `ops.pack`."""

    input_norm: Tensor | None  # [E]; None where the attention's input is normed already
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
    dtype: torch.dtype  # of weights that are no quants

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
        """Load a checkpoint in `dtype` and pack it, layer by layer: no weight is held twice.

        `dummy` makes up weights of the shapes that config.json names; `weights` is as in
        `load_model`, and needs `ops.takes_quants`; `on_layer` is called after each layer.
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
        shared = w.lm_head is w.embedding and ops.pack_embedding == ops.pack
        embedding = vocabulary if shared else ops.pack_embedding(w.embedding)
        # Packed weights are copies: the pages they were read from need not stay resident.
        w.release()
        return cls(config, embedding, w.layers, w.norm, w.lm_head, vocabulary, dtype)


def pack_layer(layer: LayerWeights, head_dim: int, ops: Ops) -> DecoderLayer:
    """Bring one layer's weights into the layout of `ops`."""
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


def plan_window(cache: KVCache, rows: int, config: ModelConfig, ops: Ops) -> Any:
    """What all layers share for T = `rows` rows behind the cache's committed lengths."""
    return ops.plan(
        cache.lengths,
        rows,
        k_cache=cache.k,
        v_cache=cache.v,
        page_table=cache.page_table,
        cos_table=cache.cos,
        sin_table=cache.sin,
        group=config.num_heads // config.num_kv_heads,
        window=config.sliding_window,
        head_dim=config.head_dim,
    )


def decoder_layer(
    x: Tensor,
    layer: DecoderLayer,
    eps: float,
    cache: KVCache,
    index: int,
    plan: Any,
    ops: Ops,
    *,
    inputs: Tensor | None = None,
) -> Tensor:
    """Run one layer: x [B*T, E] -> [B*T, E]; layer `index` of the cache gets the window's K, V.

    `inputs` is what Q, K and V are made of where that is not x itself (EAGLE-3).
    """
    k, v = cache.k[index], cache.v[index]
    norms = {"q_norm": layer.q_norm, "k_norm": layer.k_norm}
    source = x if inputs is None else inputs
    q = ops.qkv_rope_cache(source, layer.input_norm, eps, layer.qkv, k, v, plan, **norms)
    attended = ops.verify_attention(q, k, v, cache.page_table, plan)
    x = ops.linear(attended.view(x.shape[0], -1), layer.o, residual=x)
    gated = ops.gate_up_silu(x, layer.post_attention_norm, eps, layer.gate_up)
    return ops.linear(gated, layer.down, residual=x)


def run_trunk(
    model: Llama, window: Tensor, cache: KVCache, ops: Ops, taps: Sequence[int] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Run the window behind each sequence's committed tokens: window [B, T] int64.

    -> (hidden [B*T, E] before the final norm, the hidden states [B*T, E] after the layers `taps`,
    counted from 1). K and V are written at slots lengths[b] .. lengths[b] + T - 1, not committed.
    """
    if ops.layers is not None:
        return ops.layers(model, window, cache, taps)
    config = model.config
    plan = plan_window(cache, window.shape[1], config, ops)
    x = ops.embed(model.embedding, window)
    tapped = {}
    for index, layer in enumerate(model.layers):
        x = decoder_layer(x, layer, config.rms_norm_eps, cache, index, plan, ops)
        if index + 1 in taps:
            tapped[index + 1] = x
    return x, [tapped[tap] for tap in taps]
