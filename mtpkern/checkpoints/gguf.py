"""GGUF -> Hugging Face's config.json and tokenizer files, and safetensors if it is converted.

Metadata that would change the computation and has no counterpart here is refused by name.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mtpkern.checkpoints.directory import EMBEDDING, LM_HEAD, read_entries
from mtpkern.checkpoints.gguf_file import ARCHITECTURES, read_metadata
from mtpkern.checkpoints.gguf_tokenizer import write_tokenizer
from mtpkern.checkpoints.hf_config import read_hf_config
from mtpkern.checkpoints.json_files import write_json
from mtpkern.checkpoints.llama import check_entries
from mtpkern.checkpoints.tensor_entry import Maps, TensorEntry, read_rows, row_slices
from mtpkern.errors import ModelLoadError, printable
from mtpkern.rope import RopeConfig

_ROPE_FACTORS = "rope_freqs.weight"
# Metadata with the values that are supported; "*" is the architecture.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "general.architecture": tuple(ARCHITECTURES),
    "general.type": ("model",),
    "split.count": (0, 1),
    "tokenizer.ggml.add_sep_token": (False,),
    "*.attention.causal": (True,),
    "*.attention.clamp_kqv": (0.0,),
    "*.attention.max_alibi_bias": (0.0,),
    "*.attention.sliding_window": (0,),
    "*.attn_logit_softcapping": (0.0,),
    "*.final_logit_softcapping": (0.0,),
    "*.embedding_scale": (0.0, 1.0),
    "*.residual_scale": (0.0, 1.0),
    "*.logit_scale": (0.0, 1.0),
    "*.expert_count": (0,),
    "*.expert_used_count": (0,),
    "*.leading_dense_block_count": (0,),
    "*.nextn_predict_layers": (0,),
    "*.use_parallel_residual": (False,),
    "*.rope.scaling.attn_factor": (1.0,),
    "*.rope.scaling.yarn_attn_factor": (1.0,),
    "*.rope.scaling.yarn_ext_factor": (1.0,),
    "*.rope.scaling.yarn_log_multiplier": (0.0,),
}
# llama.cpp's defaults for SentencePiece's tokenizers.
_SENTENCEPIECE_IDS = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
_REQUIRED = ("general.architecture", "tokenizer.ggml.model")
# Metadata that is converted.
_CONVERTED = re.compile(
    r"\*\.(vocab_size|context_length|embedding_length|feed_forward_length|block_count"
    r"|attention\.(head_count|head_count_kv|key_length|value_length|scale|layer_norm_rms_epsilon)"
    r"|rope\.(dimension_count|freq_base|scale_linear)"
    r"|rope\.scaling\.(type|factor|original_context_length|yarn_beta_fast|yarn_beta_slow))"
    r"|tokenizer\.ggml\.(model|pre|tokens|token_type|scores|merges|add_(bos|eos)_token"
    r"|add_space_prefix|remove_extra_whitespaces|(bos|eos|eot|eom)_token_id)"
    r"|tokenizer\.chat_template(\..+)?"
)
# Metadata that affects neither tokens nor logits. All other metadata is refused.
_UNRELATED = re.compile(
    r"(?!\*\.|tokenizer\.).*|tokenizer\.(chat_templates|huggingface\.json|rwkv\.world)"
    r"|tokenizer\.ggml\.(token_type_count|\w+_token_id)"
    r"|\*\.(tensor_data_layout|pooling_type|rope\.scaling\.finetuned)"
)


def convert_gguf(
    source: Path, directory: Path, *, on_tensor: Callable[[int], None] = lambda total: None
) -> None:
    """Write the model in a GGUF into an existing directory, its weights as bfloat16 safetensors.

    `on_tensor(total)` is called after each tensor. Raises ModelLoadError naming the metadata or
    tensor that is missing or not supported.
    """
    describe_gguf(source, directory)
    # The RoPE factors are in config.json.
    weights = {n: entry for n, entry in read_entries(source).items() if n != _ROPE_FACTORS}
    _write_weights(directory / "model.safetensors", weights, on_tensor)


def describe_gguf(source: Path, directory: Path) -> None:
    """Write config.json and the tokenizer files of a GGUF into an existing directory.

    Checks the GGUF's tensors against that config.json. Raises ModelLoadError as `convert_gguf`
    does.
    """
    entries, metadata = read_entries(source), read_metadata(source)
    if metadata.get("tokenizer.ggml.model") == "llama":
        metadata = _SENTENCEPIECE_IDS | metadata
    try:
        _check_metadata(metadata)
        config = _hf_config(metadata, entries)
        write_json(directory / "config.json", config)
        write_tokenizer(directory, metadata, config)
    except KeyError as error:
        raise ModelLoadError(f"{printable(source)} has no {printable(error.args[0])}") from None
    except ModelLoadError as error:
        raise ModelLoadError(f"{printable(source)}: {printable(error)}") from None
    check_entries(read_hf_config(directory), entries, source)


def _check_metadata(metadata: dict[str, Any]) -> None:
    """Refuse metadata that would change the computation and is not converted."""
    for name in _REQUIRED:
        metadata[name]
    prefix = metadata["general.architecture"] + "."
    for name, value in metadata.items():
        key = f"*.{name.removeprefix(prefix)}" if name.startswith(prefix) else name
        if key in _SUPPORTED and value not in _SUPPORTED[key]:
            supported = ", ".join(str(v) for v in _SUPPORTED[key])
            raise ModelLoadError(
                f"{name}={printable(value)} is not supported; supported: {supported}"
            )
        if not (key in _SUPPORTED or _CONVERTED.fullmatch(key) or _UNRELATED.fullmatch(key)):
            raise ModelLoadError(f"{printable(name)}={printable(value)} is not supported")
        if name.startswith(prefix) and isinstance(value, list):
            raise ModelLoadError(f"{printable(name)}: a value per layer is not supported")


def _hf_config(metadata: dict[str, Any], entries: Mapping[str, TensorEntry]) -> dict[str, Any]:
    """The content of config.json."""
    model_type = metadata["general.architecture"]
    prefix = f"{model_type}."
    heads = metadata[prefix + "attention.head_count"]
    hidden = metadata[prefix + "embedding_length"]
    head_dim = metadata.get(prefix + "attention.key_length", hidden // heads)
    vocab_size = len(metadata["tokenizer.ggml.tokens"])
    if EMBEDDING in entries:
        # The matrix may be padded to a round number of rows.
        vocab_size = max(vocab_size, entries[EMBEDDING].shape[0])
    for name, supported in (
        ("rope.dimension_count", head_dim),
        ("attention.value_length", head_dim),
        ("vocab_size", vocab_size),
    ):
        value = metadata.get(prefix + name, supported)
        if value != supported:
            raise ModelLoadError(f"{prefix}{name}={value} is not supported; supported: {supported}")
    scale = metadata.get(prefix + "attention.scale", 0.0)
    if scale and abs(scale * head_dim**0.5 - 1) > 1e-5:
        raise ModelLoadError(
            f"{prefix}attention.scale={scale:.6g} is not supported; supported: {head_dim**-0.5:.6g}"
        )
    flags = {
        flag: True
        for flag, part in (("attention_bias", "self_attn"), ("mlp_bias", "mlp"))
        if any(re.fullmatch(rf"model\.layers\.\d+\.{part}\.\w+\.bias", name) for name in entries)
    }
    theta = float(metadata.get(prefix + "rope.freq_base", 10000.0))
    scaling = _rope_scaling(metadata, prefix)
    if _ROPE_FACTORS in entries:
        if scaling:
            raise ModelLoadError(f"{_ROPE_FACTORS} beside {prefix}rope.scaling is not supported")
        scaling = _llama3_rope_scaling(entries[_ROPE_FACTORS], theta, head_dim)
    return {
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type,
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": metadata[prefix + "feed_forward_length"],
        "num_hidden_layers": metadata[prefix + "block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(prefix + "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata[prefix + "context_length"],
        # Stored as float32, which has seven significant digits.
        "rms_norm_eps": float(f"{metadata[prefix + 'attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": theta,
        **({"rope_scaling": scaling} if scaling else {}),
        **(flags if model_type != "qwen2" else {}),  # Qwen2 always has biases on Q, K and V
        "tie_word_embeddings": LM_HEAD not in entries,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "bfloat16",
    }


def _rope_scaling(metadata: dict[str, Any], prefix: str) -> dict[str, Any] | None:
    """config.json's rope_scaling. A factor without a type means linear scaling."""
    rope = f"{prefix}rope.scaling."
    factor = metadata.get(rope + "factor", metadata.get(f"{prefix}rope.scale_linear", 0.0))
    kind = metadata.get(rope + "type", "linear" if factor else "none")
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if kind not in ("linear", "yarn"):
        raise ModelLoadError(
            f"{rope}type={printable(kind)} is not supported; supported: none, linear, yarn"
        )
    if not factor:
        raise ModelLoadError(f"{rope}type={kind} has no {rope}factor")
    scaling = {"rope_type": kind, "factor": float(f"{factor:.6g}")}
    if kind == "yarn":
        for gguf_name, hf_name in (
            ("original_context_length", "original_max_position_embeddings"),
            ("yarn_beta_fast", "beta_fast"),
            ("yarn_beta_slow", "beta_slow"),
        ):
            if rope + gguf_name in metadata:
                scaling[hf_name] = metadata[rope + gguf_name]
    return scaling


def _llama3_rope_scaling(entry: TensorEntry, theta: float, head_dim: int) -> dict[str, Any]:
    """config.json's rope_scaling for a tensor [D/2] of factors that divide the frequencies.

    Llama 3.1 and later have such a tensor in place of metadata.
    """
    factors = read_rows(entry, {}, slice(None)).float()
    factor = float(factors.max())
    settings = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    settings["original_max_position_embeddings"] = 8192
    rope = RopeConfig("llama3", theta, factor, **settings)  # type: ignore[arg-type]
    unscaled, _ = RopeConfig(theta=theta).inverse_frequencies(head_dim)
    scaled, _ = rope.inverse_frequencies(head_dim)
    if factors.shape != unscaled.shape or not torch.allclose(unscaled / scaled, factors, rtol=1e-3):
        raise ModelLoadError(f"{entry.name} holds other factors than Llama 3.1's")
    return {"rope_type": "llama3", "factor": float(f"{factor:.6g}")} | settings


def _write_weights(
    file: Path, entries: Mapping[str, TensorEntry], on_tensor: Callable[[int], None]
) -> None:
    """Write the tensors as bfloat16 safetensors, a slice of rows at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in sorted(entries.items()):
        size = 2 * math.prod(entry.shape)
        offsets = [offset, offset + size]
        header[name] = {"dtype": "BF16", "shape": list(entry.shape), "data_offsets": offsets}
        offset += size
    text = json.dumps(header).encode()
    # Trailing spaces are allowed in the header; they align the weights to a cache line.
    text += b" " * (-(8 + len(text)) % 64)
    maps: Maps = {}
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, entry in sorted(entries.items()):
            for rows in row_slices(entry):
                values = read_rows(entry, maps, rows).bfloat16().contiguous()
                stream.write(values.view(torch.uint8).numpy().data)
            on_tensor(len(entries))
