"""`mtpkern train`: prompts and a frozen model in, a directory of heads out.

The model answers its prompts round by round, and each round's answers are learned from while the
last few rounds are kept: hidden states pass through a window on disk and are never stored whole.
Everything needed to go on lies beside the heads in `.train`: a killed run goes on where it was, at
most a minute back. If it was learning, its losses on a CPU are those of an unbroken one; if the
model was answering, near-ties in what was left to answer may fall otherwise.
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtpkern.checkpoint import fingerprint, load_config, load_tensors
from mtpkern.config import ModelConfig, UserError, printable
from mtpkern.fetch import resolve_model
from mtpkern.tokenizer import Tokenizer
from mtpkern.train.acceptance import evaluate
from mtpkern.train.dataset import Dataset, hold_to
from mtpkern.train.distill import (
    LONGEST_PROMPT,
    Job,
    Trunk,
    read_prompts,
    record,
    usable_device,
)
from mtpkern.train.families import (
    Head,
    export_head,
    is_reduced,
    kind_of,
    load_head,
    new_head,
)
from mtpkern.train.fit import (
    Recipe,
    Trainer,
    at_least_one,
    choose_draft_vocab,
    expected_tokens,
    feature_spread,
)
from mtpkern.train.mtp_head import MtpHead

MEASUREMENTS = 4  # of a run on recorded answers


@dataclass(frozen=True)
class Plan:
    """What to train on what; see `mtpkern train --help`. Raises UserError for nonsense."""

    out: Path
    model: str | None = None
    prompts: tuple[Path, ...] = ()
    answers: tuple[Path, ...] = ()  # recorded before, in place of prompts
    init: Path | None = None
    family: str = "mtp"
    draft_vocab_size: int = 16384
    round_prompts: int = 1024  # prompts answered between two rounds of learning
    window: int = 4  # rounds whose answers are kept
    held_out: int = 64  # prompts to measure on, answered greedily
    temperature: float = 0.6  # of every other prompt's answer; 0: all are greedy
    max_new: int = 192
    slots: int = 128
    device: str = "auto"

    def __post_init__(self) -> None:
        at_least_one(self, "draft_vocab_size", "round_prompts", "window", "held_out", "slots")
        at_least_one(self, "max_new")
        if bool(self.prompts) == bool(self.answers):
            raise UserError("one of prompts and recorded answers is needed, not both")
        if self.temperature < 0:
            raise UserError(f"temperature must be 0 or more, got {self.temperature}")


class Frozen(NamedTuple):
    """What training needs of the model."""

    directory: Path
    config: ModelConfig
    fingerprint: str
    embedding: Tensor  # [V, E] bf16
    lm_head: Tensor  # [V, E]


class Part(NamedTuple):
    """The answers that are learned from between two measurements, and the steps begin..end-1."""

    data: Dataset
    indices: Sequence[int]
    begin: int
    end: int


def train(plan: Plan, recipe: Recipe) -> dict[str, Any]:
    """Train heads as planned and write them with their card -> acceptance on the held-out answers,
    by kind and category. Raises UserError for what the caller can mend."""
    device = usable_device(plan.device)
    torch.manual_seed(recipe.seed)
    model = _freeze(plan.model, device)
    head = _begin(plan, recipe, model).to(device)
    work = plan.out / ".train"
    rounds = _Rounds(plan, recipe, model, head.config.tap_layers, device, work)
    work.mkdir(parents=True, exist_ok=True)
    here = {name: value for name, value in asdict(plan).items() if name not in _FREE}
    hold_to(work / "run.json", here | asdict(recipe) | {"model": model.fingerprint})
    trainer = Trainer(head, recipe, work / "checkpoint.pt")
    if trainer.resume():
        print(f"going on from step {trainer.step} of {recipe.steps}", flush=True)
    else:
        trainer.notes |= {"tokens": 0, "sequences": 0, "rounds": 0}
        trainer.notes["expected"] = torch.zeros(model.config.vocab_size, dtype=torch.float64)
    result: dict[str, Any] = {}
    for number in range(rounds.count):
        end = math.ceil(recipe.steps * (number + 1) / rounds.count)
        if trainer.step >= end and number + 1 < rounds.count:
            continue
        part = rounds.part(number, end)
        if trainer.notes["rounds"] <= number and (plan.prompts or number == 0):
            _look_at(part, number, plan, trainer, model)
        trainer.fit(
            model.embedding,
            model.lm_head,
            part.data,
            part.indices,
            begin=part.begin,
            end=part.end,
            log=_Progress(recipe),
        )
        trainer.save()
        if plan.init is not None and number + 1 == rounds.count:
            _meet_halfway(head, load_head(plan.init))
        held_out, indices = rounds.held_out()
        result = evaluate(head, model.embedding, model.lm_head, held_out, indices, recipe.K)
        overall = result["head"]["overall"]
        print(
            f"step {trainer.step}: {overall['mean_acceptance_length']:.3f} tokens a step on "
            f"held-out answers, accepted by position {overall['acceptance_by_position']}",
            flush=True,
        )
    export_head(head, plan.out, model.lm_head)
    (plan.out / "README.md").write_text(_card(plan, recipe, trainer, model, result))
    shutil.rmtree(work)
    return result


# What a run that goes on may have otherwise.
_FREE = ("out", "model", "slots", "device")


def _freeze(name: str | None, device: str) -> Frozen:
    directory = resolve_model(name)
    config = load_config(directory)
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    frozen = load_tensors(directory, names[: 1 if config.tie_word_embeddings else 2])
    embedding, lm_head = (
        frozen.get(name, frozen[names[0]]).to(device, torch.bfloat16) for name in names
    )
    return Frozen(directory, config, fingerprint(directory), embedding, lm_head)


def _begin(plan: Plan, recipe: Recipe, model: Frozen) -> Head:
    """A new head, or the one to go on from, in either case for this model's weights."""
    if plan.init is None:
        return new_head(plan.family, model.directory, K=recipe.K, vocab_size=plan.draft_vocab_size)
    head, mark = load_head(plan.init), model.fingerprint
    if head.config.base_model_fingerprint not in ("", mark):
        raise UserError(f"{printable(plan.init)} was trained on other weights")
    most = getattr(head.config, "num_heads", None)
    if most is not None and recipe.K > most:
        raise UserError(f"K must be at most {most}, the number of heads in {printable(plan.init)}")
    head.config = replace(head.config, base_model_fingerprint=mark)  # type: ignore[assignment]
    return head


def _meet_halfway(head: Head, start: Head) -> None:
    """Move a head midway between where training began and where it ended, which drafts better than
    either: much of what came of few answers cancels (Wortsman et al. 2022, robust fine-tuning)."""
    if isinstance(head, MtpHead):
        start.rescale(head.spread.cpu())
    with torch.no_grad():
        for ended, began in zip(head.parameters(), start.parameters(), strict=True):
            ended.lerp_(began.to(ended.device), 0.5)


class _Rounds:
    """Where answers come from: recorded ones, the same in each round, or new ones for each."""

    def __init__(
        self,
        plan: Plan,
        recipe: Recipe,
        model: Frozen,
        taps: tuple[int, ...],
        device: str,
        work: Path,
    ):
        self.plan, self.recipe, self.model = plan, recipe, model
        self.taps, self.device, self.work = taps, device, work
        # Recorded answers are all there from the beginning, and measured on now and then.
        self.count = MEASUREMENTS
        self.trunk: Trunk | None = None
        self.jobs: list[Job] = []
        if plan.answers:
            self.held_out()
            return
        tokenizer = Tokenizer.from_directory(model.directory)
        self.jobs = read_prompts(plan.prompts, tokenizer, LONGEST_PROMPT, recipe.seed)
        if len(self.jobs) <= plan.held_out:
            raise UserError(
                f"{len(self.jobs)} usable prompts are too few: {plan.held_out} are held out"
            )
        # Every so many, so that the held-out ones are of all lengths.
        apart = len(self.jobs) // plan.held_out
        self.kept_back = self.jobs[::apart][: plan.held_out]
        taken = {job.number for job in self.kept_back}
        self.jobs = [job for job in self.jobs if job.number not in taken]
        self.count = math.ceil(len(self.jobs) / plan.round_prompts)

    def part(self, number: int, end: int) -> Part:
        """The data of a round; answers that no later round needs are removed."""
        begin = math.ceil(self.recipe.steps * number / self.count)
        if self.plan.answers:
            data, held_out = self.held_out()
            indices = sorted(set(range(len(data))) - set(held_out))
            return Part(data, indices, begin, end)
        self.held_out()
        size, first = self.plan.round_prompts, max(0, number + 1 - self.plan.window)
        for n in range(number + 1):
            if n >= first:
                self._answer(self._place(n), self.jobs[n * size : (n + 1) * size], n)
            else:
                shutil.rmtree(self._place(n), ignore_errors=True)
        data = Dataset([self._place(n) for n in range(first, number + 1)], self.taps)
        return Part(data, range(len(data)), begin, end)

    def held_out(self) -> tuple[Dataset, Sequence[int]]:
        """Answers that are only measured on."""
        if self.plan.answers:
            data = Dataset(self.plan.answers, self.taps, self.model.fingerprint)
            if len(data) < 2:
                raise UserError(f"{len(data)} recorded answers are too few: one is held out")
            return data, [i for i in range(len(data)) if is_held_out(data, i)] or [0]
        self._answer(self.work / "held-out", self.kept_back, None)
        data = Dataset([self.work / "held-out"], self.taps)
        return data, range(len(data))

    def _place(self, number: int) -> Path:
        return self.work / f"round-{number:04d}"

    def _answer(self, directory: Path, jobs: list[Job], number: int | None) -> None:
        """Record answers that are not there yet; half of a round's are sampled."""
        done = directory / "done"
        if done.exists():
            return
        plan = self.plan
        if self.trunk is None:
            capacity = LONGEST_PROMPT + plan.max_new
            self.trunk = Trunk(self.model.directory, plan.slots, capacity, self.device, self.taps)
        temperature = 0.0 if number is None else plan.temperature
        record(
            self.trunk,
            jobs,
            directory,
            max_new=plan.max_new,
            temperature=temperature,
            seed=self.recipe.seed,
        )
        done.touch()


def is_held_out(data: Dataset, index: int, share: float = 0.01) -> bool:
    """Whether a recorded answer is only measured on; the choice stays as a directory grows."""
    directory, row = data.sequences[index]
    return bool(np.random.default_rng((directory, row["offset"])).random() < share)


def _look_at(part: Part, number: int, plan: Plan, trainer: Trainer, model: Frozen) -> None:
    """Take in a round's new answers: their tokens for the draft vocabulary, and the totals."""
    notes, head, data = trainer.notes, trainer.head, part.data
    newest = [
        i for i in part.indices if plan.answers or data.sequences[i][0] == len(data.files) - 1
    ]
    if number == 0:
        spread = feature_spread(data).to(head.draft_vocab.device)
        (head.prepare if plan.init is None else head.rescale)(spread)
    # Heads to go on from keep theirs, which was chosen from answers that may not be here.
    if plan.init is None:
        V = model.config.vocab_size
        notes["expected"] = notes["expected"] + expected_tokens(data, newest, V)
        # The vocabulary is no weight of a head: it may change while the head learns.
        size = len(head.draft_vocab) if is_reduced(head) else V
        head.draft_vocab.copy_(choose_draft_vocab(notes["expected"], size))
    notes["sequences"] += len(newest)
    notes["tokens"] += sum(data.answer_length(i) for i in newest)
    notes["rounds"] = number + 1
    trainer.save()


class _Progress:
    """Prints a line every so many steps."""

    def __init__(self, recipe: Recipe, every: int = 25):
        self.recipe, self.every = recipe, every
        self.losses: list[float] = []

    def __call__(self, step: int, loss: float, parts: Tensor, rate: float) -> None:
        self.losses.append(loss)
        if step % self.every == 0 or step == self.recipe.steps:
            mean = sum(self.losses) / len(self.losses)
            left = (self.recipe.steps - step) * self.recipe.rows / rate / 60
            drafts = " ".join(f"{part:.2f}" for part in parts.tolist())
            print(
                f"step {step}/{self.recipe.steps} loss {mean:.4f}, by draft {drafts}; "
                f"{rate:.0f} rows/s, {left:.0f} minutes of learning left",
                flush=True,
            )
            self.losses = []


def _card(
    plan: Plan, recipe: Recipe, trainer: Trainer, model: Frozen, result: dict[str, Any]
) -> str:
    """The training card: what the heads are, what they learned from, and how good they are."""
    notes, head = trainer.notes, trainer.head
    parameters = sum(w.numel() for w in head.parameters())
    source = [path.name for path in plan.prompts or plan.answers]
    started = "nothing" if plan.init is None else f"{plan.init.name}, and ended midway to it"
    sampled = "as recorded" if plan.answers else "greedy"
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
        f"| started from | {started} |",
        f"| time | {notes['seconds'] / 60:.0f} minutes, {torch.get_num_threads()} threads, "
        f"{trainer.head.draft_vocab.device.type}, torch {torch.__version__} |",
        "",
        f"Replayed on held-out answers, {sampled}, K = {recipe.K}. Hybrid copies after a 3-gram "
        "match, else drafts with the head; loop-free ends at the first repeated 8-gram. A replay "
        "makes all K drafts; decoding stops where they are too unsure.",
        "",
        "| kind | category | tokens | tokens a step | accepted by position |",
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
