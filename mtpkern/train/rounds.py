"""Where a run's answers come from, round by round: recorded ones, the same in each round, or new
ones for each, of which the last few rounds are kept on disk."""

import math
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mtpkern.errors import UserError
from mtpkern.status import Status
from mtpkern.tokenizer import Tokenizer
from mtpkern.train import budget
from mtpkern.train.budget import Pace, Settings
from mtpkern.train.dataset import Dataset
from mtpkern.train.distill import Job, digest, read_prompts, record, slot_size
from mtpkern.train.fit import Recipe
from mtpkern.train.frozen import Frozen
from mtpkern.train.plan import Plan
from mtpkern.train.teacher import Teacher

MEASUREMENTS = 4  # of a run on recorded answers


class Round(NamedTuple):
    """The answers that steps begin..end-1 learn from, between two measurements."""

    data: Dataset
    new: Dataset  # the part of `data` that no earlier round had
    begin: int
    end: int


class Rounds:
    """`count` rounds of answers, and held-out answers to measure on.

    `available` is the number of prompts or recorded answers, `tokens` those of recorded answers.
    `measure` and `configure` come before the first round.
    """

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
        self.data: Dataset | None = None
        self.jobs: list[Job] = []
        self.prompts = ""
        self._loaded: Teacher | None = None
        if plan.answers:
            self._open_recorded()
        else:
            self._read_prompts()

    def _open_recorded(self) -> None:
        # All answers are there from the start; rounds only say when to measure.
        self.count = MEASUREMENTS
        data = self.data = Dataset(
            self.plan.answers,
            self.taps,
            hidden_size=self.model.config.hidden_size,
            fingerprint=self.model.fingerprint[:16],
        )
        if len(data) < 2:
            raise UserError(f"too few recorded answers: {len(data)}, of which one is held out")
        held_out = [i for i in range(len(data)) if is_held_out(data, i)] or [0]
        self._held_out = data.pick(held_out)
        self._learned = data.pick(sorted(set(range(len(data))) - set(held_out)))
        self.available = len(self._learned)
        self.tokens = sum(self._learned.answer_length(i) for i in range(self.available))

    def _read_prompts(self) -> None:
        plan, config = self.plan, self.model.config
        tokenizer = Tokenizer.from_directory(self.model.directory)
        context = config.max_position_embeddings
        with self.status.phase("reading prompts"):
            self.jobs = read_prompts(plan.prompts, tokenizer, self.recipe.seed, context)
        self.prompts = digest(self.jobs)
        self.available, self.tokens = len(self.jobs), 0
        if len(self.jobs) <= (held_out := max(1, plan.held_out)):
            raise UserError(
                f"too few usable prompts: {len(self.jobs)}, of which {held_out} to be held out"
            )
        self.capacity = slot_size(self.jobs, plan.max_new, config, self.status)

    def load(self) -> None:
        """Load what answers prompts, unless the answers are recorded."""
        if self.data is None:
            self._teacher()

    def measure(self) -> Pace:
        """How fast new answers are written."""
        if self.data is not None:
            return Pace(length=self.tokens / self.available)
        return budget.measure_answers(
            self._teacher(), self.jobs, self.plan.max_new, self.plan.slots
        )

    def configure(self, settings: Settings, recipe: Recipe) -> None:
        """Hold prompts out and divide the others into rounds, as many as the settings say."""
        self.recipe = recipe
        if self.data is not None:
            return
        self.slots = self.plan.slots or settings.slots
        # Any stretch of the shuffled prompts is as mixed as all of them. Neighbours have similar
        # lengths, so that an even stride holds out all lengths.
        jobs = self.jobs[: settings.held_out + settings.prompts]
        stride = len(jobs) // settings.held_out
        self._held_out_jobs = jobs[::stride][: settings.held_out]
        held_out = {job.number for job in self._held_out_jobs}
        self.jobs = [job for job in jobs if job.number not in held_out]
        self.count = math.ceil(len(self.jobs) / self.plan.round_prompts)

    def name(self, number: int) -> str:
        """Which of several rounds this is."""
        return f", round {number + 1} of {self.count}" if self.count > 1 else ""

    def prepare(self, number: int, end: int, seen: int) -> Round:
        """Record the answers of a round that ends at step `end`, and remove those that it and later
        rounds do not need. Rounds before `seen` are known already."""
        begin = math.ceil(self.recipe.steps * number / self.count)
        if self.data is not None:
            data = self._learned
            return Round(data, data.pick([]) if seen else data, begin, end)
        self.held_out()
        size, first = self.plan.round_prompts, max(0, number + 1 - self.plan.window)
        for n in range(number + 1):
            if n >= first:
                jobs = self.jobs[n * size : (n + 1) * size]
                what = f"answers{self.name(n)}"
                self._record(self._directory(n), jobs, self.plan.temperature, what)
            else:
                shutil.rmtree(self._directory(n), ignore_errors=True)
        data = Dataset([self._directory(n) for n in range(first, number + 1)], self.taps)
        # A round that has no step of its own is new in the next one.
        new = data.pick(i for i, (n, _) in enumerate(data.sequences) if first + n >= seen)
        return Round(data, new, begin, end)

    def held_out(self) -> Dataset:
        """Answers that are only measured on."""
        if self.data is not None:
            return self._held_out
        self._record(self.work / "held-out", self._held_out_jobs, 0.0, "held-out answers")
        return Dataset([self.work / "held-out"], self.taps)

    def _directory(self, number: int) -> Path:
        return self.work / f"round-{number:04d}"

    def _teacher(self) -> Teacher:
        if self._loaded is None:
            self._loaded = Teacher(
                self.model.directory, self.capacity, self.device, self.taps, self.status
            )
        return self._loaded

    def _record(self, directory: Path, jobs: list[Job], temperature: float, what: str) -> None:
        """Record the answers that a directory does not hold yet."""
        done = directory / "done"
        if done.exists():
            return
        record(
            self._teacher(),
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
    """Whether a recorded answer is only measured on; the same for an answer when more are added."""
    directory, row = data.sequences[index]
    return bool(np.random.default_rng((directory, row["offset"])).random() < share)
