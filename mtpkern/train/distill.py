"""Self-distillation: prompts -> the frozen model's own answers, and what a head learns from.

Generation is batched for throughput, with continuous refill, over slots of one static KV cache.
"""

import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.checkpoint import fingerprint, load_model
from mtpkern.kernels.sample import gumbel_ref, sampling_key
from mtpkern.tokenizer import Tokenizer
from mtpkern.train.dataset import TOP, DatasetWriter
from mtpkern.train.prompts import read_turns

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
        self.fingerprint = fingerprint(directory)[:16]
        self.config, self.weights = load_model(directory, dtype=torch.bfloat16, device=device)
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
    number: int = 0  # its place among the prompts
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
    """The likeliest token, the lowest id among equals: logits, ids [B, M] -> [B]."""
    return ids.masked_fill(logits < logits[:, :1], 1 << 30).amin(-1)


def nucleus(temperature: float, top_p: float, seed: int) -> Choice:
    """Sampling among the likeliest tokens that make up top_p. The noise follows from the seed, the
    job's number, the position and the token, so that a run that goes on samples as it would have.
    """

    def choose(logits: Tensor, ids: Tensor, jobs: Sequence[Job]) -> Tensor:
        facts = [(sampling_key(seed, job.number), len(job.tokens)) for job in jobs]
        key, position = torch.tensor(facts, device=ids.device).unbind(1)
        scaled = logits.float() / temperature
        p = scaled.softmax(-1)
        # Every row has ids of its own, [B, M] in place of [n].
        noisy = scaled + gumbel_ref(key, position, ids.long())
        noisy.masked_fill_(p.cumsum(-1) - p > top_p, float("-inf"))
        return ids.gather(1, noisy.argmax(-1, keepdim=True))[:, 0]

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
        growing = [job for slot in rows if (job := active[slot]) is not None]
        chosen = choose(logits, ids, growing).tolist()
        for slot, job, token in zip(rows, growing, chosen, strict=True):
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
    prompts: str = "",
    force: bool = False,
    log: Callable[[str], None] = print,
) -> None:
    """Write the answers to a directory that Dataset reads, those that are not there yet; every
    other one is sampled, or none at temperature 0.

    A recording that was killed goes on where it was; `prompts` says which ones `jobs` are of, as
    `digest` does, and a directory with answers to others, or by another model, is a UserError, or
    begun anew with `force`.
    Answers that were cut short begin again, with the same noise but among other neighbours: bf16
    may then prefer another of two near equals.
    """
    writer = DatasetWriter(
        directory,
        trunk.config.hidden_size,
        trunk.taps,
        fingerprint=trunk.fingerprint,
        prompts=prompts,
        seed=seed,
        max_new=max_new,
        temperature=temperature,
        force=force,
    )
    choices: list[Choice] = [greedy]
    if temperature:
        choices.append(nucleus(temperature, TOP_P, seed))
    waiting = [job for job in jobs if job.number not in writer.numbers]

    def sink(job: Job, features: Tensor, ids: Tensor, logits: Tensor) -> None:
        prompt = len(job.prompt)
        writer.add(job.tokens, prompt, job.category, features, ids, logits, job.number)

    for turn, choose in enumerate(choices):
        some = [job for job in waiting if job.number % len(choices) == turn]
        generate(trunk, some, sink, max_new=max_new, choose=choose, log=log)


def digest(jobs: Iterable[Job]) -> str:
    """What tells prompts in their order from others: sixteen digits."""
    return hashlib.sha256(repr([job.prompt for job in jobs]).encode()).hexdigest()[:16]


def read_prompts(files: Iterable[Path], tokenizer: Tokenizer, seed: int) -> list[Job]:
    """Jobs from JSONL files, see `read_turns`, shuffled, like lengths close together: a chat where
    the model has a template for it. Prompts of a single token, or too long ones, are left out."""
    turns = [turn for file in files for turn in read_turns(file)]
    random.Random(seed).shuffle(turns)
    jobs = []
    for category, text in turns:
        if tokenizer.has_chat_template:
            prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        else:
            prompt = tokenizer.encode(text)
        if 2 <= len(prompt) <= LONGEST_PROMPT:
            jobs.append(Job(prompt, category))
    size = 8 * PREFILL_GROUP
    windows = [jobs[at : at + size] for at in range(0, len(jobs), size)]
    jobs = [job for window in windows for job in sorted(window, key=lambda job: len(job.prompt))]
    for number, job in enumerate(jobs):
        job.number = number
    return jobs
