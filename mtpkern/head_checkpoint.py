"""Heads on disk -> a drafter: the ones that ship, or a directory, checked against the trunk.

A directory holds config.json, whose `model_type` names the kind, and model.safetensors. Kinds:

    mtpkern_mtp      a sequential head of our own (train/), names as in MiMo's MTP layers
    mtpkern_medusa   parallel heads, names as in Medusa's medusa_lm_head.pt (`mtpkern convert`)
    mimo             the MTP layer that a MiMo checkpoint brings along (Xiaomi 2025)
    eagle3           an EAGLE-3 head as published: architectures is ["LlamaForCausalLMEagle3"]
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtpkern.cache import KVCache
from mtpkern.cached_heads import Eagle3Drafter, MtpDrafter, MtpWeights
from mtpkern.checkpoint import LayerWeights, load_tensors
from mtpkern.config import (
    ModelConfig,
    ModelLoadError,
    RopeConfig,
    UserError,
    printable,
    read_json_object,
)
from mtpkern.heads import Drafter, MedusaDrafter, OwnVocabularyDrafter
from mtpkern.model import Llama, pack_layer
from mtpkern.ops import Ops

PRETRAINED = Path(__file__).with_name("pretrained")


def find_heads(name: str, model: str, directory: Path | None = None) -> Path | None:
    """The directory of heads that `name` means for `model`; None where there are to be none.

    "auto" is what the checkpoint in `directory` brings along, or what ships for the model, if
    anything; "none" nothing; else a name in the package or a directory. Raises UserError for a name
    that is neither.
    """
    if name == "none":
        return None
    if name == "auto" and directory is not None:
        settings = read_json_object(directory / "config.json")
        if settings.get("model_type") == "mimo" and settings.get("num_nextn_predict_layers"):
            return directory
    shipped = sorted(path.parent.name for path in PRETRAINED.glob("*/config.json"))
    if name == "auto":
        return PRETRAINED / model if model in shipped else None
    if name in shipped:
        return PRETRAINED / name
    if Path(name).is_dir():
        return Path(name)
    raise UserError(
        f"heads {printable(name)}: no such directory; names: auto, none, {', '.join(shipped)}"
    )


def load_heads(directory: Path, trunk: Llama, cache: KVCache, *, k: int, ops: Ops) -> Drafter:
    """Load heads for a trunk and its cache. Raises ModelLoadError where they do not fit.

    config.json names the kind by `model_type`.
    """
    path = directory / "config.json"
    settings = read_json_object(path)
    kind = settings.get("model_type")
    if settings.get("architectures") == ["LlamaForCausalLMEagle3"]:
        kind = "eagle3"
    expected = _SHAPES.get(str(kind))
    if expected is None:
        raise ModelLoadError(
            f"{printable(path)}: model_type {printable(kind)} is not supported; supported: "
            f"{', '.join(_SHAPES)}"
        )
    tensors = load_tensors(directory)
    if kind == "mimo":
        tensors, settings = _read_mimo(tensors, settings, trunk.config, path)
    if kind == "eagle3":
        tensors, settings = _read_eagle3(tensors, settings, trunk.config)
    try:
        shapes = expected(settings, trunk.config)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(f"{printable(path)} is not complete: {printable(error)}") from None
    for name, shape in shapes.items():
        if name not in tensors:
            raise ModelLoadError(f"{printable(directory)}: tensor {name} is missing")
        if tuple(tensors[name].shape) != shape:
            raise ModelLoadError(
                f"{printable(directory)}: tensor {name} must be {list(shape)} to match the model, "
                f"got {list(tensors[name].shape)}"
            )
    if kind == "mtpkern_medusa":
        if k > settings["num_heads"]:
            raise UserError(
                f"num_speculative_tokens must be at most {settings['num_heads']}, the number of "
                f"heads, got {k}"
            )
        typed = {name: tensor.to(trunk.embedding) for name, tensor in tensors.items()}
        if settings.get("own_vocabulary"):
            return OwnVocabularyDrafter(typed, settings, trunk.config.num_layers, ops)
        return MedusaDrafter(typed, settings, ops)
    config = _mtp_layer_config(settings, trunk.config)
    weights = _pack_mtp(tensors, config, settings, trunk, ops)
    inverse_frequencies, scaling = config.rope.inverse_frequencies(config.head_dim)
    own = cache.beside(
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        inverse_frequencies=inverse_frequencies,
        rope_scaling=scaling,
    )
    drafter = Eagle3Drafter if kind == "eagle3" else MtpDrafter
    return drafter(weights, trunk, own, ops)


def _read_eagle3(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], trunk: ModelConfig
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An EAGLE-3 head as published, in the names and settings of our own sequential heads.

    It taps three layers of the trunk (their outputs, counted from 1), and its context is the
    trunk's, whatever its config says. d2t holds distances: id = row + d2t[row].
    """
    own = {name.removeprefix("midlayer."): tensor for name, tensor in tensors.items()}
    for ours, theirs in (
        ("token_layernorm", "input_layernorm"),
        ("hidden_layernorm", "hidden_norm"),
        ("final_layernorm", "norm"),
        ("vocabulary", "lm_head"),
    ):
        if f"{theirs}.weight" in own:
            own[f"{ours}.weight"] = own.pop(f"{theirs}.weight")
    rows = settings.get("draft_vocab_size") or trunk.vocab_size
    if "d2t" in own:
        own["draft_vocab"] = own.pop("d2t").long() + torch.arange(rows)
    heads, L = settings["num_attention_heads"], trunk.num_layers
    return own, {
        "tap_layers": [2, L // 2, L - 3],
        "num_attention_heads": heads,
        "num_key_value_heads": settings.get("num_key_value_heads", heads),
        "head_dim": settings.get("head_dim") or trunk.hidden_size // heads,
        "intermediate_size": settings["intermediate_size"],
        "rms_norm_eps": settings.get("rms_norm_eps", 1e-6),
        "rope_theta": float(settings.get("rope_theta", 10000.0)),
        "draft_vocab_size": rows if "draft_vocab" in own else None,
    }


def _eagle3_shapes(settings: Mapping[str, Any], trunk: ModelConfig) -> dict[str, tuple[int, ...]]:
    taps, E = settings["tap_layers"], trunk.hidden_size
    if taps != sorted(set(taps)):
        raise ValueError(f"EAGLE-3 taps layers {taps}: the model has too few")
    shapes = _mtp_shapes(dict(settings, tap_layers=[trunk.num_layers]), trunk)
    del shapes["input_proj.weight"], shapes["input_layernorm.weight"]
    for name in ("q_proj", "k_proj", "v_proj"):
        shapes[f"self_attn.{name}.weight"] = (shapes[f"self_attn.{name}.weight"][0], 2 * E)
    rows = settings["draft_vocab_size"] or trunk.vocab_size
    return shapes | {"fc.weight": (E, 3 * E), "vocabulary.weight": (rows, E)}


def _read_mimo(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], trunk: ModelConfig, path: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A MiMo checkpoint's MTP layer, in the names and settings of our own sequential heads.

    It is fed the final hidden state, sizes and rotation are the trunk's, and one layer drafts all
    positions.
    """
    if settings.get("num_nextn_predict_layers") != 1:
        raise ModelLoadError(
            f"{printable(path)}: num_nextn_predict_layers must be 1, "
            f"got {printable(settings.get('num_nextn_predict_layers'))}"
        )
    prefix = "model.mtp_layers.0."
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
    }


def _medusa_shapes(settings: Mapping[str, Any], trunk: ModelConfig) -> dict[str, tuple[int, ...]]:
    width = trunk.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    for h in range(settings["num_heads"]):
        for d in range(settings["num_layers"]):
            shapes[f"{h}.{d}.linear.weight"] = (width, width)
            shapes[f"{h}.{d}.linear.bias"] = (width,)
        if settings.get("own_vocabulary"):
            shapes[f"{h}.vocabulary.weight"] = (trunk.vocab_size, width)
    return shapes


def _mtp_layer_config(settings: Mapping[str, Any], trunk: ModelConfig) -> ModelConfig:
    """The trunk's config with the module's own layer sizes."""
    return replace(
        trunk,
        num_layers=1,
        num_heads=settings["num_attention_heads"],
        num_kv_heads=settings["num_key_value_heads"],
        head_dim=settings["head_dim"],
        intermediate_size=settings["intermediate_size"],
        rms_norm_eps=settings["rms_norm_eps"],
        rope=RopeConfig(theta=settings["rope_theta"]) if "rope_theta" in settings else trunk.rope,
        qkv_bias=bool(settings.get("qkv_bias")),
        qk_norm=False,
        sliding_window=0,
    )


def _mtp_shapes(settings: Mapping[str, Any], trunk: ModelConfig) -> dict[str, tuple[int, ...]]:
    config = _mtp_layer_config(settings, trunk)
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


_SHAPES = {
    "mtpkern_mtp": _mtp_shapes,
    "mtpkern_medusa": _medusa_shapes,
    "mimo": _mtp_shapes,
    "eagle3": _eagle3_shapes,
}


def _pack_mtp(
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    settings: Mapping[str, Any],
    trunk: Llama,
    ops: Ops,
) -> MtpWeights:
    """Pack a module's tensors (names as in MiMo's MTP layers, plus fc and draft_vocab)."""
    taps = settings["tap_layers"]

    def named(*names: str, kind: str = "weight") -> Tensor:
        return torch.cat([tensors[f"{name}.{kind}"].to(trunk.embedding) for name in names])

    joined = "input_proj.weight" in tensors
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    layer = LayerWeights(
        input_norm=named("input_layernorm") if joined else None,
        qkv=named(*attention),
        qkv_bias=named(*attention, kind="bias") if config.qkv_bias else None,
        q_norm=None,
        k_norm=None,
        o=named("self_attn.o_proj"),
        o_bias=None,
        post_attention_norm=named("post_attention_layernorm"),
        gate_up=named("mlp.gate_proj", "mlp.up_proj"),
        gate_up_bias=None,
        down=named("mlp.down_proj"),
        down_bias=None,
    )
    reduced = "draft_vocab" in tensors
    ids = tensors["draft_vocab"] if reduced else torch.arange(trunk.config.vocab_size)
    token_ids = ids.to(trunk.embedding.device, torch.int64)
    if "vocabulary.weight" in tensors:
        vocabulary = ops.pack(named("vocabulary"))
    else:
        vocabulary = ops.pack(trunk.lm_head[token_ids]) if reduced else trunk.vocabulary
    return MtpWeights(
        taps=tuple(taps),
        fc=ops.pack(named("fc")) if len(taps) > 1 else None,
        hidden_norm=named("hidden_layernorm"),
        token_norm=named("token_layernorm"),
        input_proj=ops.pack(named("input_proj")) if joined else None,
        layer=pack_layer(layer, ops),
        final_norm=named("final_layernorm"),
        vocabulary=vocabulary,
        token_ids=token_ids,
        config=config,
        zero_first=bool(settings.get("zero_first")),
    )
