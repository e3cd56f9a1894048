"""The tensors that heads of each kind must have for a trunk, in our own names: name -> shape.

Settings that are not complete or do not fit raise KeyError, TypeError or ValueError.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mtpkern.checkpoints.llama import layer_parts
from mtpkern.config import ModelConfig
from mtpkern.rope import RopeConfig

Shapes = dict[str, tuple[int, ...]]


def medusa_shapes(settings: Mapping[str, Any], trunk: ModelConfig) -> Shapes:
    E = trunk.hidden_size
    shapes: Shapes = {}
    for h in range(settings["num_heads"]):
        for d in range(settings["num_layers"]):
            shapes[f"{h}.{d}.linear.weight"] = (E, E)
            shapes[f"{h}.{d}.linear.bias"] = (E,)
        if settings.get("own_vocabulary"):
            shapes[f"{h}.vocabulary.weight"] = (trunk.vocab_size, E)
    return shapes


def layers_shapes(settings: Mapping[str, Any], trunk: ModelConfig) -> Shapes:
    shapes = _draft_vocabulary(settings)
    for h in range(settings["num_heads"]):
        shapes |= _decoder_shapes(f"{h}.", trunk)
    return shapes


def hydra_shapes(settings: Mapping[str, Any], trunk: ModelConfig) -> Shapes:
    E, V = trunk.hidden_size, trunk.vocab_size
    shapes = _draft_vocabulary(settings)
    if settings.get("prefix"):
        shapes |= _decoder_shapes("prefix.", trunk)
    for h in range(settings["num_heads"]):
        parts = {"residual": (E, (h + 2) * E), "0.linear": (E, (h + 2) * E)}
        if "draft_vocab" not in shapes:
            parts["vocabulary"] = (V, E)
        parts |= {f"{d}.linear": (E, E) for d in range(1, settings["num_layers"])}
        for name, shape in parts.items():
            shapes[f"{h}.{name}.weight"], shapes[f"{h}.{name}.bias"] = shape, shape[:1]
    return shapes


def mtp_shapes(settings: Mapping[str, Any], trunk: ModelConfig) -> Shapes:
    vocabulary, modules = _draft_vocabulary(settings), settings.get("num_heads")
    module = _module_shapes(settings, trunk)
    if not modules:
        return vocabulary | module
    return vocabulary | {
        f"{d}.{name}": shape for d in range(modules) for name, shape in module.items()
    }


def eagle3_shapes(settings: Mapping[str, Any], trunk: ModelConfig) -> Shapes:
    taps, E = settings["tap_layers"], trunk.hidden_size
    if taps != sorted(set(taps)) or len(taps) != 3:
        raise ValueError(f"EAGLE-3 taps layers {taps}: the model has too few")
    shapes = mtp_shapes(dict(settings, tap_layers=[trunk.num_layers]), trunk)
    del shapes["input_proj.weight"], shapes["input_layernorm.weight"]
    for name in ("q_proj", "k_proj", "v_proj"):
        shapes[f"self_attn.{name}.weight"] = (shapes[f"self_attn.{name}.weight"][0], 2 * E)
    if settings["own_vocabulary"]:
        rows = settings["draft_vocab_size"] or trunk.vocab_size
        shapes["vocabulary.weight"] = (rows, E)
    if settings["norm_before_fc"]:
        shapes["input_norm.weight"] = (3 * E,)
    return shapes | {"fc.weight": (E, 3 * E)}


def mtp_layer_config(settings: Mapping[str, Any], trunk: ModelConfig) -> ModelConfig:
    """The trunk's config with the layer sizes of a sequential module."""
    rope = settings.get("rope", trunk.rope)
    if "rope_theta" in settings:
        rope = RopeConfig(theta=settings["rope_theta"])
    return replace(
        trunk,
        num_layers=1,
        num_heads=settings["num_attention_heads"],
        num_kv_heads=settings["num_key_value_heads"],
        head_dim=settings["head_dim"],
        intermediate_size=settings["intermediate_size"],
        rms_norm_eps=settings["rms_norm_eps"],
        rope=rope,
        qkv_bias=bool(settings.get("qkv_bias")),
        qk_norm=bool(settings.get("qk_norm")),
        sliding_window=0,
    )


def _draft_vocabulary(settings: Mapping[str, Any]) -> Shapes:
    """The ids of a reduced vocabulary, which is one for all heads."""
    rows = settings.get("draft_vocab_size")
    return {"draft_vocab": (rows,)} if rows else {}


def _decoder_shapes(prefix: str, config: ModelConfig) -> Shapes:
    """A layer like the trunk's, and the norm after it."""
    shapes: Shapes = {f"{prefix}norm.weight": (config.hidden_size,)}
    for named in layer_parts(config).values():
        shapes |= {f"{prefix}{name}": shape for name, shape in named}
    return shapes


def _module_shapes(settings: Mapping[str, Any], trunk: ModelConfig) -> Shapes:
    """One sequential module, without its vocabulary."""
    config = mtp_layer_config(settings, trunk)
    taps, E, F = settings["tap_layers"], trunk.hidden_size, config.intermediate_size
    if taps != sorted(set(taps)) or taps[0] < 1 or taps[-1] != trunk.num_layers:
        raise ValueError(f"tap_layers must ascend to {trunk.num_layers}, got {taps}")
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: Shapes = {
        "hidden_layernorm.weight": (E,),
        "token_layernorm.weight": (E,),
        "input_proj.weight": (E, 2 * E),
        "input_layernorm.weight": (E,),
        "self_attn.q_proj.weight": (q, E),
        "self_attn.k_proj.weight": (kv, E),
        "self_attn.v_proj.weight": (kv, E),
        "self_attn.o_proj.weight": (E, q),
        "post_attention_layernorm.weight": (E,),
        "mlp.gate_proj.weight": (F, E),
        "mlp.up_proj.weight": (F, E),
        "mlp.down_proj.weight": (E, F),
        "final_layernorm.weight": (E,),
    }
    if len(taps) > 1:
        shapes["fc.weight"] = (E, len(taps) * E)
    if config.qkv_bias:
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"self_attn.{name}_proj.bias"] = (rows,)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes
