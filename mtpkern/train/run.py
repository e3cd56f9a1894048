"""`mtpkern train`: prompts and a frozen model in, a directory of heads out.

The model answers its prompts round by round; heads learn from each round's answers and the last few
rounds before it, so that hidden states pass through a window on disk and are never stored whole.
budget.py decides how many prompts and steps fit the time that a run is given.
Everything needed to continue is beside the heads in `.train`. A run that was killed while it
learned continues where it was, at most a minute back, with the losses of an unbroken run; Ctrl-C
saves first. One that was killed while it answered starts the unfinished answers again.
"""

import json
import math
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mtpkern.checkpoints.json_files import read_json_object
from mtpkern.checkpoints.resolve import model_name
from mtpkern.device import resolve_device
from mtpkern.drafters.load import find_heads
from mtpkern.errors import UserError, counted, printable
from mtpkern.outputs import run_directory, writing
from mtpkern.status import SILENT, Phase, Status
from mtpkern.train import DEFAULT_MINUTES, budget
from mtpkern.train.acceptance import evaluate
from mtpkern.train.budget import Settings
from mtpkern.train.card import training_card
from mtpkern.train.dataset import claim, differences
from mtpkern.train.distill import check_prompts
from mtpkern.train.fit import (
    Recipe,
    Trainer,
    choose_draft_vocab,
    expected_tokens,
    feature_spread,
)
from mtpkern.train.frozen import Frozen
from mtpkern.train.heads.families import (
    Head,
    export_head,
    is_reduced,
    load_head,
    new_head,
)
from mtpkern.train.heads.mtp import MtpHead
from mtpkern.train.plan import Plan
from mtpkern.train.rounds import Round, Rounds

WORK = ".train"  # in `out`: everything that an unfinished run continues from
FINISHED = "training.json"  # in `out`: settings and result of a finished run


def train(plan: Plan, recipe: Recipe, *, status: Status = SILENT) -> dict[str, Any]:
    """Train heads as planned and write them with their card -> acceptance on the held-out answers,
    by kind and category. Raises UserError for what the caller can mend.

    An unfinished run of the same settings continues, a finished one is left as it is, and anything
    else in `plan.out` is refused: see `mtpkern.outputs`.
    """
    if bool(plan.prompts) == bool(plan.answers):
        raise UserError("one of prompts and recorded answers is needed, not both")
    if plan.minutes and recipe.steps:
        raise UserError("a run has a number of minutes or one of steps, not both")
    check_prompts(plan.prompts)
    if plan.init is not None and str(plan.init) != "auto":
        find_heads(str(plan.init))
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
    model = Frozen.load(plan.model, device, status)
    if plan.init is not None:
        name = model_name(model.directory)
        plan = replace(plan, init=find_heads(str(plan.init), name, model.directory))
    head = _initial_head(plan, recipe, model).to(device)
    work = plan.out / WORK
    rounds = Rounds(plan, recipe, model, head.config.tap_layers, device, work, status)
    facts = _identity(plan, recipe, model, rounds.prompts)
    if not (work / "run.json").exists() and not plan.force:
        if (finished := _finished(plan.out, facts)) is not None:
            with status.paused():
                print(f"{printable(plan.out)} holds the heads of this very run already", flush=True)
            return finished
    claim(work / "run.json", facts, replaced=["*"] if plan.force else None)
    settings = _settings(plan, recipe, model, head, rounds, began, status)
    if not recipe.steps:
        # In a short run, the learning rate should not rise to the end.
        recipe = replace(recipe, warmup=min(recipe.warmup, math.ceil(settings.steps / 5)))
    recipe = replace(recipe, steps=settings.steps, rows=settings.rows)
    rounds.configure(settings, recipe)
    dtype = getattr(torch, settings.dtype)
    model = model.in_dtype(dtype)
    trainer = Trainer(head, recipe, work / "checkpoint.pt", dtype)
    if trainer.resume():
        status.say(f"continuing from step {trainer.step} of {recipe.steps}")
    else:
        trainer.notes |= {"tokens": 0, "sequences": 0, "rounds": 0}
        trainer.notes["expected"] = torch.zeros(model.config.vocab_size, dtype=torch.float64)
    result: dict[str, Any] = {}
    for number in range(rounds.count):
        end = math.ceil(recipe.steps * (number + 1) / rounds.count)
        if trainer.step >= end and number + 1 < rounds.count:
            continue
        answers = rounds.prepare(number, end, trainer.notes["rounds"])
        if len(answers.new):
            _count_answers(answers, number, plan, trainer, model)
        with status.phase(f"learning{rounds.name(number)}", end - trainer.step, "steps") as phase:
            trainer.fit(
                model.embedding,
                model.lm_head,
                answers.data,
                begin=answers.begin,
                end=answers.end,
                log=_StepLog(recipe, status, phase),
            )
        trainer.save()
        if plan.init is not None and number + 1 == rounds.count:
            _average_with_start(head, load_head(plan.init))
        held_out = rounds.held_out()
        with status.phase("measuring on held-out answers"):
            result = evaluate(head, model.embedding, model.lm_head, held_out, recipe.K)
        overall = result["head"]["overall"]
        rates = " ".join(f"{rate:.2f}" for rate in overall["acceptance_by_position"])
        with status.paused():
            print(
                f"step {trainer.step}: {overall['mean_acceptance_length']:.3f} tokens per step on "
                f"held-out answers; accepted by position: {rates}",
                flush=True,
            )
    export_head(head, plan.out, model.lm_head)
    card = training_card(plan, settings, trainer, result)
    with writing(plan.out):
        (plan.out / "README.md").write_text(card)
        (plan.out / FINISHED).write_text(json.dumps({"run": facts, "result": result}, indent=1))
    shutil.rmtree(work)
    return result


def _settings(
    plan: Plan,
    recipe: Recipe,
    model: Frozen,
    head: Head,
    rounds: Rounds,
    began: float,
    status: Status,
) -> Settings:
    """The settings that a run keeps to its end: written down when it began, or measured now."""
    file = rounds.work / "settings.json"
    if file.exists():
        return Settings(**read_json_object(file))
    rounds.load()
    with status.phase("measuring how fast it goes"):
        dtype = budget.fastest_dtype(rounds.device.type)
        pace = rounds.measure()
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
    """The result of a finished run of the same settings, or None without a finished run. Raises
    UserError for a run of other settings."""
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


def _identity(plan: Plan, recipe: Recipe, model: Frozen, prompts: str) -> dict[str, Any]:
    """What must not change when a run continues: everything but the device, the slots and names."""
    facts = asdict(plan) | asdict(recipe)
    facts |= {"fingerprint": model.fingerprint[:16], "prompts": prompts}
    for name in ("out", "model", "slots", "device", "force"):
        del facts[name]
    found: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return found


def _initial_head(plan: Plan, recipe: Recipe, model: Frozen) -> Head:
    """A new head, or the one to continue from, for this model's weights in either case."""
    if plan.init is None:
        return new_head(plan.family, model.directory, K=recipe.K, vocab_size=plan.draft_vocab_size)
    head, expected = load_head(plan.init), model.fingerprint
    if head.config.base_model_fingerprint not in ("", expected):
        raise UserError(f"{printable(plan.init)} was trained on other weights")
    if head.config.num_heads is not None and recipe.K > head.config.num_heads:
        raise UserError(
            f"{printable(plan.init)} drafts {counted(head.config.num_heads, 'token')}, "
            f"and K is {recipe.K}"
        )
    head.config = replace(head.config, base_model_fingerprint=expected)  # type: ignore[assignment]
    return head


def _average_with_start(head: Head, start: Head) -> None:
    """Replace a trained head by the mean of its weights and those that it started from.

    The mean drafts better than either (Wortsman et al. 2022, robust fine-tuning): much of the noise
    of learning from few answers cancels.
    """
    if isinstance(head, MtpHead):
        start.rescale(head.spread.cpu())
    with torch.no_grad():
        for w, first in zip(head.parameters(), start.parameters(), strict=True):
            w.lerp_(first.to(w.device), 0.5)


def _count_answers(
    answers: Round, number: int, plan: Plan, trainer: Trainer, model: Frozen
) -> None:
    """Choose the draft vocabulary again with a round's new answers, and add them to the totals."""
    notes, head, new = trainer.notes, trainer.head, answers.new
    if number == 0:
        spread = feature_spread(answers.data).to(head.draft_vocab.device)
        (head.prepare if plan.init is None else head.rescale)(spread)
    # Heads to continue from keep their vocabulary, chosen from answers that may not be here.
    if plan.init is None:
        notes["expected"] = notes["expected"] + expected_tokens(new, model.config.vocab_size)
        # The vocabulary is not a weight of the head, and may change while the head learns.
        size = len(head.draft_vocab) if is_reduced(head) else model.config.vocab_size
        head.draft_vocab.copy_(choose_draft_vocab(notes["expected"], size))
    notes["sequences"] += len(new)
    notes["tokens"] += sum(new.answer_length(i) for i in range(len(new)))
    notes["rounds"] = number + 1
    trainer.save()


class _StepLog:
    """Shows each step, and prints a line at most once per `steps` steps and `seconds` seconds."""

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
