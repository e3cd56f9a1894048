"""All decoder layers of a Llama-style model in one program.

    per layer  x += o(attend(qkv(norm(x)))),  x += down(silu(gate) * up)

Bytes moved: every weight once for up to 8 rows, from memory once for up to about 40 (chunks stay in
the cache between passes); the cache of keys and values once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from .program import Norm, Pages, Program
from .quants import Array
from .weights import Weights


class Layer(NamedTuple):
    """One decoder layer: Llama, Mistral, Qwen2 (biases in qkv), Qwen3 (q and k norms)."""

    input_norm: Norm
    qkv: Weights  # [(Hq + 2 Hk) D, E], q above k above v
    o: Weights  # [E, Hq D]
    post_attention_norm: Norm
    gate_up: Weights  # [2 F, E] in the order of `weights.interleaved`
    down: Weights  # [E, F]
    q_norm: Array | None = None  # [D]
    k_norm: Array | None = None


class Cache(NamedTuple):
    """Keys and values of all layers, and how heads lie in them."""

    k: Tensor  # [L, pages, page_size, Hk, D]
    v: Tensor
    cos: Tensor  # [positions, D] float32
    sin: Tensor  # its first half negated
    heads: int  # query heads
    sliding: int = 0  # positions that a row sees; 0: all
    head_dim: int = 0  # see `program.Pages`


def add_layers(
    program: Program,
    x: Array,
    layers: Sequence[Layer],
    cache: Cache,
    taps: Mapping[int, Array] | None = None,
    inputs: Array | None = None,
) -> Array:
    """Add layers that begin with the hidden states x [max_rows, E] -> those after the last of them;
    x itself may be overwritten.

    `taps` are where hidden states are to be kept, by the layer after which they are, counted from
    1. `inputs` [max_rows, any] is what the first layer attends with where that is not x (EAGLE-3).
    """
    E, first = layers[0].o.out_features, layers[0]
    qkv, attended = program.buffer(first.qkv.out_features), program.buffer(first.o.in_features)
    gated = program.buffer(first.down.in_features)
    taps = taps or {}
    for index, layer in enumerate(layers):
        # A layer adds to its input in place, but leaves a tapped one as it is.
        out = x if index not in taps else program.buffer(E)
        out = taps.get(index + 1, out)
        pages = Pages(
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
