"""The operations of a step as one value: pass another `Ops` and the same step runs on other code.

TORCH holds the references, which are also the runtime on a CPU.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from mtpkern.kernels.accept import accept_ref
from mtpkern.kernels.gate_up_silu import gate_up_silu_ref
from mtpkern.kernels.linear import linear_ref, pack_ref
from mtpkern.kernels.multi_head_projection import multi_head_projection_ref
from mtpkern.kernels.ngram import ngram_ref
from mtpkern.kernels.qkv_rope_cache import qkv_rope_cache_ref
from mtpkern.kernels.rms_norm import rms_norm_ref
from mtpkern.kernels.sample import SamplingRows, sample_ref, sampling_key
from mtpkern.kernels.step_plan import plan_ref
from mtpkern.kernels.verify_attention import verify_attention_ref

__all__ = ["TORCH", "Ops", "SamplingRows", "sampling_key"]


class Ops(NamedTuple):
    """One implementation of every operation; the references in kernels/ define what each does."""

    pack: Callable[..., Any]
    plan: Callable[..., Any]
    rms_norm: Callable[..., Any]
    qkv_rope_cache: Callable[..., Any]
    verify_attention: Callable[..., Any]
    linear: Callable[..., Any]
    gate_up_silu: Callable[..., Any]
    multi_head_projection: Callable[..., Any]
    sample: Callable[..., Any]
    accept: Callable[..., Any]
    ngram: Callable[..., Any]


TORCH = Ops(
    pack=pack_ref,
    plan=plan_ref,
    rms_norm=rms_norm_ref,
    qkv_rope_cache=qkv_rope_cache_ref,
    verify_attention=verify_attention_ref,
    linear=linear_ref,
    gate_up_silu=gate_up_silu_ref,
    multi_head_projection=multi_head_projection_ref,
    sample=sample_ref,
    accept=accept_ref,
    ngram=ngram_ref,
)
