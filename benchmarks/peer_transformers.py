"""The same weights in transformers: greedy, batch 1, with a static cache, eager or compiled."""

import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, StaticCache
from transformers.utils import logging

from mtpkern.checkpoints.directory import load_tensors
from mtpkern.checkpoints.resolve import resolve_model
from mtpkern.errors import UserError

# Prompts and answers of all lengths share a cache of this size, so that one compilation serves.
CACHE = 2048


def load(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A checkpoint in transformers; its weights may be in a GGUF."""
    config = AutoConfig.from_pretrained(directory)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    missing = model.load_state_dict(load_tensors(directory), strict=False).missing_keys
    if set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set()):
        raise UserError(f"{directory} does not fit transformers: it has no {', '.join(missing)}")
    return model


class Peer:
    """A loaded model, with the leanest decode loop around its forward that its API permits."""

    def __init__(self, model: str | None, dtype: torch.dtype, device: torch.device):
        logging.disable_progress_bar()
        loaded = load(resolve_model(model), dtype)
        self.model, self.device = loaded.eval().to(device), device
        self.compiled = torch.compile(self.model, mode="reduce-overhead", fullgraph=True)

    @torch.inference_mode()
    def decode(self, prompt: list[int], count: int, *, compiled: bool = False) -> tuple[int, float]:
        """Decode `count` tokens after a prompt -> (tokens, seconds without the prompt's)."""
        size = CACHE if compiled else len(prompt) + count
        cache = StaticCache(config=self.model.config, max_cache_len=size)
        if len(prompt) > 1:
            known = torch.tensor([prompt[:-1]], device=self.device)
            self.model(known, past_key_values=cache, logits_to_keep=1)
        step = self.compiled if compiled else self.model
        token = torch.tensor([prompt[-1:]], device=self.device)
        started = time.perf_counter()
        for _ in range(count):
            logits = step(token, past_key_values=cache, logits_to_keep=1).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
        token.item()  # a GPU's time ends when the last token is there
        return count, time.perf_counter() - started
