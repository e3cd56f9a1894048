"""Prefill on a GPU, through the vendor's GEMM and attention: many rows, bound by arithmetic.

A prompt runs without its last token, alone, in chunks cut at absolute multiples of a fixed size, so
that its cache does not depend on its neighbours. The host knows where each chunk begins, so nothing
is read back from the device.

A layer is twelve launches: two norms, four matmuls, of which two add to the residual in place,
rotation and append in one, two gathers of pages, attention, and silu and its product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mtpkern.kernels.rope_cache import rope_cache
from mtpkern.ops.base import Ops, PackedWeight

if TYPE_CHECKING:
    from mtpkern.cache import KVCache
    from mtpkern.model import DecoderLayer, Llama

# Keys are taken in whole multiples of this where a mask hides some, so that attention meets few
# extents: for each new one cuDNN makes a plan, which takes longer than the chunk.
MASKED_KEYS = 512
# Without a mask the vendor's flash kernel serves every extent; cuDNN is left out.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Chunk(NamedTuple):
    """What all layers share for the rows of one chunk."""

    slots: Tensor  # [R] int64
    positions: Tensor  # [R] int64
    pages: Tensor  # [n] int64, those of the keys
    mask: Tensor | None  # [R, n * page_size] bool; None: causal, the last row sees the last key


def run_chunk(
    model: Llama, window: Tensor, cache: KVCache, taps: Sequence[int], ops: Ops
) -> tuple[Tensor, list[Tensor]]:
    """Run the rows [1, R] of a prompt after its first cache.lengths tokens, as `Ops.layers` does;
    cache.lengths [1] is on the host."""
    chunk = plan_chunk(int(cache.lengths[0]), window.shape[1], cache, model.config.sliding_window)
    x = ops.embed(model.embedding, window)
    tapped = {}
    for index, layer in enumerate(model.layers):
        eps = model.config.rms_norm_eps
        run_layer(x, layer, eps, cache.k[index], cache.v[index], cache, chunk, ops)
        if index + 1 in taps:
            tapped[index + 1] = x.clone()
    return x, [tapped[tap] for tap in taps]


def plan_chunk(begin: int, rows: int, cache: KVCache, window: int) -> Chunk:
    """Plan `rows` rows after `begin` tokens, both multiples of the page size; `window` > 0 limits
    a row to the last `window` positions, its own included."""
    page_size, device = cache.k.shape[2], cache.page_table.device
    table, end = cache.page_table[0].long(), begin + rows
    positions = torch.arange(begin, end, device=device)
    slots = table[positions // page_size] * page_size + positions % page_size
    if not window:
        return Chunk(slots, positions, table[: end // page_size], None)
    first = max(0, begin + 1 - window) // MASKED_KEYS * MASKED_KEYS
    pages = table[first // page_size : -(-end // MASKED_KEYS) * MASKED_KEYS // page_size]
    keys = torch.arange(first, first + len(pages) * page_size, device=device)
    mask = (keys <= positions[:, None]) & (keys > positions[:, None] - window)
    return Chunk(slots, positions, pages, mask)


def run_layer(
    x: Tensor,
    layer: DecoderLayer,
    eps: float,
    k_pages: Tensor,
    v_pages: Tensor,
    cache: KVCache,
    chunk: Chunk,
    ops: Ops,
) -> None:
    """Run one layer on x [R, E], in place."""
    normed = x if layer.input_norm is None else ops.rms_norm(x, layer.input_norm, eps)
    q = rope_cache(
        multiply(normed, layer.qkv),
        k_pages,
        v_pages,
        chunk.slots,
        chunk.positions,
        cache.cos,
        cache.sin,
        q_norm=layer.q_norm,
        k_norm=layer.k_norm,
        eps=eps,
    )
    # The vendor's attention reads no pages.
    k, v = (pages[chunk.pages].flatten(0, 1).transpose(0, 1)[None] for pages in (k_pages, v_pages))
    attended = attend(q.transpose(0, 1)[None], k, v, chunk.mask)
    add_product(x, attended[0].transpose(0, 1).reshape(len(x), -1), layer.o)
    hidden = multiply(ops.rms_norm(x, layer.post_attention_norm, eps), layer.gate_up)
    width = hidden.shape[1] // 2
    add_product(x, F.silu(hidden[:, :width]).mul_(hidden[:, width:]), layer.down)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The vendor's attention: q [1, Hq, R, D], k and v [1, Hk, keys, D] -> [1, Hq, R, D]."""
    # A second of imports and 100 MB, which a CPU does without.
    from torch.nn.attention.bias import causal_lower_right

    if mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    causal = causal_lower_right(q.shape[2], k.shape[2])
    with sdpa_kernel(BACKENDS):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True)


def multiply(x: Tensor, w: PackedWeight) -> Tensor:
    return F.linear(x, w.data, w.bias)


def add_product(x: Tensor, y: Tensor, w: PackedWeight) -> None:
    """x += y w^T + bias, the sum inside the matmul."""
    x.addmm_(y, w.data.t())
    if w.bias is not None:
        x.add_(w.bias)
