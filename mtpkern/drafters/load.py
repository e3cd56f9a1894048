"""Heads on disk -> a drafter: which directory a name means, and whether it fits the trunk.

A directory holds config.json, whose `model_type` names the kind, and model.safetensors. Our own
kinds, with the tensor names that shapes.py lists:

    mtpkern_mtp      a sequential head (train/), names as in MiMo's MTP layers; with num_heads one
                     module for each depth, prefixed "0.", "1.", ...
    mtpkern_medusa   parallel heads, names as in Medusa's medusa_lm_head.pt (`mtpkern convert`)
    mtpkern_hydra    heads that are given earlier drafts (`mtpkern convert` of hydra_lm_head.pt)
    mtpkern_layers   layers in place of the trunk's last one, names as there, prefixed "0.", ...

Published kinds are in published.py. EAGLE-3 and Medusa heads are recognised by their tensors, those
of speculators by `speculators_model_type`; Medusa's may be in medusa_lm_head.safetensors.
"""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtpkern.cache import KVCache
from mtpkern.checkpoints.directory import conversion_hint, has_weights, load_tensors, read_entries
from mtpkern.checkpoints.hf_config import read_hf_config
from mtpkern.checkpoints.json_files import read_json_object
from mtpkern.checkpoints.llama import (
    fingerprint,
    load_config,
)
from mtpkern.config import ModelConfig
from mtpkern.drafters.base import Drafter
from mtpkern.drafters.build import HeadTensors, build_hydra, build_layers, build_medusa, build_mtp
from mtpkern.drafters.published import (
    is_eagle3,
    is_medusa,
    read_eagle3,
    read_medusa,
    read_mimo,
    read_mtp_llama,
    read_speculators,
)
from mtpkern.drafters.shapes import (
    Shapes,
    eagle3_shapes,
    hydra_shapes,
    layers_shapes,
    medusa_shapes,
    mtp_shapes,
)
from mtpkern.errors import ModelLoadError, UserError, printable
from mtpkern.model import Llama
from mtpkern.ops.base import Ops

PRETRAINED = Path(__file__).parents[1] / "pretrained"
MEDUSA_FILE = "medusa_lm_head.safetensors"
# Models whose checkpoints include heads: model_type -> the key of config.json that counts them, its
# value in a model without any, and the prefix of their tensors.
_WITH_HEADS = {
    "mimo": ("num_nextn_predict_layers", 0, "model.mtp_layers."),
    "mtp_llama": ("prediction_heads", 1, "model.mtp_heads."),
}
_LOG = logging.getLogger(__name__)


def find_heads(name: str, model: str = "", directory: Path | None = None) -> Path | None:
    """The directory of heads that `name` means for `model`; None if there are to be none.

    `name` is "auto", "none", the name of heads in the package, or a directory. "auto" means the
    heads in the checkpoint's own `directory`, else those that the package has for these weights,
    else none; the other names mean the same for every model. A checkpoint whose config.json names
    heads that fine-tuning dropped has none, and a warning says so. Raises UserError for any other
    name.
    """
    if name == "none":
        return None
    if name == "auto" and directory is not None and has_weights(directory):
        settings = read_json_object(directory / "config.json")
        count, none, prefix = _WITH_HEADS.get(str(settings.get("model_type")), ("", 0, ""))
        if settings.get(count, none) not in (none, None):
            if any(tensor.startswith(prefix) for tensor in read_entries(directory)):
                return directory
            _LOG.warning(
                "%s has no tensors %s*, though %s=%s: it runs without heads of its own",
                printable(directory),
                prefix,
                count,
                settings[count],
            )
    shipped = sorted(path.parent.name for path in PRETRAINED.glob("*/config.json"))
    if name == "auto":
        own = PRETRAINED / model
        return own if model in shipped and _trained_on(own, directory) else None
    if name in shipped:
        return PRETRAINED / name
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise UserError(f"heads {printable(name)}: not a directory; {conversion_hint(Path(name))}")
    raise UserError(
        f"heads {printable(name)}: no such directory; names: auto, none, {', '.join(shipped)}"
    )


def _trained_on(heads: Path, base: Path | None) -> bool:
    """Whether heads were trained on the weights in `base`; True if either does not say."""
    mark = _settings(heads).get("base_model_fingerprint")
    return not mark or base is None or not has_weights(base) or mark == fingerprint(base)


def _is_same(tensor: Tensor, trunk: Llama, ops: Ops) -> bool:
    """Whether an embedding [V, E] is the trunk's, up to rounding to another dtype."""
    ids = torch.arange(trunk.config.vocab_size, device=trunk.norm.device)
    other = ops.embed(trunk.embedding, ids)
    if tensor.shape != other.shape:
        return False
    return torch.allclose(tensor.to(other), other, rtol=0.01, atol=1e-4)


class _Kind(NamedTuple):
    """How heads of one kind are read, checked and built."""

    read: Callable[..., tuple[dict[str, Tensor], dict[str, Any]]] | None  # None: in our own layout
    shapes: Callable[[Mapping[str, Any], ModelConfig], Shapes]
    build: Callable[..., Drafter]


class OpenHeads(NamedTuple):
    """Heads that fit a trunk, in our own layout; their tensors are mapped from the files."""

    kind: _Kind
    tensors: dict[str, Tensor]
    settings: dict[str, Any]

    @property
    def most(self) -> int | None:
        """How many tokens they draft at most; None: any number."""
        most: int | None = self.settings.get("num_heads")  # each head drafts one token
        return most

    def build(self, trunk: Llama, cache: KVCache, ops: Ops) -> Drafter:
        """A drafter for the trunk and its cache."""
        tensors = dict(self.tensors)
        embedding = tensors.get("embed_tokens.weight")
        if embedding is not None and _is_same(embedding, trunk, ops):
            del tensors["embed_tokens.weight"]
        return self.kind.build(HeadTensors(tensors, trunk), self.settings, trunk, cache, ops)


def open_heads(directory: Path, config: ModelConfig, base: Path | None = None) -> OpenHeads:
    """Open heads for a trunk of this configuration. Raises ModelLoadError if they do not fit.

    `base` is the trunk's checkpoint: heads whose config.json has the fingerprint of other weights
    are refused. None skips that check.
    """
    if not _trained_on(directory, base):
        raise ModelLoadError(
            f"{printable(directory)} was trained on other weights than those of {printable(base)}"
        )
    return _read(directory, config)


def check_heads(directory: Path) -> None:
    """Raise ModelLoadError if there is no trunk for which these heads would load."""
    tensors, settings, name = _open(directory)
    try:
        own = name in _WITH_HEADS
        trunk = load_config(directory) if own else _implied_trunk(name, tensors, settings)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(
            f"{printable(directory)} is not complete: {printable(error)}"
        ) from None
    for tensor, values in _read(directory, trunk).tensors.items():
        if values.is_floating_point() and not values.isfinite().all():
            raise ModelLoadError(
                f"{printable(directory)}: tensor {tensor} holds values that are not finite"
            )


def _settings(directory: Path) -> dict[str, Any]:
    """A directory's config.json; Medusa heads need none."""
    path = directory / "config.json"
    if not path.is_file() and (directory / MEDUSA_FILE).is_file():
        return {}
    return read_json_object(path)


def _open(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """A directory's tensors, its settings, and the name of its kind of heads."""
    settings = _settings(directory)
    medusa = directory / MEDUSA_FILE
    whole = (directory / "model.safetensors").is_file() or not medusa.is_file()
    tensors = load_tensors(directory if whole else medusa)
    name = str(settings.get("model_type"))
    if not name.startswith("mtpkern_"):
        if is_eagle3(tensors):
            name = "eagle3"
        elif settings.get("speculators_model_type") is not None:
            name = f"speculators_{settings['speculators_model_type']}"
        elif is_medusa(tensors):
            name = "medusa"
    return tensors, settings, name


def _read(directory: Path, trunk: ModelConfig) -> OpenHeads:
    """Read heads and check them against a trunk."""
    path = directory / "config.json"
    tensors, settings, name = _open(directory)
    kind = _KINDS.get(name)
    if kind is None:
        raise ModelLoadError(
            f"{printable(path)}: model_type {printable(name)} is not supported; supported: "
            f"{', '.join(_KINDS)}"
        )
    try:
        if kind.read is not None:
            tensors, settings = kind.read(tensors, settings, trunk, path)
        shapes = kind.shapes(settings, trunk)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ModelLoadError):
            raise
        raise ModelLoadError(f"{printable(path)} is not complete: {printable(error)}") from None
    if name in _OWN_EMBEDDING and "embed_tokens.weight" in tensors:
        shapes["embed_tokens.weight"] = (trunk.vocab_size, trunk.hidden_size)
    _check(directory, tensors, shapes, trunk.vocab_size)
    most = settings.get("num_heads")
    if most is not None and most < 1:
        raise ModelLoadError(f"{printable(path)} names {most} heads")
    return OpenHeads(kind, tensors, settings)


def _check(directory: Path, tensors: Mapping[str, Tensor], shapes: Shapes, vocab_size: int) -> None:
    """Raise ModelLoadError unless the tensors are those that `shapes` lists, of floats, and the
    draft vocabulary's ids are in 0..vocab_size - 1."""
    for tensor, shape in shapes.items():
        if tensor not in tensors:
            raise ModelLoadError(f"{printable(directory)}: tensor {tensor} is missing")
        if tuple(tensors[tensor].shape) != shape:
            raise ModelLoadError(
                f"{printable(directory)}: tensor {tensor} must be {list(shape)} to match the "
                f"model, got {list(tensors[tensor].shape)}"
            )
        if tensor != "draft_vocab" and not tensors[tensor].is_floating_point():
            raise ModelLoadError(
                f"{printable(directory)}: tensor {tensor} must hold floats, "
                f"got {tensors[tensor].dtype}"
            )
    if strange := sorted(tensors.keys() - shapes.keys()):
        raise ModelLoadError(
            f"{printable(directory)}: tensor {printable(strange[0])} has no place in such heads"
        )
    ids = tensors.get("draft_vocab", torch.zeros(1))
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ModelLoadError(
            f"{printable(directory)} drafts tokens that the model's vocabulary of "
            f"{vocab_size} does not have"
        )


def _implied_trunk(
    name: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> ModelConfig:
    """A trunk of the sizes that heads imply. KeyError if a tensor that gives one is missing."""
    queries = keys = head_dim = width = 1
    layers = 1
    if name == "eagle3":
        inner = settings.get("transformer_layer_config", settings)
        hidden, vocabulary = len(tensors["fc.weight"]), inner.get("vocab_size", 32000)
        given = dict(settings.get("eagle_config") or {}) | dict(settings)
        ids = given.get("eagle_aux_hidden_state_layer_ids") or [2, 4, 5]
        # The third layer from the end, counted from 1 or from 0.
        layers = int(ids[-1]) + (4 if ids[0] == 1 else 3)
    elif name in ("medusa", "mtpkern_medusa"):
        hidden = len(tensors["0.0.linear.weight"])
        vocabulary = len(tensors.get("0.vocabulary.weight", tensors["0.0.linear.weight"]))
    else:
        hidden, vocabulary = len(tensors["0.0.linear.weight"]), len(tensors["0.vocabulary.weight"])
        if settings.get("prefix"):
            rows = [len(tensors[f"prefix.self_attn.{n}_proj.weight"]) for n in "qk"]
            head_dim = math.gcd(*rows)
            queries, keys = (n // head_dim for n in rows)
            width = len(tensors["prefix.mlp.gate_proj.weight"])
    return read_hf_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "dtype": "float32",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": queries,
            "num_key_value_heads": keys,
            "head_dim": head_dim if head_dim % 2 == 0 else 2,
        }
    )


_KINDS = {
    "mtpkern_mtp": _Kind(None, mtp_shapes, build_mtp),
    "mtpkern_medusa": _Kind(None, medusa_shapes, build_medusa),
    "mtpkern_hydra": _Kind(None, hydra_shapes, build_hydra),
    "mtpkern_layers": _Kind(None, layers_shapes, build_layers),
    "mimo": _Kind(read_mimo, mtp_shapes, build_mtp),
    "speculators_mtp": _Kind(read_speculators, mtp_shapes, build_mtp),
    "eagle3": _Kind(read_eagle3, eagle3_shapes, build_mtp),
    "medusa": _Kind(read_medusa, medusa_shapes, build_medusa),
    "mtp_llama": _Kind(read_mtp_llama, layers_shapes, build_layers),
}
# Kinds that may have an embedding of their own.
_OWN_EMBEDDING = ("eagle3",)
