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

from mtpkern.checkpoints.llama import fingerprint
from mtpkern.checkpoints.model_weights import load_model
from mtpkern.config import ModelConfig
from mtpkern.errors import UserError
from mtpkern.kernels.sample import gumbel_ref, sampling_key
from mtpkern.status import SILENT, Phase, Status
from mtpkern.tokenizer import Tokenizer
from mtpkern.train.dataset import TOP, DatasetWriter
from mtpkern.train.prompts import read_turns

PREFILL_GROUP = 8
TOP_P = 0.95  # of sampled answers
LONGEST_PROMPT = 512  # in tokens; longer ones are left out


class Trunk:
    """A Llama trunk over B slots of S positions, for many sequences at once."""

    def __init__(
        self,
        directory: Path,
        capacity: int,
        device: str | torch.device = "cpu",
        taps: Sequence[int] = (),
        dtype: torch.dtype = torch.bfloat16,
    ):
        """`capacity` is S; `taps` are layers, counted from 1, whose states are wanted beside the
        final ones. `allot` comes before the first step."""
        self.device, self.dtype, self.capacity = torch.device(device), dtype, capacity
        self.fingerprint = fingerprint(directory)[:16]
        self.config, self.weights = load_model(directory, dtype=dtype, device=device)
        c, w = self.config, self.weights
        assert isinstance(w.embedding, Tensor) and isinstance(w.lm_head, Tensor), "no bits are kept"
        self.embedding, self.lm_head = w.embedding, w.lm_head
        self.taps = tuple(sorted({*taps, c.num_layers}))
        frequencies, scaling = c.rope.inverse_frequencies(c.head_dim)
        angle = torch.arange(capacity)[:, None] * frequencies
        cos, sin = angle.cos() * scaling, angle.sin() * scaling
        self.cos = torch.cat([cos, cos], -1).to(device, dtype)
        self.sin = torch.cat([-sin, sin], -1).to(device, dtype)
        self.keys = self.values = torch.empty(0)

    def allot(self, slots: int) -> None:
        """Make room for so many sequences; what the slots held is gone."""
        c = self.config
        shape = (c.num_layers, slots, c.num_kv_heads, self.capacity, c.head_dim)
        if self.keys.shape != shape:
            self.keys = self.values = torch.empty(0)  # the old ones go before the new ones come
            self.keys = torch.zeros(shape, dtype=self.dtype, device=self.device)
            self.values = torch.zeros_like(self.keys)

    @property
    def bytes_per_slot(self) -> int:
        """Memory that a sequence takes: keys and values, and what `generate` keeps of it."""
        c = self.config
        keys = 2 * c.num_layers * c.num_kv_heads * c.head_dim * self.dtype.itemsize
        return self.capacity * (keys + 2 * len(self.taps) * c.hidden_size + 6 * TOP)

    def forward(self, tokens: Tensor, slots: Tensor, start: Tensor) -> Tensor:
        """tokens [B, T] at start [B] + 0..T-1 of slots [B] -> features [B, T, n*E].

        T > 1 is a prefill from position 0; T = 1 is a step of all slots, in order.
        """
        c, (B, T) = self.config, tokens.shape
        Hq, Hk, D = c.num_heads, c.num_kv_heads, c.head_dim
        positions = start[:, None] + torch.arange(T, device=self.device)
        cos, sin = self.cos[positions][:, :, None], self.sin[positions][:, :, None]
        S = min(-(-(int(start.max()) + 1) // 32) * 32, self.capacity)
        at, keys = start[:, None, None, None], torch.arange(S, device=self.device)
        unseen = keys > at
        causal = None
        if c.sliding_window:
            unseen |= keys <= at - c.sliding_window
            one = torch.ones(T, T, dtype=torch.bool, device=self.device)
            causal = one.tril() & one.triu(1 - c.sliding_window)
        mask = torch.zeros(B, 1, 1, S, dtype=self.dtype, device=self.device)
        mask.masked_fill_(unseen, float("-inf"))
        x, taps = F.embedding(tokens, self.embedding), []
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
        values, ids = F.linear(final, self.lm_head).topk(TOP, -1)
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
        # The largest comes first: no temperature makes the differences overflow upwards.
        scaled = (logits.float() - logits[:, :1].float()) / temperature
        p = scaled.softmax(-1)
        # Every row has ids of its own, [B, M] in place of [n].
        noisy = scaled + gumbel_ref(key, position, ids.long())
        noisy.masked_fill_(p.cumsum(-1) - p > top_p, float("-inf"))
        return ids.gather(1, noisy.argmax(-1, keepdim=True))[:, 0]

    return choose


def every_other(sampled: Choice) -> Choice:
    """Greedy for jobs of even numbers, sampled for the others."""

    def choose(logits: Tensor, ids: Tensor, jobs: Sequence[Job]) -> Tensor:
        odd = torch.tensor([job.number % 2 == 1 for job in jobs], device=ids.device)
        return torch.where(odd, sampled(logits, ids, jobs), greedy(logits, ids, jobs))

    return choose


@torch.inference_mode()
def generate(
    trunk: Trunk,
    jobs: Sequence[Job],
    sink: Sink,
    *,
    slots: int,
    max_new: int,
    choose: Choice = greedy,
    phase: Phase,
) -> None:
    """Answer every job, `slots` at a time; sink(job, features [n, n*E], ids [n, M], logits [n, M])
    gets each, whole, and `phase` counts them.

    An answer ends at a stop token, after max_new tokens, at the slot's end, or when it loops. A
    model whose logits are no numbers is a UserError.
    """
    if not jobs:
        return
    slots, capacity = min(slots, len(jobs)), trunk.capacity
    trunk.allot(slots)
    stop = set(trunk.config.eos_token_ids)
    on = trunk.device
    shape = (slots, capacity, len(trunk.taps) * trunk.config.hidden_size)
    features = torch.zeros(shape, dtype=torch.bfloat16, device=on)
    top_ids = torch.zeros(slots, capacity, TOP, dtype=torch.int32, device=on)
    top_logits = torch.zeros(slots, capacity, TOP, dtype=torch.float16, device=on)
    active: list[Job | None] = [None] * slots
    last = torch.zeros(slots, dtype=torch.int64, device=on)
    lengths = torch.zeros(slots, dtype=torch.int64, device=on)
    queue, waiting, made, began = iter(jobs), True, 0, time.monotonic()

    def extend(rows: list[int], at_end: Tensor) -> None:
        """Add a token to the sequences in slots `rows`, from features [B, n*E] at their ends."""
        nonlocal made
        logits, ids = trunk.top(at_end)
        if not logits[:, 0].isfinite().all():  # topk puts NaN first
            raise UserError("the model's logits are no numbers: there is nothing to learn from")
        ends = lengths[rows] - 1
        features[rows, ends], top_ids[rows, ends] = at_end.bfloat16(), ids.int()
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
                phase.advance()
                state.append((slot, 0, 0))
            else:
                state.append((slot, token, n))
        at, next_tokens, next_lengths = torch.tensor(state, device=on).unbind(1)
        last[at], lengths[at] = next_tokens, next_lengths

    while True:
        free = [slot for slot, job in enumerate(active) if job is None]
        while waiting and len(free) >= min(PREFILL_GROUP, slots):
            group = list(islice(queue, min(PREFILL_GROUP, slots)))
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
            features[at, : tokens.shape[1]] = out.bfloat16()
            extend(rows, out[torch.arange(len(rows), device=on), lengths[at] - 1])
        rows = [slot for slot, job in enumerate(active) if job is not None]
        if not rows and not waiting:
            return
        if rows:
            every = torch.arange(slots, device=on)
            out = trunk.forward(last[:, None], every, (lengths - 1).clamp(min=0))
            extend(rows, out[rows, 0])
        phase.advance(0, f"{made / (time.monotonic() - began):.0f} tokens/s")


def slot_size(
    jobs: Sequence[Job], max_new: int, config: ModelConfig, status: Status = SILENT
) -> int:
    """Tokens of the longest prompt and its answer, which the model's context may cut short."""
    longest, context = max(len(job.prompt) for job in jobs), config.max_position_embeddings
    if longest + max_new > context:
        status.say(
            f"the model's context is {context} tokens: an answer ends there, the one to the "
            f"longest prompt after {context - longest} of {max_new}"
        )
    return min(longest + max_new, context)


def record(
    trunk: Trunk,
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
    """Write the answers to a directory that Dataset reads, those that are not there yet, `slots`
    at a time; every other one is sampled, or none at temperature 0.

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
    choose = every_other(nucleus(temperature, TOP_P, seed)) if temperature else greedy
    waiting = [job for job in jobs if job.number not in writer.numbers]

    def sink(job: Job, features: Tensor, ids: Tensor, logits: Tensor) -> None:
        prompt = len(job.prompt)
        writer.add(job.tokens, prompt, job.category, features, ids, logits, job.number)

    with status.phase(what, total=len(waiting), unit="answers") as phase:
        generate(trunk, waiting, sink, slots=slots, max_new=max_new, choose=choose, phase=phase)


def digest(jobs: Iterable[Job]) -> str:
    """What tells prompts in their order from others: sixteen digits."""
    return hashlib.sha256(repr([job.prompt for job in jobs]).encode()).hexdigest()[:16]


def read_prompts(files: Iterable[Path], tokenizer: Tokenizer, seed: int, context: int) -> list[Job]:
    """Jobs from JSONL files, see `read_turns`, shuffled, like lengths close together: a chat where
    the model has a template for it. Prompts of a single token are left out, and those of over
    LONGEST_PROMPT or that leave no room in the model's context."""
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
    size = 8 * PREFILL_GROUP
    windows = [jobs[at : at + size] for at in range(0, len(jobs), size)]
    jobs = [job for window in windows for job in sorted(window, key=lambda job: len(job.prompt))]
    for number, job in enumerate(jobs):
        job.number = number
    return jobs
