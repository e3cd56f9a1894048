"""GGUF -> config.json and the tokenizer's files, and, to convert it, safetensors.

What would change the computation, and is not carried over, is refused by name.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mtpkern.checkpoints.gguf_file import ARCHITECTURES, read_metadata
from mtpkern.checkpoints.gguf_tokenizer import write_json, write_tokenizer
from mtpkern.checkpoints.llama import check_entries, read_entries
from mtpkern.checkpoints.tensor_files import Maps, TensorEntry, expanded, row_slices
from mtpkern.config import ModelConfig, ModelLoadError, RopeConfig, printable

_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROPE_FACTORS = "rope_freqs.weight"
# Metadata that must be as here if it is there at all: this is what is computed. "*" stands for the
# architecture.
_ONLY: dict[str, tuple[Any, ...]] = {
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
_REQUIRED = ("general.architecture", "tokenizer.ggml.model")
# Metadata that conversion reads below.
_READ = re.compile(
    r"\*\.(vocab_size|context_length|embedding_length|feed_forward_length|block_count"
    r"|attention\.(head_count|head_count_kv|key_length|value_length|scale|layer_norm_rms_epsilon)"
    r"|rope\.(dimension_count|freq_base|scale_linear)"
    r"|rope\.scaling\.(type|factor|original_context_length|yarn_beta_fast|yarn_beta_slow))"
    r"|tokenizer\.ggml\.(model|pre|tokens|token_type|scores|merges|add_(bos|eos)_token"
    r"|add_space_prefix|remove_extra_whitespaces|(bos|eos|eot|eom)_token_id)"
    r"|tokenizer\.chat_template(\..+)?"
)
# Metadata that changes neither a token nor a logit. What is outside these two is refused.
_SILENT = re.compile(
    r"(?!\*\.|tokenizer\.).*|tokenizer\.(chat_templates|huggingface\.json|rwkv\.world)"
    r"|tokenizer\.ggml\.(token_type_count|\w+_token_id)"
    r"|\*\.(tensor_data_layout|pooling_type|rope\.scaling\.finetuned)"
)


def convert_gguf(
    source: Path, directory: Path, *, on_tensor: Callable[[int], None] = lambda total: None
) -> None:
    """Write the model in a GGUF into an existing directory, its weights as safetensors.

    `on_tensor(total)` is called after each tensor. Raises ModelLoadError naming what in the file is
    missing, or would change the computation and is not supported.
    """
    describe_gguf(source, directory)
    # What config.json says in words is no weight.
    weights = {n: entry for n, entry in read_entries(source).items() if n != _ROPE_FACTORS}
    _write_weights(directory / "model.safetensors", weights, on_tensor)


def describe_gguf(source: Path, directory: Path) -> None:
    """Write config.json and the tokenizer's files of a GGUF into an existing directory, and check
    its tensors against them.

    Raises ModelLoadError as `convert_gguf` does.
    """
    entries, metadata = read_entries(source), read_metadata(source)
    try:
        _check_metadata(metadata)
        config = _config(metadata, entries)
        write_json(directory / "config.json", config)
        write_tokenizer(directory, metadata, config)
    except KeyError as error:
        raise ModelLoadError(f"{printable(source)} has no {printable(error.args[0])}") from None
    except ModelLoadError as error:
        raise ModelLoadError(f"{printable(source)}: {printable(error)}") from None
    check_entries(ModelConfig.from_json(directory), entries, source)


def _check_metadata(metadata: dict[str, Any]) -> None:
    """Refuse what would change the computation and is neither carried over nor without effect."""
    for name in _REQUIRED:
        metadata[name]
    own = metadata["general.architecture"] + "."
    for name, value in metadata.items():
        known = f"*.{name.removeprefix(own)}" if name.startswith(own) else name
        if known in _ONLY and value not in _ONLY[known]:
            supported = ", ".join(str(v) for v in _ONLY[known])
            raise ModelLoadError(
                f"{name}={printable(value)} is not supported; supported: {supported}"
            )
        if known not in _ONLY and not _READ.fullmatch(known) and not _SILENT.fullmatch(known):
            raise ModelLoadError(f"{printable(name)}={printable(value)} is not supported")
        if name.startswith(own) and isinstance(value, list):
            raise ModelLoadError(f"{printable(name)}: a value per layer is not supported")


def _config(metadata: dict[str, Any], entries: Mapping[str, TensorEntry]) -> dict[str, Any]:
    """config.json, in Hugging Face's words."""
    model_type = metadata["general.architecture"]
    own = f"{model_type}."
    heads = metadata[own + "attention.head_count"]
    hidden = metadata[own + "embedding_length"]
    head_dim = metadata.get(own + "attention.key_length", hidden // heads)
    vocab_size = len(metadata["tokenizer.ggml.tokens"])
    if _EMBEDDING in entries:
        # Rows beyond the last token fill the matrix up to a round size.
        vocab_size = max(vocab_size, entries[_EMBEDDING].shape[0])
    for name, wanted in (
        ("rope.dimension_count", head_dim),
        ("attention.value_length", head_dim),
        ("vocab_size", vocab_size),
    ):
        value = metadata.get(own + name, wanted)
        if value != wanted:
            raise ModelLoadError(f"{own}{name}={value} is not supported; supported: {wanted}")
    scale = metadata.get(own + "attention.scale", 0.0)
    if scale and abs(scale * head_dim**0.5 - 1) > 1e-5:
        raise ModelLoadError(
            f"{own}attention.scale={scale:.6g} is not supported; supported: {head_dim**-0.5:.6g}"
        )
    flags = {
        flag: True
        for flag, part in (("attention_bias", "self_attn"), ("mlp_bias", "mlp"))
        if any(re.fullmatch(rf"model\.layers\.\d+\.{part}\.\w+\.bias", name) for name in entries)
    }
    theta = float(metadata.get(own + "rope.freq_base", 10000.0))
    scaling = _rope_scaling(metadata, own)
    if _ROPE_FACTORS in entries:
        if scaling:
            raise ModelLoadError(f"{_ROPE_FACTORS} beside {own}rope.scaling is not supported")
        scaling = _rope_factors(entries[_ROPE_FACTORS], theta, head_dim)
    return {
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type,
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": metadata[own + "feed_forward_length"],
        "num_hidden_layers": metadata[own + "block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(own + "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata[own + "context_length"],
        # The file holds float32: 1e-5 comes back with seven true digits.
        "rms_norm_eps": float(f"{metadata[own + 'attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": theta,
        **({"rope_scaling": scaling} if scaling else {}),
        **(flags if model_type != "qwen2" else {}),  # which has the biases of Q, K and V always
        "tie_word_embeddings": _LM_HEAD not in entries,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "bfloat16",
    }


def _rope_scaling(metadata: dict[str, Any], own: str) -> dict[str, Any] | None:
    """config.json's words for how RoPE is stretched; a factor without a type is linear."""
    rope = f"{own}rope.scaling."
    factor = metadata.get(rope + "factor", metadata.get(f"{own}rope.scale_linear", 0.0))
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
        for theirs, ours in (
            ("original_context_length", "original_max_position_embeddings"),
            ("yarn_beta_fast", "beta_fast"),
            ("yarn_beta_slow", "beta_slow"),
        ):
            if rope + theirs in metadata:
                scaling[ours] = metadata[rope + theirs]
    return scaling


def _rope_factors(entry: TensorEntry, theta: float, head_dim: int) -> dict[str, Any]:
    """config.json's words for factors [D/2] by which frequencies are divided: those of Llama 3.1
    and later, which the metadata does not name."""
    factors = expanded(entry, {}, slice(None)).float()
    factor = float(factors.max())
    names = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    names["original_max_position_embeddings"] = 8192
    rope = RopeConfig("llama3", theta, factor, **names)  # type: ignore[arg-type]
    plain, _ = RopeConfig(theta=theta).inverse_frequencies(head_dim)
    stretched, _ = rope.inverse_frequencies(head_dim)
    if factors.shape != plain.shape or not torch.allclose(plain / stretched, factors, rtol=1e-3):
        raise ModelLoadError(f"{entry.name} holds other factors than Llama 3.1's")
    return {"rope_type": "llama3", "factor": float(f"{factor:.6g}")} | names


def _write_weights(
    file: Path, entries: Mapping[str, TensorEntry], on_tensor: Callable[[int], None]
) -> None:
    """Write the tensors as bfloat16, expanded some rows at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in sorted(entries.items()):
        size = 2 * math.prod(entry.shape)
        offsets = [offset, offset + size]
        header[name] = {"dtype": "BF16", "shape": list(entry.shape), "data_offsets": offsets}
        offset += size
    text = json.dumps(header).encode()
    # Spaces after the header are allowed: the weights then begin on a cache line.
    text += b" " * (-(8 + len(text)) % 64)
    maps: Maps = {}
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, entry in sorted(entries.items()):
            for rows in row_slices(entry):
                values = expanded(entry, maps, rows).bfloat16().contiguous()
                stream.write(values.view(torch.uint8).numpy().data)
            on_tensor(len(entries))
