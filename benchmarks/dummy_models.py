"""Models and heads of real shapes with random weights, or without data (device "meta")."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from kernel_cases.case import PAGE_SIZE
from model_shapes import ModelShape

from mtpkern.cache import KVCache
from mtpkern.checkpoints.hf_config import read_hf_config
from mtpkern.decode import DecodeState
from mtpkern.drafters.medusa import MedusaDrafter
from mtpkern.drafters.mtp import MtpDrafter, MtpWeights
from mtpkern.model import Llama
from mtpkern.ops.base import Ops
from mtpkern.ops.gpu import TRITON

META = torch.device("meta")
DRAFT_VOCABULARY = 32000


def write_config(model: ModelShape, directory: Path) -> Path:
    """Write a config.json of this shape, enough for load_format="dummy" -> the directory."""
    directory.mkdir()
    config = {
        "architectures": ["Qwen3ForCausalLM" if model.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if model.qk_norm else "llama",
        "hidden_act": "silu",
        "vocab_size": model.V,
        "hidden_size": model.E,
        "intermediate_size": model.F,
        "num_hidden_layers": model.L,
        "num_attention_heads": model.Hq,
        "num_key_value_heads": model.Hk,
        "head_dim": model.D,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": model.E < 4096,
        "torch_dtype": "bfloat16",
        "eos_token_id": None,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def meta_state(
    directory: Path, batch: int, k: int, ops: Ops = TRITON, **options: Any
) -> tuple[Llama, DecodeState]:
    """A model and a state without data, of the shapes that config.json names."""
    config = read_hf_config(directory)
    trunk = Llama.load(directory, dtype=torch.bfloat16, ops=ops, device=META, dummy=True)
    cache = KVCache.empty(
        layers=config.num_layers,
        pages=8,
        page_size=PAGE_SIZE,
        page_table=torch.zeros(batch, 4, dtype=torch.int32, device=META),
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        inverse_frequencies=torch.ones(config.head_dim // 2),
        rope_scaling=1.0,
        dtype=torch.bfloat16,
    )
    ring = torch.zeros(4, batch, 2 * k + 3, dtype=torch.int64, device=META)
    return trunk, DecodeState.empty(cache, 200, k, ring=ring, **options)


def medusa_heads(trunk: Llama, heads: int, ops: Ops) -> MedusaDrafter:
    """Parallel heads of one block each, with random weights."""
    E, like = trunk.config.hidden_size, trunk.embedding
    tensors = {}
    for h in range(heads):
        tensors[f"{h}.0.linear.weight"] = like.new_empty(E, E).normal_(std=E**-0.5)
        tensors[f"{h}.0.linear.bias"] = like.new_zeros(E)
    return MedusaDrafter(tensors, {"num_heads": heads, "num_layers": 1}, ops)


def mtp_module(trunk: Llama, cache: KVCache, ops: Ops) -> MtpDrafter:
    """A sequential head like the trunk's first layer, with a draft vocabulary of 32,000 tokens and
    a cache beside the trunk's `cache`."""
    c, like = trunk.config, trunk.embedding
    E, ids = c.hidden_size, torch.arange(min(DRAFT_VOCABULARY, c.vocab_size), device=like.device)
    inverse_frequencies, scaling = c.rope.inverse_frequencies(c.head_dim)
    weights = MtpWeights(
        taps=(c.num_layers,),
        fc=None,
        hidden_norm=like.new_ones(E),
        token_norm=like.new_ones(E),
        input_proj=ops.pack(like.new_empty(E, 2 * E).normal_(std=(2 * E) ** -0.5)),
        layer=trunk.layers[0],
        final_norm=like.new_ones(E),
        vocabulary=ops.pack(trunk.lm_head[: len(ids)]),
        token_ids=ids,
        config=replace(c, num_layers=1),
    )
    own = cache.beside(
        kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        inverse_frequencies=inverse_frequencies,
        rope_scaling=scaling,
    )
    return MtpDrafter(weights, trunk, own, ops)
