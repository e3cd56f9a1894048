"""Small GGUFs with random weights, written with the library gguf."""

import gguf
import numpy as np
import torch
from conftest import TINY_CONFIG, tiny_tensors
from tokenizers import pre_tokenizers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


TOKENS = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["th", "the"]


CONFIG = TINY_CONFIG | {"vocab_size": len(TOKENS), "hidden_size": 64, "intermediate_size": 96}


CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 2}


NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(rows, heads):
    """The row order that GGUF keeps Q and K in: the halves of each head taken alternately."""
    a, b = rows.reshape(heads, 2, -1, rows.shape[1]).unbind(1)
    return torch.stack((a, b), dim=2).reshape(rows.shape)


def write_gguf(path, *, pre="smollm", change=lambda writer: None):
    """A small GGUF with the weights of tiny_tensors, quantised to Q4_1 where it is a layer's.

    `change` may alter the writer before the file is written.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_block_count(3)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    for name, tensor in tiny_tensors(CONFIG).items():
        parts = name.removeprefix("model.").split(".")
        if parts[0] == "layers":
            inner = NAMES[".".join(parts[2:-1])]
            name = f"blk.{parts[1]}.{inner}.weight"
            heads = {"attn_q": 4, "attn_k": 2}.get(inner)
            tensor = interleaved(tensor, heads) if heads else tensor
        else:
            name = {"embed_tokens": "token_embd", "norm": "output_norm"}[parts[0]] + ".weight"
        data = tensor.numpy().astype(np.float32)
        if data.ndim == 2 and name.startswith("blk."):
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
