"""All decoder layers of a Llama-style model in one program.

    per layer  x += o(attend(qkv(norm(x)))),  x += down(silu(gate) * up)

Bytes moved: every weight once, for up to about 40 rows (beyond 8 rows, chunks are read again from
the processor's cache); keys and values once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from .program import LayerCache, Norm, Program
from .quants import Array
from .weights import Weights


class PackedLayer(NamedTuple):
    """One decoder layer: Llama, Mistral, Qwen2 (biases in qkv), Qwen3 (q and k norms)."""

    input_norm: Norm
    qkv: Sequence[Weights]  # [(Hq + 2 Hk) D, E], q above k above v, cut where the format changes
    o: Weights  # [E, Hq D]
    post_attention_norm: Norm
    gate_up: Weights  # [2 F, E] in the order of `weights.interleaved`
    down: Weights  # [E, F]
    q_norm: Array | None = None  # [D]
    k_norm: Array | None = None


class ModelCache(NamedTuple):
    """Keys and values of all layers, and the layout of their heads."""

    k: Tensor  # [L, pages, page_size, Hk, D]
    v: Tensor
    cos: Tensor  # [positions, D] float32
    sin: Tensor  # its first half negated
    heads: int  # query heads
    sliding: int = 0  # positions that a row sees; 0: all
    head_dim: int = 0  # see `LayerCache`


def add_layers(
    program: Program,
    x: Array,
    layers: Sequence[PackedLayer],
    cache: ModelCache,
    taps: Mapping[int, Array] | None = None,
    inputs: Array | None = None,
) -> Array:
    """Add layers to a program -> the hidden states [max_rows, E] after the last one.

    x [max_rows, E] are the hidden states before the first layer; they may be overwritten. `taps`
    maps a layer, counted from 1, to the buffer for the hidden states after it. `inputs`
    [max_rows, any] replaces x as the input of the first layer's attention (EAGLE-3).
    """
    E, first = layers[0].o.out_features, layers[0]
    qkv = program.buffer(sum(w.out_features for w in first.qkv))
    attended = program.buffer(first.o.in_features)
    gated = program.buffer(first.down.in_features)
    taps = taps or {}
    for index, layer in enumerate(layers):
        # A layer adds to its input in place, unless that is tapped.
        out = x if index not in taps else program.buffer(E)
        out = taps.get(index + 1, out)
        pages = LayerCache(
            cache.k[index],
            cache.v[index],
            cache.cos,
            cache.sin,
            cache.heads,
            cache.sliding,
            layer.q_norm,
            layer.k_norm,
            cache.head_dim,
        )
        source = x if inputs is None or index else inputs
        program.qkv_rope_cache(source, layer.qkv, qkv, pages, norm=layer.input_norm)
        program.attend(qkv, attended, pages)
        program.linear(attended, layer.o, out, residual=x)
        program.gate_up_silu(out, layer.gate_up, gated, norm=layer.post_attention_norm)
        program.linear(gated, layer.down, out, residual=out)
        x = out
    return x
