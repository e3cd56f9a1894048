"""Small random heads of every family as files, in our own layouts and in published ones."""

import json
from pathlib import Path
from typing import Any

import torch
from conftest import TINY_CONFIG, tiny_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtpkern.convert import convert

E, V, L = TINY_CONFIG["hidden_size"], TINY_CONFIG["vocab_size"], TINY_CONFIG["num_hidden_layers"]


def write_mtp(
    directory: Path, *, taps: tuple[int, ...] = (1, 2, 3), reduced: bool = True, hidden: int = E
) -> Path:
    """A random sequential head for the tiny model, or one of another hidden size, with other head
    counts than the trunk's."""
    directory.mkdir()
    heads, kv_heads, head_dim, width = 4, 2, 10, 72
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    tensors = {
        "input_proj.weight": normal(hidden, 2 * hidden),
        "self_attn.q_proj.weight": normal(heads * head_dim, hidden),
        "self_attn.k_proj.weight": normal(kv_heads * head_dim, hidden),
        "self_attn.v_proj.weight": normal(kv_heads * head_dim, hidden),
        "self_attn.o_proj.weight": normal(hidden, heads * head_dim),
        "mlp.gate_proj.weight": normal(width, hidden),
        "mlp.up_proj.weight": normal(width, hidden),
        "mlp.down_proj.weight": normal(hidden, width),
    }
    for name in ("hidden", "token", "input", "post_attention", "final"):
        tensors[f"{name}_layernorm.weight"] = 1 + normal(hidden)
    if len(taps) > 1:
        tensors["fc.weight"] = normal(hidden, len(taps) * hidden)
    settings: dict[str, Any] = {
        "model_type": "mtpkern_mtp",
        "hidden_size": hidden,
        "tap_layers": list(taps),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": width,
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-5,
    }
    if reduced:
        tensors["draft_vocab"] = torch.arange(3, V, 2, dtype=torch.int32)
        settings["draft_vocab_size"] = len(tensors["draft_vocab"])
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


def medusa_blocks(head: int, depth: int, generator: torch.Generator) -> dict[str, Tensor]:
    tensors = {}
    for d in range(depth):
        name = f"{head}.{d}.linear"
        tensors[f"{name}.weight"] = torch.randn(E, E, generator=generator) / E**0.5
        tensors[f"{name}.bias"] = torch.randn(E, generator=generator)
    return tensors


def write_medusa(directory: Path, heads: int = 3, depth: int = 2) -> Path:
    directory.mkdir()
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for h in range(heads):
        tensors |= medusa_blocks(h, depth, generator)
    save_file(tensors, directory / "model.safetensors")
    settings = {"model_type": "mtpkern_medusa", "num_heads": heads, "num_layers": depth}
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


def published_medusa(heads: int = 3, depth: int = 2) -> dict[str, Tensor]:
    """The tensors of a medusa_lm_head.pt: blocks, and after them each head's own vocabulary."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for h in range(heads):
        tensors |= medusa_blocks(h, depth, generator)
        tensors[f"{h}.{depth}.weight"] = torch.randn(V, E, generator=generator)
    return tensors


def write_published(directory: Path) -> Path:
    source = directory.with_name(f"{directory.name}.pt")
    torch.save(published_medusa(), source)
    convert(source, directory)
    return directory


def write_eagle3(directory: Path, *, reduced: bool = True) -> Path:
    """A random EAGLE-3 head in the published layout, for a trunk of eight layers."""
    source = directory.with_name(f"{directory.name}-published")
    source.mkdir()
    heads, kv_heads, head_dim, width = 4, 2, 12, 72
    generator = torch.Generator().manual_seed(6)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    rows = V // 2 if reduced else V
    tensors = {
        "fc.weight": normal(E, 3 * E),
        "midlayer.self_attn.q_proj.weight": normal(heads * head_dim, 2 * E),
        "midlayer.self_attn.k_proj.weight": normal(kv_heads * head_dim, 2 * E),
        "midlayer.self_attn.v_proj.weight": normal(kv_heads * head_dim, 2 * E),
        "midlayer.self_attn.o_proj.weight": normal(E, heads * head_dim),
        "midlayer.mlp.gate_proj.weight": normal(width, E),
        "midlayer.mlp.up_proj.weight": normal(width, E),
        "midlayer.mlp.down_proj.weight": normal(E, width),
        "lm_head.weight": normal(rows, E),
    }
    for name in (
        "midlayer.input_layernorm",
        "midlayer.hidden_norm",
        "midlayer.post_attention_layernorm",
        "norm",
    ):
        tensors[f"{name}.weight"] = 1 + normal(E)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": E,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": width,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "max_position_embeddings": 2048,
        "vocab_size": V,
    }
    if reduced:
        config["draft_vocab_size"] = rows
        ids = torch.arange(1, V, 2)[:rows]
        tensors["d2t"] = ids - torch.arange(rows)
        tensors["t2d"] = torch.zeros(V, dtype=torch.bool).index_fill(0, ids, True)
    torch.save(tensors, source / "pytorch_model.bin")
    (source / "config.json").write_text(json.dumps(config))
    convert(source, directory)
    return directory


HQ, HK, D = TINY_CONFIG["num_attention_heads"], TINY_CONFIG["num_key_value_heads"], 8


FF, THETA = TINY_CONFIG["intermediate_size"], TINY_CONFIG["rope_theta"]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape) / shape[-1] ** 0.5


def write_layers(directory: Path, heads: int = 3) -> Path:
    """The tiny model as mtp_llama: layers in place of its last one, each with a norm of its own."""
    tiny_checkpoint(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "mtp_llama"}
    config |= {"architectures": ["MTPLlamaForCausalLM"], "prediction_heads": heads + 1}
    config["auto_map"] = {"AutoModel": "modeling_mtp_llama.MTPLlamaModel"}
    path.write_text(json.dumps(config))
    tensors = load_file(directory / "model.safetensors")
    torch.manual_seed(12)
    for name in [name for name in tensors if name.startswith(f"model.layers.{L - 1}.")]:
        for i in range(heads):
            like = tensors[name]
            head = name.replace(f"layers.{L - 1}", f"mtp_heads.{i}")
            tensors[head] = normal(*like.shape) + (like.dim() == 1)
    tensors["model.mtp_norms.0.weight"] = tensors.pop("model.norm.weight")
    for i in range(1, heads + 1):
        tensors[f"model.mtp_norms.{i}.weight"] = 1 + normal(E)
    save_file(tensors, directory / "model.safetensors")
    return directory


def published_hydra(*, heads: int = 3, prefix: bool) -> dict[str, Tensor]:
    """Heads of two blocks; with a layer below them, dropout takes every other number."""
    torch.manual_seed(13)
    tensors = {"input_embed_fn.weight": torch.zeros(V, E)}
    for h in range(heads):
        first, second = ("1", "3") if prefix else ("0", "1")
        wide = (E, (h + 2) * E)
        for name, shape in (
            (f"hydra_mlp.{h}.{first}.linear", wide),
            (f"hydra_mlp.{h}.{first}.res_connection", wide),
            (f"hydra_mlp.{h}.{second}.linear", (E, E)),
            (f"hydra_lm_head.{h}.1" if prefix else f"hydra_lm_head.{h}", (V, E)),
        ):
            tensors[f"{name}.weight"] = normal(*shape)
            tensors[f"{name}.bias"] = torch.randn(shape[0])
    if prefix:
        layer = "prefix_embeding_layer.layers.0"
        tensors["prefix_embeding_layer.embed_tokens.weight"] = torch.zeros(V, E)
        tensors["prefix_embeding_layer.norm.weight"] = 1 + normal(E)
        for name, shape in (
            *(
                (f"self_attn.{n}_proj", (rows * D, E))
                for n, rows in zip("qkv", (HQ, HK, HK), strict=True)
            ),
            ("self_attn.o_proj", (E, HQ * D)),
            *((f"mlp.{n}_proj", (FF, E)) for n in ("gate", "up")),
            ("mlp.down_proj", (E, FF)),
        ):
            tensors[f"{layer}.{name}.weight"] = normal(*shape)
        for name in ("input", "post_attention"):
            tensors[f"{layer}.{name}_layernorm.weight"] = 1 + normal(E)
    return tensors


def write_hydra(directory: Path, *, prefix: bool = True) -> Path:
    source = directory.with_name(f"{directory.name}-published")
    source.mkdir()
    torch.save(published_hydra(prefix=prefix), source / "hydra_lm_head.pt")
    (source / "config.json").write_text(json.dumps({"grounded_heads": True}))
    convert(source, directory)
    return directory
