"""Fit heads to recorded answers: optimisers, schedule, and checkpoints to continue from.

The target of a row is the model's distribution over its likeliest tokens, mixed with its own token;
matrices are trained with Muon (or AdamW), the rest with AdamW, both with a linear decay to zero.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mtpkern.errors import UserError
from mtpkern.outputs import writing
from mtpkern.train.dataset import Dataset
from mtpkern.train.heads.families import Head
from mtpkern.train.interrupt import held_back
from mtpkern.train.losses import batch_loss
from mtpkern.train.muon import Muon

# Seconds between checkpoints: what a killed run loses at most.
SAVE_SECONDS = 45.0


def expected_tokens(data: Dataset, V: int) -> Tensor:
    """The model's probability of each token, summed over all answer positions: [V] float64.

    The distributions say more about rare tokens than counts of the chosen tokens would.
    """
    expected = np.zeros(V)
    for index, (_, row) in enumerate(data.sequences):
        answer = slice(row["prompt"] - 1, row["length"] - 1)
        ids, logits = data.read(index, "top_ids")[answer], data.read(index, "top_logits")[answer]
        p = logits.float().softmax(-1)
        expected += np.bincount(ids.flatten(), p.flatten(), minlength=V)
    return torch.from_numpy(expected)


def choose_draft_vocab(expected: Tensor, size: int) -> Tensor:
    """The `size` tokens with the largest expected counts, ascending. Tokens that are never expected
    rank by id, which is the order of a BPE's merges."""
    ranked = np.lexsort((np.arange(len(expected)), -expected.numpy()))
    return torch.from_numpy(np.sort(ranked[:size])).int()


def feature_spread(data: Dataset, samples: int = 100) -> Tensor:
    """Root mean square of every feature, [n*E], without the first token, an attention sink."""
    indices = range(0, len(data), max(1, len(data) // samples))
    rows = torch.cat([data.read(i, "features")[1:-1].float() for i in indices])
    return rows.pow(2).mean(0).sqrt().clamp(min=1e-3)


@dataclass(frozen=True)
class Recipe:
    """What a training run depends on besides its data; the defaults are those of the shipped heads.

    Zero steps or rows are numbers that budget.py chooses before the run.
    """

    steps: int
    rows: int = 1024  # answer rows in a batch
    K: int = 4  # drafts of a chain
    optimizer: str = "muon"
    lr: float = 8e-3
    warmup: int = 20
    decay: float = 0.8  # draft k has the weight decay^k in the loss
    hard: float = 0.2  # share of the model's chosen token in a target
    continued: float = 0.5  # share of chains that continue past their first draft
    seed: int = 0


class Trainer:
    """Optimisers, schedule and position in the data, all of which a checkpoint holds."""

    def __init__(
        self,
        head: Head,
        recipe: Recipe,
        checkpoint: Path | None,
        dtype: torch.dtype = torch.bfloat16,
    ):
        """`dtype` is what Muon multiplies its matrices in."""
        self.head, self.recipe, self.step = head, recipe, 0
        self.checkpoint, self.saved_at = checkpoint, time.monotonic()
        self.is_whole = True  # False within a step of the optimisers
        self.rows = 0  # learned from by this process
        self.notes: dict[str, Any] = {"seconds": 0.0}  # totals of the run, kept in checkpoints
        parameters = list(head.parameters())
        matrices = [w for w in parameters if w.dim() == 2]
        self.small = [w for w in parameters if w.dim() == 1]
        self.rates = (recipe.lr, recipe.lr / 4)
        first: torch.optim.Optimizer
        if recipe.optimizer == "muon":
            first = Muon(matrices, lr=recipe.lr, dtype=dtype)
        else:
            first = torch.optim.AdamW(
                matrices, lr=recipe.lr, weight_decay=0.0, betas=(0.9, 0.98), eps=1e-10
            )
        second = torch.optim.AdamW(
            self.small, lr=recipe.lr / 4, weight_decay=0.0, betas=(0.9, 0.98)
        )
        self.optimizers = (first, second)

    def save(self) -> None:
        """Write a checkpoint, atomically, with all that the rest of the run depends on."""
        now = time.monotonic()
        self.notes["seconds"] += now - self.saved_at
        self.saved_at = now
        if self.checkpoint is None:
            return
        state: dict[str, Any] = {"step": self.step, "head": self.head.state_dict()}
        state["optimizers"] = [o.state_dict() for o in self.optimizers]
        state["notes"] = self.notes
        temporary = self.checkpoint.with_suffix(".tmp")
        with writing(self.checkpoint), temporary.open("wb") as file:
            torch.save(state, file)
        temporary.replace(self.checkpoint)

    def resume(self) -> bool:
        """Load the checkpoint -> whether there was one."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return False
        # Weights and moments are copied to their parameters' device; the notes stay on the CPU.
        state = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        self.head.load_state_dict(state["head"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.notes = state["step"], state["notes"]
        return True

    def update(self, loss: Tensor) -> None:
        """Take one optimiser step at the schedule's learning rate."""
        rise = min(1.0, (self.step + 1) / self.recipe.warmup)
        fall = max(1 - self.step / self.recipe.steps, 0.01)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * rise * fall
        loss.backward()
        nn.utils.clip_grad_norm_(self.small, 1.0)
        with held_back():
            self.is_whole = False
            self.take_step()
            self.step += 1
            self.is_whole = True

    def take_step(self) -> None:
        """Apply the gradients."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def fit(
        self,
        embedding: Tensor,
        lm_head: Tensor,
        data: Dataset,
        *,
        begin: int,
        end: int,
        log: Callable[[int, float, Tensor, float], None] = lambda *_: None,
    ) -> list[float]:
        """Train up to step `end` on this data, whose first batch belongs to step `begin` -> the
        loss of every step taken. Calls log(step, loss, loss by draft [K], rows/s) after each.

        The dtype of embedding and lm_head, both [V, E], is that of all matrix products. On a
        KeyboardInterrupt or SystemExit the state is saved, unless it came in the middle of an
        optimiser's step.
        """
        losses: list[float] = []
        try:
            for loss, parts, rate in self._steps(embedding, lm_head, data, begin, end):
                losses.append(loss)
                log(self.step, loss, parts, rate)
                if time.monotonic() - self.saved_at > SAVE_SECONDS:
                    self.save()
        except (KeyboardInterrupt, SystemExit):
            if self.is_whole:
                self.save()
            raise
        return losses

    def _steps(
        self, embedding: Tensor, lm_head: Tensor, data: Dataset, begin: int, end: int
    ) -> Iterator[tuple[float, Tensor, float]]:
        """Take the steps up to `end` -> each one's loss, loss by draft [K], and rows/s so far."""
        recipe, K, where = self.recipe, self.recipe.K, embedding.device
        vocab = self.head.draft_vocab.long()
        table, to_draft = lm_head[vocab], torch.full((len(embedding),), -1, device=where)
        to_draft[vocab] = torch.arange(len(vocab), device=where)
        weights = recipe.decay ** torch.arange(K, device=where)
        weights = weights / weights.sum()
        # A resumed run skips batches already seen: their order follows from seed, begin and epoch.
        skip, epoch = self.step - begin, 0
        before, began = self.rows, time.monotonic()
        while self.step < end:
            rng = np.random.default_rng((recipe.seed, begin, epoch))
            batches = data.batches(recipe.rows, rng)
            epoch, skipped = epoch + 1, min(skip, len(batches))
            skip -= skipped
            for batch in batches[skipped:]:
                if self.step >= end:
                    break
                x = {name: t.to(where) for name, t in data.collate(batch, K).items()}
                x["features"] = x["features"].to(embedding.dtype)
                chains = x["starts"].shape[1]
                generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.step)
                keep = torch.randperm(chains, generator=generator)
                keep = keep[: math.ceil(chains * recipe.continued)].sort().values.to(where)
                loss, parts = batch_loss(
                    self.head, embedding, table, to_draft, x, keep, weights, recipe.hard
                )
                value = loss.item()
                if not math.isfinite(value):
                    raise UserError(
                        f"the loss of step {self.step + 1} is NaN or infinite: lower --lr (the "
                        "last checkpoint is kept)"
                    )
                self.update(loss)
                self.rows += int(x["live"][0].sum())
                yield value, parts, (self.rows - before) / (time.monotonic() - began)
