"""Prompts in the model's own words: it writes the user's turn itself (Magpie, arXiv 2406.08464).

python -m mtpkern.train.invent --count 9000 --out questions.jsonl
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpkern.arguments import Parser, at_least, run
from mtpkern.outputs import FORCE, output_file, writing
from mtpkern.train.prompts import OPENINGS

if TYPE_CHECKING:
    from mtpkern.tokenizer import Tokenizer
    from mtpkern.train.distill import Job


def invented_jobs(
    tokenizer: "Tokenizer", openings: Mapping[str, Sequence[str]], count: int
) -> "tuple[int, list[Job]]":
    """Jobs whose prompts end inside the user's turn, after an opening -> the length of the template
    that all prompts begin with, and the jobs."""
    from mtpkern.train.distill import Job

    mark = "\x00"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": mark}], False)
    head = ids[: ids.index(tokenizer.encode(mark, add_special_tokens=False)[0])]
    kinds = [(category, text) for category, texts in openings.items() for text in texts]
    jobs = []
    for n in range(count):
        category, text = kinds[n % len(kinds)]
        jobs.append(Job(head + tokenizer.encode(text, add_special_tokens=False), category, n))
    return len(head), jobs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command -> exit code, as `mtpkern.arguments.run` has it."""
    p = Parser(
        prog="python -m mtpkern.train.invent", description="Let a model invent prompts for itself"
    )
    p.set_defaults(run=_invent)
    add, count = p.add_argument, at_least(1)
    add("--model", help="directory of the model; the default model without it")
    add("--count", type=count, required=True, help="prompts to try; some are dropped")
    add("--out", type=Path, required=True, help="JSONL with `turns` and `category`")
    add("--force", action="store_true", help=FORCE)
    add("--max-new", type=count, default=220, help="longest prompt in tokens")
    add("--slots", type=count, help="sequences at a time (default: measured)")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--threads", type=count, help="CPU threads (default: physical cores)")
    add("--seed", type=at_least(0), default=0)
    return run(p, argv)


def _invent(a: argparse.Namespace) -> int:
    with output_file(a.out, force=a.force) as file:
        text = "".join(_lines(a))
        with writing(a.out):
            file.write_text(text, encoding="utf-8")
    return 0


def _lines(a: argparse.Namespace) -> list[str]:
    from mtpkern.checkpoints.llama import load_config
    from mtpkern.checkpoints.resolve import resolve_model
    from mtpkern.device import resolve_device
    from mtpkern.threads import use_threads
    from mtpkern.tokenizer import Tokenizer
    from mtpkern.train.budget import measure_answers
    from mtpkern.train.distill import generate, nucleus
    from mtpkern.train.teacher import Teacher

    use_threads(a.threads)
    device, _ = resolve_device(a.device)
    directory = resolve_model(a.model, status=a.status)
    tokenizer = Tokenizer.from_directory(directory)
    head, jobs = invented_jobs(tokenizer, OPENINGS, a.count)
    context = load_config(directory).max_position_embeddings
    capacity = min(a.max_new + max(len(job.prompt) for job in jobs), context)
    teacher = Teacher(directory, capacity, device, status=a.status)
    slots = a.slots
    if slots is None:
        with a.status.phase("measuring how fast it goes"):
            slots = measure_answers(teacher, jobs, a.max_new, 0).best_slots(len(jobs))
    stop, seen = set(teacher.config.eos_token_ids), set()
    lines: list[str] = []

    def sink(job: "Job", *_: Any) -> None:
        text = tokenizer.decode(job.tokens[head:-1]).strip()
        key = text.lower()[:60]
        # Duplicates and prompts that did not end are left out.
        if job.tokens[-1] in stop and len(text) >= 15 and key not in seen:
            seen.add(key)
            row = {"question_id": f"own-{len(seen)}", "category": job.category, "turns": [text]}
            lines.append(json.dumps(row) + "\n")

    choose = nucleus(0.9, 0.92, a.seed)
    with a.status.phase("prompts", len(jobs), "tried") as phase:
        generate(teacher, jobs, sink, slots=slots, max_new=a.max_new, choose=choose, phase=phase)
    return lines


if __name__ == "__main__":
    sys.exit(main())
