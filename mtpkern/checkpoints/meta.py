"""Meta's multi-token-prediction checkpoints -> config.json and safetensors as Hugging Face's.

    params.json        sizes; n_layers includes the heads' layers, n_future_tokens counts the heads
    consolidated.pth   tok_embeddings, layers.*, extra_heads.*, norm, output
    tokenizer.model    SentencePiece, copied if present

Every head takes the hidden state before the trunk's last layer, which is head 0 (Gloeckle et al.
2024, section 2). They share the final norm and the output matrix. Meta's RoPE rotates neighbouring
dimensions, Hugging Face's rotates halves, so the rows of q and k are reordered.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mtpkern.checkpoints.json_files import read_json_object, write_json
from mtpkern.errors import ModelLoadError, printable
from mtpkern.outputs import writing

_PARTS = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTER = {
    "tok_embeddings": "model.embed_tokens",
    "output": "lm_head",
    "norm": "model.mtp_norms.0",
}
_LAYER = re.compile(r"(layers|extra_heads)\.(\d+)\.(.+)\.weight")


def convert_meta(tensors: Mapping[str, Tensor], directory: Path, file: Path) -> None:
    """Write the model of `tensors`, which were read from `file`, into `directory`."""
    params = read_json_object(file.with_name("params.json"))
    try:
        num_heads, hidden_size = params["n_heads"], params["dim"]
        prediction_heads = params["n_future_tokens"]
        head_dim = hidden_size // num_heads
        renamed = {}
        for name, tensor in tensors.items():
            if m := _LAYER.fullmatch(name):
                group = "layers" if m[1] == "layers" else "mtp_heads"
                if m[3] in ("attention.wq", "attention.wk"):
                    tensor = _deinterleaved(tensor, head_dim)
                renamed[f"model.{group}.{m[2]}.{_PARTS[m[3]]}.weight"] = tensor.contiguous()
            elif name != "rope.freqs":
                renamed[f"{_OUTER[name.removesuffix('.weight')]}.weight"] = tensor.contiguous()
        for i in range(1, prediction_heads):
            renamed[f"model.mtp_norms.{i}.weight"] = tensors["norm.weight"].clone()
        config = {
            "architectures": ["MTPLlamaForCausalLM"],
            "model_type": "mtp_llama",
            "prediction_heads": prediction_heads,
            "vocab_size": len(tensors["tok_embeddings.weight"]),
            "hidden_size": hidden_size,
            "intermediate_size": len(tensors["layers.0.feed_forward.w1.weight"]),
            "num_hidden_layers": params["n_layers"] - prediction_heads + 1,
            "num_attention_heads": num_heads,
            "num_key_value_heads": params.get("n_kv_heads") or num_heads,
            "rms_norm_eps": params.get("norm_eps", 1e-5),
            "rope_theta": params.get("rope_theta", 10000.0),
            "max_position_embeddings": params.get("max_seq_len", 4096),
            "tie_word_embeddings": False,
            "torch_dtype": str(tensors["output.weight"].dtype).removeprefix("torch."),
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    except (KeyError, TypeError) as error:
        raise ModelLoadError(
            f"{printable(file)} and its params.json are not a model of Meta's: {printable(error)}"
        ) from None
    with writing(directory / "model.safetensors"):
        save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
    write_json(directory / "config.json", config)
    tokenizer = file.with_name("tokenizer.model")
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, directory / tokenizer.name)


def _deinterleaved(w: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of each head [H * D, E]: even rows first, then odd rows."""
    return w.view(-1, head_dim // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
