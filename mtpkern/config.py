"""Configuration values: what a model is (`ModelConfig`), what a request asks for
(`SamplingParams`).

checkpoints/hf_config.py reads a ModelConfig from a checkpoint's config.json.
"""

from dataclasses import dataclass, field, fields
from typing import Any

import torch

from mtpkern.errors import UserError
from mtpkern.rope import RopeConfig
from mtpkern.validation import choice, flag, integer, real, shown

MAX_SPECULATIVE_TOKENS = 16
MAX_COMPLETIONS = 1 << 14
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes (V, E, F, L, Hq, Hk, D, in the order of the fields) and settings of one model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    dtype: torch.dtype | None  # None if neither config.json nor a weight states one
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    model_type: str = "llama"
    qk_norm: bool = False  # RMS norm of each head of q and k before RoPE
    sliding_window: int = 0  # positions that a token attends to, its own included; 0 for all
    # One line for each setting of the checkpoint's files that is ignored or overridden.
    remarks: tuple[str, ...] = field(default=(), compare=False)


def resolve_dtype(name: str | torch.dtype, config: ModelConfig) -> torch.dtype:
    """The torch dtype for a user's choice: one of DTYPES, by name or as torch.dtype, or "auto".

    "auto" is the checkpoint's dtype, or float32 if the checkpoint has none.
    """
    name = dtype_name(name)
    return (config.dtype or torch.float32) if name == "auto" else DTYPES[name]


def dtype_name(dtype: str | torch.dtype) -> str:
    """A user's choice of a dtype by name: "auto" or one of DTYPES."""
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    return choice("dtype", name, ("auto", *DTYPES))


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded. Names and meanings are vLLM's.

    `temperature=0` is greedy decoding. 0 disables `top_k` and `min_p`, 1 disables `top_p`.
    `n` completions are drawn per prompt. A seed gives a prompt the same completions in every run,
    independently of the rest of the batch, and different prompts different noise; without a seed
    each prompt draws a fresh one, which is reported on its completions.

    `stop` strings end the text; they may spell special tokens, although the text omits those.
    `stop_token_ids` end it as the end-of-text tokens do, which `ignore_eos` disables.
    `include_stop_str_in_output` keeps the stop string or token in the text. Before `min_tokens`
    tokens, end-of-text tokens and `stop_token_ids` are masked and stop strings are not matched.

    Numbers may be numpy's. Raises UserError for a value of the wrong type or out of range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    n: int = 1

    def __new__(cls, *args: Any, **given: Any) -> "SamplingParams":
        # The generated __init__ would report an unknown name without listing the known ones.
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise UserError(f"{name} is not supported; supported: {', '.join(known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        checked = {
            "stop": _stop_strings(self.stop),
            "stop_token_ids": _stop_token_ids(self.stop_token_ids),
            "max_tokens": (most := integer("max_tokens", self.max_tokens, 1, 2**31 - 1)),
            "min_tokens": integer("min_tokens", self.min_tokens, 0, most),
            "top_k": integer("top_k", self.top_k, 0, 2**31 - 1),
            "seed": None if self.seed is None else integer("seed", self.seed, 0, 2**63 - 1),
            "n": integer("n", self.n, 1, MAX_COMPLETIONS),
            "temperature": real("temperature", self.temperature, 0.0, 1e4),
            "min_p": real("min_p", self.min_p, 0.0, 1.0),
            "top_p": real("top_p", self.top_p, 0.0, 1.0),
            "logprobs": flag("logprobs", self.logprobs),
            "ignore_eos": flag("ignore_eos", self.ignore_eos),
            "include_stop_str_in_output": flag(
                "include_stop_str_in_output", self.include_stop_str_in_output
            ),
        }
        if checked["top_p"] == 0:
            raise UserError("top_p must be above 0 and at most 1, got 0")
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.n > 1 and self.temperature == 0:
            raise UserError(f"n must be 1 at temperature 0, where all are the same, got {self.n}")


def _stop_strings(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    texts = (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, list | tuple) or any(not isinstance(s, str) or not s for s in texts):
        raise UserError(f"stop must be non-empty strings, got {shown(stop)}")
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise UserError("stop must be valid Unicode, got a lone surrogate")
    return tuple(texts)


def _stop_token_ids(ids: Any) -> tuple[int, ...]:
    if ids is None:
        return ()
    if not isinstance(ids, list | tuple):
        raise UserError(f"stop_token_ids must be a list of token ids, got {shown(ids)}")
    return tuple(integer("stop_token_ids", token_id, 0, 2**31 - 1) for token_id in ids)
