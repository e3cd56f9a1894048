"""How many tokens to draft: the K that gives the most tokens per second, from measured costs.

    gain(K) = extra tokens expected - speed x (seconds(K) - seconds(0)) / seconds(0)

The gain is in tokens: what K drafts add to the one token of a plain step, less what their extra
time would have brought at the present speed (tokens per duration of a plain step). The best K has
the highest gain; K = 0, plain decoding, has gain 0.

`DraftLength` is for a CPU: it chooses after drafting, from the source of the drafts and their
probabilities. `GraphDraftLength` (graph_draft_length.py) is for a GPU.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import NamedTuple, Protocol

from mtpkern.drafters.base import HEADS, MIN_PROBABILITY, NGRAM, NONE, SOURCES
from mtpkern.drafters.timings import Timings

# Acceptance rate assumed before any observation: high enough that drafts are tried.
PRIOR = 0.7


class Proposal(NamedTuple):
    """The drafts of one sequence: their source, and for each the source's own estimate that it is
    accepted if those before it are (1 from a source without estimates)."""

    source: int
    probabilities: Sequence[float]


class KChooser(Protocol):
    """Chooses K for each step of a batch."""

    def rest(self) -> Iterable[int]:
        """Sources, as in `active_source`, of the next steps, which are plain (K = 0) and need no
        call of the chooser for as long as no source drafts; empty if the next step needs one."""

    def choose(self, proposals: Sequence[Proposal]) -> int:
        """K of the next step, given the drafts of each active sequence (empty if unknown)."""

    def use_heads(self) -> bool:
        """Whether the heads should draft at the end of the next step."""

    def use_heads_first(self) -> bool:
        """Whether the heads should draft after a prompt, before its first step."""

    def use_ngram(self) -> bool:
        """Whether copies should be searched for at the end of the next step, or after a prompt."""

    def heads_may_pay(self) -> bool:
        """Whether the heads may draft in this run, so that they should be given its prompts."""

    def active_source(self) -> int:
        """Who is given the next step: HEADS (heads and n-gram), NGRAM alone, or NONE."""

    def min_probability(self) -> float:
        """From which probability of acceptance one more draft of the heads is worth its cost."""

    def observe(
        self,
        k: int,
        seconds: float,
        outcomes: Sequence[tuple[Proposal, int]],
        drafted: int,
        drafting: float,
    ) -> None:
        """Learn from a step of K = k that took `seconds`: `outcomes` has each active sequence's
        proposal, cut to k, and how many of its drafts were accepted; the heads drafted `drafted`
        tokens at the step's end, which took `drafting` of the seconds."""

    def observe_rest(self, seconds: Sequence[float]) -> None:
        """Learn from the steps of a rest, which took `seconds`."""


class FixedDraftLength:
    """The K that the caller asked for, at every step."""

    def __init__(self, k: int):
        self.k = k

    def rest(self) -> Iterable[int]:
        return () if self.k else repeat(NONE)

    def choose(self, proposals: Sequence[Proposal]) -> int:
        return self.k

    def use_heads(self) -> bool:
        return True

    def use_heads_first(self) -> bool:
        return True

    def use_ngram(self) -> bool:
        return True

    def heads_may_pay(self) -> bool:
        return True

    def active_source(self) -> int:
        return HEADS

    def min_probability(self) -> float:
        return MIN_PROBABILITY

    def observe(
        self,
        k: int,
        seconds: float,
        outcomes: Sequence[tuple[Proposal, int]],
        drafted: int,
        drafting: float,
    ) -> None:
        pass

    def observe_rest(self, seconds: Sequence[float]) -> None:
        pass


# How much time each source's drafts may lose, in durations of a plain step. At the start of a run
# CREDIT times a share, which a run of that batch size in which they lost halves, and one in which
# they gained raises halfway to 1; at least what is left of the run before, up to one try. LOSS more
# with each token, MOST_CREDIT at most.
CREDIT, MOST_CREDIT = {HEADS: 2.0, NGRAM: 0.5}, 16.0
LOSS = {HEADS: 0.0025, NGRAM: 0.001}
# The gain assumed of a call of the heads before any was observed.
HOPE = 0.3
# How many observations a prior counts for, and the least weight of a new draft and a new gain.
PRIOR_COUNT, NEWEST_DRAFT, NEWEST_GAIN = 4.0, 0.02, 0.05
# Steps until a source that does not pay is tried again, doubled after each failure up to
# MOST_RETRY; steps until a plain step is timed again (REFRESH).
RETRY, MOST_RETRY, REFRESH = 32, 256, 128
# The heads are given steps again AWAKE steps before they are tried. A rest has at most MOST_REST
# steps. After an n-gram match that brought a token each step is searched for another one; after
# each that was not worth verifying, half as many, down to one in MOST_LOOK.
AWAKE, MOST_REST, MOST_LOOK = 2, 32, 32


class DraftLength:
    """Chooses K on a CPU, for any batch size, and learns from every step.

    A step's cost is that of its rows, batch x (K + 1). The probability that a draft is accepted is
    the source's own estimate, corrected by how often its drafts were accepted so far. The heads
    draft as long as that brings more than it costs. An account of what each source has lost keeps
    decoding within `LOSS` of plain decoding, but for what a run starts with and the last try
    overdraws, however wrong the estimates are.

    After a pass over a model's weights a few lines of Python take as long as one per cent of a
    step. Steps without drafts whose K is certain are therefore a rest: see `KChooser.rest`.
    """

    def __init__(self, most: int):
        """`most` is the largest K."""
        self.most = most
        self.seconds = Timings()  # of a step, by its rows, drafting left out
        self.drafting = Timings()  # of the heads, by how many tokens they draft
        self.trust = [[PRIOR] * most for _ in SOURCES]  # accepted / expected, by source, position
        self.gain = HOPE  # tokens that a call of the heads is expected to gain, a running mean
        self.speed = 1.0  # tokens per duration of a plain step, a running mean
        # What each source's drafts may still lose, in durations of a plain step.
        self.credit = dict(CREDIT)
        # What their drafts have gained in this run, and the share of `CREDIT` that a run of a batch
        # size starts with.
        self._gained = dict.fromkeys(CREDIT, 0.0)
        self._worth: dict[tuple[int, int], float] = {}
        self._weight = [[PRIOR_COUNT] * most for _ in SOURCES]
        self._calls = 0  # calls of the heads whose drafts were verified
        self._idle = dict.fromkeys(range(len(SOURCES)), RETRY)  # steps since the last try
        self._rest = dict.fromkeys(range(len(SOURCES)), RETRY)  # steps between tries
        self._unrefreshed = 0  # steps since the last plain one
        self._look = 1  # steps from one n-gram search to the next while nothing is drafted
        self._copying = False  # whether the step at hand verifies n-gram drafts
        self._drafted = 0  # tokens that the heads drafted in the last step
        self._warm = False  # whether the heads have run: the first call includes one-time work
        self._batch, self._may_pay = 1, True  # of this run: see `heads_may_pay`

    def start_with(
        self, steps: Mapping[int, Sequence[float]], drafts: Mapping[int, Sequence[float]]
    ) -> None:
        """Start from seconds of steps, by their rows, and of the heads, by their drafts."""
        for timings, seconds in ((self.seconds, steps), (self.drafting, drafts)):
            for count, some in seconds.items():
                timings.observe(count, *some)

    def begin(self, batch: int, *, heads: bool = True) -> None:
        """Start a run of `batch` sequences at a time; `heads` is whether there are any."""
        for source, gained in self._gained.items():
            key = (source, self._batch)
            if gained:
                worth, won = self._worth.get(key, 1.0), float(gained > 0)
                self._worth[key] = (worth + won) / 2
            self._gained[source] = 0.0
        self._batch, self._drafted = batch, 0
        self._may_pay = heads and self._could_pay()
        # On another text the heads may pay.
        self.gain = max(self.gain, 0.0)
        for source, credit in self.credit.items():
            left = min(credit, self._try_cost(source))
            self.credit[source] = max(left, CREDIT[source] * self._worth.get((source, batch), 1.0))

    def plain(self) -> float:
        """Seconds of a step without drafts."""
        return self.seconds(self._batch)

    def extra(
        self, proposals: Sequence[Proposal], most: int, *, claimed: bool = False
    ) -> list[float]:
        """How many of 0, 1, .., `most` drafts are expected to be accepted, on average over the
        sequences; with `claimed`, by the sources' own estimates."""
        totals = [0.0] * (most + 1)
        for source, probabilities in proposals:
            reached, total, last = 1.0, 0.0, 0
            trusts = repeat(1.0) if claimed else self._trusted(source)
            for last, (probability, trust) in enumerate(
                zip(probabilities[:most], trusts, strict=False), 1
            ):
                reached *= min(1.0, probability * trust)
                total += reached
                totals[last] += total
            for k in range(last + 1, most + 1):
                totals[k] += total
        return [total / max(1, len(proposals)) for total in totals]

    def cost(self, k: int) -> float:
        """What verifying k drafts takes beyond a plain step, in durations of one."""
        plain = self.plain()
        return max(0.0, self.seconds(self._batch * (k + 1)) - plain) / plain if plain else 0.0

    def price(self, k: int) -> float:
        """What that costs, in tokens."""
        return self.speed * self.cost(k)

    def rest(self) -> Iterable[int]:
        steps = self._steps_to_try()
        if steps <= AWAKE:
            return [HEADS] * steps
        steps = min(steps - AWAKE, MOST_REST)
        sources = [NONE] * steps
        if self.use_ngram():
            sources[self._look - 1 :: self._look] = [NGRAM] * (steps // self._look)
            sources[-1] = NGRAM
        return sources

    def choose(self, proposals: Sequence[Proposal]) -> int:
        most = max((len(probabilities) for _, probabilities in proposals), default=0)
        self._unrefreshed += 1
        if most == 0 or self._unrefreshed > REFRESH:
            return 0
        # The heads' time is already spent: their drafts may be verified whatever the credit is.
        credit = math.inf if self._drafted else self.credit[NGRAM]
        costs = [self.cost(k) for k in range(most + 1)]
        extra = self.extra(proposals, most)
        gains = {k: extra[k] - self.speed * c for k, c in enumerate(costs) if c <= credit}
        best = max(gains, key=gains.__getitem__, default=0)
        if best == 0 and len(gains) > 1:
            sources = {source for source, probabilities in proposals if probabilities}
            if all(self._idle[source] >= self._rest[source] for source in sources):
                claimed = self.extra(proposals, most, claimed=True)
                pay = [k for k in gains if claimed[k] > self.speed * costs[k]]
                best = max(pay, key=gains.__getitem__, default=0)
        if any(source == NGRAM for source, _ in proposals):
            self._copying = best > 0
            if not best:
                self._look = min(2 * self._look, MOST_LOOK)
        return best

    def use_heads(self) -> bool:
        return self._steps_to_try() == 0

    def use_heads_first(self) -> bool:
        return False  # the first token is the hardest to guess: a call here does not pay

    def use_ngram(self) -> bool:
        return self._try_cost(NGRAM) <= self.credit[NGRAM]

    def heads_may_pay(self) -> bool:
        return self._may_pay

    def active_source(self) -> int:
        if self._steps_to_try() <= AWAKE:
            return HEADS
        return NGRAM if (self._look == 1 or self._copying) and self.use_ngram() else NONE

    def min_probability(self) -> float:
        plain = self.plain()
        if not plain:
            return 0.0
        rows = (self.seconds(self._batch * (self.most + 1)) - plain) / self.most
        passes = (self.drafting(self.most) - self.drafting(1)) / max(1, self.most - 1)
        return self.speed * max(0.0, rows + passes) / plain

    def observe(
        self,
        k: int,
        seconds: float,
        outcomes: Sequence[tuple[Proposal, int]],
        drafted: int,
        drafting: float,
    ) -> None:
        verifying, heads = seconds - drafting, drafting if self._warm else 0.0
        self.seconds.observe(self._batch * (k + 1), verifying)
        # After a rest the heads first write the pairs that they missed: not a cost of drafting.
        if drafted and self._drafted and self._warm:
            self.drafting.observe(drafted, drafting)
        self._warm |= drafted > 0
        if k == 0:
            self._unrefreshed = 0
        plain, active = self.plain(), max(1, len(outcomes))
        # By their expectation, corrected by `trust`, which varies less than the outcomes.
        expected = sum(self.extra([p], k)[k] for p, _ in outcomes if p.source == HEADS) / active
        for (source, probabilities), accepted in outcomes:
            for i, probability in enumerate(probabilities[: accepted + 1]):
                self._update_trust(source, i, probability, i < accepted)
        extra = sum(accepted for _, accepted in outcomes) / active
        spent = (verifying + heads) / plain
        self.speed += NEWEST_GAIN * ((1 + extra) / spent - self.speed)
        self.speed = max(1.0, self.speed)
        if k:
            heads_drafted = any(p.source == HEADS and p.probabilities for p, _ in outcomes)
            self._pay(HEADS if heads_drafted else NGRAM, 1 + extra - verifying / plain)
        self._pay(HEADS, -heads / plain)
        self._earn(1 + extra)
        self._note_tries(k, outcomes)
        self._copying = False
        if any(source == NGRAM and accepted for (source, _), accepted in outcomes):
            self._look = 1
        if self._drafted:
            self._update_gain(expected - self.price(k) - self._draft_price(self._drafted))
        elif not drafted:
            # An estimate loses weight with age, so that a source that did not pay is tried again.
            self.gain *= 1 - NEWEST_GAIN / 2
        self._drafted = drafted

    def observe_rest(self, seconds: Sequence[float]) -> None:
        steps = len(seconds)
        self.seconds.observe(self._batch, *seconds)
        self._unrefreshed = self._drafted = 0
        self.speed = 1 + (self.speed - 1) * (1 - NEWEST_GAIN) ** steps
        self._earn(steps)
        self.gain *= (1 - NEWEST_GAIN / 2) ** steps
        for source in self._idle:
            self._idle[source] += steps

    def _pay(self, source: int, gained: float) -> None:
        self.credit[source] += gained
        self._gained[source] += gained

    def _earn(self, tokens: float) -> None:
        for source, loss in LOSS.items():
            self.credit[source] = min(MOST_CREDIT, self.credit[source] + loss * tokens)

    def _steps_to_try(self) -> int:
        """After how many plain steps the heads may draft: the credit allows it, and they do not
        rest."""
        if not self._may_pay:
            return AWAKE + MOST_REST
        missing = self._try_cost(HEADS) - self.credit[HEADS]
        steps = math.ceil(missing / LOSS[HEADS]) if missing > 0 else 0
        if self.gain < 0:
            steps = max(steps, self._rest[HEADS] - self._idle[HEADS])
        return steps

    def _try_cost(self, source: int) -> float:
        """How long the cheapest try of a source takes, in durations of a plain step."""
        plain = self.plain()
        if not plain:
            return 0.0
        drafting = self.drafting(1) / plain if source == HEADS else 0.0
        return drafting + min(self.cost(k) for k in range(1, self.most + 1))

    def _could_pay(self) -> bool:
        """Whether some K would be faster than plain decoding if the heads' drafts were accepted at
        the rate `PRIOR`."""
        plain, extra = self.plain(), 0.0
        for k in range(1, self.most + 1):
            extra += PRIOR**k
            if self.seconds(self._batch * (k + 1)) + self.drafting(k) < (1 + extra) * plain:
                return True
        return not plain

    def _draft_price(self, drafts: int) -> float:
        """What it costs that the heads draft `drafts` tokens, in tokens."""
        plain = self.plain()
        return self.speed * self.drafting(drafts) / plain if plain else 0.0

    def _trusted(self, source: int) -> Iterator[float]:
        """The trust by position; one without observations has that of the position before it."""
        trusted = PRIOR
        for trust, weight in zip(self.trust[source], self._weight[source], strict=True):
            trusted = trust if weight > PRIOR_COUNT else trusted
            yield trusted

    def _update_gain(self, gain: float) -> None:
        self._calls += 1
        self.gain += max(NEWEST_GAIN, 1 / (self._calls + PRIOR_COUNT)) * (gain - self.gain)

    def _update_trust(self, source: int, position: int, probability: float, accepted: bool) -> None:
        """Move the trust so that probability x trust approaches the observed acceptance rate."""
        weight = self._weight[source]
        weight[position] = min(weight[position] + 1, 1 / NEWEST_DRAFT)
        trust = self.trust[source]
        trust[position] += (accepted - probability * trust[position]) / weight[position]
        trust[position] = min(max(trust[position], 0.0), 2.0)

    def _note_tries(self, k: int, outcomes: Sequence[tuple[Proposal, int]]) -> None:
        """Double the rest of a source that was tried and had no draft accepted."""
        tried = {source for (source, probabilities), _ in outcomes if k and probabilities}
        paid = {source for (source, _), accepted in outcomes if accepted}
        for source in self._idle:
            if source in paid:
                self._rest[source] = RETRY
            elif source in tried and self._idle[source] >= self._rest[source]:
                self._rest[source] = min(2 * self._rest[source], MOST_RETRY)
            self._idle[source] = 0 if source in tried else self._idle[source] + 1
