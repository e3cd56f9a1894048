"""Small random checkpoints of every supported Llama layout, built and saved by `transformers`.

`LAYOUTS` is the table; `write_layout` writes one row of it to a directory. All parameters are
random, norms and biases too (the ones and zeros of a new model would hide mistakes), and large
enough that a wrong position or a wrong head changes tokens.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SHAPE: dict[str, Any] = dict(
    vocab_size=131,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=None,
)

# Scaled rotations start from a context of 32, which the tests' sequences outgrow.
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=32)
LINEAR = dict(rope_type="linear", rope_theta=1000.0, factor=4.0)

# Architectures with classes of their own in transformers; the other layouts are Llamas.
ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mimo": (Qwen2Config, Qwen2ForCausalLM),
}

LAYOUTS: dict[str, dict[str, Any]] = {
    "grouped_ratio_2": dict(),
    "grouped_ratio_3": dict(hidden_size=72, num_attention_heads=9, num_key_value_heads=3),
    "grouped_ratio_4": dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=2),
    "multi_head": dict(num_attention_heads=3, num_key_value_heads=3),
    "multi_query": dict(num_attention_heads=6, num_key_value_heads=1),
    "wide_heads": dict(head_dim=20),
    "narrow_heads": dict(head_dim=6),
    "attention_biases": dict(attention_bias=True),
    "mlp_biases": dict(mlp_bias=True),
    "tied": dict(tie_word_embeddings=True),
    "all_biases_tied": dict(
        attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=14
    ),
    "odd_sizes": dict(
        vocab_size=97,
        hidden_size=51,
        intermediate_size=67,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=10,
    ),
    "large_norm_epsilon": dict(rms_norm_eps=0.3),
    "rope_small_theta": dict(rope_parameters=dict(rope_type="default", rope_theta=50.0)),
    "rope_linear": dict(rope_parameters=LINEAR),
    "rope_llama3": dict(rope_parameters=LLAMA3, head_dim=16),
    "rope_yarn": dict(rope_parameters=YARN, head_dim=16),
    "rope_yarn_own_ramp": dict(
        rope_parameters=dict(YARN, beta_fast=8.0, beta_slow=2.0, attention_factor=1.3), head_dim=16
    ),
    "rope_yarn_fractional_ramp": dict(
        rope_parameters=dict(YARN, truncate=False, mscale=0.7, mscale_all_dim=0.3), head_dim=22
    ),
    # Windows that the tests' sequences outgrow; one is a whole tile of keys, one is odd.
    "mistral": dict(sliding_window=None, head_dim=20),
    "mistral_window_64": dict(sliding_window=64),
    "mistral_window_7": dict(sliding_window=7, num_key_value_heads=1),
    "qwen2": dict(tie_word_embeddings=True),
    "qwen2_unused_window": dict(sliding_window=16, use_sliding_window=False, intermediate_size=96),
    "qwen3": dict(head_dim=20),
    "qwen3_biases": dict(head_dim=16, attention_bias=True, num_key_value_heads=4),
    "mimo": dict(),
    # A window from layer max_window_layers on: every layer's, or none's.
    "qwen2_window_7": dict(sliding_window=7, use_sliding_window=True, max_window_layers=0),
    "qwen3_window_7": dict(
        head_dim=20, sliding_window=7, use_sliding_window=True, max_window_layers=0
    ),
    "qwen3_window_of_no_layer": dict(
        head_dim=20, sliding_window=7, use_sliding_window=True, max_window_layers=2
    ),
}

# One at which no layout's 64 greedy tokens meet a near-tie. New layouts go last in the table.
SEED = 400


def write_layout(
    name: str,
    directory: Path,
    *,
    spelling: str = "rope_parameters",
    modules: int = 1,
    **changes: Any,
) -> LlamaForCausalLM:
    """Write one layout's config.json and model.safetensors, and return the model, in float32.

    `spelling` is how config.json names the rotation: "rope_scaling" before transformers 5,
    "rope_parameters" since. `modules` are a MiMo's MTP layers. `changes` are further LlamaConfig
    arguments, such as `eos_token_id`.
    """
    torch.manual_seed(SEED + list(LAYOUTS).index(name))
    kind = name.split("_")[0]
    config_class, model_class = ARCHITECTURES.get(kind, (LlamaConfig, LlamaForCausalLM))
    model = model_class(config_class(**{**SHAPE, **LAYOUTS[name], **changes})).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if key.endswith("norm.weight"):
                parameter.add_(1.0)
    model.save_pretrained(directory)
    if kind == "mimo":
        _make_mimo(Path(directory), modules)
    if spelling == "rope_scaling":
        _spell_as_before(Path(directory) / "config.json")
    return model


def _make_mimo(directory: Path, modules: int) -> None:
    """Turn the checkpoint into a MiMo: its architecture's name, and MTP layers."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"architectures": ["MiMoForCausalLM"], "model_type": "mimo"}
    config["auto_map"] = {"AutoConfig": "configuration_mimo.MiMoConfig"}
    config["num_nextn_predict_layers"] = modules
    path.write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(directory / "model.safetensors")
    E, trunk = config["hidden_size"], list(tensors.items())
    for d in range(modules):
        layer = f"model.mtp_layers.{d}."
        for name, tensor in trunk:
            if name.startswith("model.layers.0."):
                head = name.replace("model.layers.0.", layer)
                tensors[head] = torch.randn_like(tensor) * 0.3 + ("norm" in name)
        for name in ("token", "hidden", "final"):
            tensors[f"{layer}{name}_layernorm.weight"] = 1 + 0.3 * torch.randn(E)
        tensors[f"{layer}input_proj.weight"] = 0.3 * torch.randn(E, 2 * E)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _spell_as_before(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters")
    kind = rope.pop("rope_type")
    config["rope_theta"] = rope.pop("rope_theta")
    # The oldest files of this spelling have "type"; of the layouts here, linear scaling is as old.
    kind_key = "type" if kind == "linear" else "rope_type"
    config["rope_scaling"] = None if kind == "default" else {kind_key: kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
