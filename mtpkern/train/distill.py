"""Self-distillation: prompts -> the frozen model's own answers, and what a head learns from.

Generation is batched for throughput, with continuous refill, over slots of one static KV cache.
"""

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.checkpoint import fingerprint, load_model
from mtpkern.config import UserError, printable
from mtpkern.tokenizer import Tokenizer
from mtpkern.train.dataset import TOP, DatasetWriter

PREFILL_GROUP = 8
TOP_P = 0.95  # of sampled answers
LONGEST_PROMPT = 512  # in tokens; longer ones are left out


class Trunk:
    """A Llama trunk in bf16 over B slots of S positions, for many sequences at once."""

    def __init__(
        self,
        directory: Path,
        slots: int,
        capacity: int,
        device: str | torch.device = "cpu",
        taps: Sequence[int] = (),
    ):
        """`taps` are layers, counted from 1, whose states are wanted beside the final ones."""
        self.device = torch.device(device)
        self.config, self.weights = load_model(directory, dtype=torch.bfloat16, device=device)
        self.fingerprint = fingerprint(directory)
        c = self.config
        self.taps = tuple(sorted({*taps, c.num_layers}))
        frequencies, scaling = c.rope.inverse_frequencies(c.head_dim)
        angle = torch.arange(capacity)[:, None] * frequencies
        cos, sin = angle.cos() * scaling, angle.sin() * scaling
        self.cos = torch.cat([cos, cos], -1).bfloat16().to(device)
        self.sin = torch.cat([-sin, sin], -1).bfloat16().to(device)
        shape = (c.num_layers, slots, c.num_kv_heads, capacity, c.head_dim)
        self.keys = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        self.values = torch.zeros(shape, dtype=torch.bfloat16, device=device)

    def forward(self, tokens: Tensor, slots: Tensor, start: Tensor) -> Tensor:
        """tokens [B, T] at start [B] + 0..T-1 of slots [B] -> features [B, T, n*E].

        T > 1 is a prefill from position 0; T = 1 is a step of all slots, in order.
        """
        c, (B, T) = self.config, tokens.shape
        Hq, Hk, D = c.num_heads, c.num_kv_heads, c.head_dim
        positions = start[:, None] + torch.arange(T, device=self.device)
        cos, sin = self.cos[positions][:, :, None], self.sin[positions][:, :, None]
        S = -(-(int(start.max()) + 1) // 32) * 32
        at, keys = start[:, None, None, None], torch.arange(S, device=self.device)
        unseen = keys > at
        causal = None
        if c.sliding_window:
            unseen |= keys <= at - c.sliding_window
            one = torch.ones(T, T, dtype=torch.bool, device=self.device)
            causal = one.tril() & one.triu(1 - c.sliding_window)
        mask = torch.zeros(B, 1, 1, S, dtype=torch.bfloat16, device=self.device)
        mask.masked_fill_(unseen, float("-inf"))
        x, taps = F.embedding(tokens, self.weights.embedding), []
        for i, layer in enumerate(self.weights.layers):
            y = F.rms_norm(x, x.shape[-1:], layer.input_norm, c.rms_norm_eps)
            qkv = F.linear(y, layer.qkv, layer.qkv_bias).view(B, T, -1, D)
            qk, v = qkv[:, :, : Hq + Hk], qkv[:, :, Hq + Hk :].transpose(1, 2)
            if layer.q_norm is not None:
                parts = zip(qk.split([Hq, Hk], 2), (layer.q_norm, layer.k_norm), strict=True)
                qk = torch.cat([F.rms_norm(x, (D,), w, c.rms_norm_eps) for x, w in parts], 2)
            qk = qk * cos + qk.roll(D // 2, -1) * sin
            q, k = qk[:, :, :Hq], qk[:, :, Hq:].transpose(1, 2)
            keys, values = self.keys[i], self.values[i]
            if T == 1:
                keys[slots, :, start], values[slots, :, start] = k[:, :, 0], v[:, :, 0]
                # The query heads of a group are rows of one product.
                q = q.reshape(B, Hk, Hq // Hk, D)
                o = F.scaled_dot_product_attention(q, keys[:, :, :S], values[:, :, :S], mask)
            else:
                keys[slots, :, :T], values[slots, :, :T] = k, v
                q = q.transpose(1, 2)
                o = F.scaled_dot_product_attention(
                    q, k, v, causal, is_causal=causal is None, enable_gqa=True
                )
                o = o.transpose(1, 2)
            x = x + F.linear(o.reshape(B, T, -1), layer.o, layer.o_bias)
            y = F.rms_norm(x, x.shape[-1:], layer.post_attention_norm, c.rms_norm_eps)
            gate, up = F.linear(y, layer.gate_up, layer.gate_up_bias).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down, layer.down_bias)
            if i + 1 in self.taps[:-1]:
                taps.append(x)
        final = F.rms_norm(x, x.shape[-1:], self.weights.norm, c.rms_norm_eps)
        return torch.cat([*taps, final], -1)

    def top(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, n*E] -> the M largest logits, and their ids [B, M]."""
        final = features[:, -self.config.hidden_size :]
        values, ids = F.linear(final, self.weights.lm_head).topk(TOP, -1)
        return values, ids


@dataclass
class Job:
    """A prompt, and the sequence that grows from it."""

    prompt: list[int]
    category: str
    number: int = 0  # its place among the prompts, which noise follows
    tokens: list[int] = field(default_factory=list)
    grams: Counter = field(default_factory=Counter)

    def is_looping(self, size: int = 8, times: int = 3) -> bool:
        """Whether the last `size` tokens now stand in the answer `times` times."""
        if len(self.tokens) - len(self.prompt) < size:
            return False
        gram = tuple(self.tokens[-size:])
        self.grams[gram] += 1
        return self.grams[gram] >= times


Sink = Callable[[Job, Tensor, Tensor, Tensor], None]
Choice = Callable[[Tensor, Tensor, Sequence[Job]], Tensor]


def greedy(logits: Tensor, ids: Tensor, jobs: Sequence[Job]) -> Tensor:
    """The likeliest token, the lowest id among equals: logits, ids [B, M] of B jobs -> [B]."""
    return ids.masked_fill(logits < logits[:, :1], 1 << 30).amin(-1)


def nucleus(temperature: float, top_p: float, seed: int) -> Choice:
    """Sampling among the likeliest tokens that make up top_p.

    The noise follows the seed, the prompt's number and the position, and nothing else: whoever goes
    on after a kill draws what would have been drawn.
    """
    generator = torch.Generator()

    def choose(logits: Tensor, ids: Tensor, jobs: Sequence[Job]) -> Tensor:
        p = torch.softmax(logits.float() / temperature, -1).cpu()
        p = p.masked_fill(p.cumsum(-1) - p > top_p, 0)
        noise = torch.empty_like(p)
        for row, job in zip(noise, jobs, strict=True):
            generator.manual_seed((seed * 1_000_003 + job.number) * 65_537 + len(job.tokens))
            row.exponential_(generator=generator)
        # The first of exponential clocks at rates p rings with probability p.
        chosen = (p / noise).argmax(-1, keepdim=True)
        return ids.gather(1, chosen.to(ids.device))[:, 0]

    return choose


@torch.inference_mode()
def generate(
    trunk: Trunk,
    jobs: Iterable[Job],
    sink: Sink,
    *,
    max_new: int,
    choose: Choice = greedy,
    log: Callable[[str], None] = print,
) -> None:
    """Answer every job; sink(job, features [n, n*E], ids [n, M], logits [n, M]) gets each, whole.

    An answer ends at a stop token, after max_new tokens, at the slot's end, or when it loops.
    """
    _, slots, _, capacity, _ = trunk.keys.shape
    stop = set(trunk.config.eos_token_ids)
    on = trunk.device
    shape = (slots, capacity, len(trunk.taps) * trunk.config.hidden_size)
    features = torch.zeros(shape, dtype=torch.bfloat16, device=on)
    top_ids = torch.zeros(slots, capacity, TOP, dtype=torch.int32, device=on)
    top_logits = torch.zeros(slots, capacity, TOP, dtype=torch.float16, device=on)
    active: list[Job | None] = [None] * slots
    last = torch.zeros(slots, dtype=torch.int64, device=on)
    lengths = torch.zeros(slots, dtype=torch.int64, device=on)
    jobs, waiting, finished, made, began = iter(jobs), True, 0, 0, time.time()

    def extend(rows: list[int], at_end: Tensor) -> None:
        """Add a token to the sequences in slots `rows`, from features [B, n*E] at their ends."""
        nonlocal finished, made
        logits, ids = trunk.top(at_end)
        ends = lengths[rows] - 1
        features[rows, ends], top_ids[rows, ends] = at_end, ids.int()
        top_logits[rows, ends] = logits.half()
        state: list[tuple[int, int, int]] = []  # slot, newest token, length; zeros at an end
        some = [job for slot in rows if (job := active[slot]) is not None]
        for slot, job, token in zip(rows, some, choose(logits, ids, some).tolist(), strict=True):
            job.tokens.append(token)
            made += 1
            n = len(job.tokens)
            if token in stop or n - len(job.prompt) >= max_new or n >= capacity or job.is_looping():
                # The last token has not been through the model; nothing asks for its features.
                features[slot, n - 1].zero_()
                sink(job, *(t[slot, :n].cpu() for t in (features, top_ids, top_logits)))
                active[slot] = None
                finished += 1
                state.append((slot, 0, 0))
            else:
                state.append((slot, token, n))
        at, next_tokens, next_lengths = torch.tensor(state, device=on).unbind(1)
        last[at], lengths[at] = next_tokens, next_lengths

    steps = 0
    while True:
        free = [slot for slot, job in enumerate(active) if job is None]
        while waiting and len(free) >= min(PREFILL_GROUP, slots):
            group = list(islice(jobs, min(PREFILL_GROUP, slots)))
            if not group:
                waiting = False
                break
            rows, free = free[: len(group)], free[len(group) :]
            prompts = [torch.tensor(job.prompt) for job in group]
            tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
            for slot, job in zip(rows, group, strict=True):
                job.tokens, job.grams = list(job.prompt), Counter()
                active[slot], lengths[slot] = job, len(job.prompt)
            top_ids[rows], top_logits[rows] = 0, 0
            at = torch.tensor(rows, device=on)
            out = trunk.forward(tokens.to(on), at, torch.zeros_like(at))
            features[at, : tokens.shape[1]] = out
            extend(rows, out[torch.arange(len(rows), device=on), lengths[at] - 1])
        rows = [slot for slot, job in enumerate(active) if job is not None]
        if not rows and not waiting:
            return
        if rows:
            every = torch.arange(slots, device=on)
            out = trunk.forward(last[:, None], every, (lengths - 1).clamp(min=0))
            extend(rows, out[rows, 0])
        steps += 1
        if steps % 100 == 0:
            rate = made / (time.time() - began)
            log(f"{finished} sequences, {made} tokens, {rate:.0f} tokens/s")


def record(
    trunk: Trunk,
    jobs: Iterable[Job],
    directory: Path,
    *,
    max_new: int,
    temperature: float = 0.0,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> None:
    """Write the answers to a directory that Dataset reads, those that are not there yet.

    Every other one is sampled, or none at temperature 0. A recording that was killed goes on where
    it was; near-ties may then fall otherwise, since others are answered beside them. Raises
    UserError where answers of another model, to other prompts or in another way are there.
    """
    made = {"model": trunk.fingerprint, "max_new": max_new, "temperature": temperature}
    writer = DatasetWriter(directory, trunk.config.hidden_size, trunk.taps, **made, seed=seed)
    jobs, answered = list(jobs), {row["number"]: row for row in writer.written}
    tokens = np.fromfile(directory / "tokens.bin", np.int32)
    for job in jobs:
        if row := answered.get(job.number):
            if tokens[row["offset"] :][: row["prompt"]].tolist() != job.prompt:
                raise UserError(f"{printable(directory)} holds answers to other prompts")
    waiting = [job for job in jobs if job.number not in answered]
    choices = (greedy, nucleus(temperature, TOP_P, seed)) if temperature else (greedy,)

    def sink(job: Job, features: Tensor, ids: Tensor, logits: Tensor) -> None:
        prompt = len(job.prompt)
        writer.add(job.tokens, prompt, job.category, features, ids, logits, job.number)

    for turn, choose in enumerate(choices):
        some = [job for job in waiting if job.number % len(choices) == turn]
        generate(trunk, some, sink, max_new=max_new, choose=choose, log=log)


def read_prompts(files: Iterable[Path], tokenizer: Tokenizer, longest: int, seed: int) -> list[Job]:
    """Jobs from JSONL files with `turns`, and `category` if they like, shuffled, like lengths close
    together. Raises UserError for files that are none."""
    lines = [line for file in files for line in _lines(file)]
    random.Random(seed).shuffle(lines)
    jobs = []
    for file, line in lines:
        try:
            row = json.loads(line)
            text, category = row["turns"][0], str(row.get("category", "all"))
        except (ValueError, LookupError, TypeError, AttributeError):
            shown = printable(line[:60])
            raise UserError(f"{printable(file)}: no object with `turns`: {shown}") from None
        if tokenizer.has_chat_template:
            prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        else:
            prompt = tokenizer.encode(text)
        if 2 <= len(prompt) <= longest:
            jobs.append(Job(prompt, category))
    size = 8 * PREFILL_GROUP
    windows = [jobs[at : at + size] for at in range(0, len(jobs), size)]
    jobs = [job for window in windows for job in sorted(window, key=lambda job: len(job.prompt))]
    for number, job in enumerate(jobs):
        job.number = number
    return jobs


def _lines(file: Path) -> list[tuple[Path, str]]:
    """The lines of a file that are not blank, each with the file."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{printable(file)}: {printable(reason)}") from None
    return [(file, line) for line in lines if line.strip()]


def usable_device(name: str) -> str:
    """A device to train on; "auto" is a GPU where there is one. Raises UserError for none."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device must be auto, cpu or cuda, got {printable(name)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda needs a GPU, and torch finds none")
    return "cuda" if torch.cuda.is_available() and name != "cpu" else "cpu"


def one_line_errors(main: Callable[[], object]) -> None:
    """Run a command of this package; what its user can mend is one line and exit code 2."""
    try:
        main()
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
