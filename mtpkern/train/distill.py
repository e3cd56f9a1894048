"""Self-distillation: prompts -> the frozen model's own answers, and what a head learns from them.

Many answers are decoded at once. A finished one makes room for the next prompt, and its hidden
states and likeliest tokens, which each step records, are written out.
"""

import hashlib
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mtpkern.config import ModelConfig
from mtpkern.errors import UserError
from mtpkern.kernels.sample import gumbel_ref, sampling_key
from mtpkern.status import SILENT, Phase, Status
from mtpkern.tokenizer import Tokenizer
from mtpkern.train.dataset import TOP, DatasetWriter
from mtpkern.train.prompts import read_turns
from mtpkern.train.teacher import Teacher

TOP_P = 0.95  # of sampled answers
LONGEST_PROMPT = 512  # in tokens; longer ones are left out
SORTED_TOGETHER = 64  # shuffled prompts of which neighbours get similar lengths


@dataclass
class Job:
    """A prompt, and the sequence that grows from it."""

    prompt: list[int]
    category: str
    number: int = 0  # its place among the prompts
    tokens: list[int] = field(default_factory=list)
    grams: Counter = field(default_factory=Counter)

    def is_looping(self, size: int = 8, times: int = 3) -> bool:
        """Whether the answer holds its last `size` tokens `times` times; called once per token."""
        if len(self.tokens) - len(self.prompt) < size:
            return False
        gram = tuple(self.tokens[-size:])
        self.grams[gram] += 1
        return self.grams[gram] >= times


Sink = Callable[[Job, Tensor, Tensor, Tensor], None]
Choice = Callable[[Tensor, Tensor, Sequence[Job]], Tensor]


def greedy(logits: Tensor, ids: Tensor, jobs: Sequence[Job]) -> Tensor:
    """The likeliest token, the lowest id among equals: logits and ids [B, M] -> [B]."""
    return ids.masked_fill(logits < logits[:, :1], 1 << 30).amin(-1)


def nucleus(temperature: float, top_p: float, seed: int) -> Choice:
    """Sample from the fewest likeliest tokens whose probabilities exceed top_p, at most M.

    The noise depends on the seed, the job's number, the position and the token alone, so that a
    resumed run samples what an unbroken one would have.
    """

    def choose(logits: Tensor, ids: Tensor, jobs: Sequence[Job]) -> Tensor:
        facts = [(sampling_key(seed, job.number), len(job.tokens)) for job in jobs]
        key, position = torch.tensor(facts, device=ids.device).unbind(1)
        # The largest logit comes first, so that no temperature makes a difference overflow.
        scaled = (logits.float() - logits[:, :1].float()) / temperature
        p = scaled.softmax(-1)
        # Each row has its own ids, [B, M] instead of [n].
        noisy = scaled + gumbel_ref(key, position, ids.long())
        noisy.masked_fill_(p.cumsum(-1) - p > top_p, float("-inf"))
        return ids.gather(1, noisy.argmax(-1, keepdim=True))[:, 0]

    return choose


def every_other(sampled: Choice) -> Choice:
    """Greedy for jobs with even numbers, sampled for the others."""

    def choose(logits: Tensor, ids: Tensor, jobs: Sequence[Job]) -> Tensor:
        odd = torch.tensor([job.number % 2 == 1 for job in jobs], device=ids.device)
        return torch.where(odd, sampled(logits, ids, jobs), greedy(logits, ids, jobs))

    return choose


@torch.inference_mode()
def generate(
    teacher: Teacher,
    jobs: Sequence[Job],
    sink: Sink,
    *,
    slots: int,
    max_new: int,
    choose: Choice = greedy,
    phase: Phase,
) -> None:
    """Answer every job, `slots` at a time. Each finished answer of n tokens goes to
    sink(job, features [n, n_taps*E], top_ids [n, M], top_logits [n, M]); `phase` counts them.

    An answer ends at a stop token, after max_new tokens, at the slot's end, or when it loops.
    Raises UserError for a model whose logits are NaN or infinite.
    """
    teacher.allot(slots)
    slots = min(slots, len(jobs))
    stop, on = set(teacher.config.eos_token_ids), teacher.device
    shape = (slots, teacher.capacity)
    width = len(teacher.taps) * teacher.config.hidden_size
    features = torch.zeros(*shape, width, dtype=torch.bfloat16, device=on)
    top_ids = torch.zeros(*shape, TOP, dtype=torch.int32, device=on)
    top_logits = torch.zeros(*shape, TOP, dtype=torch.float16, device=on)
    waiting, free, active = deque(jobs), list(range(slots)), dict[int, Job]()
    made, began = 0, time.monotonic()
    while waiting or active:
        while waiting and free:
            slot, job = free.pop(), waiting.popleft()
            active[slot] = job
            job.tokens, job.grams = list(job.prompt), Counter()
            top_ids[slot], top_logits[slot] = 0, 0
            if known := job.prompt[:-1]:
                features[slot, : len(known)] = teacher.prefill(slot, known).bfloat16()
        growing = list(active.items())
        lengths = [len(job.tokens) - 1 for _, job in growing]
        rows = teacher.step(list(active), [job.tokens[-1] for _, job in growing], lengths)
        if not rows.top_logits[:, 0].isfinite().all():  # topk puts NaN first
            raise UserError(
                "the model's logits are NaN or infinite: there is nothing to learn from"
            )
        at = torch.tensor(list(active), device=on), torch.tensor(lengths, device=on)
        features[at] = rows.features.bfloat16()
        top_ids[at], top_logits[at] = rows.top_ids.int(), rows.top_logits.half()
        chosen = choose(rows.top_logits, rows.top_ids, list(active.values())).tolist()
        for (slot, job), token in zip(growing, chosen, strict=True):
            job.tokens.append(token)
            n = len(job.tokens)
            is_full = n - len(job.prompt) >= max_new or n >= teacher.capacity
            if token in stop or is_full or job.is_looping():
                # The model has not run on the last token; these rows held another answer's.
                features[slot, n - 1], top_ids[slot, n - 1], top_logits[slot, n - 1] = 0, 0, 0
                sink(job, *(t[slot, :n].cpu() for t in (features, top_ids, top_logits)))
                del active[slot]
                free.append(slot)
                phase.advance()
        made += len(chosen)
        phase.advance(0, f"{made / (time.monotonic() - began):.0f} tokens/s")


def slot_size(
    jobs: Sequence[Job], max_new: int, config: ModelConfig, status: Status = SILENT
) -> int:
    """Positions that the longest prompt and its answer take, at most the model's context."""
    longest, context = max(len(job.prompt) for job in jobs), config.max_position_embeddings
    if longest + max_new > context:
        status.say(
            f"the model's context is {context} tokens: an answer ends there, the one to the "
            f"longest prompt after {context - longest} of {max_new}"
        )
    return min(longest + max_new, context)


def record(
    teacher: Teacher,
    jobs: Iterable[Job],
    directory: Path,
    *,
    slots: int,
    max_new: int,
    temperature: float = 0.0,
    seed: int = 0,
    prompts: str = "",
    force: bool = False,
    status: Status = SILENT,
    what: str = "answers",
) -> None:
    """Write answers to a directory that Dataset reads, `slots` at a time: those that it does not
    hold yet. Every other answer is sampled, or none at temperature 0.

    A recording that was killed continues where it was. Unfinished answers start again and, on a
    CPU, come out as they would have. `prompts` identifies the prompts of `jobs` (see `digest`).
    Raises UserError for a directory with answers to other prompts, with other settings or by
    another model, unless `force` replaces them.
    """
    writer = DatasetWriter(
        directory,
        teacher.config.hidden_size,
        teacher.taps,
        fingerprint=teacher.fingerprint,
        prompts=prompts,
        seed=seed,
        max_new=max_new,
        temperature=temperature,
        force=force,
    )
    choose = every_other(nucleus(temperature, TOP_P, seed)) if temperature else greedy
    waiting = [job for job in jobs if job.number not in writer.numbers]

    def sink(job: Job, features: Tensor, ids: Tensor, logits: Tensor) -> None:
        prompt = len(job.prompt)
        writer.add(job.tokens, prompt, job.category, features, ids, logits, job.number)

    with status.phase(what, total=len(waiting), unit="answers") as phase:
        generate(teacher, waiting, sink, slots=slots, max_new=max_new, choose=choose, phase=phase)


def digest(jobs: Iterable[Job]) -> str:
    """Sixteen hexadecimal digits that identify the prompts and their order."""
    return hashlib.sha256(repr([job.prompt for job in jobs]).encode()).hexdigest()[:16]


def check_prompts(files: Iterable[Path]) -> None:
    """Raise UserError if a file of prompts is missing or malformed, before a model is fetched."""
    for file in files:
        read_turns(file)


def read_prompts(files: Iterable[Path], tokenizer: Tokenizer, seed: int, context: int) -> list[Job]:
    """Shuffled jobs from JSONL files (see `read_turns`), neighbours of similar lengths.

    A prompt is a chat if the model has a template for it, else plain text. Prompts of one token,
    of more than LONGEST_PROMPT, or that fill the model's context are left out.
    """
    turns = [turn for file in files for turn in read_turns(file)]
    random.Random(seed).shuffle(turns)
    jobs = []
    for category, text in turns:
        if tokenizer.has_chat_template:
            prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        else:
            prompt = tokenizer.encode(text)
        if 2 <= len(prompt) <= min(LONGEST_PROMPT, context - 1):
            jobs.append(Job(prompt, category))
    size = SORTED_TOGETHER
    windows = (jobs[at : at + size] for at in range(0, len(jobs), size))
    jobs = [job for window in windows for job in sorted(window, key=lambda job: len(job.prompt))]
    for number, job in enumerate(jobs):
        job.number = number
    return jobs
