"""Every kernel at the shapes of real models, to be launched, checked, timed or compiled.

`OPS` has one entry per op. `bench_kernels.py` runs the cases on a GPU; `check_codegen.py` compiles
them on any machine, from tensors without data (device "meta").
"""

from collections.abc import Callable, Iterator

from checkout import ROOT  # noqa: F401  (first: mtpkern is this checkout's)
from model_shapes import ModelShape

from .case import Call, KernelCase
from .layers import (
    gate_up_silu_cases,
    linear_cases,
    qkv_rope_cache_cases,
    rms_norm_cases,
    rope_cache_cases,
    verify_attention_cases,
)
from .step import (
    accept_cases,
    advance_cases,
    kv_rollback_cases,
    ngram_cases,
    window_slots_cases,
)
from .vocabulary import medusa_blocks_cases, multi_head_projection_cases, sample_cases

__all__ = ["OPS", "Call", "KernelCase"]

OPS: dict[str, Callable[[ModelShape, int, int], Iterator[KernelCase]]] = {
    "rms_norm": rms_norm_cases,
    "qkv_rope_cache": qkv_rope_cache_cases,
    "rope_cache": rope_cache_cases,
    "linear": linear_cases,
    "gate_up_silu": gate_up_silu_cases,
    "verify_attention": verify_attention_cases,
    "medusa_blocks": medusa_blocks_cases,
    "multi_head_projection": multi_head_projection_cases,
    "accept": accept_cases,
    "advance": advance_cases,
    "kv_rollback": kv_rollback_cases,
    "sample": sample_cases,
    "ngram": ngram_cases,
    "window_slots": window_slots_cases,
}
