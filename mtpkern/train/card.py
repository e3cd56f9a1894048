"""The training card, README.md beside the heads."""

import json
from dataclasses import asdict
from typing import Any

import torch

from mtpkern.train.budget import Settings
from mtpkern.train.fit import Trainer
from mtpkern.train.heads.families import kind_of
from mtpkern.train.plan import Plan


def training_card(
    plan: Plan, settings: Settings, trainer: Trainer, result: dict[str, dict[str, Any]]
) -> str:
    """Markdown: what the heads are, what they learned from, and how many drafts are accepted."""
    notes, head, recipe = trainer.notes, trainer.head, trainer.recipe
    parameters = sum(w.numel() for w in head.parameters())
    source = [path.name for path in plan.prompts or plan.answers]
    start = "nothing" if plan.init is None else f"{plan.init.name}; in the end, the mean with it"
    how = "greedy" if plan.prompts else "as they were recorded"
    lines = [
        f"# Heads for {head.config.base_model}",
        "",
        f"{parameters / 1e6:.1f} M parameters, {kind_of(head)}; for the weights with the "
        f"fingerprint {head.config.base_model_fingerprint[:16]} only. Made by `mtpkern train`.",
        "",
        "| | |",
        "|---|---|",
        f"| data | {', '.join(source)} |",
        f"| answers | {notes['sequences']} of the model's own, {notes['tokens']} tokens |",
        f"| recipe | {json.dumps(asdict(recipe))} |",
        f"| started from | {start} |",
        f"| time | {notes['seconds'] / 60:.0f} minutes, {torch.get_num_threads()} threads, "
        f"{settings.dtype}, {head.draft_vocab.device.type}, torch {torch.__version__} |",
        "",
        f"Replayed on held-out answers, {how}, K = {recipe.K}. Hybrid copies after a 3-gram "
        "match, else drafts with the head; loop-free ends at the first repeated 8-gram.",
        "",
        "| kind | category | tokens | tokens per step | accepted by position |",
        "|---|---|---|---|---|",
    ]
    for kind, rows in result.items():
        for category, row in rows.items():
            rates = " ".join(f"{rate:.3f}" for rate in row["acceptance_by_position"])
            length = f"{row['mean_acceptance_length']:.3f}"
            lines.append(
                f"| {kind.replace('_', ', ', 1).replace('_', '-')} | {category} "
                f"| {row['tokens']} | {length} | {rates} |"
            )
    return "\n".join(lines) + "\n"
