"""What callers pass to LLM: prompts of three kinds, one or many, and parameters for each."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch

from mtpkern.config import SamplingParams
from mtpkern.errors import UserError, counted
from mtpkern.request import EncodedPrompt
from mtpkern.tokenizer import Tokenizer
from mtpkern.validation import integer, shown

# Bits of a seed that we draw ourselves: JSON readers keep integers of this size exactly.
SEED_BITS = 53

# A message's content is text, or a list of parts {"type": "text", "text": ...}.
Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]


class Job(NamedTuple):
    """One completion to generate, number `completion_index` of its prompt's `params.n`."""

    prompt: EncodedPrompt
    params: SamplingParams
    completion_index: int


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages."""
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, from one prompt or several; UserError for anything else."""
    if isinstance(prompts, torch.Tensor | np.ndarray):
        prompts = prompts.tolist()
    if isinstance(prompts, Mapping):
        raise UserError(f"messages go in a list: [message], got one message {shown(prompts)}")
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise UserError(
            "prompts must be text, token ids, a list of messages, or a list of these, "
            f"got {shown(prompts)}"
        )
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) and isinstance(prompts[0], Integral | Mapping):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def encode_prompt(
    prompt: Prompt,
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    model: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    continue_final_message: bool | str = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt, at least one, all in 0..vocab_size - 1; see `LLM.encode`.

    `model` is the name that error messages show. Raises UserError.
    """
    given = chat_template_kwargs or {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise UserError(f"chat_template_kwargs must have names as keys, got {shown(given)}")
    chat = dict(given)
    for name, value in (
        ("tools", tools),
        ("documents", documents),
        ("continue_final_message", continue_final_message or None),
    ):
        if value is not None:
            chat[name] = value
    if isinstance(prompt, torch.Tensor | np.ndarray):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise UserError(
            f"a prompt must be text, token ids or a list of messages, got {shown(prompt)}"
        )
    if not len(prompt):
        raise UserError("the prompt is empty")
    if chat and not is_chat(prompt):
        raise UserError(f"{sorted(chat)[0]} needs a prompt of chat messages")
    if not isinstance(prompt, str) and not is_chat(prompt):
        return [integer("a token id", i, 0, vocab_size - 1) for i in prompt]
    if tokenizer is None:
        raise UserError(f"{model} has no tokenizer: prompts must be token ids")
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    else:
        ids = tokenizer.apply_chat_template(prompt, **chat)  # type: ignore[arg-type]
    if not ids:
        raise UserError("the prompt is empty")
    if max(ids) >= vocab_size:
        raise UserError(f"token ids must be in 0..{vocab_size - 1}")
    return ids


def plan_jobs(
    prompts: Sequence[EncodedPrompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[Job]:
    """The completions to generate, in order; those of one prompt share a seed.

    `params` are for all prompts, or a list of one for each. Raises UserError.
    """
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(prompts)
    wanted = "params must be SamplingParams, or a list of one for each prompt, got"
    if not isinstance(params, list | tuple):
        raise UserError(f"{wanted} {shown(params)}")
    if strange := [one for one in params if not isinstance(one, SamplingParams)]:
        raise UserError(f"{wanted} a list that holds {shown(strange[0])}")
    if len(params) != len(prompts):
        raise UserError(f"{wanted} {len(params)} for {counted(len(prompts), 'prompt')}")
    jobs = []
    for prompt, one in zip(prompts, params, strict=True):
        if one.seed is None and one.temperature > 0:
            one = replace(one, seed=secrets.randbits(SEED_BITS))
        jobs += [Job(prompt, one, index) for index in range(one.n)]
    return jobs
