"""What a request becomes: its tokens so far, where it stops, its text, and what it cost."""

import re
import time
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from mtpkern.config import SamplingParams
from mtpkern.drafters.base import SOURCES
from mtpkern.errors import UserError
from mtpkern.ring import StepRecord
from mtpkern.tokenizer import Tokenizer


@dataclass
class Stats:
    """What one completion cost. Drafts are counted by where they came from and by position."""

    num_speculative_tokens: int
    prompt_tokens: int
    new_tokens: int = 0
    steps: int = 0
    cached_tokens: int = 0  # of the prompt: their K and V were there from an earlier request
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    # From when the request was made, while it waited for a slot too.
    time_to_first_token_seconds: float = 0.0
    # source -> [K] counts
    drafted: dict[str, list[int]] = field(default_factory=dict)
    accepted: dict[str, list[int]] = field(default_factory=dict)
    # source -> steps whose drafts came from it, and tokens that those steps emitted
    source_steps: dict[str, int] = field(default_factory=dict)
    source_tokens: dict[str, int] = field(default_factory=dict)
    # K -> steps that verified so many drafts: one K where it is fixed
    steps_by_k: dict[int, int] = field(default_factory=dict)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens emitted per step, the corrected or bonus token included; plain decoding has 1."""
        return self.new_tokens / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Tokens of the prompt that were computed, per second."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Accepted at position i over drafted at position i, all sources together."""
        k = self.num_speculative_tokens
        drafted = [sum(counts[i] for counts in self.drafted.values()) for i in range(k)]
        accepted = [sum(counts[i] for counts in self.accepted.values()) for i in range(k)]
        return [a / d if d else 0.0 for a, d in zip(accepted, drafted, strict=True)]

    def count_step(self, k: int, source: str, drafts: int, accepted: int, emitted: int) -> None:
        """Count a step of K = k that emitted `emitted` tokens, and whose first `accepted` drafts of
        `drafts` stood.

        In the last step only the drafts before its last token count: those behind it could not be
        emitted, and it would have come without drafts too. So accepted drafts are tokens gained:
        new_tokens is steps + accepted drafts.
        """
        self.steps += 1
        self.new_tokens += emitted
        self.steps_by_k[k] = self.steps_by_k.get(k, 0) + 1
        k = self.num_speculative_tokens
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
            "steps_by_num_speculative_tokens": {
                str(k): self.steps_by_k[k] for k in sorted(self.steps_by_k)
            },
            "mean_acceptance_length": self.mean_acceptance_length,
            "acceptance_by_position": self.acceptance_by_position,
            "cached_tokens": self.cached_tokens,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "tokens_per_second": self.tokens_per_second,
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "time_to_first_token_seconds": self.time_to_first_token_seconds,
        }


@dataclass(frozen=True)
class Completion:
    """One answer. `token_ids` includes a final end-of-text id, `text` does not show it; `drafted`
    says of each token whether it was guessed and accepted, rather than computed by the model."""

    text: str
    token_ids: list[int]
    drafted: list[bool]
    logprobs: list[float] | None
    finish_reason: str  # "stop" or "length"
    stats: Stats
    index: int = 0  # which of its prompt's `n` completions this is
    seed: int | None = None  # what repeats it: the one given, or a fresh one; None if greedy


@dataclass(frozen=True)
class Event:
    """One token of a stream. The text may lag behind: no half character, no half stop string."""

    text: str
    token_id: int
    drafted: bool  # guessed by a drafter and accepted, rather than computed by the model itself
    completion: Completion | None  # with the last token


class EncodedPrompt(NamedTuple):
    """A prompt's token ids, and whether the answer goes on in the prompt's own text, or is one of
    its own, as a turn in a chat is."""

    ids: list[int]
    continued: bool = True


class Request:
    """One prompt on its way: its tokens so far, and whether they are enough."""

    def __init__(
        self,
        index: int,
        prompt: EncodedPrompt,
        params: SamplingParams,
        *,
        completion_index: int = 0,
        k: int,
        room: int,
        ends: tuple[int, ...],
        tokenizer: Tokenizer | None,
    ):
        """`index` counts the run's requests, completion_index those of one prompt; `room` is how
        many tokens the context can still take, `ends` are the tokens that end."""
        self.index, self.prompt, self.params = index, prompt.ids, params
        self.completion_index = completion_index
        self.stats = Stats(k, len(prompt.ids))
        self.pages: list[int] = []
        self.known = self.pairs = 0  # what they hold of the prompt: see cache.Claim
        self.created = time.perf_counter()
        self.token_ids: list[int] = []
        self.drafted: list[bool] = []
        self.logprobs: list[float] = []
        self.finish_reason: str | None = None
        self.started = 0.0
        self.ends = (() if params.ignore_eos else ends) + params.stop_token_ids
        # Tokens that are not to be chosen among the first `min_tokens`.
        self.withheld = ends + params.stop_token_ids if params.min_tokens else ()
        self.room = min(params.max_tokens, room)
        if params.stop and tokenizer is None:
            raise UserError("stop needs a tokenizer, which this model has none of")
        before = prompt.ids if prompt.continued else []
        self._detokenizer = tokenizer.stream(before) if tokenizer else None
        # With a mark for each special token of a stop string: see `_stop_patterns`.
        self._text = ""
        self._stop, self._marks = _stop_patterns(params.stop, tokenizer)
        self._printed = 0

    @property
    def left(self) -> int:
        """How many tokens may still come; one step brings at least one."""
        return 0 if self.finish_reason else self.room - len(self.token_ids)

    def take(self, record: StepRecord, k: int, now: float) -> list[Event]:
        """Take the tokens that a step of K = k emitted, up to where the completion ends."""
        self.stats.decode_seconds = now - self.started
        if not self.token_ids:
            self.stats.time_to_first_token_seconds = now - self.created
        pieces = []
        for token_id in record.target[: record.accepted + (not record.broken)]:
            pieces.append((self.push(token_id), token_id))
            if self.finish_reason:
                break
        if self.params.logprobs:
            self.logprobs += record.logprobs[: len(pieces)]
        drafts = record.drafted
        if self.finish_reason:
            drafts = min(drafts, len(pieces) - 1)
        self.stats.count_step(k, SOURCES[record.source], drafts, record.accepted, len(pieces))
        guessed = min(record.accepted, record.drafted)
        drafted = [i < guessed for i in range(len(pieces))]
        self.drafted += drafted
        events = [Event(*piece, guess, None) for piece, guess in zip(pieces, drafted, strict=True)]
        if self.finish_reason:
            events[-1] = replace(events[-1], completion=self.completion())
        return events

    def push(self, token_id: int) -> str:
        """Take one token; -> the text that is certain now. Sets `finish_reason` at the end."""
        self.token_ids.append(token_id)
        text = ""
        ended = token_id in self.ends
        if self._detokenizer and (not ended or self.params.include_stop_str_in_output):
            text = self._detokenizer.push(token_id) + self._marks.get(token_id, "")
        if ended:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.room:
            self.finish_reason = "length"
        if self.finish_reason and self._detokenizer:
            text += self._detokenizer.flush()
        self._text += text
        return self._release(len(text))

    def _release(self, fresh: int) -> str:
        """Cut at a stop string, and hold back what could become one."""
        # A match must end in the fresh text, or it would have been found before.
        old = len(self._text) - fresh
        found = []
        if len(self.token_ids) > self.params.min_tokens:
            for stop in self._stop:
                at = self._text.find(stop, max(0, old - len(stop) + 1))
                if at >= 0:
                    found.append((at, at + len(stop)))
        if found:
            begin, end = min(found)
            self._text = self._text[: end if self.params.include_stop_str_in_output else begin]
            self.finish_reason = "stop"
        end = len(self._text)
        if not self.finish_reason:
            held = (n for s in self._stop for n in range(1, len(s)) if self._text.endswith(s[:n]))
            end -= max(held, default=0)
        released = self._text[self._printed : end]
        self._printed = max(self._printed, end)
        return _without_marks(released)

    def completion(self) -> Completion:
        logprobs = self.logprobs if self.params.logprobs else None
        assert self.finish_reason is not None, "a completion is made when the request has finished"
        return Completion(
            _without_marks(self._text),
            self.token_ids,
            self.drafted,
            logprobs,
            self.finish_reason,
            self.stats,
            self.completion_index,
            self.params.seed,
        )


def _stop_patterns(
    stop: tuple[str, ...], tokenizer: Tokenizer | None
) -> tuple[list[str], dict[int, str]]:
    """What to look for in a text that marks special tokens, and the mark of each by its id.

    A mark is a lone surrogate, which no decoded text holds. A stop string is looked for as it is,
    since other tokens may spell the same, and with marks for the special tokens in it.
    """
    if tokenizer is None:
        return list(stop), {}
    special = {token: i for text in stop for token, i in tokenizer.special_tokens_in(text).items()}
    if not special:
        return list(stop), {}
    marks = {token: chr(0xD800 + n) for n, token in enumerate(special)}
    longest_first = sorted(special, key=len, reverse=True)
    spelled = re.compile("|".join(map(re.escape, longest_first)))
    marked = [spelled.sub(lambda found: marks[found[0]], text) for text in stop]
    return list(dict.fromkeys([*stop, *marked])), {special[token]: marks[token] for token in marks}


def _without_marks(text: str) -> str:
    return re.sub("[\ud800-\udfff]", "", text)
