"""Published layouts of heads -> the names, settings and shapes that head_checkpoint builds from.

    mimo             the MTP layer that a MiMo checkpoint brings along (Xiaomi 2025)
    speculators_mtp  the same layer in a directory of its own, as vllm-project/speculators saves it
    eagle3           an EAGLE-3 head as published (Li et al. 2025)
    mtp_llama        layers in place of the trunk's last one, in the trunk's own checkpoint
                     (Gloeckle et al. 2024, in the names of ServiceNow's Fast-LLM)

A reader takes all tensors and the config.json of a directory; shapes come from the settings that it
returns, and raise KeyError, TypeError or ValueError where those are not complete.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtpkern.checkpoint import layer_parts
from mtpkern.config import ModelConfig, ModelLoadError, RopeConfig, printable

Read = tuple[dict[str, Tensor], dict[str, Any]]


def read_eagle3(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], trunk: ModelConfig, path: Path
) -> Read:
    """An EAGLE-3 head as published, in the names and settings of our own sequential heads.

    It taps three layers of the trunk (their outputs, counted from 1), and its context is the
    trunk's, whatever its config says. d2t holds distances: id = row + d2t[row].
    """
    llama = {"num_hidden_layers": 1} | dict(settings) | {"model_type": "llama"}
    layer = ModelConfig.from_json(llama | {"architectures": ["LlamaForCausalLM"]})
    if layer.vocab_size != trunk.vocab_size:
        raise ModelLoadError(
            f"{printable(path)}: vocab_size must be {trunk.vocab_size} to match the model, "
            f"got {layer.vocab_size}"
        )
    L = trunk.num_layers
    # Some count the tapped layers from 1, some from 0: both are the same three.
    usual = {
        "num_hidden_layers": (1,),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "norm_before_residual": (False,),
        "norm_before_fc": (False,),
        "fc_norm": (False,),
        "norm_output": (False,),
        "eagle_aux_hidden_state_layer_ids": ([2, L // 2, L - 3], [1, L // 2 - 1, L - 4]),
    }
    given = dict(settings.get("eagle_config") or {}) | dict(settings)
    for name, values in usual.items():
        if given.get(name) not in (None, *values):
            raise ModelLoadError(
                f"{printable(path)}: {name}={printable(given[name])} is not supported in EAGLE-3 "
                f"heads; supported: {values[0]}"
            )
    own = {name.removeprefix("midlayer."): tensor for name, tensor in tensors.items()}
    for ours, theirs in (
        ("token_layernorm", "input_layernorm"),
        ("hidden_layernorm", "hidden_norm"),
        ("final_layernorm", "norm"),
        ("vocabulary", "lm_head"),
    ):
        if f"{theirs}.weight" in own:
            own[f"{ours}.weight"] = own.pop(f"{theirs}.weight")
    own.pop("t2d", None)  # d2t the other way round
    rows = settings.get("draft_vocab_size") or trunk.vocab_size
    if "d2t" in own:
        distances = own.pop("d2t").long()
        own["draft_vocab"] = distances + torch.arange(len(distances))
    return own, {
        "tap_layers": [2, L // 2, L - 3],
        "num_attention_heads": layer.num_heads,
        "num_key_value_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "intermediate_size": layer.intermediate_size,
        "rms_norm_eps": layer.rms_norm_eps,
        "rope": layer.rope,
        "draft_vocab_size": rows if "draft_vocab" in own else None,
    }


def eagle3_shapes(settings: Mapping[str, Any], trunk: ModelConfig) -> dict[str, tuple[int, ...]]:
    taps, E = settings["tap_layers"], trunk.hidden_size
    if taps != sorted(set(taps)):
        raise ValueError(f"EAGLE-3 taps layers {taps}: the model has too few")
    shapes = mtp_shapes(dict(settings, tap_layers=[trunk.num_layers]), trunk)
    del shapes["input_proj.weight"], shapes["input_layernorm.weight"]
    for name in ("q_proj", "k_proj", "v_proj"):
        shapes[f"self_attn.{name}.weight"] = (shapes[f"self_attn.{name}.weight"][0], 2 * E)
    rows = settings["draft_vocab_size"] or trunk.vocab_size
    return shapes | {"fc.weight": (E, 3 * E), "vocabulary.weight": (rows, E)}


def read_mimo(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], trunk: ModelConfig, path: Path
) -> Read:
    """A MiMo checkpoint's MTP layers, in the names and settings of our own sequential heads.

    The first is fed the final hidden state; sizes and rotation are the trunk's. One layer drafts
    all positions, several one each.
    """
    modules = settings.get("num_nextn_predict_layers")
    if not isinstance(modules, int) or modules < 1:
        raise ModelLoadError(
            f"{printable(path)}: num_nextn_predict_layers must be 1 or more, "
            f"got {printable(modules)}"
        )
    # One module drafts all positions and needs no number.
    prefix = "model.mtp_layers.0." if modules == 1 else "model.mtp_layers."
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return own, {
        "tap_layers": [trunk.num_layers],
        "num_attention_heads": trunk.num_heads,
        "num_key_value_heads": trunk.num_kv_heads,
        "head_dim": trunk.head_dim,
        "intermediate_size": trunk.intermediate_size,
        "rms_norm_eps": trunk.rms_norm_eps,
        "qkv_bias": trunk.qkv_bias,
        "zero_first": True,
        "num_heads": None if modules == 1 else modules,
    }


def read_speculators(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], trunk: ModelConfig, path: Path
) -> Read:
    """A speculators MTP head: MiMo's names, sizes in transformer_layer_config."""
    if settings.get("num_nextn_predict_layers", 1) != 1:
        raise ModelLoadError(f"{printable(path)}: num_nextn_predict_layers must be 1")
    prefix, layer = "mtp_layers.0.", settings["transformer_layer_config"]
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    heads = layer["num_attention_heads"]
    return own, {
        "tap_layers": [trunk.num_layers],
        "num_attention_heads": heads,
        "num_key_value_heads": layer.get("num_key_value_heads", heads),
        "head_dim": layer.get("head_dim") or trunk.hidden_size // heads,
        "intermediate_size": layer["intermediate_size"],
        "rms_norm_eps": layer.get("rms_norm_eps", 1e-6),
        "qkv_bias": "self_attn.q_proj.bias" in own,
    }


def read_mtp_llama(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], trunk: ModelConfig, path: Path
) -> Read:
    """Layers in a trunk's checkpoint: head i is mtp_heads.i with mtp_norms.(i + 1)."""
    own = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.removeprefix("model.").partition(".")
        if kind == "mtp_heads":
            own[rest] = tensor
        elif kind == "mtp_norms" and rest != "0.weight":
            number, _, _ = rest.partition(".")
            own[f"{int(number) - 1}.norm.weight"] = tensor
    return own, {"num_heads": settings["prediction_heads"] - 1}


def medusa_shapes(settings: Mapping[str, Any], trunk: ModelConfig) -> dict[str, tuple[int, ...]]:
    width = trunk.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    for h in range(settings["num_heads"]):
        for d in range(settings["num_layers"]):
            shapes[f"{h}.{d}.linear.weight"] = (width, width)
            shapes[f"{h}.{d}.linear.bias"] = (width,)
        if settings.get("own_vocabulary"):
            shapes[f"{h}.vocabulary.weight"] = (trunk.vocab_size, width)
    return shapes


def layers_shapes(settings: Mapping[str, Any], trunk: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for h in range(settings["num_heads"]):
        shapes |= decoder_shapes(f"{h}.", trunk)
    if settings.get("draft_vocab_size"):
        shapes["draft_vocab"] = (settings["draft_vocab_size"],)
    return shapes


def hydra_shapes(settings: Mapping[str, Any], trunk: ModelConfig) -> dict[str, tuple[int, ...]]:
    E, V = trunk.hidden_size, trunk.vocab_size
    shapes = decoder_shapes("prefix.", trunk) if settings.get("prefix") else {}
    for h in range(settings["num_heads"]):
        parts = {"residual": (E, (h + 2) * E), "0.linear": (E, (h + 2) * E)}
        if not settings.get("draft_vocab_size"):
            parts["vocabulary"] = (V, E)
        parts |= {f"{d}.linear": (E, E) for d in range(1, settings["num_layers"])}
        for name, shape in parts.items():
            shapes[f"{h}.{name}.weight"], shapes[f"{h}.{name}.bias"] = shape, shape[:1]
    if settings.get("draft_vocab_size"):
        shapes["draft_vocab"] = (settings["draft_vocab_size"],)
    return shapes


def decoder_shapes(prefix: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """A layer of the trunk's kind and the norm behind it."""
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}norm.weight": (config.hidden_size,)}
    for named in layer_parts(config).values():
        shapes |= {f"{prefix}{name}": shape for name, shape in named}
    return shapes


def mtp_layer_config(settings: Mapping[str, Any], trunk: ModelConfig) -> ModelConfig:
    """The trunk's config with the module's own layer sizes."""
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
        qk_norm=False,
        sliding_window=0,
    )


def mtp_shapes(settings: Mapping[str, Any], trunk: ModelConfig) -> dict[str, tuple[int, ...]]:
    if settings.get("num_heads"):
        one = mtp_shapes({**settings, "num_heads": None}, trunk)
        # The vocabulary is one for all.
        shared = {"draft_vocab": one.pop("draft_vocab")} if "draft_vocab" in one else {}
        return shared | {
            f"{d}.{name}": shape
            for d in range(settings["num_heads"])
            for name, shape in one.items()
        }
    config = mtp_layer_config(settings, trunk)
    taps, E, F_ = settings["tap_layers"], trunk.hidden_size, config.intermediate_size
    if taps != sorted(set(taps)) or taps[0] < 1 or taps[-1] != trunk.num_layers:
        raise ValueError(f"tap_layers must ascend to {trunk.num_layers}, got {taps}")
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "hidden_layernorm.weight": (E,),
        "token_layernorm.weight": (E,),
        "input_proj.weight": (E, 2 * E),
        "input_layernorm.weight": (E,),
        "self_attn.q_proj.weight": (q, E),
        "self_attn.k_proj.weight": (kv, E),
        "self_attn.v_proj.weight": (kv, E),
        "self_attn.o_proj.weight": (E, q),
        "post_attention_layernorm.weight": (E,),
        "mlp.gate_proj.weight": (F_, E),
        "mlp.up_proj.weight": (F_, E),
        "mlp.down_proj.weight": (E, F_),
        "final_layernorm.weight": (E,),
    }
    if len(taps) > 1:
        shapes["fc.weight"] = (E, len(taps) * E)
    if config.qkv_bias:
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"self_attn.{name}_proj.bias"] = (rows,)
    if settings.get("draft_vocab_size"):
        shapes["draft_vocab"] = (settings["draft_vocab_size"],)
    return shapes
