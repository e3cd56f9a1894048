"""Heads on disk -> a drafter: the ones that ship, or a directory, checked against the trunk.

A directory holds config.json, whose `model_type` names the kind, and model.safetensors. Kinds:

    mtpkern_mtp      a sequential head of our own (train/), names as in MiMo's MTP layers; with
                     num_heads several, one for each depth, prefixed "0.", "1.", ...
    mtpkern_medusa   parallel heads, names as in Medusa's medusa_lm_head.pt (`mtpkern convert`)
    mtpkern_hydra    heads that see the drafts before them (`mtpkern convert` of hydra_lm_head.pt)
    mtpkern_layers   layers in place of the trunk's last one, names as there, prefixed "0.", ...

Published kinds are in published.py. EAGLE-3 and Medusa heads are known by their tensors, those
of speculators by `speculators_model_type`; Medusa's may lie in medusa_lm_head.safetensors.
"""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtpkern.cache import KVCache
from mtpkern.checkpoints.llama import (
    LayerWeights,
    conversion,
    fingerprint,
    has_weights,
    layer_parts,
    load_config,
    load_tensors,
    read_entries,
)
from mtpkern.config import ModelConfig, ModelLoadError, UserError, printable, read_json_object
from mtpkern.drafters.base import Drafter, MedusaDrafter, OwnVocabularyDrafter
from mtpkern.drafters.layers import HydraDrafter, HydraHead, LayersDrafter
from mtpkern.drafters.mtp import Eagle3Drafter, ModulesDrafter, MtpDrafter, MtpWeights
from mtpkern.drafters.published import (
    eagle3_shapes,
    hydra_shapes,
    is_eagle3,
    is_medusa,
    layers_shapes,
    medusa_shapes,
    mtp_layer_config,
    mtp_shapes,
    read_eagle3,
    read_medusa,
    read_mimo,
    read_mtp_llama,
    read_speculators,
)
from mtpkern.kernels.cpu.quants import GROUP, Quants, quantise
from mtpkern.kernels.cpu.weights import take_outputs
from mtpkern.model import DecoderLayer, Llama, pack_layer
from mtpkern.ops.base import Ops

PRETRAINED = Path(__file__).parents[1] / "pretrained"
MEDUSA_FILE = "medusa_lm_head.safetensors"
# Models that come with heads: model_type -> what config.json counts them by, the count of a model
# without, and where their tensors are.
_BRINGS = {
    "mimo": ("num_nextn_predict_layers", 0, "model.mtp_layers."),
    "mtp_llama": ("prediction_heads", 1, "model.mtp_heads."),
}
_LOG = logging.getLogger(__name__)


def find_heads(name: str, model: str, directory: Path | None = None) -> Path | None:
    """The directory of heads that `name` means for `model`; None where there are to be none.

    "auto" is what the checkpoint in `directory` brings along, or what ships for these weights of
    the model, if anything; "none" nothing; else a name in the package or a directory. A checkpoint
    whose config.json names heads that its fine-tuning dropped has none, with a warning. Raises
    UserError for a name that is neither.
    """
    if name == "none":
        return None
    if name == "auto" and directory is not None and has_weights(directory):
        settings = read_json_object(directory / "config.json")
        count, none, prefix = _BRINGS.get(str(settings.get("model_type")), ("", 0, ""))
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
        raise UserError(f"heads {printable(name)}: not a directory; {conversion(Path(name))}")
    raise UserError(
        f"heads {printable(name)}: no such directory; names: auto, none, {', '.join(shipped)}"
    )


def _trained_on(heads: Path, base: Path | None) -> bool:
    """Whether heads fit these weights, as far as they name them and there are any."""
    mark = _settings(heads).get("base_model_fingerprint")
    return not mark or base is None or not has_weights(base) or mark == fingerprint(base)


def _is_same(tensor: Tensor, trunk: Llama, ops: Ops) -> bool:
    """Whether an embedding differs from the trunk's by no more than rounding to another type."""
    ids = torch.arange(trunk.config.vocab_size, device=trunk.norm.device)
    other = ops.embed(trunk.embedding, ids)
    if tensor.shape != other.shape:
        return False
    return torch.allclose(tensor.to(other), other, rtol=0.01, atol=1e-4)


class _Kind(NamedTuple):
    """How heads of one kind are read, checked and built."""

    read: Callable[..., tuple[dict[str, Tensor], dict[str, Any]]] | None  # None: as they are
    shapes: Callable[[Mapping[str, Any], ModelConfig], dict[str, tuple[int, ...]]]
    build: Callable[..., Drafter]


def load_heads(
    directory: Path,
    trunk: Llama,
    cache: KVCache,
    *,
    ops: Ops,
    base: Path | None = None,
) -> tuple[Drafter, int | None]:
    """Load heads for a trunk and its cache -> a drafter, and how many tokens it drafts at most
    (None: any number). Raises ModelLoadError where they do not fit.

    `base` is the trunk's checkpoint, where heads that name their model's fingerprint are to be
    held to it.
    """
    if not _trained_on(directory, base):
        raise ModelLoadError(
            f"{printable(directory)} was trained on other weights than those of {printable(base)}"
        )
    kind, tensors, settings = _read(directory, trunk.config)
    embedding = tensors.get("embed_tokens.weight")
    if embedding is not None and _is_same(embedding, trunk, ops):
        del tensors["embed_tokens.weight"]
    drafter = kind.build(_Source(tensors, trunk), settings, trunk, cache, ops)
    return drafter, settings.get("num_heads")  # of which each drafts one position


def check_heads(directory: Path) -> None:
    """ModelLoadError where there is no trunk for which these heads would load."""
    tensors, settings, name = _open(directory)
    try:
        own = name in _BRINGS
        trunk = load_config(directory) if own else _implied_trunk(name, tensors, settings)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(
            f"{printable(directory)} is not complete: {printable(error)}"
        ) from None
    _, tensors, _ = _read(directory, trunk)
    for tensor, values in tensors.items():
        if values.is_floating_point() and not values.isfinite().all():
            raise ModelLoadError(
                f"{printable(directory)}: tensor {tensor} holds values that are not finite"
            )


def _settings(directory: Path) -> dict[str, Any]:
    """A directory's config.json, which Medusa heads do without."""
    path = directory / "config.json"
    if not path.is_file() and (directory / MEDUSA_FILE).is_file():
        return {}
    return read_json_object(path)


def _open(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """A directory's tensors and settings, and the kind of heads that they are."""
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


def _read(directory: Path, trunk: ModelConfig) -> tuple[_Kind, dict[str, Tensor], dict[str, Any]]:
    """Heads for a trunk, checked against it: their kind, tensors and settings, in our names."""
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
    if ids.min() < 0 or ids.max() >= trunk.vocab_size:
        raise ModelLoadError(
            f"{printable(directory)} drafts tokens that the model's vocabulary of "
            f"{trunk.vocab_size} does not have"
        )
    most = settings.get("num_heads")
    if most is not None and most < 1:
        raise ModelLoadError(f"{printable(path)} names {most} heads")
    return kind, tensors, settings


def _implied_trunk(
    name: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> ModelConfig:
    """A trunk of the sizes that heads to be converted imply; KeyError where they are not all
    there."""
    queries = keys = head_dim = width = 1
    layers = 1
    if name == "eagle3":
        inner = settings.get("transformer_layer_config", settings)
        hidden, vocabulary = len(tensors["fc.weight"]), inner.get("vocab_size", 32000)
        given = dict(settings.get("eagle_config") or {}) | dict(settings)
        ids = given.get("eagle_aux_hidden_state_layer_ids") or [2, 4, 5]
        # Three from the end, counted from 1 or from 0.
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
    return ModelConfig.from_json(
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


class _Source:
    """A directory's tensors, in the trunk's dtype and on its device; matrices in 8 bits beside a
    trunk of quants, which costs drafts at most."""

    def __init__(self, tensors: Mapping[str, Tensor], trunk: Llama):
        self.tensors, self.trunk = tensors, trunk

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Any:
        return self._rounded(self._tensor(name))

    def packed(self, name: str, ops: Ops) -> Any:
        """A linear with its bias, where it has one."""
        bias = f"{name}.bias"
        return ops.pack(self[f"{name}.weight"], self[bias] if bias in self else None)

    def layer(self, prefix: str, config: ModelConfig, ops: Ops) -> DecoderLayer:
        """A decoder layer; it has no norm of its input where that is normed already (EAGLE-3)."""
        fields: dict[str, Any] = {}
        for field, named in layer_parts(config).items():
            parts = [self._tensor(prefix + name) for name, _ in named if prefix + name in self]
            fields[field] = self._rounded(torch.cat(parts)) if parts else None
        return pack_layer(LayerWeights(**fields), config.head_dim, ops)

    def _tensor(self, name: str) -> Tensor:
        return self.tensors[name].to(self.trunk.norm.device, self.trunk.dtype)

    def _rounded(self, w: Tensor) -> Tensor | Quants:
        quantised = isinstance(self.trunk.lm_head, Quants)
        if quantised and w.dim() == 2 and w.shape[1] % GROUP == 0:
            return quantise(w, "q8_0")
        return w


def _cache_beside(cache: KVCache, config: ModelConfig, layers: int = 1) -> KVCache:
    inverse_frequencies, scaling = config.rope.inverse_frequencies(config.head_dim)
    return cache.beside(
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        inverse_frequencies=inverse_frequencies,
        rope_scaling=scaling,
        layers=layers,
    )


def _build_medusa(
    source: _Source, settings: Mapping[str, Any], trunk: Llama, cache: KVCache, ops: Ops
) -> Drafter:
    if settings.get("own_vocabulary"):
        return OwnVocabularyDrafter(source, settings, trunk.config.num_layers, ops)
    return MedusaDrafter(source, settings, ops)


def _build_layers(
    source: _Source, settings: Mapping[str, Any], trunk: Llama, cache: KVCache, ops: Ops
) -> Drafter:
    heads, config = range(settings["num_heads"]), trunk.config
    layers = [source.layer(f"{h}.", config, ops) for h in heads]
    norms = [source[f"{h}.norm.weight"] for h in heads]
    own = _cache_beside(cache, config, len(heads))
    return LayersDrafter(layers, norms, *_vocabulary(source, trunk, ops), trunk, own, ops)


def _build_hydra(
    source: _Source, settings: Mapping[str, Any], trunk: Llama, cache: KVCache, ops: Ops
) -> Drafter:
    shared, token_ids = _vocabulary(source, trunk, ops)
    heads = [
        HydraHead(
            residual=source.packed(f"{h}.residual", ops),
            blocks=[source.packed(f"{h}.{d}.linear", ops) for d in range(settings["num_layers"])],
            vocabulary=source.packed(f"{h}.vocabulary", ops)
            if f"{h}.vocabulary.weight" in source
            else shared,
        )
        for h in range(settings["num_heads"])
    ]
    prefix = None
    if settings.get("prefix"):
        prefix = source.layer("prefix.", trunk.config, ops), source["prefix.norm.weight"]
    own = _cache_beside(cache, trunk.config)
    return HydraDrafter(heads, token_ids, prefix, trunk, own, ops)


def _vocabulary(source: _Source, trunk: Llama, ops: Ops) -> tuple[Any, Tensor]:
    """What heads draft through, and its ids: one of their own, the trunk's, or the rows
    `draft_vocab` of that."""
    where, reduced = trunk.norm.device, "draft_vocab" in source
    ids = source.tensors["draft_vocab"] if reduced else torch.arange(trunk.config.vocab_size)
    ids = ids.to(where, torch.int64)
    if "vocabulary.weight" in source:
        return source.packed("vocabulary", ops), ids
    if not reduced:
        return trunk.vocabulary, ids
    if isinstance(trunk.lm_head, Quants):
        # Packed, they are in memory already.
        return take_outputs(trunk.vocabulary, ids.numpy()), ids
    return ops.pack(trunk.lm_head[ids]), ids


def _build_mtp(
    source: _Source, settings: Mapping[str, Any], trunk: Llama, cache: KVCache, ops: Ops
) -> Drafter:
    modules = settings.get("num_heads")
    if modules:
        shared = _vocabulary(source, trunk, ops)
        weights = [
            _mtp_weights(source, f"{d}.", settings, trunk, shared, ops) for d in range(modules)
        ]
        own = _cache_beside(cache, weights[0].config, modules)
        return ModulesDrafter(weights, trunk, own, ops)
    module = _mtp_weights(source, "", settings, trunk, _vocabulary(source, trunk, ops), ops)
    kind = MtpDrafter if module.input_proj is not None else Eagle3Drafter
    drafter = kind(module, trunk, _cache_beside(cache, module.config), ops)
    if "embed_tokens.weight" in source:
        drafter.embedding = ops.pack_embedding(source["embed_tokens.weight"])
    return drafter


def _mtp_weights(
    source: _Source,
    prefix: str,
    settings: Mapping[str, Any],
    trunk: Llama,
    shared: tuple[Any, Tensor],
    ops: Ops,
) -> MtpWeights:
    """A sequential module, names as in MiMo's MTP layers, plus fc; `shared` is what it drafts
    through, and its ids."""
    config, taps = mtp_layer_config(settings, trunk.config), settings["tap_layers"]
    joined = f"{prefix}input_proj.weight" in source
    vocabulary, token_ids = shared
    return MtpWeights(
        taps=tuple(taps),
        fc=source.packed(f"{prefix}fc", ops) if len(taps) > 1 else None,
        hidden_norm=source[f"{prefix}hidden_layernorm.weight"],
        token_norm=source[f"{prefix}token_layernorm.weight"],
        input_proj=source.packed(f"{prefix}input_proj", ops) if joined else None,
        layer=source.layer(prefix, config, ops),
        final_norm=source[f"{prefix}final_layernorm.weight"],
        vocabulary=vocabulary,
        token_ids=token_ids,
        config=config,
        zero_first=bool(settings.get("zero_first")),
        input_norm=source["input_norm.weight"] if settings.get("norm_before_fc") else None,
        norm_before_residual=bool(settings.get("norm_before_residual")),
    )


_KINDS = {
    "mtpkern_mtp": _Kind(None, mtp_shapes, _build_mtp),
    "mtpkern_medusa": _Kind(None, medusa_shapes, _build_medusa),
    "mtpkern_hydra": _Kind(None, hydra_shapes, _build_hydra),
    "mtpkern_layers": _Kind(None, layers_shapes, _build_layers),
    "mimo": _Kind(read_mimo, mtp_shapes, _build_mtp),
    "speculators_mtp": _Kind(read_speculators, mtp_shapes, _build_mtp),
    "eagle3": _Kind(read_eagle3, eagle3_shapes, _build_mtp),
    "medusa": _Kind(read_medusa, medusa_shapes, _build_medusa),
    "mtp_llama": _Kind(read_mtp_llama, layers_shapes, _build_layers),
}
# Kinds that may look drafted tokens up in an embedding of their own.
_OWN_EMBEDDING = ("eagle3",)
