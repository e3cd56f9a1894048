"""What training needs of the frozen model beside its answers."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mtpkern.checkpoints.directory import load_tensors
from mtpkern.checkpoints.llama import fingerprint, load_config
from mtpkern.checkpoints.resolve import resolve_model
from mtpkern.config import ModelConfig
from mtpkern.status import Status


class Frozen(NamedTuple):
    """The model's identity and sizes, and the matrices through which heads read and draft."""

    directory: Path
    fingerprint: str
    config: ModelConfig
    embedding: Tensor  # [V, E]
    lm_head: Tensor  # [V, E]

    @classmethod
    def load(cls, name: str | None, device: torch.device, status: Status) -> "Frozen":
        """Find the model called `name` and load its two matrices, in bf16."""
        directory = resolve_model(name, status=status)
        config = load_config(directory)
        names = ["model.embed_tokens.weight", "lm_head.weight"]
        tensors = load_tensors(directory, names[: 1 if config.tie_word_embeddings else 2])
        embedding, lm_head = (
            tensors.get(name, tensors[names[0]]).to(device, torch.bfloat16) for name in names
        )
        return cls(directory, fingerprint(directory), config, embedding, lm_head)

    def in_dtype(self, dtype: torch.dtype) -> "Frozen":
        """The same with its matrices in the dtype of learning."""
        return self._replace(embedding=self.embedding.to(dtype), lm_head=self.lm_head.to(dtype))
