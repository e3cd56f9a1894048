"""The oracle: a Llama-style model computed in the plainest way, against which the rest is tested.

Every new token is computed from the whole sequence, without cache, batch, fused weights or kernels.
Nothing is shared with the model and the operations that are tested against this file: it uses
torch and the checkpoint's tensors alone. It is slow on purpose.

    x = embedding[token_ids]
    per layer:  x += attention(norm(x)) Wo;   x += (silu(norm(x) Wgate) * norm(x) Wup) Wdown
    logits = norm(x) embedding or lm_head
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtpkern.checkpoints.llama import final_norm
from mtpkern.config import ModelConfig

Tensors = Mapping[str, Tensor]


def logits(
    config: ModelConfig,
    tensors: Tensors,
    token_ids: Tensor | Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Logits of every next token: token_ids [S] -> [S, V] in `dtype`.

    `tensors` are the checkpoint's, as `checkpoints.directory.load_tensors` returns them. Norms,
    RoPE and softmax run in float32, or in `dtype` if it is wider: float64 gives the truth that
    float32 is measured against.
    """
    wide = torch.promote_types(dtype, torch.float32)

    def linear(x: Tensor, name: str, bias: bool) -> Tensor:
        y = x @ tensors[f"{name}.weight"].to(dtype).T
        return y + tensors[f"{name}.bias"].to(dtype) if bias else y

    def norm(x: Tensor, name: str) -> Tensor:
        mean_square = x.to(wide).square().mean(dim=-1, keepdim=True)
        unit = x.to(wide) / (mean_square + config.rms_norm_eps).sqrt()
        return unit.to(dtype) * tensors[f"{name}.weight"].to(dtype)

    ids = torch.as_tensor(token_ids, dtype=torch.int64)
    embedding = tensors["model.embed_tokens.weight"]
    x = embedding[ids].to(dtype)
    S, D = len(ids), config.head_dim
    group = config.num_heads // config.num_kv_heads
    frequencies, scaling = config.rope.inverse_frequencies(D)
    angles = torch.arange(S, dtype=wide)[:, None] * frequencies.to(wide)
    hidden = torch.ones(S, S, dtype=torch.bool).triu(diagonal=1)
    if config.sliding_window:
        hidden |= torch.ones(S, S, dtype=torch.bool).tril(diagonal=-config.sliding_window)

    for layer in range(config.num_layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"

        h = norm(x, f"model.layers.{layer}.input_layernorm")
        q = linear(h, f"{attention}.q_proj", config.qkv_bias).view(S, -1, D)
        k = linear(h, f"{attention}.k_proj", config.qkv_bias).view(S, -1, D)
        v = linear(h, f"{attention}.v_proj", config.qkv_bias).view(S, -1, D)
        if config.qk_norm:
            q, k = norm(q, f"{attention}.q_norm"), norm(k, f"{attention}.k_norm")
        q, k = _rotate(q.to(wide), angles, scaling), _rotate(k.to(wide), angles, scaling)
        heads = []
        for head in range(config.num_heads):
            scores = q[:, head] @ k[:, head // group].T * D**-0.5
            weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
            heads.append(weights @ v[:, head // group].to(wide))
        h = torch.cat(heads, dim=-1).to(dtype)
        x = x + linear(h, f"{attention}.o_proj", config.o_bias)

        h = norm(x, f"model.layers.{layer}.post_attention_layernorm")
        gate = linear(h, f"{mlp}.gate_proj", config.mlp_bias)
        up = linear(h, f"{mlp}.up_proj", config.mlp_bias)
        gated = (gate.to(wide) * gate.to(wide).sigmoid()).to(dtype) * up
        x = x + linear(gated, f"{mlp}.down_proj", config.mlp_bias)

    output = embedding if config.tie_word_embeddings else tensors["lm_head.weight"]
    return norm(x, final_norm(config).removesuffix(".weight")) @ output.to(dtype).T


def generate(
    config: ModelConfig,
    tensors: Tensors,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> list[int]:
    """Continue `prompt` greedily by at most `max_tokens` token ids; ties go to the lowest id.

    Generation stops after a token in `config.eos_token_ids`, which is returned too.
    """
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        last = logits(config, tensors, [*prompt, *tokens], dtype=dtype)[-1]
        tokens.append(int(last.argmax()))
        if tokens[-1] in config.eos_token_ids:
            break
    return tokens


def _rotate(x: Tensor, angles: Tensor, scaling: float) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) by its position's angle: x [S, H, D], angles [S, D/2]."""
    cos, sin = angles.cos()[:, None] * scaling, angles.sin()[:, None] * scaling
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
