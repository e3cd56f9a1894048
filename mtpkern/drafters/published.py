"""Published layouts of heads -> the names, settings and shapes that head_checkpoint builds from.

    mimo             the MTP layer that a MiMo checkpoint brings along (Xiaomi 2025)
    speculators_mtp  the same layer in a directory of its own, as vllm-project/speculators saves it
    eagle3           an EAGLE-3 head as its authors publish it (Li et al. 2025), or as
                     vllm-project/speculators does: known by its tensors, whatever its config is
                     called
    medusa           Medusa's heads (Cai et al. 2024) as their authors publish them, or as vLLM's
                     converter wrote them: known by their tensors, and counted
    mtp_llama        layers in place of the trunk's last one, in the trunk's own checkpoint
                     (Gloeckle et al. 2024, in the names of ServiceNow's Fast-LLM)

A reader takes all tensors and the config.json of a directory; shapes come from the settings that it
returns, and raise KeyError, TypeError or ValueError where those are not complete.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtpkern.checkpoints.hf_config import read_hf_config
from mtpkern.checkpoints.llama import layer_parts
from mtpkern.config import ModelConfig
from mtpkern.errors import ModelLoadError, counted, printable
from mtpkern.rope import RopeConfig

Read = tuple[dict[str, Tensor], dict[str, Any]]


# What speculators leaves out of transformer_layer_config: Llama's defaults in transformers.
_LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
}
_EAGLE3_LAYER = re.compile(r"(?:model\.)?(?:midlayer|layers\.0)\.(.+)")
# Buffers, and what only training reads.
_EAGLE3_UNUSED = re.compile(r".*rotary_emb\..*|(?:model\.)?verifier_(?:norm|lm_head)\.weight")
_EAGLE3_NAMES = {
    "input_layernorm.weight": "token_layernorm.weight",
    "hidden_norm.weight": "hidden_layernorm.weight",
    "norm.weight": "final_layernorm.weight",
    "lm_head.weight": "vocabulary.weight",
}
# Settings of variants, with the values under which they change nothing.
_EAGLE3_NEUTRAL = {
    "fc_norm": False,
    "norm_output": False,
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
}


def is_eagle3(names: Iterable[str]) -> bool:
    """Whether tensors of these names are an EAGLE-3 head, which norms both halves."""
    plain = {name.removeprefix("model.") for name in names}
    layers = ("midlayer", "layers.0")
    return "fc.weight" in plain and any(f"{n}.hidden_norm.weight" in plain for n in layers)


def read_eagle3(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], trunk: ModelConfig, path: Path
) -> Read:
    """An EAGLE-3 head as published, in the names and settings of our own sequential heads.

    It taps three layers of the trunk, and its context is the trunk's, whatever its config says; nor
    does the number of layers there count, which may be the trunk's. d2t holds distances: id = row +
    d2t[row].
    """
    given = dict(settings.get("eagle_config") or {}) | dict(settings)
    inner = settings.get("transformer_layer_config")
    sizes = dict(settings) if inner is None else _LLAMA_DEFAULTS | dict(inner)
    layer = read_hf_config(
        sizes
        | {"num_hidden_layers": 1, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    )
    if layer.vocab_size != trunk.vocab_size:
        raise ModelLoadError(
            f"{printable(path)}: vocab_size must be {trunk.vocab_size} to match the model, "
            f"got {layer.vocab_size}"
        )
    for name, neutral in _EAGLE3_NEUTRAL.items():
        if given.get(name) not in (None, neutral):
            raise ModelLoadError(
                f"{printable(path)}: {name}={printable(given[name])} is not supported in EAGLE-3 "
                f"heads; supported: {neutral}"
            )
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if re.match(r"(model\.)?layers\.[1-9]", name):
            raise ModelLoadError(f"{printable(path)}: EAGLE-3 heads of one layer are supported")
        if not _EAGLE3_UNUSED.fullmatch(name):
            in_layer = _EAGLE3_LAYER.fullmatch(name)
            plain = in_layer[1] if in_layer else name.removeprefix("model.")
            own[_EAGLE3_NAMES.get(plain, plain)] = tensor
    # The draft vocabulary comes twice, from either side.
    chosen = own.pop("t2d", None)
    if "d2t" in own:
        distances = own.pop("d2t").long()
        own["draft_vocab"] = distances + torch.arange(len(distances))
    elif chosen is not None:
        own["draft_vocab"] = chosen.nonzero().flatten()
    rows = settings.get("draft_vocab_size") or trunk.vocab_size
    return own, {
        "tap_layers": _eagle3_taps(given, trunk.num_layers, inner is not None, path),
        "num_attention_heads": layer.num_heads,
        "num_key_value_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "intermediate_size": layer.intermediate_size,
        "rms_norm_eps": layer.rms_norm_eps,
        "rope": layer.rope,
        "qkv_bias": "self_attn.q_proj.bias" in own,
        "qk_norm": "self_attn.q_norm.weight" in own,
        "draft_vocab_size": rows if "draft_vocab" in own else None,
        "own_vocabulary": "vocabulary.weight" in own,
        "norm_before_fc": bool(given.get("norm_before_fc")),
        "norm_before_residual": bool(given.get("norm_before_residual")),
    }


def _eagle3_taps(given: Mapping[str, Any], L: int, counted: bool, path: Path) -> list[int]:
    """After how many of the trunk's L layers its states are tapped.

    That is what the ids mean where they are `counted` so (speculators). Others count the layers
    from 1 or from 0, so that only the usual three are known for sure.
    """
    name = "eagle_aux_hidden_state_layer_ids"
    usual, ids = [2, L // 2, L - 3], given.get(name)
    if ids is None or (not counted and ids in (usual, [1, L // 2 - 1, L - 4])):
        return usual
    if counted and isinstance(ids, list) and all(type(i) is int and 0 < i < L for i in ids):
        return ids
    raise ModelLoadError(
        f"{printable(path)}: {name}={printable(ids)} is not supported in EAGLE-3 heads for a model "
        f"of {L} layers; supported: {usual}"
    )


def eagle3_shapes(settings: Mapping[str, Any], trunk: ModelConfig) -> dict[str, tuple[int, ...]]:
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


# Blocks, and vocabularies behind them: the authors' names, alone or in a whole model, and vLLM's.
_MEDUSA_BLOCK = re.compile(
    r"(?:medusa_head\.)?(\d+)\.(\d+)\.linear\.(weight|bias)"
    r"|blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)"
)
_MEDUSA_VOCABULARY = re.compile(r"(?:medusa_head\.)?(\d+)\.(\d+)\.weight|lm_heads\.(\d+)\.weight")


def is_medusa(names: Iterable[str]) -> bool:
    """Whether there are blocks of Medusa heads among tensors of these names."""
    return any(_MEDUSA_BLOCK.fullmatch(name) for name in names)


def read_medusa(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], trunk: Any, path: Path
) -> Read:
    """Medusa heads as published. Heads and depth are counted: configs are known to say something
    else. The blocks of a head are one block, so that a file may hold the first alone."""
    blocks: dict[tuple[int, int], dict[str, Tensor]] = {}
    vocabularies: dict[int, Tensor] = {}
    depths = set()
    for name, tensor in tensors.items():
        if m := _MEDUSA_BLOCK.fullmatch(name):
            head, block, part = (group for group in m.groups() if group is not None)
            blocks.setdefault((int(head), int(block)), {})[part] = tensor
        elif m := _MEDUSA_VOCABULARY.fullmatch(name):
            vocabularies[int(m[1] or m[3])] = tensor
            depths |= {int(m[2])} if m[2] else set()
        else:
            raise ModelLoadError(
                f"{printable(path)} holds no Medusa heads: {printable(name)} has no place in them"
            )
    if not blocks:
        raise ModelLoadError(f"{printable(path)} holds no Medusa heads: no blocks")
    heads = 1 + max(head for head, _ in blocks)
    depth = max(depths, default=1 + max(block for _, block in blocks))
    for head in range(heads):
        for block in range(1, depth):
            if (head, 0) in blocks:
                blocks.setdefault((head, block), blocks[head, 0])
    everywhere = set(range(heads))
    whole = len(blocks) == heads * depth and vocabularies.keys() in (set(), everywhere)
    if not whole or len(depths) > 1:
        raise ModelLoadError(
            f"{printable(path)}: {counted(heads, 'Medusa head')} of {counted(depth, 'block')} are "
            "not all there"
        )
    own: dict[str, Tensor] = {}
    biased = any("bias" in parts for parts in blocks.values())
    for (head, block), parts in blocks.items():
        if not biased and parts["weight"].dim():
            parts = parts | {"bias": parts["weight"].new_zeros(len(parts["weight"]))}
        own |= {f"{head}.{block}.linear.{part}": tensor for part, tensor in parts.items()}
    own |= {f"{head}.vocabulary.weight": tensor for head, tensor in vocabularies.items()}
    return own, {
        "num_heads": heads,
        "num_layers": depth,
        "own_vocabulary": bool(vocabularies),
    }


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
    if not own:
        raise ModelLoadError(
            f"{printable(path)} names MTP layers, but there are no tensors model.mtp_layers: heads "
            "none does without"
        )
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
        qk_norm=bool(settings.get("qk_norm")),
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
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    if settings.get("draft_vocab_size"):
        shapes["draft_vocab"] = (settings["draft_vocab_size"],)
    return shapes
