"""How fast a machine answers and learns, and the training run that fits into a given time.

A short measurement before the run decides its dtype, slots, rows per step, prompts and steps, which
are written down. A run that continues keeps them, so that its learning-rate schedule, which falls
to zero at the last step, is that of an unbroken run. The time given is therefore not a limit but an
estimate, as good as the measurement.

Time is divided between answering and learning so that every answer token is learned from PASSES
times, as for the heads that ship. With too few prompts for that, tokens are learned from up to
MOST_PASSES times, and the run ends early.
"""

import copy
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.errors import counted
from mtpkern.train.dataset import TOP, Dataset, DatasetWriter
from mtpkern.train.distill import Job
from mtpkern.train.fit import Recipe, Trainer
from mtpkern.train.heads.families import Head
from mtpkern.train.teacher import Teacher

PASSES, MOST_PASSES = 3, 10
TYPICAL_LENGTH = 0.7  # of an answer, as a share of the longest
# Held-out prompts: the most whose answers take at most this share of the time.
HELD_OUT, HELD_OUT_SHARE = (64, 32, 16, 8), 0.1
# Rows per step: the fewest with which the optimiser takes at most this share of a step.
ROWS, OPTIMIZER_SHARE = (128, 256, 512, 1024), 0.25
PROBED_ROWS, PROBE_SECONDS = 256, 20.0
# Sequences answered at once that are tried. A CPU is saturated by the smallest of them.
SLOTS = {"cpu": (8, 16, 32), "cuda": (32, 128, 512)}
LEAST_PROMPTS = 8  # to answer, however little time there is


@dataclass(frozen=True)
class Pace:
    """What was measured; times are in seconds."""

    slots: tuple[int, ...] = ()  # numbers of sequences, ascending
    step: tuple[float, ...] = ()  # a decoding step with each number of them
    prompt: float = 0.0  # prefill of a prompt
    length: float = 0.0  # expected tokens per answer
    longest: int = 0  # most tokens per answer
    update: float = 0.0  # a step of the optimiser
    row: float = 0.0  # learning from one row

    def answering(self, answers: int, slots: int) -> float:
        """Seconds to answer `answers` prompts, `slots` at a time."""
        slots = min(slots, answers)
        if not slots:
            return 0.0
        steps = max(self.longest, answers * self.length / slots + self.longest / 2)
        return answers * self.prompt + steps * self.of_step(slots)

    def best_slots(self, answers: int) -> int:
        return min(self.slots, key=lambda slots: self.answering(answers, slots))

    def in_step(self, rows: int) -> float:
        """Mean rows of a step of at least `rows`, which ends with a whole answer."""
        return rows + self.length / 2

    def learning(self, steps: int, rows: int) -> float:
        """Seconds of `steps` steps of `rows` rows."""
        return steps * (self.update + self.in_step(rows) * self.row)

    def of_step(self, slots: int) -> float:
        """Seconds of a decoding step with `slots` sequences."""
        return float(np.interp(slots, self.slots, self.step))


@dataclass(frozen=True)
class Settings:
    """What a run keeps from its beginning to its end."""

    dtype: str
    slots: int  # answers written at a time
    rows: int  # per step
    steps: int
    prompts: int  # answered and learned from
    held_out: int  # prompts that are only measured on


def share_out(
    seconds: float, pace: Pace, wanted: Settings, available: int, tokens: int
) -> Settings:
    """Choose the run that takes about `seconds`, with `available` prompts or, where `tokens` is not
    0, recorded answers of `tokens` tokens.

    Settings that `wanted` gives are kept, its zeros are chosen; with a number of steps, all prompts
    are taken.
    """
    held_out, rows = wanted.held_out, wanted.rows
    if wanted.steps:
        rows = rows or ROWS[-1]
        held_out = held_out or min(HELD_OUT[0], max(1, available // 10))
        prompts = available if tokens else available - held_out
        slots = wanted.slots or (0 if tokens else pace.best_slots(prompts))
        return replace(wanted, slots=slots, rows=rows, prompts=prompts, held_out=held_out)
    rows = rows or _rows(pace)
    prompts, slots = available, 0
    if not tokens:
        held_out = held_out or _held_out(seconds, pace, available)
        seconds -= pace.answering(held_out, pace.best_slots(held_out))
        # Measuring on them in the end takes no backward pass.
        seconds -= held_out * pace.length * pace.row / 2
        prompts = _prompts(seconds, pace, rows, wanted.slots, available - held_out)
        slots = wanted.slots or pace.best_slots(prompts)
        seconds -= pace.answering(prompts, slots)
    most = MOST_PASSES * (tokens or prompts * pace.length) / pace.in_step(rows)
    steps = max(1, int(min(seconds / pace.learning(1, rows), most)))
    return replace(wanted, slots=slots, rows=rows, steps=steps, prompts=prompts, held_out=held_out)


def describe(settings: Settings, pace: Pace, tokens: int, seconds: float) -> list[str]:
    """Lines that say what was measured and what is planned; `seconds` is the given time, or 0."""
    s = settings
    learning = pace.learning(s.steps, s.rows)
    learned = s.steps * pace.in_step(s.rows)
    rate = f"{learned / learning:.0f} rows/s learned from in steps of {s.rows}"
    answers, words = counted(s.prompts, "recorded answer"), counted(tokens, "token")
    answered, amount = 0.0, f"{answers} of {words}"
    if not tokens:
        answering = pace.answering(s.prompts, s.slots)
        answered = answering + pace.answering(s.held_out, s.slots)
        tokens = round(s.prompts * pace.length)
        rate = f"answers at {tokens / answering:.0f} tokens/s, {s.slots} at a time; {rate}"
        prompts = counted(s.prompts, "prompt")
        amount = f"answers to {prompts}, about {tokens} tokens, and {s.held_out} held out"
    needed = answered + learning
    end = time.strftime("%a %H:%M", time.localtime(time.time() + needed))
    lines = [
        f"measured: {s.dtype}; {rate}",
        f"planned: {amount}; {counted(s.steps, 'step')}, each token learned from "
        f"{learned / tokens:.1f} times; {answered / 60:.1f} minutes of answering and "
        f"{learning / 60:.1f} of learning, until about {end}",
    ]
    if seconds and needed > 1.5 * seconds:
        lines.append("that is longer than the time given, which is too short to be of use")
    elif needed < 0.7 * seconds and s.steps >= int(MOST_PASSES * tokens / pace.in_step(s.rows)):
        lines.append(
            f"that is shorter than the time given: a token is learned from at most {MOST_PASSES} "
            "times, so that more time needs more prompts"
        )
    return lines


def _prompts(seconds: float, pace: Pace, rows: int, slots: int, most: int) -> int:
    """How many prompts to answer, leaving the time to learn PASSES times from the answers."""
    best, row = 0, pace.learning(1, rows) / pace.in_step(rows)
    for count in (slots,) if slots else pace.slots:
        step = pace.of_step(count)
        an_answer = pace.prompt + pace.length * (step / count + PASSES * row)
        answers = int((seconds - pace.longest / 2 * step) / an_answer)
        # With fewer answers, slots would be empty from the start, which the estimate leaves out.
        if answers >= count * TYPICAL_LENGTH:
            best = max(best, answers)
    return min(max(best, LEAST_PROMPTS), most)


def _held_out(seconds: float, pace: Pace, available: int) -> int:
    for count in HELD_OUT:
        if pace.answering(count, pace.best_slots(count)) <= HELD_OUT_SHARE * seconds:
            break
    return min(count, max(1, available // 10))


def _rows(pace: Pace) -> int:
    for rows in ROWS:
        if pace.update <= OPTIMIZER_SHARE * pace.learning(1, rows):
            break
    return rows


@functools.cache
def fastest_dtype(kind: str) -> torch.dtype:
    """The dtype in which a device trains matrices fastest; bfloat16 on a GPU.

    CPUs with instructions for bfloat16 are several times faster with it, all others slower.
    """
    if kind != "cpu":
        return torch.bfloat16
    generator, found = torch.Generator().manual_seed(0), {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(128, 1024, generator=generator).to(dtype)
        w = torch.randn(512, 1024, generator=generator).to(dtype).requires_grad_()

        def both(x: torch.Tensor = x, w: torch.Tensor = w) -> None:
            F.linear(x, w).sum().backward()

        found[dtype] = timed(torch.device(kind), both)
    return min(found, key=lambda dtype: found[dtype])


def timed(device: torch.device, call: Callable[[], object], repeats: int = 3) -> float:
    """Mean seconds of a few calls after a warm-up call, for about half a second.

    The mean and not the minimum: other load on the machine will be there during the run too.
    """
    call()
    _wait(device)
    spent: list[float] = []
    while len(spent) < repeats and sum(spent) < 0.5:
        began = time.perf_counter()
        call()
        _wait(device)
        spent.append(time.perf_counter() - began)
    return sum(spent) / len(spent)


def measure_answers(teacher: Teacher, jobs: Sequence[Job], max_new: int, slots: int) -> Pace:
    """Time the teacher's steps with `slots` sequences, or with several numbers of sequences, the
    fewest first, for some seconds where `slots` is 0."""
    lengths = sorted(len(job.prompt) for job in jobs)
    prompt = lengths[len(lengths) // 2]
    longest = min(max_new, teacher.capacity - prompt)
    on, found = teacher.device, dict[int, float]()
    most = max(1, _free_memory(on) // 2 // teacher.bytes_per_slot)
    fitting = [count for count in SLOTS[on.type] if count <= most] or [SLOTS[on.type][0]]
    candidates = [slots] if slots else fitting
    teacher.allot(candidates[-1])
    began = time.perf_counter()
    for count in candidates:
        if found and time.perf_counter() - began > PROBE_SECONDS:
            break
        rows = range(count), [5] * count, [prompt + longest // 2] * count
        found[count] = timed(on, functools.partial(teacher.step, *rows))
    prefill = timed(on, lambda: teacher.prefill(0, [5] * prompt))
    return Pace(
        tuple(found),
        tuple(found.values()),
        prefill,
        max(1.0, TYPICAL_LENGTH * longest),
        longest,
    )


class _Watched(Trainer):
    """A trainer that records when its steps end, and how long its optimisers take."""

    ends: list[float]
    updates: list[float]

    def take_step(self) -> None:
        began = time.perf_counter()
        super().take_step()
        _wait(self.head.draft_vocab.device)
        self.ends.append(time.perf_counter())
        self.updates.append(self.ends[-1] - began)


def measure_learning(
    head: Head, recipe: Recipe, data: Dataset, embedding: Tensor, lm_head: Tensor
) -> tuple[float, float]:
    """Seconds that a step spends in the optimisers, and per row besides, from the second of two
    short steps of a copy of the head."""
    trainer = _Watched(
        copy.deepcopy(head), replace(recipe, steps=2, rows=PROBED_ROWS), None, embedding.dtype
    )
    trainer.ends, trainer.updates, rows = [], [], []
    trainer.fit(embedding, lm_head, data, begin=0, end=2, log=lambda *_: rows.append(trainer.rows))
    whole, update = trainer.ends[1] - trainer.ends[0], trainer.updates[1]
    return update, (whole - update) / (rows[1] - rows[0])


def made_up_answers(
    directory: Path, E: int, taps: Sequence[int], V: int, prompt: int, answer: int
) -> Dataset:
    """Random answers, enough for two short steps, to measure with."""
    writer, generator = DatasetWriter(directory, E, taps), torch.Generator().manual_seed(0)
    n = prompt + answer
    for number in range(math.ceil(2 * PROBED_ROWS / answer)):
        writer.add(
            torch.randint(V, (n,), generator=generator).tolist(),
            prompt,
            "all",
            torch.randn(n, len(taps) * E, generator=generator).bfloat16(),
            torch.randint(V, (n, TOP), generator=generator),
            torch.randn(n, TOP, generator=generator),
            number,
        )
    return Dataset([directory], taps)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free_memory(device: torch.device) -> int:
    """Bytes that can be allocated; 2^60 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 60
    return next((int(s.split()[1]) * 1024 for s in lines if s.startswith("MemAvailable")), 1 << 60)
