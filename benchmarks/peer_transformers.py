"""The same weights in transformers: greedy, batch 1, with a static cache, eager or compiled."""

import time

import torch
from transformers import AutoModelForCausalLM, StaticCache
from transformers.utils import logging

from mtpkern.fetch import resolve_model

# Prompts and answers of all lengths share a cache of this size, so that one compilation serves.
CACHE = 2048


class Peer:
    """A loaded model, with the leanest decode loop around its forward that its API permits."""

    def __init__(self, model: str | None, dtype: torch.dtype, device: torch.device):
        logging.disable_progress_bar()
        loaded = AutoModelForCausalLM.from_pretrained(resolve_model(model), dtype=dtype)
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
