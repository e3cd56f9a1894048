"""A request while it runs: its tokens, its text, where it stops, and its statistics."""

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
    """Statistics of one completion. Drafts are counted by source and by position."""

    num_speculative_tokens: int
    prompt_tokens: int
    new_tokens: int = 0
    steps: int = 0
    cached_tokens: int = 0  # of the prompt, whose K and V an earlier request left
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    # Since the request was made, including the time it waited for a slot.
    time_to_first_token_seconds: float = 0.0
    # source -> [K] counts
    drafted: dict[str, list[int]] = field(default_factory=dict)
    accepted: dict[str, list[int]] = field(default_factory=dict)
    # source -> steps with drafts from it, and tokens that those steps emitted
    source_steps: dict[str, int] = field(default_factory=dict)
    source_tokens: dict[str, int] = field(default_factory=dict)
    # K -> steps that verified K drafts
    steps_by_k: dict[int, int] = field(default_factory=dict)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens emitted per step, including the corrected or bonus token; 1 without drafts."""
        return self.new_tokens / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Computed tokens of the prompt per second, without the cached ones."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def drafted_by_position(self) -> list[int]:
        """Drafts at position i, all sources together."""
        return self._by_position(self.drafted)

    @property
    def acceptance_by_position(self) -> list[float]:
        """Accepted at position i over drafted at position i, all sources together; 0 where nothing
        was drafted."""
        accepted = self._by_position(self.accepted)
        return [
            a / d if d else 0.0 for a, d in zip(accepted, self.drafted_by_position, strict=True)
        ]

    def _by_position(self, counts: dict[str, list[int]]) -> list[int]:
        return [sum(c[i] for c in counts.values()) for i in range(self.num_speculative_tokens)]

    def count_step(self, k: int, source: str, drafts: int, accepted: int, emitted: int) -> None:
        """Count a step of K = k that accepted the first `accepted` of `drafts` drafts and emitted
        `emitted` tokens.

        For a completion's last step the caller passes only the drafts before its last token: later
        ones could not be emitted, and one token comes without drafts. Thus every accepted draft is
        a token gained: new_tokens = steps + accepted drafts.
        """
        self.steps += 1
        self.new_tokens += emitted
        self.steps_by_k[k] = self.steps_by_k.get(k, 0) + 1
        k = self.num_speculative_tokens
        self.source_steps[source] = self.source_steps.get(source, 0) + 1
        self.source_tokens[source] = self.source_tokens.get(source, 0) + emitted
        drafted = self.drafted.setdefault(source, [0] * k)
        agreed = self.accepted.setdefault(source, [0] * k)
        for i in range(drafts):
            drafted[i] += 1
            agreed[i] += i < accepted

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
    """One answer. `token_ids` include a final end-of-text id, which `text` omits; `drafted` tells
    for each token whether it is an accepted draft rather than the model's own."""

    text: str
    token_ids: list[int]
    drafted: list[bool]
    logprobs: list[float] | None
    finish_reason: str  # "stop" or "length"
    stats: Stats
    index: int = 0  # among its prompt's `n` completions
    seed: int | None = None  # the given one, or the one drawn; None if greedy


@dataclass(frozen=True)
class Event:
    """One token of a stream. Its text may come with a later token: incomplete characters and
    possible beginnings of stop strings are held back."""

    text: str
    token_id: int
    drafted: bool  # an accepted draft, rather than the model's own
    completion: Completion | None  # with the last token


class EncodedPrompt(NamedTuple):
    """A prompt's token ids, and whether the answer continues the prompt's text or, as in a chat, is
    a text of its own."""

    ids: list[int]
    continued: bool = True


class Request:
    """One completion while it is decoded."""

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
        """`index` counts the run's requests, completion_index those of one prompt. `k` is the most
        drafts per step, `room` how many tokens the context can still hold, `ends` are the model's
        end tokens."""
        self.index, self.prompt, self.params = index, prompt.ids, params
        self.completion_index = completion_index
        self.stats = Stats(k, len(prompt.ids))
        self.pages: list[int] = []
        self.known = self.pairs = 0  # what the pages hold of the prompt: see cache.Claim
        self.created = time.perf_counter()
        self.token_ids: list[int] = []
        self.drafted: list[bool] = []
        self.logprobs: list[float] = []
        self.finish_reason: str | None = None
        self.started = 0.0
        self.ends = (() if params.ignore_eos else ends) + params.stop_token_ids
        # Tokens that may not be among the first `min_tokens`.
        self.withheld = ends + params.stop_token_ids if params.min_tokens else ()
        self.room = min(params.max_tokens, room)
        if params.stop and tokenizer is None:
            raise UserError("stop needs a tokenizer, and this model has none")
        before = prompt.ids if prompt.continued else []
        self._detokenizer = tokenizer.stream(before) if tokenizer else None
        # It has a mark for each special token of a stop string: see `_stop_patterns`.
        self._text = ""
        self._stop, self._marks = _stop_patterns(params.stop, tokenizer)
        self._shown = 0  # characters of the text

    @property
    def left(self) -> int:
        """How many more tokens may be emitted."""
        return 0 if self.finish_reason else self.room - len(self.token_ids)

    def take(self, record: StepRecord, k: int, now: float) -> list[Event]:
        """Take the tokens that a step of K = k emitted, up to the end of the completion."""
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
        accepted = min(record.accepted, record.drafted)
        drafted = [i < accepted for i in range(len(pieces))]
        self.drafted += drafted
        events = [Event(*piece, draft, None) for piece, draft in zip(pieces, drafted, strict=True)]
        if self.finish_reason:
            events[-1] = replace(events[-1], completion=self.completion())
        return events

    def push(self, token_id: int) -> str:
        """Take one token -> the text that can now be shown. Sets `finish_reason` at the end."""
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
        return self._showable(len(text))

    def _showable(self, fresh: int) -> str:
        """Cut at a stop string -> the text that was not shown yet, up to what could become one.

        The last `fresh` characters are new.
        """
        # A match ends in the new text, or it would have been found before.
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
        text = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return _without_marks(text) if self._marks else text

    def completion(self) -> Completion:
        """The answer of a finished request."""
        logprobs = self.logprobs if self.params.logprobs else None
        assert self.finish_reason is not None, "the request has not finished"
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
    """Strings to search for in a text with marks for special tokens, and the mark of each token id.

    A mark is a lone surrogate, which no decoded text contains. Each stop string is searched for in
    two forms: as it is, since ordinary tokens may spell it, and with marks for its special tokens.
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
