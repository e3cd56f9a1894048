"""Small data sets, heads and plans for the tests of the trainer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_checkpoint

from mtpkern.train import distill, fit
from mtpkern.train.fit import Recipe
from mtpkern.train.heads.mtp import HeadConfig, MtpHead
from mtpkern.train.plan import Plan
from mtpkern.train.teacher import Teacher

E, D, HQ, HK = 48, 8, 6, 2


def record_answers(root: Path, layers: int, taps: tuple[int, ...]) -> tuple[Path, Path]:
    sizes = {"num_hidden_layers": layers, "tie_word_embeddings": False}
    model = tiny_checkpoint(root / "model", seed=3, **sizes)
    words = ["the quick fox", "a dog and the sun", "jumps over", "sleeps lazy in brown dog"]
    turns = [f"{w} {i}" for i in range(6) for w in words]
    rows = [{"category": "ab"[i % 2], "turns": [t]} for i, t in enumerate(turns)]
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_distill(model, prompts, root / "answers", taps)
    return model, root / "answers"


def run_distill(model: Path, prompts: Path, out: Path, taps: tuple[int, ...]) -> None:
    directory = str(model)
    teacher = Teacher(model, 120, taps=taps)
    tokenizer = distill.Tokenizer.from_directory(directory)
    jobs = distill.read_prompts([prompts], tokenizer, 0, 512)
    distill.record(teacher, jobs, out, slots=10, max_new=30)


def random_head(vocab: int = 64) -> MtpHead:
    return randomised(
        MtpHead(HeadConfig(E, (1, 2, 3), HQ, HK, D, 112, 10000.0, 1e-5, vocab, "tiny"))
    )


def randomised(head: Any) -> Any:
    """The head with weights that all matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for w in head.parameters():
            w.copy_(torch.randn_like(w) * (0.1 if w.dim() == 2 else 0.3) + (w.dim() == 1))
    return head


RECIPE = Recipe(steps=30, rows=120, K=3, lr=0.03, warmup=2)


def recorder_of_losses(patch: pytest.MonkeyPatch) -> list[float]:
    losses: list[float] = []
    train = fit.Trainer.fit

    def kept(*a: Any, **b: Any) -> list[float]:
        losses.extend(some := train(*a, **b))
        return some

    patch.setattr(fit.Trainer, "fit", kept)
    return losses


def small_plan(model: Path, out: Path, prompts: Path) -> Plan:
    return Plan(
        out,
        str(model),
        prompts=(prompts,),
        draft_vocab_size=100,
        round_prompts=8,
        window=2,
        held_out=4,
        max_new=20,
        slots=6,
    )
