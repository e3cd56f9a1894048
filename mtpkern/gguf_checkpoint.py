"""GGUF -> safetensors, config.json and tokenizer.json: the Llama layout with a byte-level BPE.

Weights are dequantised a slice at a time and written as bfloat16, so that conversion needs little
more memory than its largest slice. What has to come out right: GGUF stores the rows of Q and K with
the two halves of each head interleaved, and Hugging Face's RoPE wants them apart.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from mtpkern.config import ModelLoadError, printable

_SLICE_ROWS = 4096
_CONTROL_TOKEN = 3  # GGUF's token type for special tokens
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


def convert_gguf(
    source: Path, directory: Path, *, on_tensor: Callable[[int], None] = lambda total: None
) -> None:
    """Write the model in a GGUF into an existing directory; `on_tensor` hears of each tensor.

    It is called with the number of all tensors whenever one is written.
    """
    try:
        reader = GGUFReader(source)
    except (ValueError, OSError, IndexError) as error:
        raise ModelLoadError(f"{printable(source)} is not a GGUF: {printable(error)}") from None
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    for name, wanted in (
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "smollm"),
    ):
        if metadata.get(name) != wanted:
            raise ModelLoadError(
                f"{printable(source)}: {name}={printable(metadata.get(name))} is not supported; "
                f"supported: {wanted}"
            )
    try:
        config = _config(metadata, tied=all(t.name != "output.weight" for t in reader.tensors))
        _write_json(directory / "config.json", config)
        _write_tokenizer(directory, metadata, config)
        _write_weights(directory / "model.safetensors", reader, config, on_tensor)
    except KeyError as error:
        raise ModelLoadError(f"{printable(source)} has no {printable(error)}") from None


def _config(metadata: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    heads = metadata["llama.attention.head_count"]
    hidden = metadata["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "max_position_embeddings": metadata["llama.context_length"],
        # The file holds float32: 1e-5 comes back with seven true digits.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(metadata["llama.rope.freq_base"]),
        "tie_word_embeddings": tied,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "bfloat16",
    }


def _write_tokenizer(directory: Path, metadata: dict[str, Any], config: dict[str, Any]) -> None:
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
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
    tokenizer.save(str(directory / "tokenizer.json"))
    bos, eos = config["bos_token_id"], config["eos_token_id"]
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[bos],
            "eos_token": tokens[eos],
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            "chat_template": metadata.get("tokenizer.chat_template"),
        },
    )
    # A chat turn ends with the template's token, a document with <|endoftext|>.
    ends = [eos] + [i for i in [vocabulary.get("<|endoftext|>")] if i not in (None, eos)]
    _write_json(directory / "generation_config.json", {"bos_token_id": bos, "eos_token_id": ends})


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
