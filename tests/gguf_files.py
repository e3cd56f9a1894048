"""Small GGUFs with random weights, written with the library gguf."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from conftest import TINY_CONFIG, tiny_tensors
from gguf import GGMLQuantizationType as Kind
from tokenizers import pre_tokenizers

from mtpkern.checkpoints.gguf import describe_gguf

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["th", "the"]
# The model of `write_gguf`.
CONFIG = TINY_CONFIG | {"vocab_size": len(TOKENS), "hidden_size": 64, "intermediate_size": 96}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 2}
# The model of `write_model`, whose rows hold whole blocks of every type.
WIDE_CONFIG = TINY_CONFIG | {
    "vocab_size": len(TOKENS),
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
FLOATS = {Kind.F32: np.float32, Kind.F16: np.float16}
# Types that the gguf package only dequantises: bytes per block, offsets of its fp16 scales, and
# their mean size, for values of about 0.06.
MADE_UP = {
    Kind.Q6_K: (210, (208,), 5e-5),
    Kind.Q4_K: (144, (0, 2), 3e-4),
    Kind.Q5_K: (176, (0, 2), 1.5e-4),
}

Change = Callable[[gguf.GGUFWriter], None]


def write_gguf(path: Path, *, pre: str = "smollm", change: Change = lambda writer: None) -> Path:
    """A small GGUF with the weights of tiny_tensors, quantised to Q4_1 where it is a layer's.

    `change` may alter the writer before the file is written.
    """

    def kind(name: str) -> Kind:
        return Kind.Q4_1 if name.startswith("model.layers.") else Kind.F32

    writer = gguf.GGUFWriter(path, "llama")
    add_sizes(writer, CONFIG)
    writer.add_rope_freq_base(1e5)
    add_tokens(writer, pre=pre)
    writer.add_bos_token_id(1)
    writer.add_chat_template("{{ messages[0].content }}")
    add_weights(writer, tiny_tensors(CONFIG), kind, CONFIG)
    change(writer)
    write(writer)
    return path


def write_model(
    directory: Path,
    kind: Kind | Callable[[str], Kind],
    *,
    arch: str = "llama",
    tied: bool = True,
    change: Change = lambda writer: None,
    damage: Callable[[str, np.ndarray], None] = lambda name, data: None,
) -> dict[str, torch.Tensor]:
    """Write model.gguf with its config.json and tokenizer -> what its tensors represent.

    `kind` is the type of each matrix, by its name. `damage` may change a matrix's bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = WIDE_CONFIG | {"tie_word_embeddings": tied}
    writer = gguf.GGUFWriter(directory / "model.gguf", arch)
    add_sizes(writer, config)
    writer.add_key_length(head_dim(config))
    add_tokens(writer)
    found = add_weights(writer, model_tensors(arch, config), kind, config, damage=damage)
    change(writer)
    write(writer)
    describe_gguf(directory / "model.gguf", directory)
    return found


def model_tensors(arch: str, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Float32 tensors under Hugging Face's names, with those added by the architecture."""
    tensors = tiny_tensors(dict(config))
    generator = torch.Generator().manual_seed(1)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}.self_attn."
        if arch == "qwen2":
            for name in "qkv":
                rows = len(tensors[f"{at}{name}_proj.weight"])
                tensors[f"{at}{name}_proj.bias"] = torch.randn(rows, generator=generator)
        if arch == "qwen3":
            for name in "qk":
                norm = 1 + torch.randn(head_dim(config), generator=generator) / 10
                tensors[f"{at}{name}_norm.weight"] = norm
    return tensors


def head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def add_sizes(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_context_length(256)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def add_tokens(writer: gguf.GGUFWriter, *, pre: str = "smollm") -> None:
    """TOKENS as a byte-level BPE."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(2)


def add_weights(
    writer: gguf.GGUFWriter,
    tensors: Mapping[str, torch.Tensor],
    kind: Kind | Callable[[str], Kind],
    config: Mapping[str, Any],
    *,
    damage: Callable[[str, np.ndarray], None] = lambda name, data: None,
) -> dict[str, torch.Tensor]:
    """Add tensors under GGUF's names -> what they represent, under Hugging Face's."""
    found = {}
    for name, tensor in tensors.items():
        stem, _, what = name.rpartition(".")
        if stem in OUTER_NAMES:
            theirs = f"{OUTER_NAMES[stem]}.{what}"
        else:
            _, _, layer, inner = stem.split(".", 3)
            theirs = f"blk.{layer}.{NAMES[inner]}.{what}"
        own = kind if isinstance(kind, Kind) else kind(name)
        data = values = tensor.numpy()
        if tensor.ndim == 2:
            data = stored(values, own)
            values = data if own in FLOATS else gguf.dequantize(data, own)
            damage(name, data)
        found[name] = torch.from_numpy(values.astype(np.float32))
        heads = {
            "q_proj": config["num_attention_heads"],
            "k_proj": config["num_key_value_heads"],
        }.get(stem.rpartition(".")[2])
        if heads and writer.arch == "llama":
            # Row i of the first half of a head, then row i of its second half.
            rows = np.arange(len(data)).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
            data = data[rows]
        quantised = tensor.ndim == 2 and own not in FLOATS
        writer.add_tensor(theirs, data, raw_dtype=own if quantised else None)
    return found


def stored(values: np.ndarray, kind: Kind) -> np.ndarray:
    """A matrix as stored in a file; random blocks for types that the package cannot quantise."""
    if kind in FLOATS:
        return values.astype(FLOATS[kind])
    if kind not in MADE_UP:
        return gguf.quantize(values, kind)
    size, scales, mean = MADE_UP[kind]
    generator = np.random.default_rng(len(values))
    blocks = generator.integers(0, 256, (len(values), values.shape[1] // 256, size), np.uint8)
    for at in scales:
        d = generator.choice([-1, 1], blocks.shape[:2]) * generator.uniform(
            mean / 2, mean * 1.5, blocks.shape[:2]
        )
        d = d.astype(np.float16)
        blocks[:, :, at : at + 2] = d[..., None].view(np.uint8).reshape(*d.shape, 2)
    return blocks.reshape(len(values), -1)


def write(writer: gguf.GGUFWriter) -> None:
    """Write the file and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
