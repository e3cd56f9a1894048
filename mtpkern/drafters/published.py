"""Published layouts of heads -> tensors and settings in our own layouts.

    mimo             the MTP layers in a MiMo checkpoint (Xiaomi 2025)
    speculators_mtp  the same layer in a directory of its own, as vllm-project/speculators saves it
    eagle3           an EAGLE-3 head as its authors publish it (Li et al. 2025), or as
                     vllm-project/speculators does: recognised by its tensors, since the names in
                     configs vary
    medusa           Medusa's heads (Cai et al. 2024) as their authors publish them, or from vLLM's
                     converter: recognised by their tensors
    mtp_llama        layers in place of the trunk's last one, in the trunk's own checkpoint
                     (Gloeckle et al. 2024, in the names of ServiceNow's Fast-LLM)

A reader is given all tensors and the config.json of a directory. It raises KeyError, TypeError or
ValueError if a setting is missing or of the wrong type.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtpkern.checkpoints.hf_config import read_hf_config
from mtpkern.config import ModelConfig
from mtpkern.errors import ModelLoadError, counted, printable

Read = tuple[dict[str, Tensor], dict[str, Any]]

# Values that speculators omits from transformer_layer_config: Llama's defaults in transformers.
_LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
}
_EAGLE3_LAYER = re.compile(r"(?:model\.)?(?:midlayer|layers\.0)\.(.+)")
# Buffers, and tensors that only training needs.
_EAGLE3_UNUSED = re.compile(r".*rotary_emb\..*|(?:model\.)?verifier_(?:norm|lm_head)\.weight")
_EAGLE3_NAMES = {
    "input_layernorm.weight": "token_layernorm.weight",
    "hidden_norm.weight": "hidden_layernorm.weight",
    "norm.weight": "final_layernorm.weight",
    "lm_head.weight": "vocabulary.weight",
}
# Settings of variants that are not supported, with the values that leave them off.
_EAGLE3_NEUTRAL = {
    "fc_norm": False,
    "norm_output": False,
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
}


def is_eagle3(names: Iterable[str]) -> bool:
    """Whether tensors of these names are an EAGLE-3 head: it has a norm for both halves of a
    pair."""
    plain = {name.removeprefix("model.") for name in names}
    layers = ("midlayer", "layers.0")
    return "fc.weight" in plain and any(f"{n}.hidden_norm.weight" in plain for n in layers)


def read_eagle3(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], trunk: ModelConfig, path: Path
) -> Read:
    """An EAGLE-3 head as published.

    It taps three layers of the trunk. Its config's context length and number of layers, often the
    trunk's, are ignored. d2t holds distances: id = row + d2t[row].
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
    # The draft vocabulary is there twice: as distances and as a mask.
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


def _eagle3_taps(given: Mapping[str, Any], L: int, from_one: bool, path: Path) -> list[int]:
    """The three layers of the trunk's L that are tapped, counted from 1.

    Speculators counts `from_one` too. Other configs count from 1 or from 0, so that only the usual
    three are unambiguous.
    """
    name = "eagle_aux_hidden_state_layer_ids"
    usual, ids = [2, L // 2, L - 3], given.get(name)
    if ids is None or (not from_one and ids in (usual, [1, L // 2 - 1, L - 4])):
        return usual
    if from_one and isinstance(ids, list) and all(type(i) is int and 0 < i < L for i in ids):
        return ids
    raise ModelLoadError(
        f"{printable(path)}: {name}={printable(ids)} is not supported in EAGLE-3 heads for a model "
        f"of {L} layers; supported: {usual}"
    )


# Blocks and the vocabularies after them: in the authors' names, which may have a prefix, or vLLM's.
_MEDUSA_BLOCK = re.compile(
    r"(?:medusa_head\.)?(\d+)\.(\d+)\.linear\.(weight|bias)"
    r"|blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)"
)
_MEDUSA_VOCABULARY = re.compile(r"(?:medusa_head\.)?(\d+)\.(\d+)\.weight|lm_heads\.(\d+)\.weight")


def is_medusa(names: Iterable[str]) -> bool:
    """Whether tensors of these names include blocks of Medusa heads."""
    return any(_MEDUSA_BLOCK.fullmatch(name) for name in names)


def read_medusa(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], trunk: Any, path: Path
) -> Read:
    """Medusa heads as published.

    Heads and blocks are counted, since configs are known to be wrong. A head's blocks are one
    shared block in some files, which then hold the first alone.
    """
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
    """The MTP layers in a MiMo checkpoint.

    The first reads the final hidden state; sizes and RoPE are the trunk's. One layer drafts all
    positions, several draft one each.
    """
    modules = settings.get("num_nextn_predict_layers")
    if not isinstance(modules, int) or modules < 1:
        raise ModelLoadError(
            f"{printable(path)}: num_nextn_predict_layers must be 1 or more, "
            f"got {printable(modules)}"
        )
    # A single module's tensors have no number in our layout.
    prefix = "model.mtp_layers.0." if modules == 1 else "model.mtp_layers."
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if not own:
        raise ModelLoadError(
            f"{printable(path)} names MTP layers, but there are no tensors model.mtp_layers: heads "
            "none runs the model without them"
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
    """An MTP head of speculators: MiMo's names, sizes in transformer_layer_config."""
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
    """The layers in a trunk's checkpoint: head i is mtp_heads.i with mtp_norms.(i + 1)."""
    own = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.removeprefix("model.").partition(".")
        if kind == "mtp_heads":
            own[rest] = tensor
        elif kind == "mtp_norms" and rest != "0.weight":
            number, _, _ = rest.partition(".")
            own[f"{int(number) - 1}.norm.weight"] = tensor
    return own, {"num_heads": settings["prediction_heads"] - 1}
