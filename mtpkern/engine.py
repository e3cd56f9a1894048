"""LLM: prompts in, completions out. Prefill, batching, the loop, stop conditions, statistics.

The only file that waits for the device: a step's tokens are read here, once, at its end.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtpkern.cache import KVCache
from mtpkern.checkpoint import load_config
from mtpkern.config import (
    MAX_SPECULATIVE_TOKENS,
    ModelConfig,
    SamplingParams,
    UserError,
    resolve_dtype,
)
from mtpkern.decode import DecodeState, StepOutput, decode_step
from mtpkern.fetch import model_name, resolve_model
from mtpkern.head_checkpoint import find_heads, load_heads
from mtpkern.heads import (
    SOURCES,
    CompanionDrafter,
    Drafter,
    NgramDrafter,
    NoDrafter,
)
from mtpkern.model import Llama, run_trunk
from mtpkern.ops import TORCH, Ops, sampling_key
from mtpkern.tokenizer import Tokenizer

PREFILL_CHUNK = 128
DEFAULT_SPECULATIVE_TOKENS = 4

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


@dataclass
class Stats:
    """What one completion cost. Drafts are counted by where they came from and by position."""

    num_speculative_tokens: int
    prompt_tokens: int
    new_tokens: int = 0
    steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    # source -> [K] counts
    drafted: dict[str, list[int]] = field(default_factory=dict)
    accepted: dict[str, list[int]] = field(default_factory=dict)
    # source -> steps whose drafts came from it, and tokens that those steps emitted
    source_steps: dict[str, int] = field(default_factory=dict)
    source_tokens: dict[str, int] = field(default_factory=dict)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens emitted per step, the corrected or bonus token included; plain decoding has 1."""
        return self.new_tokens / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Accepted at position i over drafted at position i, all sources together."""
        k = self.num_speculative_tokens
        drafted = [sum(counts[i] for counts in self.drafted.values()) for i in range(k)]
        accepted = [sum(counts[i] for counts in self.accepted.values()) for i in range(k)]
        return [a / d if d else 0.0 for a, d in zip(accepted, drafted, strict=True)]

    def count_step(self, source: str, drafts: int, accepted: int, emitted: int) -> None:
        k = self.num_speculative_tokens
        self.steps += 1
        self.new_tokens += emitted
        self.source_steps[source] = self.source_steps.get(source, 0) + 1
        self.source_tokens[source] = self.source_tokens.get(source, 0) + emitted
        drafted = self.drafted.setdefault(source, [0] * k)
        stood = self.accepted.setdefault(source, [0] * k)
        for i in range(drafts):
            drafted[i] += 1
            stood[i] += i < accepted

    def as_json(self) -> dict[str, Any]:
        return {
            "new_tokens": self.new_tokens,
            "steps": self.steps,
            "num_speculative_tokens": self.num_speculative_tokens,
            "mean_acceptance_length": self.mean_acceptance_length,
            "acceptance_by_position": self.acceptance_by_position,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "tokens_per_second": self.tokens_per_second,
        }


@dataclass(frozen=True)
class Completion:
    """One answer. `token_ids` includes a final end-of-text id, `text` does not show it."""

    text: str
    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: str  # "stop" or "length"
    stats: Stats


@dataclass(frozen=True)
class Event:
    """One token of a stream. The text may lag behind: no half character, no half stop string."""

    text: str
    token_id: int
    drafted: bool  # guessed by a drafter and accepted, rather than computed by the model itself
    completion: Completion | None  # with the last token


class _Request:
    """One prompt on its way: its tokens so far, and whether they are enough."""

    def __init__(
        self,
        index: int,
        prompt: list[int],
        params: SamplingParams,
        llm: "LLM",
        k: int,
    ):
        self.index, self.prompt, self.params = index, prompt, params
        self.stats = Stats(k, len(prompt))
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: str | None = None
        self.started = 0.0
        self._eos = () if params.ignore_eos else llm.eos_token_ids
        self._room = min(params.max_tokens, llm.max_length - len(prompt))
        self._detokenizer = llm.tokenizer.stream() if llm.tokenizer else None
        self._text = ""
        self._printed = 0

    def push(self, token_id: int) -> str:
        """Take one token; -> the text that is certain now. Sets `finish_reason` at the end."""
        self.token_ids.append(token_id)
        text = self._detokenizer.push(token_id) if self._detokenizer else ""
        if token_id in self._eos:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self._room:
            self.finish_reason = "length"
        if self.finish_reason and self._detokenizer:
            text += self._detokenizer.flush()
        self._text += text
        return self._release(len(text))

    def _release(self, fresh: int) -> str:
        """Cut at a stop string, and hold back what could become one."""
        longest = max(map(len, self.params.stop), default=0)
        # A match must end in the fresh text, or it would have been found before.
        begin = max(0, len(self._text) - fresh - longest + 1)
        found = [at for s in self.params.stop if (at := self._text.find(s, begin)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.finish_reason = "stop"
        end = len(self._text)
        if not self.finish_reason:
            held = (
                n for s in self.params.stop for n in range(1, len(s)) if self._text.endswith(s[:n])
            )
            end -= max(held, default=0)
        released = self._text[self._printed : end]
        self._printed = max(self._printed, end)
        return released

    def completion(self) -> Completion:
        logprobs = self.logprobs if self.params.logprobs else None
        assert self.finish_reason is not None, "a completion is made when the request has finished"
        return Completion(self._text, self.token_ids, logprobs, self.finish_reason, self.stats)


class LLM:
    """A model, its heads and its cache, ready to generate.

    `model` is a name, a directory or a hub id (None: the default model); `heads` "auto" (those that
    ship for the model, if any), "none", a name or a directory; `ngram` adds drafting from the
    sequence itself. num_speculative_tokens is K in 0..16 (None: 4 where anything drafts).
    Raises UserError for whatever the caller can mend.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        heads: str | Path = "auto",
        ngram: bool = True,
        num_speculative_tokens: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        max_batch: int = 8,
        max_length: int | None = None,
        ops: Ops = TORCH,
    ):
        if device not in ("auto", "cpu"):
            raise UserError(f"device must be auto or cpu in this version, got {device}")
        if max_batch < 1:
            raise UserError(f"max_batch must be at least 1, got {max_batch}")
        directory = resolve_model(None if model is None else str(model))
        config = load_config(directory)
        self.name = model_name(directory)
        heads_directory = find_heads(str(heads), self.name)
        self.ops = ops
        self._running = False
        self._threads = torch.get_num_threads()
        self.dtype = resolve_dtype(dtype, config)
        self.k = _resolve_k(num_speculative_tokens, heads_directory is not None or ngram)
        self.max_length = _resolve_length(max_length, config)
        self.config = config
        self.tokenizer = _load_tokenizer(directory, config)
        self.eos_token_ids = config.eos_token_ids
        if not self.eos_token_ids and self.tokenizer and self.tokenizer.eos_token_id is not None:
            self.eos_token_ids = (self.tokenizer.eos_token_id,)
        with torch.inference_mode():
            self.trunk = Llama.load(directory, dtype=self.dtype, ops=ops)
            capacity = -(-(self.max_length + self.k) // PREFILL_CHUNK) * PREFILL_CHUNK
            inverse_frequencies, scaling = config.rope.inverse_frequencies(config.head_dim)
            self._cache = KVCache.contiguous(
                layers=config.num_layers,
                batch=max_batch,
                capacity=capacity,
                kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                inverse_frequencies=inverse_frequencies,
                rope_scaling=scaling,
                dtype=self.dtype,
            )
            self.drafter: Drafter = NgramDrafter(ops) if ngram else NoDrafter()
            if heads_directory is not None and self.k:
                drafter = load_heads(
                    heads_directory,
                    self.trunk,
                    batch=max_batch,
                    capacity=capacity,
                    k=self.k,
                    ops=ops,
                )
                self.drafter = CompanionDrafter(NgramDrafter(ops), drafter) if ngram else drafter

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        speculate: bool = True,
    ) -> list[Completion]:
        """Complete prompts (text, token ids or chat messages), `max_batch` at a time.

        `speculate=False` is K = 0 through the same step, and gives the same tokens.
        """
        encoded = [self.encode(prompt) for prompt in _as_list(prompts)]
        completions: dict[int, Completion] = {}
        for index, event in self._run(encoded, params or SamplingParams(), speculate):
            if event.completion is not None:
                completions[index] = event.completion
        return [completions[i] for i in range(len(encoded))]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, speculate: bool = True
    ) -> Iterator[Event]:
        """Complete one prompt, token by token; the last event carries the completion."""
        for _, event in self._run([self.encode(prompt)], params or SamplingParams(), speculate):
            yield event

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; chat messages go through the model's template."""
        if prompt and not isinstance(prompt, str) and not isinstance(prompt[0], Mapping):
            ids = [int(i) for i in prompt]  # type: ignore[arg-type]
        elif self.tokenizer is None:
            raise UserError(f"{self.name} has no tokenizer: prompts must be token ids")
        elif isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        else:
            ids = self.tokenizer.apply_chat_template([dict(m) for m in prompt])  # type: ignore[arg-type]
        if not ids:
            raise UserError("the prompt is empty")
        if len(ids) >= self.max_length:
            raise UserError(
                f"the prompt has {len(ids)} tokens; the context holds {self.max_length}, "
                "of which at least one must be left for the answer"
            )
        if not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            raise UserError(f"token ids must be in 0..{self.config.vocab_size - 1}")
        return ids

    @torch.inference_mode()
    def _run(
        self, prompts: list[list[int]], params: SamplingParams, speculate: bool
    ) -> Iterator[tuple[int, Event]]:
        """Decode all prompts; the cache serves one run at a time."""
        if self._running:
            raise UserError(
                "this LLM is answering already: exhaust or close the other stream first"
            )
        if torch.get_num_threads() != self._threads:
            # The row counts that keep a row's bits were probed with that many.
            raise UserError(
                f"torch had {self._threads} threads when this LLM was loaded and has "
                f"{torch.get_num_threads()} now: load it again"
            )
        self._running = True
        try:
            yield from self._decode(prompts, params, speculate)
        finally:
            self._running = False

    def _decode(
        self, prompts: list[list[int]], params: SamplingParams, speculate: bool
    ) -> Iterator[tuple[int, Event]]:
        """Take steps until all are done, refilling a slot as soon as its sequence has finished."""
        k = self.k if speculate else 0
        drafter = self.drafter if speculate else NoDrafter()
        waiting = deque(_Request(i, p, params, self, k) for i, p in enumerate(prompts))
        batch = min(self._cache.lengths.shape[0], len(prompts))
        state = DecodeState.empty(self._cache.rows(0, batch), self.max_length, k)
        slots: list[_Request | None] = [None] * batch
        for slot in range(batch):
            drafter.reset(slot)
            state.cache.reset(slot)
        while waiting or any(slots):
            for slot in range(batch):
                if slots[slot] is None and waiting:
                    slots[slot] = request = waiting.popleft()
                    self._admit(state, drafter, slot, request)
            output = decode_step(state, self.trunk, drafter, self.ops)
            yield from self._read(output, slots)
            for slot, occupant in enumerate(slots):
                if occupant is not None and occupant.finish_reason:
                    slots[slot] = None
                    state.active[slot] = 0
                    state.cache.reset(slot)
                    drafter.reset(slot)

    def _admit(self, state: DecodeState, drafter: Drafter, slot: int, request: _Request) -> None:
        """Fill a slot: settings, known tokens, and the cache for all but the last of them."""
        started = time.perf_counter()
        prompt = torch.tensor(request.prompt)
        state.tokens[slot, : len(prompt)] = prompt
        state.window[slot] = 0
        state.window[slot, 0] = prompt[-1]
        state.source[slot] = SOURCES.index("none")
        state.drafted[slot] = 0
        state.active[slot] = 1
        params, sampling = request.params, state.sampling
        sampling.temperature[slot] = params.temperature
        sampling.top_k[slot], sampling.top_p[slot] = params.top_k, params.top_p
        sampling.min_p[slot] = params.min_p
        sampling.key[slot] = sampling_key(params.seed, 0)
        self._prefill(state.cache.rows(slot, slot + 1), drafter, slot, prompt)
        request.started = time.perf_counter()
        request.stats.prefill_seconds = request.started - started

    def _prefill(self, cache: KVCache, drafter: Drafter, slot: int, prompt: Tensor) -> None:
        """Run all but the last prompt token, in padded chunks at absolute multiples."""
        layers, eps = self.config.num_layers, self.config.rms_norm_eps
        inner = [tap for tap in drafter.taps if tap < layers]
        for begin in range(0, len(prompt) - 1, PREFILL_CHUNK):
            chunk = prompt[begin : min(begin + PREFILL_CHUNK, len(prompt) - 1)]
            padded = torch.zeros(1, PREFILL_CHUNK, dtype=torch.int64)
            padded[0, : len(chunk)] = chunk
            hidden, tapped = run_trunk(self.trunk, padded, cache, self.ops, inner)
            if drafter.taps:
                normed = self.ops.rms_norm(hidden, self.trunk.norm, eps)
                features = torch.cat([*tapped, normed], -1)[: len(chunk)]
                drafter.prefill(slot, features, prompt[begin + 1 : begin + 1 + len(chunk)])
            cache.commit(torch.tensor([len(chunk)]))

    def _read(
        self, output: StepOutput, slots: list[_Request | None]
    ) -> Iterator[tuple[int, Event]]:
        """Hand a step's tokens to their requests, each of which stops where it must."""
        now = time.perf_counter()
        target, accepted = output.target.tolist(), output.accepted.tolist()
        source, drafted = output.source.tolist(), output.drafted.tolist()
        for slot, request in enumerate(slots):
            if request is None:
                continue
            request.stats.decode_seconds = now - request.started
            run = target[slot][: accepted[slot] + 1]
            if request.params.logprobs:
                request.logprobs += _logprobs(output.logits[slot], output.target[slot], len(run))
            events = []
            for i, token_id in enumerate(run):
                text = request.push(token_id)
                events.append((text, token_id, i < min(accepted[slot], drafted[slot])))
                if request.finish_reason:
                    break
            del request.logprobs[len(request.token_ids) :]
            request.stats.count_step(
                SOURCES[source[slot]], drafted[slot], accepted[slot], len(events)
            )
            for i, (text, token_id, guessed) in enumerate(events):
                last = bool(request.finish_reason) and i + 1 == len(events)
                done = request.completion() if last else None
                yield request.index, Event(text, token_id, guessed, done)


def _logprobs(logits: Tensor, target: Tensor, count: int) -> list[float]:
    """Log-probabilities of the emitted tokens under the model itself (temperature 1)."""
    # Row by row: a row's bits must not depend on how many rows stand beside it.
    rows = (logits[i].float().log_softmax(-1)[target[i]] for i in range(count))
    return torch.stack(list(rows)).tolist()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Tell one prompt from a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int | Mapping):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _load_tokenizer(directory: Path, config: ModelConfig) -> Tokenizer | None:
    """The checkpoint's tokenizer; None where it has none, which leaves prompts of token ids."""
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    tokenizer = Tokenizer.from_directory(directory)
    tokenizer.check_against(config)
    return tokenizer


def _resolve_k(k: int | None, drafts: bool) -> int:
    if k is None:
        return DEFAULT_SPECULATIVE_TOKENS if drafts else 0
    if not 0 <= k <= MAX_SPECULATIVE_TOKENS:
        raise UserError(f"num_speculative_tokens must be in 0..{MAX_SPECULATIVE_TOKENS}, got {k}")
    if k and not drafts:
        raise UserError(f"num_speculative_tokens is {k}, but there is nothing to draft with")
    return k


def _resolve_length(length: int | None, config: ModelConfig) -> int:
    limit = config.max_position_embeddings
    if length is None:
        return min(limit, 8192)
    if not 2 <= length <= limit:
        raise UserError(f"max_length must be in 2..{limit} for this model, got {length}")
    return length
