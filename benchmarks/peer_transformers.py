"""The same weights in transformers: eager, greedy, batch 1, with a static cache."""

import time

import torch
from transformers import AutoModelForCausalLM, StaticCache
from transformers.utils import logging

from mtpkern.fetch import resolve_model


class Peer:
    """A loaded model, with the leanest decode loop around its forward that its API permits."""

    def __init__(self, model: str | None, dtype: torch.dtype):
        logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(resolve_model(model), dtype=dtype).eval()

    @torch.inference_mode()
    def decode(self, prompt: list[int], count: int) -> tuple[int, float]:
        """Decode `count` tokens after a prompt -> (tokens, seconds without the prompt's)."""
        cache = StaticCache(config=self.model.config, max_cache_len=len(prompt) + count)
        if len(prompt) > 1:
            self.model(torch.tensor([prompt[:-1]]), past_key_values=cache, logits_to_keep=1)
        token = torch.tensor([prompt[-1:]])
        started = time.perf_counter()
        for _ in range(count):
            logits = self.model(token, past_key_values=cache, logits_to_keep=1).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
        return count, time.perf_counter() - started
