"""A GPU's prefill against the definitions: the same hidden states, taps, keys and values.

On a CPU: what it launches of its own is replaced by its definition, the vendor's part is torch's.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_checkpoint
from llama_layouts import write_layout

from mtpkern.cache import KVCache
from mtpkern.kernels.rms_norm import rms_norm_ref
from mtpkern.kernels.rope_cache import rope_cache_ref
from mtpkern.model import Llama
from mtpkern.ops import prefill
from mtpkern.ops.definitions import DEFINITIONS
from mtpkern.ops.gpu import TRITON

PAGES = [3, 1, 4, 2, 5, 8, 7, 6, 9, 12, 11, 10]


def empty_cache(model: Llama) -> KVCache:
    config = model.config
    frequencies, scaling = config.rope.inverse_frequencies(config.head_dim)
    cache = KVCache.empty(
        layers=config.num_layers,
        pages=len(PAGES),
        page_size=64,
        page_table=torch.zeros(1, len(PAGES), dtype=torch.int32),
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        inverse_frequencies=frequencies,
        rope_scaling=scaling,
        dtype=torch.float32,
    )
    cache = replace(cache, k=torch.zeros_like(cache.k), v=torch.zeros_like(cache.v))
    cache.assign(0, PAGES)
    return cache


def test_a_sliding_window_meets_few_extents(tmp_path: Path) -> None:
    """cuDNN makes a plan for each new one, which takes longer than a chunk."""
    tiny_checkpoint(tmp_path, max_position_embeddings=1024)
    cache = empty_cache(Llama.load(tmp_path, dtype=torch.float32, ops=TRITON, device="cpu"))
    cache = replace(cache, page_table=torch.zeros(1, 512, dtype=torch.int32))
    extents = set()
    for begin in range(0, 24 * 1024, 512):
        for rows in range(64, 513, 64):
            chunk = prefill.plan_chunk(begin, rows, cache, 1000)
            assert chunk.mask is not None and chunk.mask.shape == (rows, 64 * len(chunk.pages))
            extents.add(len(chunk.pages))
    assert len(extents) <= 4


def test_attention_without_a_mask_is_not_cudnn_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its extent is another in each chunk."""
    enabled = []
    plain = F.scaled_dot_product_attention

    def record(*args: Any, **named: Any) -> Any:
        enabled.append((torch.backends.cuda.cudnn_sdp_enabled(), "attn_mask" in named))
        return plain(*args, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    q, k = torch.zeros(1, 2, 64, 16), torch.zeros(1, 2, 192, 16)
    prefill.attend(q, k, k, None)
    assert enabled == [(False, True)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2", "mistral_window_7"])
@torch.inference_mode()
def test_chunks_are_what_the_definitions_say(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "llama":
        tiny_checkpoint(tmp_path, max_position_embeddings=1024, attention_bias=True, mlp_bias=True)
    else:
        write_layout(family, tmp_path)
    monkeypatch.setattr(prefill, "rope_cache", rope_cache_ref)
    monkeypatch.setattr(prefill, "MASKED_KEYS", 64)  # so that a window leaves out whole pages
    monkeypatch.setattr(TRITON, "rms_norm", rms_norm_ref)
    ops = TRITON
    model, same = (
        Llama.load(tmp_path, dtype=torch.float32, ops=o, device="cpu") for o in (ops, DEFINITIONS)
    )
    mine, theirs = empty_cache(model), empty_cache(model)
    generator = torch.Generator().manual_seed(1)
    for begin, rows in ((0, 512), (512, 64)):
        window = torch.randint(model.config.vocab_size, (1, rows), generator=generator)
        at = torch.tensor([begin])
        hidden, (tap,) = ops.prefill(model, window, mine.at(at), (1,))
        expected, (other,) = DEFINITIONS.layers(same, window, theirs.at(at), (1,))
        torch.testing.assert_close(hidden, expected, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(tap, other, atol=2e-4, rtol=2e-4)
    for a, b in ((mine.k, theirs.k), (mine.v, theirs.v)):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)
