"""Fit a sequential MTP head to the answers that distill recorded.

    python -m mtpkern.train.fit --data answers --out head --checkpoint head.pt --steps 2000

The target of a row is the model's distribution over its likeliest tokens, mixed with its own token;
matrices are trained with Muon, norms with AdamW, both with a linear decay to zero. The same command
goes on from the checkpoint; --init starts a new schedule from an exported head.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mtpkern.checkpoint import load_config, load_tensors
from mtpkern.config import ModelConfig
from mtpkern.fetch import DEFAULT_MODEL, resolve_model
from mtpkern.train.acceptance import evaluate
from mtpkern.train.dataset import Dataset
from mtpkern.train.mtp_head import (
    DraftLoss,
    HeadConfig,
    MtpHead,
    draft_targets,
    export_head,
    load_head,
)


def choose_draft_vocab(data: Dataset, size: int, V: int) -> Tensor:
    """The tokens that the model expects most often in its answers, lowest ids first: [size].

    Its recorded distributions say more about rare tokens than counting those that it chose; what
    they never mention is filled up with the lowest ids, a BPE's earliest merges.
    """
    expected = np.zeros(V)
    for index, (_, row) in enumerate(data.sequences):
        answer = slice(row["prompt"] - 1, row["length"] - 1)
        ids, logits = data.read(index, "top_ids")[answer], data.read(index, "top_logits")[answer]
        p = logits.float().softmax(-1)
        expected += np.bincount(ids.flatten(), p.flatten(), minlength=V)
    ranked = np.lexsort((np.arange(V), -expected))
    return torch.from_numpy(np.sort(ranked[:size])).int()


def feature_spread(data: Dataset, samples: int = 100) -> Tensor:
    """Root mean square of every feature, [3E]; the first token, an attention sink, is left out."""
    indices = range(0, len(data), max(1, len(data) // samples))
    rows = torch.cat([data.read(i, "features")[1:-1].float() for i in indices])
    return rows.pow(2).mean(0).sqrt().clamp(min=1e-3)


def is_held_out(data: Dataset, index: int, share: float) -> bool:
    """Whether a sequence is kept for measuring; the choice stays as a directory grows."""
    directory, row = data.sequences[index]
    return bool(np.random.default_rng((directory, row["offset"])).random() < share)


def new_head(data: Dataset, model: ModelConfig, vocab_size: int, base_model: str) -> MtpHead:
    """An untrained head that fits the model; its draft vocabulary is still to be chosen."""
    L, size = model.num_layers, min(vocab_size, model.vocab_size)
    config = HeadConfig(
        hidden_size=model.hidden_size,
        tap_layers=(L // 3, 2 * L // 3, L),
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        intermediate_size=model.intermediate_size,
        rope_theta=model.rope.theta,
        rms_norm_eps=model.rms_norm_eps,
        draft_vocab_size=size,
        base_model=base_model,
    )
    head = MtpHead(config)
    with torch.no_grad():
        # Half as sure of itself as the model is of the token before.
        scale = feature_spread(data)[-model.hidden_size :].pow(2).mean().sqrt() / 2
        head.weights["final_layernorm"].fill_(scale)
    return head


def batch_loss(
    head: MtpHead,
    embedding: Tensor,
    table: Tensor,
    to_draft: Tensor,
    x: dict[str, Tensor],
    keep: Tensor,
    weights: Tensor,
    hard: float,
) -> tuple[Tensor, Tensor]:
    """Loss of a batch, steps weighted with weights [K], and each step's own loss [K]."""
    K, parts = len(weights), []
    states = head(x["features"], x["tokens"], x["starts"], embedding, K, keep)
    for k, state in enumerate(states):
        chains = keep if k else slice(None)
        live, starts = x["live"][k][:, chains], x["starts"][:, chains]
        labels = x["tokens"].gather(1, starts + 2 + k)[live]
        ids, logits = x["top_ids"][k][:, chains][live], x["top_logits"][k][:, chains][live]
        targets = draft_targets(ids, logits, labels, to_draft, hard)
        parts.append(DraftLoss.apply(state[live], table, *targets) / max(len(labels), 1))
    steps = torch.stack(parts)
    return (steps * weights).sum(), steps.detach()


class Trainer:
    """Optimisers, schedule and place in the data, all of which a checkpoint holds."""

    def __init__(self, head: MtpHead, a: argparse.Namespace):
        self.head, self.a, self.step = head, a, 0
        matrices = [w for w in head.weights.values() if w.dim() == 2]
        self.norms = [w for w in head.weights.values() if w.dim() == 1]
        self.rates = (a.lr, a.lr / 4)
        self.optimizers = (
            torch.optim.Muon(matrices, lr=a.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(self.norms, lr=a.lr / 4, weight_decay=0.0, betas=(0.9, 0.98)),
        )

    def save(self) -> None:
        state: dict[str, Any] = {"step": self.step, "head": self.head.state_dict()}
        state["optimizers"] = [o.state_dict() for o in self.optimizers]
        temporary = self.a.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.a.checkpoint)

    def resume(self) -> None:
        state = torch.load(self.a.checkpoint, weights_only=True)
        self.head.load_state_dict(state["head"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]

    def update(self, loss: Tensor) -> None:
        """One optimiser step, at the rate that the step's place in the schedule gives."""
        rise = min(1.0, (self.step + 1) / self.a.warmup)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * rise * max(1 - self.step / self.a.steps, 0.01)
        loss.backward()
        nn.utils.clip_grad_norm_(self.norms, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1

    def fit(
        self, embedding: Tensor, lm_head: Tensor, data: Dataset, indices: Sequence[int]
    ) -> list[float]:
        """Train to the last step; the loss of every step of this run comes back."""
        a, K, V = self.a, self.a.num_speculative_tokens, len(embedding)
        if a.checkpoint and a.checkpoint.exists():
            self.resume()
        vocab = self.head.draft_vocab.long()
        table, to_draft = lm_head[vocab], torch.full((V,), -1)
        to_draft[vocab] = torch.arange(len(vocab))
        weights = a.decay ** torch.arange(K)
        weights = weights / weights.sum()
        losses: list[float] = []
        rows, began, skip, epoch = 0, time.time(), self.step, 0
        while self.step < a.steps:
            # The order depends on seed and epoch alone: a resumed run skips what it has seen.
            batches = data.batches(indices, a.rows, np.random.default_rng((a.seed, epoch)))
            epoch, skipped = epoch + 1, min(skip, len(batches))
            skip -= skipped
            for batch in batches[skipped:]:
                if self.step >= a.steps:
                    break
                x = data.collate(batch, K)
                chains = x["starts"].shape[1]
                generator = torch.Generator().manual_seed(a.seed * 1_000_003 + self.step)
                keep = torch.randperm(chains, generator=generator)
                keep = keep[: math.ceil(chains * a.continued)].sort().values
                loss, parts = batch_loss(
                    self.head, embedding, table, to_draft, x, keep, weights, a.hard
                )
                self.update(loss)
                losses.append(loss.item())
                rows += int(x["live"][0].sum())
                if self.step % a.log_every == 0 or self.step == a.steps:
                    mean = sum(losses[-a.log_every :]) / len(losses[-a.log_every :])
                    print(
                        f"step {self.step}/{a.steps} loss {mean:.4f} by step "
                        f"{[round(p, 2) for p in parts.tolist()]} "
                        f"{rows / (time.time() - began):.0f} rows/s",
                        flush=True,
                    )
                if a.checkpoint and (self.step % a.save_every == 0 or self.step == a.steps):
                    self.save()
        return losses


def parser() -> argparse.ArgumentParser:
    """The command's arguments; defaults are the recipe."""
    p = argparse.ArgumentParser(description="Fit an MTP head to recorded answers of a model")
    p.add_argument("--model", help="directory of the frozen model; the default model without it")
    p.add_argument("--data", type=Path, nargs="+", required=True, help="what distill wrote")
    p.add_argument("--out", type=Path, help="directory of the exported head")
    p.add_argument("--checkpoint", type=Path, help="file to resume from and to save to")
    p.add_argument("--init", type=Path, help="exported head to start from")
    p.add_argument("--evaluate", action="store_true", help="only measure --init, on all of --data")
    p.add_argument("--base-model", default=DEFAULT_MODEL)
    p.add_argument("--draft-vocab-size", type=int, default=16384)
    p.add_argument("-K", "--num-speculative-tokens", type=int, default=4, help="steps unrolled")
    p.add_argument("--steps", type=int, default=2000)
    p.add_argument("--rows", type=int, default=1024, help="answer rows in a batch")
    p.add_argument("--lr", type=float, default=8e-3)
    p.add_argument("--warmup", type=int, default=20)
    p.add_argument("--decay", type=float, default=0.8, help="the loss weighs step k with decay^k")
    p.add_argument("--hard", type=float, default=0.2, help="share of the model's token in a target")
    p.add_argument("--continued", type=float, default=0.5, help="share of chains past step one")
    p.add_argument("--held-out", type=float, default=0.02, help="share of answers to measure on")
    p.add_argument("--save-every", type=int, default=100)
    p.add_argument("--log-every", type=int, default=25)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--seed", type=int, default=0)
    return p


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command; the acceptance on the held-out answers is printed and returned."""
    a = parser().parse_args(arguments)
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    directory = resolve_model(a.model)
    model = load_config(directory)
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    frozen = load_tensors(directory, names[: 1 if model.tie_word_embeddings else 2])
    embedding, lm_head = (frozen.get(name, frozen[names[0]]).bfloat16() for name in names)
    data = Dataset(a.data, model.hidden_size)
    held_out = [i for i in range(len(data)) if a.evaluate or is_held_out(data, i, a.held_out)]
    head = load_head(a.init) if a.init else new_head(data, model, a.draft_vocab_size, a.base_model)
    if not a.evaluate:
        with torch.no_grad():
            spread = feature_spread(data)
            head.weights["fc"].mul_(spread / head.spread)
            head.spread.copy_(spread)
            # The vocabulary is no weight of the head: a head to start from takes a new one too.
            vocab_size = len(head.draft_vocab)
            head.draft_vocab.copy_(choose_draft_vocab(data, vocab_size, model.vocab_size))
        Trainer(head, a).fit(
            embedding, lm_head, data, sorted(set(range(len(data))) - set(held_out))
        )
        if a.out:
            export_head(head, a.out)
            head = load_head(a.out)
    K = a.num_speculative_tokens
    result = evaluate(head, embedding, lm_head, data, held_out, K)
    for kind, rows in result.items():
        for category, row in rows.items():
            print(f"{kind:18}{category:20}{row['mean_acceptance_length']:7.3f}", end="  ")
            print(row["acceptance_by_position"], row["tokens"])
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
