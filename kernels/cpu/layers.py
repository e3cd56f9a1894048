"""All decoder layers of a Llama-style model and its vocabulary in one program.

    x = embedding[ids];  per layer  x += o(attend(qkv(norm(x)))),  x += down(silu(gate) * up)
    logits = vocabulary(norm(x))

Bytes moved: every weight once for up to 8 rows, from memory once for up to about 40 (chunks stay in
the cache between passes); the cache of keys and values once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ._compile import Kernels
from ._threads import Helpers
from .program import Norm, Pages, Program
from .weights import Array, Weights


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


class Trunk(NamedTuple):
    """A model's weights, packed."""

    embedding: Weights  # [V, E]
    layers: Sequence[Layer]
    norm: Norm
    vocabulary: Weights  # [V, E]; the embedding itself where they are tied
    heads: int  # query heads
    sliding: int = 0  # positions that a row sees; 0: all


class Step(NamedTuple):
    """A program over a trunk and the buffers it fills; rows beyond the step's are undefined."""

    program: Program
    hidden: Array  # [max_rows, E], before the final norm
    taps: list[Array]  # [max_rows, E] each: hidden states after the layers asked for
    logits: Array | None  # [max_rows, V]
    best: Array  # [max_rows, 3]; see `Program.project`


def layers(
    trunk: Trunk,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    kernels: Kernels,
    helpers: Helpers,
    *,
    max_rows: int,
    max_batch: int = 1,
    taps: Sequence[int] = (),
    keep_logits: bool = False,
) -> Step:
    """Build a model's step: k_cache, v_cache [L, pages, page_size, Hk, D]; cos, sin [positions, D].

    Before `program.run(T, B)`, set its ids [B T], lengths [B] and page_table [B, any]. `taps` are
    counted from 1.
    """
    program = Program(kernels, helpers, max_rows=max_rows, max_batch=max_batch)
    first = trunk.layers[0]
    x = program.buffer(trunk.embedding.in_features)
    qkv, attended = program.buffer(first.qkv.out_features), program.buffer(first.o.in_features)
    gated = program.buffer(first.down.in_features)
    program.embed(trunk.embedding, x)
    tapped = []
    for index, layer in enumerate(trunk.layers):
        # A layer adds to its input in place, but leaves a tapped one as it is.
        out = program.buffer(trunk.embedding.in_features) if index in taps else x
        pages = Pages(
            k_cache[index],
            v_cache[index],
            cos,
            sin,
            trunk.heads,
            trunk.sliding,
            layer.q_norm,
            layer.k_norm,
        )
        program.qkv_rope_cache(x, layer.qkv, qkv, pages, norm=layer.input_norm)
        program.attend(qkv, attended, pages)
        program.linear(attended, layer.o, out, residual=x)
        program.gate_up_silu(out, layer.gate_up, gated, norm=layer.post_attention_norm)
        program.linear(gated, layer.down, out, residual=out)
        x = out
        if index + 1 in taps:
            tapped.append(x)
    logits = program.buffer(trunk.vocabulary.out_features) if keep_logits else None
    best = program.project(x, trunk.vocabulary, norm=trunk.norm, logits=logits)
    return Step(program, x, tapped, logits, best)
