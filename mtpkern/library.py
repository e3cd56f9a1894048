"""The kernels as operators of torch, torch.ops.mtpkern.*: for torch.compile and for other engines.

Importing this module registers them. An operator takes what the launcher of the same name in
kernels/ takes, but for `out` and `pdl`. On CUDA tensors it is the kernel, on CPU tensors the
kernel's definition. It returns new tensors, and writes only where its schema says so:
`print(torch.ops.mtpkern.kv_rollback.default._schema)`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtpkern.kernels.accept import accept, accept_ref
from mtpkern.kernels.gate_up_silu import gate_up_silu, gate_up_silu_ref
from mtpkern.kernels.kv_rollback import kv_rollback, kv_rollback_ref
from mtpkern.kernels.linear import linear, linear_ref
from mtpkern.kernels.medusa_blocks import medusa_blocks, medusa_blocks_ref
from mtpkern.kernels.multi_head_projection import (
    Projection,
    multi_head_projection,
    multi_head_projection_ref,
)
from mtpkern.kernels.ngram import ngram, ngram_ref
from mtpkern.kernels.qkv_rope_cache import qkv_rope_cache, qkv_rope_cache_ref
from mtpkern.kernels.rms_norm import rms_norm, rms_norm_ref
from mtpkern.kernels.rope_cache import rope_cache, rope_cache_ref
from mtpkern.kernels.sample import sample, sample_ref
from mtpkern.kernels.verify_attention import verify_attention, verify_attention_ref
from mtpkern.kernels.window_slots import window_slots, window_slots_ref

_library = torch.library.Library("mtpkern", "DEF")


def _operator(
    launcher: Callable[..., Any], definition: Callable[..., Any], signature: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register `launcher` under its name, with `definition` for the CPU; the decorated
    function is its fake kernel, which gives the shapes."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        name = launcher.__name__
        _library.define(name + signature, tags=(torch.Tag.needs_exact_strides,))
        _library.impl(name, launcher, "CUDA")
        _library.impl(name, definition, "CPU")
        torch.library.register_fake(f"mtpkern::{name}", fake, lib=_library)
        return fake

    return register


@_operator(rms_norm, rms_norm_ref, "(Tensor x, Tensor w, float eps) -> Tensor")
def _rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@_operator(
    linear,
    linear_ref,
    "(Tensor x, Tensor w, Tensor? bias=None, *, Tensor? residual=None) -> Tensor",
)
def _linear(
    x: Tensor, w: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None
) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0])


@_operator(
    gate_up_silu,
    gate_up_silu_ref,
    "(Tensor x, Tensor norm_w, float eps, Tensor w, Tensor? bias=None) -> Tensor",
)
def _gate_up_silu(
    x: Tensor, norm_w: Tensor, eps: float, w: Tensor, bias: Tensor | None = None
) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0] // 2)


@_operator(
    qkv_rope_cache,
    qkv_rope_cache_ref,
    "(Tensor x, Tensor? norm_w, float eps, Tensor w, Tensor(a!) k_pages, Tensor(b!) v_pages,"
    " Tensor slots, Tensor positions, Tensor cos_table, Tensor sin_table, *, Tensor? bias=None,"
    " Tensor? q_norm=None, Tensor? k_norm=None) -> Tensor",
)
def _qkv_rope_cache(
    x: Tensor,
    norm_w: Tensor | None,
    eps: float,
    w: Tensor,
    k_pages: Tensor,
    *rest: Tensor,
    **options: Any,
) -> Tensor:
    Hk, D = k_pages.shape[2:]
    return x.new_empty(x.shape[0], w.shape[0] // D - 2 * Hk, D)


@_operator(
    rope_cache,
    rope_cache_ref,
    "(Tensor qkv, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots, Tensor positions,"
    " Tensor cos_table, Tensor sin_table, *, Tensor? q_norm=None, Tensor? k_norm=None,"
    " float eps=0.0) -> Tensor",
)
def _rope_cache(qkv: Tensor, k_pages: Tensor, *rest: Tensor, **options: Any) -> Tensor:
    Hk, D = k_pages.shape[2:]
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // D - 2 * Hk, D)


@_operator(
    verify_attention,
    verify_attention_ref,
    "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor lengths, *,"
    " Tensor? tree=None, int window=0, float? scale=None) -> Tensor",
)
def _verify_attention(q: Tensor, *rest: Tensor, **options: Any) -> Tensor:
    return torch.empty_like(q)


@_operator(medusa_blocks, medusa_blocks_ref, "(Tensor normed, Tensor w, Tensor bias) -> Tensor")
def _medusa_blocks(normed: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return normed.new_empty(1 + w.shape[0], *normed.shape).transpose(0, 1)


def _without_none(projection: Callable[..., Projection]) -> Callable[..., tuple[Tensor, ...]]:
    """The same with an empty tensor for what was not asked for: an operator returns no None."""

    def multi_head_projection(
        hidden: Tensor, vocabulary: Tensor, **options: Any
    ) -> tuple[Tensor, ...]:
        values, ids, logsumexp, given, logits = projection(hidden, vocabulary, **options)
        given = values.new_empty(len(hidden), 0) if given is None else given
        logits = values.new_empty(0, len(vocabulary)) if logits is None else logits
        return values, ids, logsumexp, given, logits

    return multi_head_projection


projection_kernel = _without_none(multi_head_projection)
projection_definition = _without_none(multi_head_projection_ref)


@_operator(
    projection_kernel,
    projection_definition,
    "(Tensor hidden, Tensor vocabulary, *, int top_k=1, Tensor? given=None, int logits_rows=0,"
    " Tensor? token_ids=None)"
    " -> (Tensor values, Tensor ids, Tensor logsumexp, Tensor given_logits, Tensor logits)",
)
def _multi_head_projection(
    hidden: Tensor,
    vocabulary: Tensor,
    *,
    top_k: int = 1,
    given: Tensor | None = None,
    logits_rows: int = 0,
    token_ids: Tensor | None = None,
) -> tuple[Tensor, ...]:
    R = hidden.shape[0]
    wanted = 0 if given is None else given.shape[1]
    return (
        hidden.new_empty(R, top_k, dtype=torch.float32),
        hidden.new_empty(R, top_k, dtype=torch.int64),
        hidden.new_empty(R, dtype=torch.float32),
        hidden.new_empty(R, wanted, dtype=torch.float32),
        hidden.new_empty(logits_rows, vocabulary.shape[0], dtype=torch.float32),
    )


@_operator(accept, accept_ref, "(Tensor window, Tensor target) -> (Tensor accepted, Tensor bonus)")
def _accept(window: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return window.new_empty(window.shape[0]), window.new_empty(window.shape[0])


@_operator(
    kv_rollback,
    kv_rollback_ref,
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor page_table, Tensor(c!) lengths,"
    " Tensor accepted, *, Tensor? active=None, Tensor? path=None) -> ()",
)
def _kv_rollback(*tensors: Tensor, **options: Any) -> None:
    pass


@_operator(sample, sample_ref, "(Tensor logits, Tensor? token_ids=None) -> Tensor")
def _sample(logits: Tensor, token_ids: Tensor | None = None) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


@_operator(
    ngram,
    ngram_ref,
    "(Tensor tokens, Tensor known, int drafts, int size=3) -> (Tensor drafted, Tensor found)",
)
def _ngram(tokens: Tensor, known: Tensor, drafts: int, size: int = 3) -> tuple[Tensor, Tensor]:
    B = tokens.shape[0]
    return tokens.new_empty(B, drafts), tokens.new_empty(B, dtype=torch.bool)


@_operator(
    window_slots,
    window_slots_ref,
    "(Tensor lengths, Tensor page_table, int rows, int page_size, *, Tensor? active=None,"
    " Tensor? tree=None) -> (Tensor slots, Tensor positions)",
)
def _window_slots(
    lengths: Tensor, page_table: Tensor, rows: int, page_size: int, **options: Any
) -> tuple[Tensor, Tensor]:
    count = lengths.shape[0] * rows
    return lengths.new_empty(count), lengths.new_empty(count)
