"""Record a model's answers to prompts, for several heads to learn from the same: `mtpkern train
--answers`. A recording that was killed goes on with the same command.

    python -m mtpkern.train.record --prompts texts.jsonl --families mtp medusa --out answers
"""

import argparse
from pathlib import Path

import torch

from mtpkern.checkpoint import load_config
from mtpkern.fetch import resolve_model
from mtpkern.tokenizer import Tokenizer
from mtpkern.train.distill import (
    LONGEST_PROMPT,
    Trunk,
    one_line_errors,
    read_prompts,
    record,
    usable_device,
)
from mtpkern.train.families import FAMILIES, family_taps


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description="Record a model's answers to prompts")
    p.add_argument("--model", help="directory of the model; the default model without it")
    p.add_argument("--prompts", type=Path, nargs="+", required=True, help="JSONL with `turns`")
    p.add_argument("--out", type=Path, required=True, help="a directory for `train --answers`")
    p.add_argument("--families", nargs="+", default=["mtp"], choices=FAMILIES, help="whose heads")
    p.add_argument("--limit", type=int, help="answer so many prompts")
    p.add_argument("--temperature", type=float, default=0.6, help="of every other; 0: greedy only")
    p.add_argument("--max-new", type=int, default=192, help="longest answer in tokens")
    p.add_argument("--slots", type=int, default=128, help="sequences at a time")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args(argv)
    torch.manual_seed(a.seed)
    directory = resolve_model(a.model)
    tokenizer = Tokenizer.from_directory(directory)
    jobs = read_prompts(a.prompts, tokenizer, LONGEST_PROMPT, a.seed)[: a.limit]
    L = load_config(directory).num_layers
    taps = {tap for family in a.families for tap in family_taps(family, L)}
    capacity, device = LONGEST_PROMPT + a.max_new, usable_device(a.device)
    trunk = Trunk(directory, a.slots, capacity, device, sorted(taps))
    record(trunk, jobs, a.out, max_new=a.max_new, temperature=a.temperature, seed=a.seed)


if __name__ == "__main__":
    one_line_errors(main)
