"""GGUF -> safetensors, config.json and tokenizer.json: the Llama layout with a byte-level BPE.

Weights are dequantised a slice at a time and written as bfloat16, so that conversion needs little
more memory than its largest slice. What has to come out right: GGUF stores the rows of Q and K with
the two halves of each head interleaved, and Hugging Face's RoPE wants them apart.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from mtpkern.checkpoint import check_checkpoint
from mtpkern.config import ModelLoadError, printable, reason

_SLICE_ROWS = 4096
# GGUF's token types for special tokens, and for others that are found in a text as a whole.
_CONTROL_TOKEN, _USER_DEFINED_TOKEN = 3, 4
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


# Metadata that must be as here if it is there at all: this is what is computed.
_ONLY: dict[str, tuple[Any, ...]] = {
    "general.architecture": ("llama",),
    "general.type": ("model",),
    "split.count": (0, 1),
    "tokenizer.ggml.model": ("gpt2",),
    "tokenizer.ggml.pre": ("smollm",),
    "tokenizer.ggml.add_space_prefix": (False,),
    "tokenizer.ggml.add_sep_token": (False,),
    "tokenizer.ggml.remove_extra_whitespaces": (False,),
    "llama.attention.causal": (True,),
    "llama.attention.clamp_kqv": (0.0,),
    "llama.attention.max_alibi_bias": (0.0,),
    "llama.attention.sliding_window": (0,),
    "llama.attn_logit_softcapping": (0.0,),
    "llama.final_logit_softcapping": (0.0,),
    "llama.embedding_scale": (0.0, 1.0),
    "llama.residual_scale": (0.0, 1.0),
    "llama.logit_scale": (0.0, 1.0),
    "llama.expert_count": (0,),
    "llama.expert_used_count": (0,),
    "llama.leading_dense_block_count": (0,),
    "llama.nextn_predict_layers": (0,),
    "llama.use_parallel_residual": (False,),
    "llama.rope.scaling.attn_factor": (1.0,),
    "llama.rope.scaling.yarn_attn_factor": (1.0,),
    "llama.rope.scaling.yarn_ext_factor": (1.0,),
    "llama.rope.scaling.yarn_log_multiplier": (0.0,),
}
_REQUIRED = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
# Metadata that conversion reads below.
_READ = re.compile(
    r"llama\.(vocab_size|context_length|embedding_length|feed_forward_length|block_count"
    r"|attention\.(head_count|head_count_kv|key_length|value_length|scale|layer_norm_rms_epsilon)"
    r"|rope\.(dimension_count|freq_base|scale_linear)"
    r"|rope\.scaling\.(type|factor|original_context_length|yarn_beta_fast|yarn_beta_slow))"
    r"|tokenizer\.ggml\.(tokens|token_type|merges|add_(bos|eos)_token|(bos|eos|eot|eom)_token_id)"
    r"|tokenizer\.chat_template(\..+)?"
)
# Metadata that changes neither a token nor a logit. What is outside these two is refused.
_SILENT = re.compile(
    r"(?!llama\.|tokenizer\.).*|tokenizer\.(chat_templates|huggingface\.json|rwkv\.world)"
    r"|tokenizer\.ggml\.(scores|token_type_count|\w+_token_id)"
    r"|llama\.(tensor_data_layout|pooling_type|rope\.scaling\.finetuned)"
)
_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def convert_gguf(
    source: Path, directory: Path, *, on_tensor: Callable[[int], None] = lambda total: None
) -> None:
    """Write the model in a GGUF into an existing directory.

    `on_tensor(total)` is called after each tensor. Raises ModelLoadError naming what in the file is
    missing, or would change the computation and is not supported.
    """
    try:
        reader = GGUFReader(source)
    except (ValueError, OSError, IndexError) as error:
        raise ModelLoadError(
            f"{printable(source)} is not a GGUF: {reason(error, source)}"
        ) from None
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    try:
        _check_metadata(metadata)
        config = _config(metadata, {t.name: t for t in reader.tensors})
        _write_json(directory / "config.json", config)
        _write_tokenizer(directory, metadata, config)
        _write_weights(directory / "model.safetensors", reader, config, on_tensor)
    except KeyError as error:
        raise ModelLoadError(f"{printable(source)} has no {printable(error.args[0])}") from None
    except (ModelLoadError, NotImplementedError) as error:
        raise ModelLoadError(f"{printable(source)}: {printable(error)}") from None
    try:
        check_checkpoint(directory)
    except ModelLoadError as error:
        # The directory is gone by the time that its name would be read.
        said = str(error).replace(f"{directory}/model.safetensors", printable(source))
        raise ModelLoadError(said.replace(str(directory), printable(source))) from None


def _check_metadata(metadata: dict[str, Any]) -> None:
    """Refuse what would change the computation and is neither carried over nor without effect."""
    for name in _REQUIRED:
        metadata[name]
    for name, value in metadata.items():
        if name in _ONLY and value not in _ONLY[name]:
            raise ModelLoadError(
                f"{name}={printable(value)} is not supported; supported: {_ONLY[name][0]}"
            )
        if name not in _ONLY and not _READ.fullmatch(name) and not _SILENT.fullmatch(name):
            raise ModelLoadError(f"{printable(name)}={printable(value)} is not supported")
        if name.startswith("llama.") and isinstance(value, list):
            raise ModelLoadError(f"{printable(name)}: a value per layer is not supported")


def _config(metadata: dict[str, Any], tensors: dict[str, ReaderTensor]) -> dict[str, Any]:
    heads = metadata["llama.attention.head_count"]
    hidden = metadata["llama.embedding_length"]
    head_dim = metadata.get("llama.attention.key_length", hidden // heads)
    vocab_size = len(metadata["tokenizer.ggml.tokens"])
    if "token_embd.weight" in tensors:
        # Rows beyond the last token fill the matrix up to a round size.
        vocab_size = max(vocab_size, int(tensors["token_embd.weight"].shape[1]))
    for name, wanted in (
        ("llama.rope.dimension_count", head_dim),
        ("llama.attention.value_length", head_dim),
        ("llama.vocab_size", vocab_size),
    ):
        if metadata.get(name, wanted) != wanted:
            raise ModelLoadError(f"{name}={metadata[name]} is not supported; supported: {wanted}")
    scale = metadata.get("llama.attention.scale", 0.0)
    if scale and abs(scale * head_dim**0.5 - 1) > 1e-5:
        raise ModelLoadError(
            f"llama.attention.scale={scale:.6g} is not supported; supported: {head_dim**-0.5:.6g}"
        )
    flags = {
        flag: True
        for flag, part in (("attention_bias", "attn"), ("mlp_bias", "ffn"))
        if any(re.fullmatch(rf"blk\.\d+\.{part}_\w+\.bias", name) for name in tensors)
    }
    scaling = _rope_scaling(metadata)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata["llama.context_length"],
        # The file holds float32: 1e-5 comes back with seven true digits.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(metadata.get("llama.rope.freq_base", 10000.0)),
        **({"rope_scaling": scaling} if scaling else {}),
        **flags,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "bfloat16",
    }


def _rope_scaling(metadata: dict[str, Any]) -> dict[str, Any] | None:
    """config.json's words for how RoPE is stretched; a factor without a type is linear."""
    factor = metadata.get("llama.rope.scaling.factor", metadata.get("llama.rope.scale_linear", 0.0))
    kind = metadata.get("llama.rope.scaling.type", "linear" if factor else "none")
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if kind not in ("linear", "yarn"):
        raise ModelLoadError(
            f"llama.rope.scaling.type={printable(kind)} is not supported; "
            "supported: none, linear, yarn"
        )
    if not factor:
        raise ModelLoadError(f"llama.rope.scaling.type={kind} has no llama.rope.scaling.factor")
    scaling = {"rope_type": kind, "factor": float(f"{factor:.6g}")}
    if kind == "yarn":
        for theirs, ours in (
            ("original_context_length", "original_max_position_embeddings"),
            ("yarn_beta_fast", "beta_fast"),
            ("yarn_beta_slow", "beta_slow"),
        ):
            if f"llama.rope.scaling.{theirs}" in metadata:
                scaling[ours] = metadata[f"llama.rope.scaling.{theirs}"]
    return scaling


def _write_tokenizer(directory: Path, metadata: dict[str, Any], config: dict[str, Any]) -> None:
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    merges: list[tuple[str, str]] = []
    for line in metadata["tokenizer.ggml.merges"]:
        left, right = line.split(" ")
        merges.append((left, right))
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    whole = [t for t, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED_TOKEN]
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in whole])
    edges = {
        name: tokens[metadata[f"tokenizer.ggml.{name}_token_id"]]
        for name in ("bos", "eos")
        if metadata.get(f"tokenizer.ggml.add_{name}_token")
    }
    if edges:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*([edges["bos"]] if "bos" in edges else []), "$A"]
            + ([edges["eos"]] if "eos" in edges else []),
            special_tokens=[(token, vocabulary[token]) for token in set(edges.values())],
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    bos, eos = config["bos_token_id"], config["eos_token_id"]
    template = metadata.get("tokenizer.chat_template")
    named = {
        name.removeprefix("tokenizer.chat_template."): text
        for name, text in metadata.items()
        if name.startswith("tokenizer.chat_template.")
    }
    if named:
        all_templates = ({"default": template} if template else {}) | named
        template = [{"name": name, "template": text} for name, text in all_templates.items()]
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None if bos is None else tokens[bos],
            "eos_token": None if eos is None else tokens[eos],
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            "chat_template": template,
        },
    )
    # A chat turn ends with the template's token, a document with <|endoftext|>.
    others = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
    ends = [eos, *others, vocabulary.get("<|endoftext|>")]
    sampling = {ours: metadata[theirs] for theirs, ours in _SAMPLING.items() if theirs in metadata}
    _write_json(
        directory / "generation_config.json",
        {
            "bos_token_id": bos,
            "eos_token_id": list(dict.fromkeys(i for i in ends if i is not None)),
            **sampling,
        },
    )


def _write_weights(
    file: Path, reader: GGUFReader, config: dict[str, Any], on_tensor: Callable[[int], None]
) -> None:
    tensors = sorted((_name(t.name), t) for t in reader.tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors:
        # GGUF lists the fastest dimension first.
        shape = [int(size) for size in tensor.shape][::-1]
        size = 2 * int(tensor.n_elements)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    # Spaces after the header are allowed: the weights then begin on a cache line.
    text += b" " * (-(8 + len(text)) % 64)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            heads = {
                "q_proj": config["num_attention_heads"],
                "k_proj": config["num_key_value_heads"],
            }.get(name.split(".")[-2])
            for rows in _slices(tensor, whole=heads is not None):
                _write_bfloat16(stream, _halves_apart(rows, heads) if heads else rows)
            on_tensor(len(tensors))


def _name(gguf_name: str) -> str:
    parts = gguf_name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in _OUTER_NAMES:
        return f"{_OUTER_NAMES[parts[0]]}.{parts[1]}"
    raise ModelLoadError(f"GGUF tensor {printable(gguf_name)} has no place in the Llama layout")


def _slices(tensor: ReaderTensor, *, whole: bool) -> Iterator[Tensor]:
    """The tensor dequantised to float32, some rows at a time."""
    step = len(tensor.data) if whole else _SLICE_ROWS
    for row in range(0, len(tensor.data), step):
        yield torch.from_numpy(dequantize(tensor.data[row : row + step], tensor.tensor_type).copy())


def _halves_apart(rows: Tensor, heads: int) -> Tensor:
    """Row order of each head from (a0, b0, a1, b1, ...) to (a0, a1, ..., b0, b1, ...)."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _write_bfloat16(stream: BinaryIO, rows: Tensor) -> None:
    stream.write(rows.bfloat16().contiguous().view(torch.uint8).numpy().data)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
