"""Slow definitions of the sequential drafters, and a recorder of what the fast ones draft."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.checkpoints.directory import load_tensors
from mtpkern.checkpoints.hf_config import read_hf_config
from mtpkern.drafters.ngram import CompanionDrafter
from mtpkern.engine import LLM
from mtpkern.kernels.rms_norm import rms_norm_ref
from mtpkern.ops.cpu import CpuOps

# A prompt that repeats itself.
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12] * 3


class Recorder:
    """Wraps a drafter and records known tokens -> drafts, and the drafts' logits."""

    def __init__(self, inner: Any):
        self.inner, self.taps, self.parallel_heads = inner, inner.taps, inner.parallel_heads
        self.drafted: list[tuple[list[int], list[int]]] = []
        self.seen: list[tuple[list[int], list[int], Tensor]] = []  # logits [drafts, vocabulary]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def guess(self, step: Any, count: int) -> Any:
        batch, rows = step.tokens.shape[0], []

        def kept(cpu: Any, *arguments: Any) -> Any:
            projected = project(cpu, *arguments)
            rows.append(projected[1].logits.clone())
            return projected

        project = CpuOps.project_rows
        # What drafts are chosen from; a chain in one call keeps no logits, and drafts the same
        # tokens (test_draft_chain.py).
        with (
            mock.patch.object(CpuOps, "project_rows", kept),
            mock.patch.object(CpuOps, "draft_chain", lambda *_: None),
        ):
            drafts = self.inner.guess(step, count)
        logits = torch.cat([row.view(batch, -1, row.shape[1]) for row in rows], 1)
        for b in range(batch):
            if step.advance[b]:
                known = step.tokens[b, : int(step.lengths[b]) + 1].tolist()
                num_proposed = int(torch.as_tensor(drafts.num_proposed).expand(batch)[b])
                proposed = drafts.tokens[b, :num_proposed].tolist()
                self.drafted.append((known, proposed))
                self.seen.append((known, proposed, logits[b]))
        return drafts


def trunk_states(directory: Path, tokens: list[int]) -> list[Tensor]:
    """Hidden states [S, E] after each layer, the last one normed, by a slow float32 forward."""
    config, w = read_hf_config(directory), load_tensors(directory)
    x = w["model.embed_tokens.weight"][tokens]
    states = []
    for i in range(config.num_layers):
        named = {
            name.removeprefix(f"model.layers.{i}."): tensor
            for name, tensor in w.items()
            if name.startswith(f"model.layers.{i}.")
        }
        sizes = (config.num_heads, config.num_kv_heads, config.head_dim, config.rope.theta)
        x = slow_layer(x, named, *sizes)
        states.append(x)
    states[-1] = rms_norm_ref(states[-1], w["model.norm.weight"], 1e-5)
    return states


def slow_mimo_layer(hidden: Tensor, tokens: Tensor, w: dict[str, Tensor]) -> Tensor:
    """A MiMo's MTP layer of llama_layouts, by its definition: states and embeddings [S, E] of the
    pairs of a sequence -> its states before the final norm. The first embedding counts as zeros."""
    tokens = tokens.clone()
    tokens[0] = 0
    pair = [
        rms_norm_ref(hidden, w["hidden_layernorm.weight"], 1e-5),
        rms_norm_ref(tokens, w["token_layernorm.weight"], 1e-5),
    ]
    return slow_layer(torch.cat(pair, -1) @ w["input_proj.weight"].T, w, 4, 2, 12, 10000.0)


def slow_layer(
    x: Tensor, w: dict[str, Tensor], heads: int, kv_heads: int, head_dim: int, theta: float
) -> Tensor:
    """One Llama layer over a whole sequence x [S, E], in float32."""
    count = x.shape[0]
    inner = rms_norm_ref(x, w["input_layernorm.weight"], 1e-5)
    q, k, v = (
        (inner @ w[f"self_attn.{name}_proj.weight"].T + w.get(f"self_attn.{name}_proj.bias", 0))
        .view(count, -1, head_dim)
        .transpose(0, 1)
        for name in "qkv"
    )
    angle = torch.arange(count)[:, None] / theta ** (torch.arange(0, head_dim, 2) / head_dim)
    cos, sin = angle.cos(), angle.sin()

    def rotate(t: Tensor) -> Tensor:
        a, b = t.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (rotate(k), v))
    scores = rotate(q) @ k.transpose(1, 2) / head_dim**0.5
    scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), float("-inf"))
    out = (scores.softmax(-1) @ v).transpose(0, 1).reshape(count, -1)
    x = x + out @ w["self_attn.o_proj.weight"].T
    inner = rms_norm_ref(x, w["post_attention_layernorm.weight"], 1e-5)
    gate, up = (inner @ w[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T


def eagle3_layer(
    hidden: Tensor, token: Tensor, w: dict[str, Tensor], *, norm_first: bool = False
) -> Tensor:
    """The head's layer over all pairs [S, E], in float32, without a cache."""
    count, heads, kv_heads, D = len(hidden), 4, 2, 12
    names = ("input_layernorm", "hidden_norm")
    halves = [
        rms_norm_ref(half, w[f"midlayer.{name}.weight"], 1e-5)
        for half, name in zip((token, hidden), names, strict=True)
    ]
    x = torch.cat(halves, -1)
    q, k, v = (
        (x @ w[f"midlayer.self_attn.{name}_proj.weight"].T).view(count, -1, D).transpose(0, 1)
        for name in "qkv"
    )
    angle = torch.arange(count)[:, None] / 500.0 ** (torch.arange(0, D, 2) / D)
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotate(t: Tensor) -> Tensor:
        turned = torch.complex(*t.chunk(2, -1)) * turn
        return torch.cat([turned.real, turned.imag], -1)

    k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (rotate(k), v))
    out = F.scaled_dot_product_attention(rotate(q), k, v, is_causal=True)
    residual = halves[1] if norm_first else hidden
    x = residual + out.transpose(0, 1).reshape(count, -1) @ w["midlayer.self_attn.o_proj.weight"].T
    inner = rms_norm_ref(x, w["midlayer.post_attention_layernorm.weight"], 1e-5)
    gate, up = (inner @ w[f"midlayer.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["midlayer.mlp.down_proj.weight"].T


def watch(llm: LLM) -> Recorder:
    """Put a recorder before an LLM's heads."""
    if isinstance(llm.drafter, CompanionDrafter):
        llm.drafter.drafter = recorder = Recorder(llm.drafter.drafter)
    else:
        llm.drafter = recorder = Recorder(llm.drafter)
    return recorder


def agree(draft: int, logits: Tensor, expected: Tensor, ids: Tensor | None = None) -> None:
    """Assert that a draft and its logits [Vd] are as expected; row i is of token ids[i]."""
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    row = int(expected.argmax())
    assert draft == (row if ids is None else ids[row])
