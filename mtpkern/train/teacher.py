"""The frozen model as the trainer runs it: the runtime's layers, kernels and cache, on many
sequences at once, with the hidden states that heads are fed.

On a CPU a row's bits depend on its own inputs alone, so that a sequence's states are the same
whatever else is answered beside it. The weights are those that decoding runs on: a GGUF's own bits
on a CPU, else the checkpoint's dtype.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mtpkern.cache import KVCache
from mtpkern.checkpoints.llama import check_checkpoint, fingerprint
from mtpkern.checkpoints.resolve import model_name
from mtpkern.config import resolve_dtype
from mtpkern.device import compile_kernels, resolve_device
from mtpkern.kernels.cpu.quants import Quants
from mtpkern.memory import check_fit, weight_bytes
from mtpkern.model import Llama
from mtpkern.status import SILENT, Status
from mtpkern.train.dataset import TOP

PAGE = 64  # cache slots per page


class Rows(NamedTuple):
    """What a head learns of R positions: n tapped states each, and the M largest logits."""

    features: Tensor  # [R, n*E]
    top_logits: Tensor  # [R, M], descending
    top_ids: Tensor  # [R, M]


class Teacher:
    """A frozen Llama that advances sequences in slots of `capacity` positions each.

    `taps` are layers, counted from 1, whose states are recorded beside the final normed ones.
    `allot` comes before the first sequence.
    """

    def __init__(
        self,
        directory: Path,
        capacity: int,
        device: str | torch.device = "cpu",
        taps: Sequence[int] = (),
        status: Status = SILENT,
    ):
        self.device, self.ops = resolve_device(device)
        self.config, entries = check_checkpoint(directory)
        config, dtype = self.config, resolve_dtype("auto", self.config)
        weights = "auto" if self.ops.takes_quants else None
        size = weight_bytes(config, entries, dtype=dtype, weights=weights, packed=weights == "auto")
        check_fit(model_name(directory), size, self.device)
        self.fingerprint = fingerprint(directory)[:16]
        self.taps = tuple(sorted({*taps, config.num_layers}))
        self.capacity, self.slots = capacity, 0
        compile_kernels(self.ops, status)
        with torch.inference_mode(), status.phase("loading the model"):
            self.model = Llama.load(
                directory,
                dtype=dtype,
                ops=self.ops,
                device=self.device,
                weights=weights,
            )
        quantised = isinstance(self.model.lm_head, Quants)
        self._cache_dtype = torch.float16 if quantised else self.model.dtype

    @property
    def bytes_per_slot(self) -> int:
        """Memory that a sequence takes: keys and values, and its recorded rows."""
        c = self.config
        per_head = self.ops.padded_dim(c.head_dim) * self._cache_dtype.itemsize
        keys_and_values = 2 * c.num_layers * c.num_kv_heads * per_head
        return self.capacity * (keys_and_values + 2 * len(self.taps) * c.hidden_size + 6 * TOP)

    def allot(self, slots: int) -> None:
        """Make room for `slots` sequences at once, unless there is as much already."""
        if slots <= self.slots:
            return
        c, self.slots = self.config, slots
        pages = -(-self.capacity // PAGE)
        table = 1 + torch.arange(slots * pages, dtype=torch.int32, device=self.device)
        frequencies, scaling = c.rope.inverse_frequencies(c.head_dim)
        self._cache = KVCache.empty(
            layers=c.num_layers,
            pages=slots * pages,
            page_size=PAGE,
            page_table=table.view(slots, pages),
            kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            inverse_frequencies=frequencies,
            rope_scaling=scaling,
            dtype=self._cache_dtype,
            padded_dim=self.ops.padded_dim,
        )

    @torch.inference_mode()
    def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """Begin a sequence with n tokens in a slot -> their features [n, n_taps*E]."""
        padding = 0 if self.device.type == "cpu" else -len(tokens) % PAGE
        window = torch.tensor([[*tokens, *[0] * padding]], device=self.device)
        # Its length stays on the host, which plans the pages of a prompt.
        cache = self._cache.rows(slot, slot + 1).at(torch.zeros(1, dtype=torch.int64))
        states = self.ops.prefill(self.model, window, cache, self.taps[:-1])
        return self._features(*states)[: len(tokens)]

    @torch.inference_mode()
    def step(self, slots: Sequence[int], tokens: Sequence[int], lengths: Sequence[int]) -> Rows:
        """Append one token to each of R sequences that hold `lengths` tokens -> its rows."""
        facts = torch.tensor([slots, tokens, lengths], device=self.device)
        table = self._cache.page_table[facts[0]]
        cache = replace(self._cache, page_table=table, lengths=facts[2])
        window = facts[1][:, None]
        features = self._features(*self.ops.layers(self.model, window, cache, self.taps[:-1]))
        logits = self.ops.linear(features[:, -self.config.hidden_size :], self.model.vocabulary)
        return Rows(features, *logits.topk(TOP, -1))

    def _features(self, hidden: Tensor, tapped: list[Tensor]) -> Tensor:
        """The tapped states [R, n*E] side by side, those of the last layer normed."""
        normed = self.ops.rms_norm(hidden, self.model.norm, self.config.rms_norm_eps)
        return torch.cat([*tapped, normed], -1)
