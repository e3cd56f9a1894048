"""`mtpkern train`: prompts and a frozen model in, a directory of heads out.

The model answers its prompts round by round, and each round's answers are learned from while the
last few rounds are kept: hidden states pass through a window on disk and are never stored whole.
How many prompts and steps those are, budget.py makes of the time that it is given.
Everything needed to go on lies beside the heads in `.train`: a run that was killed while it learned
goes on where it was, at most a minute back, and its losses are those of an unbroken one; Ctrl-C
saves first. One that was killed while it answered begins the answers in hand again, as `record`
says.
"""

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mtpkern.checkpoints.directory import load_tensors
from mtpkern.checkpoints.json_files import read_json_object
from mtpkern.checkpoints.llama import fingerprint, load_config
from mtpkern.checkpoints.resolve import model_name, resolve_model
from mtpkern.config import ModelConfig
from mtpkern.drafters.load import find_heads
from mtpkern.engine import resolve_device
from mtpkern.errors import UserError, counted, printable
from mtpkern.outputs import run_directory, writing
from mtpkern.status import SILENT, Phase, Status
from mtpkern.tokenizer import Tokenizer
from mtpkern.train import DEFAULT_MINUTES, budget
from mtpkern.train.acceptance import evaluate
from mtpkern.train.budget import Pace, Settings
from mtpkern.train.dataset import Dataset, claim, differences
from mtpkern.train.distill import Job, Trunk, digest, read_prompts, record, slot_size
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
    choose_draft_vocab,
    expected_tokens,
    feature_spread,
)
from mtpkern.train.mtp_head import MtpHead

MEASUREMENTS = 4  # of a run on recorded answers
WORK, FINISHED = ".train", "training.json"  # what an unfinished run goes on from; a finished one


@dataclass(frozen=True)
class Plan:
    """What to train on what; see `mtpkern train --help`.

    Zeros are chosen by measurement, for as long as `minutes` says.
    """

    out: Path
    model: str | None = None
    prompts: tuple[Path, ...] = ()
    answers: tuple[Path, ...] = ()  # recorded before, in place of prompts
    init: Path | None = None  # heads to go on from: a name or a directory
    family: str = "mtp"
    draft_vocab_size: int = 16384
    round_prompts: int = 1024  # prompts answered between two rounds of learning
    window: int = 4  # rounds whose answers are kept
    held_out: int = 0  # prompts to measure on, answered greedily
    temperature: float = 0.6  # of every other prompt's answer; 0: all are greedy
    max_new: int = 192
    slots: int = 0  # answers written at a time
    device: str = "auto"
    minutes: float = 0.0  # of a run without a number of steps; 0: DEFAULT_MINUTES
    force: bool = False  # replace finished heads, or what another run left in `out`


class Frozen(NamedTuple):
    """What training needs of the model."""

    directory: Path
    fingerprint: str
    config: ModelConfig
    embedding: Tensor  # [V, E], in the dtype of learning; bf16 until that is chosen
    lm_head: Tensor  # [V, E]


class Part(NamedTuple):
    """The answers that are learned from between two measurements, and the steps begin..end-1."""

    data: Dataset
    new: Dataset  # of these, what no part had before
    begin: int
    end: int


def train(plan: Plan, recipe: Recipe, *, status: Status = SILENT) -> dict[str, Any]:
    """Train heads as planned and write them with their card -> acceptance on the held-out answers,
    by kind and category. Raises UserError for what the caller can mend.

    An unfinished run of the same settings goes on, a finished one is left as it is, and anything
    else in `plan.out` is refused: see `mtpkern.outputs`.
    """
    if bool(plan.prompts) == bool(plan.answers):
        raise UserError("one of prompts and recorded answers is needed, not both")
    if plan.minutes and recipe.steps:
        raise UserError("a run has a number of minutes or one of steps, not both")
    with run_directory(
        plan.out,
        [f"{WORK}/run.json", FINISHED],
        work=WORK,
        sources=[plan.model, plan.init, *plan.prompts, *plan.answers],
    ):
        return _train(plan, recipe, status)


def _train(plan: Plan, recipe: Recipe, status: Status) -> dict[str, Any]:
    began = time.monotonic()
    device, _ = resolve_device(plan.device)
    torch.manual_seed(recipe.seed)
    model = _freeze(plan.model, device, status)
    if plan.init is not None:
        name = model_name(model.directory)
        plan = replace(plan, init=find_heads(str(plan.init), name, model.directory))
    head = _begin(plan, recipe, model).to(device)
    work = plan.out / WORK
    rounds = _Rounds(plan, recipe, model, head.config.tap_layers, device, work, status)
    facts = _essentials(plan, recipe, model, rounds.prompts)
    if not (work / "run.json").exists() and not plan.force:
        if (finished := _finished(plan.out, facts)) is not None:
            with status.paused():
                print(f"{printable(plan.out)} holds the heads of this very run already", flush=True)
            return finished
    claim(work / "run.json", facts, replaced=["*"] if plan.force else None)
    settings = _settle(plan, recipe, model, head, rounds, began, status)
    if not recipe.steps:
        # Of a short run, the rise of the learning rate is not to be all.
        recipe = replace(recipe, warmup=min(recipe.warmup, math.ceil(settings.steps / 5)))
    recipe = replace(recipe, steps=settings.steps, rows=settings.rows)
    rounds.settle(settings, recipe)
    dtype = getattr(torch, settings.dtype)
    model = model._replace(embedding=model.embedding.to(dtype), lm_head=model.lm_head.to(dtype))
    trainer = Trainer(head, recipe, work / "checkpoint.pt", dtype)
    if trainer.resume():
        status.say(f"going on from step {trainer.step} of {recipe.steps}")
    else:
        trainer.notes |= {"tokens": 0, "sequences": 0, "rounds": 0}
        trainer.notes["expected"] = torch.zeros(model.config.vocab_size, dtype=torch.float64)
    result: dict[str, Any] = {}
    for number in range(rounds.count):
        end = math.ceil(recipe.steps * (number + 1) / rounds.count)
        if trainer.step >= end and number + 1 < rounds.count:
            continue
        part = rounds.part(number, end, trainer.notes["rounds"])
        if len(part.new):
            _look_at(part, number, plan, trainer, model)
        with status.phase(f"learning{rounds.name(number)}", end - trainer.step, "steps") as phase:
            trainer.fit(
                model.embedding,
                model.lm_head,
                part.data,
                begin=part.begin,
                end=part.end,
                log=_Progress(recipe, status, phase),
            )
        trainer.save()
        if plan.init is not None and number + 1 == rounds.count:
            _meet_halfway(head, load_head(plan.init))
        held_out = rounds.held_out()
        with status.phase("measuring on held-out answers"):
            result = evaluate(head, model.embedding, model.lm_head, held_out, recipe.K)
        overall = result["head"]["overall"]
        with status.paused():
            print(
                f"step {trainer.step}: {overall['mean_acceptance_length']:.3f} tokens per step on "
                f"held-out answers, accepted by position {overall['acceptance_by_position']}",
                flush=True,
            )
    export_head(head, plan.out, model.lm_head)
    card = _card(plan, recipe, settings, trainer, model, result)
    with writing(plan.out):
        (plan.out / "README.md").write_text(card)
        (plan.out / FINISHED).write_text(json.dumps({"run": facts, "result": result}, indent=1))
    shutil.rmtree(work)
    return result


def _settle(
    plan: Plan,
    recipe: Recipe,
    model: Frozen,
    head: Head,
    rounds: "_Rounds",
    began: float,
    status: Status,
) -> Settings:
    """What the run is held to: as it was written down when it began, or measured now."""
    file = rounds.work / "settings.json"
    if file.exists():
        return Settings(**read_json_object(file))
    with status.phase("measuring how fast it goes"):
        dtype = budget.fastest_dtype(rounds.device.type)
        pace = rounds.measure(dtype)
        data, probe = rounds.data, rounds.work / "probe"
        if data is None:
            prompt, answer = rounds.capacity - pace.longest, max(2, round(pace.length))
            E, V = model.config.hidden_size, model.config.vocab_size
            data = budget.made_up_answers(probe, E, rounds.taps, V, prompt, answer)
        frozen = model.embedding.to(dtype), model.lm_head.to(dtype)
        update, row = budget.measure_learning(head, recipe, data, *frozen)
        shutil.rmtree(probe, ignore_errors=True)
        pace = replace(pace, update=update, row=row)
    seconds = 0.0
    if not recipe.steps:
        seconds = 60 * (plan.minutes or DEFAULT_MINUTES) - (time.monotonic() - began)
    wanted = Settings(
        dtype=str(dtype).removeprefix("torch."),
        slots=plan.slots,
        rows=recipe.rows,
        steps=recipe.steps,
        prompts=0,
        held_out=plan.held_out,
    )
    settings = budget.share_out(seconds, pace, wanted, rounds.available, rounds.tokens)
    for line in budget.describe(settings, pace, rounds.tokens, seconds):
        status.say(line)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(settings)) + "\n")
    temporary.replace(file)
    return settings


def _finished(directory: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a finished run of these settings, None where there is none. Raises UserError
    for the heads of other settings."""
    if not (directory / FINISHED).exists():
        return None
    found = read_json_object(directory / FINISHED)
    if other := differences(found["run"], facts):
        raise UserError(
            f"cannot write {printable(directory)}: it holds the heads of another run ({other}); "
            "choose another --out, or replace them with --force"
        )
    result: dict[str, Any] = found["result"]
    return result


def _essentials(plan: Plan, recipe: Recipe, model: Frozen, prompts: str) -> dict[str, Any]:
    """What a run must keep to go on: all but where it runs, and how much of it at a time."""
    facts = asdict(plan) | asdict(recipe)
    facts |= {"fingerprint": model.fingerprint[:16], "prompts": prompts}
    for name in ("out", "model", "slots", "device", "force"):
        del facts[name]
    found: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return found


def _freeze(name: str | None, device: torch.device, status: Status) -> Frozen:
    directory = resolve_model(name, status=status)
    config = load_config(directory)
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    frozen = load_tensors(directory, names[: 1 if config.tie_word_embeddings else 2])
    embedding, lm_head = (
        frozen.get(name, frozen[names[0]]).to(device, torch.bfloat16) for name in names
    )
    return Frozen(directory, fingerprint(directory), config, embedding, lm_head)


def _begin(plan: Plan, recipe: Recipe, model: Frozen) -> Head:
    """A new head, or the one to go on from, in either case for this model's weights."""
    if plan.init is None:
        return new_head(plan.family, model.directory, K=recipe.K, vocab_size=plan.draft_vocab_size)
    head, mark = load_head(plan.init), model.fingerprint
    if head.config.base_model_fingerprint not in ("", mark):
        raise UserError(f"{printable(plan.init)} was trained on other weights")
    if head.config.num_heads is not None and recipe.K > head.config.num_heads:
        raise UserError(
            f"{printable(plan.init)} drafts {counted(head.config.num_heads, 'token')}, "
            f"and K is {recipe.K}"
        )
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
        device: torch.device,
        work: Path,
        status: Status,
    ):
        self.plan, self.recipe, self.model = plan, recipe, model
        self.taps, self.device, self.work, self.status = taps, device, work, status
        self.trunk: Trunk | None = None
        self.data: Dataset | None = None
        self.jobs: list[Job] = []
        self.prompts = ""
        self.dtype = torch.bfloat16
        if plan.answers:
            # They are all there from the beginning, and measured on now and then.
            self.count = MEASUREMENTS
            data = self.data = Dataset(
                plan.answers,
                taps,
                hidden_size=model.config.hidden_size,
                fingerprint=model.fingerprint[:16],
            )
            if len(data) < 2:
                raise UserError(f"too few recorded answers: {len(data)}, of which one is held out")
            self.measured = [i for i in range(len(data)) if is_held_out(data, i)] or [0]
            self.learned = data.pick(sorted(set(range(len(data))) - set(self.measured)))
            self.available = len(self.learned)
            self.tokens = sum(self.learned.answer_length(i) for i in range(self.available))
            return
        tokenizer = Tokenizer.from_directory(model.directory)
        context = model.config.max_position_embeddings
        with status.phase("reading prompts"):
            self.jobs = read_prompts(plan.prompts, tokenizer, recipe.seed, context)
        self.prompts = digest(self.jobs)
        self.available, self.tokens = len(self.jobs), 0
        if len(self.jobs) <= (kept := max(1, plan.held_out)):
            raise UserError(
                f"too few usable prompts: {len(self.jobs)}, of which {kept} to be held out"
            )
        self.capacity = slot_size(self.jobs, plan.max_new, model.config, status)

    def measure(self, dtype: torch.dtype) -> Pace:
        """How fast the answers to come are written."""
        self.dtype = dtype
        if self.plan.answers:
            return Pace(length=self.tokens / self.available)
        return budget.measure_answers(self._trunk(), self.jobs, self.plan.max_new, self.plan.slots)

    def settle(self, settings: Settings, recipe: Recipe) -> None:
        """Keep to the settings: hold prompts out, and answer as many as they say."""
        self.recipe, self.dtype = recipe, getattr(torch, settings.dtype)
        if self.plan.answers:
            return
        self.slots = self.plan.slots or settings.slots
        # The first ones are as mixed as all of them. Every so many of those, so that the held-out
        # ones are of all lengths.
        jobs = self.jobs[: settings.held_out + settings.prompts]
        apart = len(jobs) // settings.held_out
        self.kept_back = jobs[::apart][: settings.held_out]
        taken = {job.number for job in self.kept_back}
        self.jobs = [job for job in jobs if job.number not in taken]
        self.count = math.ceil(len(self.jobs) / self.plan.round_prompts)

    def name(self, number: int) -> str:
        """Which of several rounds this is."""
        return f", round {number + 1} of {self.count}" if self.count > 1 else ""

    def part(self, number: int, end: int, seen: int) -> Part:
        """The data of a round, where those before round `seen` are known; answers that no later
        round needs are removed."""
        begin = math.ceil(self.recipe.steps * number / self.count)
        if self.plan.answers:
            data = self.learned
            return Part(data, data.pick([]) if seen else data, begin, end)
        self.held_out()
        size, first = self.plan.round_prompts, max(0, number + 1 - self.plan.window)
        for n in range(number + 1):
            if n >= first:
                jobs = self.jobs[n * size : (n + 1) * size]
                what = f"answers{self.name(n)}"
                self._answer(self._place(n), jobs, self.plan.temperature, what)
            else:
                shutil.rmtree(self._place(n), ignore_errors=True)
        data = Dataset([self._place(n) for n in range(first, number + 1)], self.taps)
        # A round without a step of its own was passed over.
        new = data.pick(i for i, (n, _) in enumerate(data.sequences) if first + n >= seen)
        return Part(data, new, begin, end)

    def held_out(self) -> Dataset:
        """Answers that are only measured on."""
        if self.data is not None:
            return self.data.pick(self.measured)
        self._answer(self.work / "held-out", self.kept_back, 0.0, "held-out answers")
        return Dataset([self.work / "held-out"], self.taps)

    def _place(self, number: int) -> Path:
        return self.work / f"round-{number:04d}"

    def _trunk(self) -> Trunk:
        if self.trunk is None:
            with self.status.phase("loading the model"):
                self.trunk = Trunk(
                    self.model.directory, self.capacity, self.device, self.taps, self.dtype
                )
        return self.trunk

    def _answer(self, directory: Path, jobs: list[Job], temperature: float, what: str) -> None:
        """Record answers that are not there yet."""
        done = directory / "done"
        if done.exists():
            return
        record(
            self._trunk(),
            jobs,
            directory,
            slots=self.slots,
            max_new=self.plan.max_new,
            temperature=temperature,
            seed=self.recipe.seed,
            prompts=self.prompts,
            status=self.status,
            what=what,
        )
        done.touch()


def is_held_out(data: Dataset, index: int, share: float = 0.01) -> bool:
    """Whether a recorded answer is only measured on; the choice stays as a directory grows."""
    directory, row = data.sequences[index]
    return bool(np.random.default_rng((directory, row["offset"])).random() < share)


def _look_at(part: Part, number: int, plan: Plan, trainer: Trainer, model: Frozen) -> None:
    """Take in a round's new answers: their tokens for the draft vocabulary, and the totals."""
    notes, head, newest = trainer.notes, trainer.head, part.new
    if number == 0:
        spread = feature_spread(part.data).to(head.draft_vocab.device)
        (head.prepare if plan.init is None else head.rescale)(spread)
    # Heads to go on from keep theirs, which was chosen from answers that may not be here.
    if plan.init is None:
        notes["expected"] = notes["expected"] + expected_tokens(newest, model.config.vocab_size)
        # The vocabulary is no weight of a head: it may change while the head learns.
        size = len(head.draft_vocab) if is_reduced(head) else model.config.vocab_size
        head.draft_vocab.copy_(choose_draft_vocab(notes["expected"], size))
    notes["sequences"] += len(newest)
    notes["tokens"] += sum(newest.answer_length(i) for i in range(len(newest)))
    notes["rounds"] = number + 1
    trainer.save()


class _Progress:
    """Shows each step, and prints a line every so many steps and seconds."""

    def __init__(
        self, recipe: Recipe, status: Status, phase: Phase, steps: int = 25, seconds: float = 5
    ):
        self.recipe, self.status, self.phase = recipe, status, phase
        self.steps, self.seconds, self.printed = steps, seconds, 0.0
        self.losses: list[float] = []

    def __call__(self, step: int, loss: float, parts: Tensor, rate: float) -> None:
        self.losses.append(loss)
        self.phase.advance(1, f"loss {loss:.2f}, {rate:.0f} rows/s")
        due = step % self.steps == 0 and time.monotonic() - self.printed > self.seconds
        if due or step == self.recipe.steps:
            mean = sum(self.losses) / len(self.losses)
            drafts = " ".join(f"{part:.2f}" for part in parts.tolist())
            per_step = self.phase.seconds / self.phase.done
            left = tqdm.format_interval((self.recipe.steps - step) * per_step)
            self.status.say(
                f"step {step}/{self.recipe.steps}: loss {mean:.4f}, by draft {drafts}; "
                f"{rate:.0f} rows/s, {left} of learning left"
            )
            self.losses, self.printed = [], time.monotonic()


def _card(
    plan: Plan,
    recipe: Recipe,
    settings: Settings,
    trainer: Trainer,
    model: Frozen,
    result: dict[str, Any],
) -> str:
    """The training card: what the heads are, what they learned from, and how good they are."""
    notes, head = trainer.notes, trainer.head
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
        f"{settings.dtype}, {trainer.head.draft_vocab.device.type}, torch {torch.__version__} |",
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
