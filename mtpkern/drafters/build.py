"""Named tensors and settings of heads, in our own layouts -> a drafter for a trunk."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtpkern.cache import KVCache
from mtpkern.checkpoints.llama import LayerWeights, layer_parts
from mtpkern.config import ModelConfig
from mtpkern.drafters.base import Drafter
from mtpkern.drafters.eagle3 import Eagle3Drafter
from mtpkern.drafters.hydra import HydraDrafter, HydraHead
from mtpkern.drafters.layers import LayersDrafter
from mtpkern.drafters.medusa import MedusaDrafter, OwnVocabularyDrafter
from mtpkern.drafters.mtp import MtpDrafter, MtpWeights
from mtpkern.drafters.mtp_modules import ModulesDrafter
from mtpkern.drafters.shapes import mtp_layer_config
from mtpkern.kernels.cpu._formats import GROUP
from mtpkern.kernels.cpu.quants import SLICE, Quants, dequantise, joined, quantise
from mtpkern.kernels.cpu.weights import take_outputs
from mtpkern.model import DecoderLayer, Llama, pack_layer
from mtpkern.ops.base import Ops

Settings = Mapping[str, Any]


class HeadTensors:
    """The tensors of heads in the trunk's dtype and on its device.

    Beside a quantised trunk matrices are rounded to `format`, which can change drafts but no token.
    """

    def __init__(self, tensors: Mapping[str, Tensor], trunk: Llama, format: str = "q8_0"):
        self.tensors, self.trunk, self.format = tensors, trunk, format

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Any:
        return self._rounded(self._converted(name))

    def packed(self, name: str, ops: Ops) -> Any:
        """The matrix {name}.weight with its bias, if it has one, packed for `ops`."""
        bias = f"{name}.bias"
        return ops.pack(self[f"{name}.weight"], self[bias] if bias in self else None)

    def layer(self, prefix: str, config: ModelConfig, ops: Ops) -> DecoderLayer:
        """A decoder layer, packed for `ops`; it may lack a norm of its input (EAGLE-3)."""
        fields: dict[str, Any] = {}
        for field, named in layer_parts(config).items():
            parts = [self._converted(prefix + name) for name, _ in named if prefix + name in self]
            fields[field] = self._rounded(torch.cat(parts)) if parts else None
        return pack_layer(LayerWeights(**fields), config.head_dim, ops)

    def vocabulary(self, ops: Ops) -> tuple[Any, Tensor]:
        """The matrix [Vd, E] that heads draft through, packed, and its token ids [Vd] int64: one of
        their own, the trunk's, or the rows `draft_vocab` of the trunk's."""
        trunk, reduced = self.trunk, "draft_vocab" in self
        ids = self.tensors["draft_vocab"] if reduced else torch.arange(trunk.config.vocab_size)
        ids = ids.to(trunk.norm.device, torch.int64, copy=True)
        if "vocabulary.weight" in self:
            return self.packed("vocabulary", ops), ids
        if not reduced:
            return trunk.vocabulary, ids
        lm_head = trunk.lm_head
        if not isinstance(lm_head, Quants):
            return ops.pack(lm_head[ids]), ids
        if self.format == "q8_0" or lm_head.format.startswith("q4") or lm_head.shape[1] % GROUP:
            # Packed, they are in memory already.
            return take_outputs(trunk.vocabulary, ids.numpy()), ids
        parts = (dequantise(lm_head.take(some.numpy())) for some in ids.split(SLICE))
        rounded = [quantise(torch.from_numpy(part), self.format) for part in parts]
        trunk.release()  # the rows that were read, of a mapped file
        return ops.pack(joined(*rounded)), ids

    def _converted(self, name: str) -> Tensor:
        return self.tensors[name].to(self.trunk.norm.device, self.trunk.dtype)

    def _rounded(self, w: Tensor) -> Tensor | Quants:
        quantised = isinstance(self.trunk.lm_head, Quants)
        if quantised and w.dim() == 2 and w.shape[1] % GROUP == 0:
            return quantise(w, self.format)
        # Vectors are copied, so that packed heads leave nothing of their file mapped.
        return w.clone() if w.dim() == 1 else w


def build_medusa(
    tensors: HeadTensors, settings: Settings, trunk: Llama, cache: KVCache, ops: Ops
) -> Drafter:
    if settings.get("own_vocabulary"):
        return OwnVocabularyDrafter(tensors, settings, trunk.config.num_layers, ops)
    return MedusaDrafter(tensors, settings, ops)


def build_layers(
    tensors: HeadTensors, settings: Settings, trunk: Llama, cache: KVCache, ops: Ops
) -> Drafter:
    heads, config = range(settings["num_heads"]), trunk.config
    layers = [tensors.layer(f"{h}.", config, ops) for h in heads]
    norms = [tensors[f"{h}.norm.weight"] for h in heads]
    own = _cache_beside(cache, config, len(heads))
    return LayersDrafter(layers, norms, *tensors.vocabulary(ops), trunk, own, ops)


def build_hydra(
    tensors: HeadTensors, settings: Settings, trunk: Llama, cache: KVCache, ops: Ops
) -> Drafter:
    shared, token_ids = tensors.vocabulary(ops)
    heads = [
        HydraHead(
            residual=tensors.packed(f"{h}.residual", ops),
            blocks=[tensors.packed(f"{h}.{d}.linear", ops) for d in range(settings["num_layers"])],
            vocabulary=tensors.packed(f"{h}.vocabulary", ops)
            if f"{h}.vocabulary.weight" in tensors
            else shared,
        )
        for h in range(settings["num_heads"])
    ]
    prefix = None
    if settings.get("prefix"):
        prefix = tensors.layer("prefix.", trunk.config, ops), tensors["prefix.norm.weight"]
    own = _cache_beside(cache, trunk.config)
    return HydraDrafter(heads, token_ids, prefix, trunk, own, ops)


def build_mtp(
    tensors: HeadTensors, settings: Settings, trunk: Llama, cache: KVCache, ops: Ops
) -> Drafter:
    """A sequential head of one module, EAGLE-3 among them, or of one for each depth."""
    # Each draft reads all of them once: 8 bits cost more time than they bring acceptance.
    tensors = HeadTensors(tensors.tensors, trunk, "q4_0")
    vocabulary, modules = tensors.vocabulary(ops), settings.get("num_heads")
    if modules:
        weights = [
            _mtp_weights(tensors, f"{d}.", settings, trunk, vocabulary, ops) for d in range(modules)
        ]
        own = _cache_beside(cache, weights[0].config, modules)
        return ModulesDrafter(weights, trunk, own, ops)
    module = _mtp_weights(tensors, "", settings, trunk, vocabulary, ops)
    kind = MtpDrafter if module.input_proj is not None else Eagle3Drafter
    drafter = kind(module, trunk, _cache_beside(cache, module.config), ops)
    if "embed_tokens.weight" in tensors:
        drafter.embedding = ops.pack_embedding(tensors["embed_tokens.weight"])
    return drafter


def _mtp_weights(
    tensors: HeadTensors,
    prefix: str,
    settings: Settings,
    trunk: Llama,
    vocabulary: tuple[Any, Tensor],
    ops: Ops,
) -> MtpWeights:
    """One module, whose tensors are named as in MiMo's MTP layers, with fc beside them."""
    config, taps = mtp_layer_config(settings, trunk.config), settings["tap_layers"]
    joined = f"{prefix}input_proj.weight" in tensors
    matrix, token_ids = vocabulary
    return MtpWeights(
        taps=tuple(taps),
        fc=tensors.packed(f"{prefix}fc", ops) if len(taps) > 1 else None,
        hidden_norm=tensors[f"{prefix}hidden_layernorm.weight"],
        token_norm=tensors[f"{prefix}token_layernorm.weight"],
        input_proj=tensors.packed(f"{prefix}input_proj", ops) if joined else None,
        layer=tensors.layer(prefix, config, ops),
        final_norm=tensors[f"{prefix}final_layernorm.weight"],
        vocabulary=matrix,
        token_ids=token_ids,
        config=config,
        zero_first=bool(settings.get("zero_first")),
        input_norm=tensors["input_norm.weight"] if settings.get("norm_before_fc") else None,
        norm_before_residual=bool(settings.get("norm_before_residual")),
    )


def _cache_beside(cache: KVCache, config: ModelConfig, layers: int = 1) -> KVCache:
    inverse_frequencies, scaling = config.rope.inverse_frequencies(config.head_dim)
    return cache.beside(
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        inverse_frequencies=inverse_frequencies,
        rope_scaling=scaling,
        layers=layers,
    )
