"""How many tokens to draft: the K that gives the most tokens per second, by what was measured.

    gain(K) = extra tokens expected - speed x (seconds(K) - seconds(0)) / seconds(0)

in plain steps: what a window of K drafts brings beyond one token, less what it takes beyond a plain
step, at the speed (tokens per plain step's time) that decoding has anyway. The best K is that of
the highest gain, and K = 0, plain decoding, has gain 0.

`GraphDraftLength` chooses before a step, for a GPU, where the host is some steps ahead and sees no
draft. `DraftLength` chooses after drafting, for a CPU, where the host knows which source drafted
and how sure it was.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from mtpkern.drafters.base import HEADS, MIN_PROBABILITY, NGRAM, NONE, SOURCES
from mtpkern.drafters.timings import Timings

# Weight of the newest observation in a running mean: it forgets in some hundred steps.
NEWEST = 0.02
# Before anything was seen, drafts stand often enough to be worth trying.
PRIOR = 0.7
# What trying out drafts may cost, of a second's tokens.
PROBE_BUDGET = 0.01
# A probe drafts in one step and verifies in the next.
PROBE_STEPS = 2


class Proposal(NamedTuple):
    """What one sequence could verify: where its drafts came from, and how sure the source was that
    each stands where those before it stand (1 where it does not say)."""

    source: int
    probabilities: Sequence[float]


class KChooser(Protocol):
    """Chooses K, step by step."""

    def choose(self, windows: Sequence[Proposal]) -> int:
        """K of the next step, given what was drafted for each active sequence (none: unknown)."""

    def use_heads(self) -> bool:
        """Whether the heads should draft at the end of the next step."""

    def active_source(self) -> int:
        """Which source must see the next step at least: HEADS (all do), NGRAM, or NONE."""

    def min_probability(self) -> float:
        """The chance of standing from which on one more draft of the heads is worth its cost."""

    def spend(self, seconds: float, drafted: int) -> None:
        """Take in that heads drafted so many tokens outside of a step, for a first window."""

    def observe(
        self,
        k: int,
        seconds: float,
        outcomes: Sequence[tuple[Proposal, int]],
        drafted: int,
    ) -> None:
        """Take in a step of K = k that took `seconds`: each active sequence's window, cut to k, and
        how many of its drafts stood, and how many tokens the heads drafted behind it (0: none)."""


class FixedDraftLength:
    """The K that the caller asked for, in every step."""

    def __init__(self, k: int):
        self.k = k

    def choose(self, windows: Sequence[Proposal]) -> int:
        return self.k

    def use_heads(self) -> bool:
        return True

    def active_source(self) -> int:
        return HEADS

    def min_probability(self) -> float:
        return MIN_PROBABILITY

    def spend(self, seconds: float, drafted: int) -> None:
        pass

    def observe(
        self,
        k: int,
        seconds: float,
        outcomes: Sequence[tuple[Proposal, int]],
        drafted: int,
    ) -> None:
        pass


class GraphDraftLength(FixedDraftLength):
    """Chooses K for one batch size, step by step. `seconds` maps each K that has a graph to the
    cost of its step; it must hold 0."""

    def __init__(self, seconds: Mapping[int, float]):
        if 0 not in seconds or min(seconds.values()) <= 0:
            raise ValueError(f"seconds must hold K = 0 and be positive, got {dict(seconds)}")
        super().__init__(max(seconds))
        self.seconds = dict(seconds)
        self.acceptance_rates = [PRIOR] * self.k
        self._probing = 0  # steps left of a probe
        self._since = 0  # steps since the last one

    def observe(
        self,
        k: int,
        seconds: float,
        outcomes: Sequence[tuple[Proposal, int]],
        drafted: int,
    ) -> None:
        for window, accepted in outcomes:
            for i in range(min(len(window.probabilities), accepted + 1)):
                self.acceptance_rates[i] += NEWEST * ((i < accepted) - self.acceptance_rates[i])

    def tokens(self, k: int) -> float:
        """Tokens that a step with K = k is expected to emit."""
        emitted, reached = 1.0, 1.0
        for rate in self.acceptance_rates[:k]:
            reached *= rate
            emitted += reached
        return emitted

    def best(self) -> int:
        """The K of the highest rate; the smaller one where two are level."""
        return max(sorted(self.seconds), key=lambda k: self.tokens(k) / self.seconds[k])

    def choose(self, windows: Sequence[Proposal]) -> int:
        """K of the next step: the best one, or now and then the largest, to see what that does."""
        best = self.best()
        if self._probing == 0 and best < self.k:
            self._since += 1
            if self._since >= self._interval(best):
                self._probing, self._since = PROBE_STEPS, 0
        if self._probing:
            self._probing -= 1
            return self.k
        return best

    def _interval(self, best: int) -> int:
        """Steps between probes, so that what they lose stays within the budget."""
        lost = self.seconds[self.k] / self.seconds[best] - 1 / self.tokens(best)
        return max(16, round(PROBE_STEPS * lost / PROBE_BUDGET))


# A loss account in plain steps: what drafting may lose before it has earned anything, at the start
# and then again for each prompt, where the heads have paid lately and where they have not; what it
# may keep of earnings, and what it may lose of each token.
START, RENEWED, DOUBTED, MOST_CREDIT = 6.0, 2.5, 1.0, 16.0
LOSS = 0.005
# Plain steps that a call of the heads is expected to bring before any was seen.
HOPE = 0.3
# Observations that a source's prior counts for, and the floor of a new one's weight.
PRIOR_COUNT, NEWEST_DRAFT, NEWEST_GAIN = 4.0, 0.02, 0.05
# Steps after which an option that does not pay is tried again, twice as many each time it has not
# paid, and at most; and steps after which a plain one is timed again.
RETRY, MOST_RETRY, REFRESH = 32, 256, 128
# AWAKE: steps before such a try in which the heads observe steps again, and steps after the last
# copy that are all searched for another one; after those, one of LOOKS steps is.
AWAKE, LOOKS = 16, 4


class DraftLength:
    """Chooses K on a CPU, step by step, for any batch size; learns from every step.

    Costs are of rows: a step of `batch` windows of K drafts has batch x (K + 1). The chance that a
    draft stands is the source's own, times how much more or less often such drafts stood so far.
    Heads draft as long as that brings more than it takes. An account of what drafting lost keeps
    the whole within `LOSS` of plain decoding however wrong every estimate is.
    """

    def __init__(self, most: int):
        """`most` is the largest K."""
        self.most = most
        self.seconds = Timings()  # of a step, by its rows, drafting left out
        self.drafting = Timings()  # of the heads, by how many tokens they draft
        self.trust = [[PRIOR] * most for _ in SOURCES]  # stood over expected, by source, position
        self.gain = HOPE  # plain steps that a call of the heads brings, a running mean
        self.speed = 1.0  # tokens per plain step's time, a running mean
        self.credit = START
        self._weight = [[PRIOR_COUNT] * most for _ in SOURCES]
        self._calls = 0  # of the heads, whose windows were verified
        self._idle = dict.fromkeys(range(len(SOURCES)), RETRY)  # steps since last tried
        self._rest = dict.fromkeys(range(len(SOURCES)), RETRY)  # steps between tries
        self._unrefreshed = 0  # steps since a plain one
        self._unmatched = 0  # steps since there was something to copy
        self._drafted = 0  # tokens that the heads drafted in the last step
        self._warm = False  # whether the heads have run: the first time sets things up
        self._batch = 1

    def begin(self, batch: int) -> None:
        """Begin a run of `batch` sequences at a time."""
        self._batch = batch
        self._drafted = 0
        if self._warm:
            self.credit = RENEWED if self.gain > 0 else DOUBTED

    def plain(self) -> float:
        """Seconds of a step without drafts."""
        return self.seconds(self._batch)

    def extra(self, windows: Sequence[Proposal], k: int) -> float:
        """Tokens beyond one, of an average sequence, that windows cut to k drafts should bring."""
        total = 0.0
        for source, probabilities in windows:
            stands = 1.0
            for chance, trust in zip(probabilities[:k], self._believed(source), strict=False):
                stands *= min(1.0, chance * trust)
                total += stands
        return total / max(1, len(windows))

    def price(self, k: int) -> float:
        """What a window of k drafts takes beyond a plain step, in tokens."""
        plain = self.plain()
        beyond = self.seconds(self._batch * (k + 1)) - plain
        return self.speed * max(0.0, beyond) / plain if plain else 0.0

    def choose(self, windows: Sequence[Proposal]) -> int:
        most = max((len(probabilities) for _, probabilities in windows), default=0)
        self._unrefreshed += 1
        if self._unrefreshed > REFRESH:
            return 0
        # Drafts that the heads were paid for are verified whatever the account says.
        lengths = [k for k in range(most + 1) if self._drafted or self.price(k) <= self.credit]
        gains = {k: self.extra(windows, k) - self.price(k) for k in lengths}
        best = max(gains, key=gains.__getitem__, default=0)
        if best == 0 and len(gains) > 1:
            sources = {source for source, probabilities in windows if probabilities}
            if all(self._idle[source] >= self._rest[source] for source in sources):
                best = max(lengths[1:], key=gains.__getitem__)
        return best

    def use_heads(self) -> bool:
        if self.price(1) + self._draft_price() > self.credit:
            return False
        return self.gain >= 0 or self._idle[HEADS] >= self._rest[HEADS]

    def active_source(self) -> int:
        if self.gain >= 0 or self._idle[HEADS] + AWAKE >= self._rest[HEADS]:
            return HEADS
        return NGRAM if self._unmatched < AWAKE or self._unmatched % LOOKS == 0 else NONE

    def min_probability(self) -> float:
        plain = self.plain()
        if not plain:
            return 0.0
        rows = (self.seconds(self._batch * (self.most + 1)) - plain) / self.most
        passes = (self.drafting(self.most) - self.drafting(1)) / max(1, self.most - 1)
        return self.speed * max(0.0, rows + passes) / plain

    def spend(self, seconds: float, drafted: int) -> None:
        self._drafted = drafted
        plain = self.plain()
        if self._warm and plain:
            self.credit -= seconds / plain
        self._warm = True

    def observe(
        self,
        k: int,
        seconds: float,
        outcomes: Sequence[tuple[Proposal, int]],
        drafted: int,
    ) -> None:
        rows = self._batch * (k + 1)
        known = self.seconds(rows)
        if drafted and not self._warm:
            seconds, self._warm = known or seconds, True
        elif drafted:
            # After a rest the heads first take in what they have missed, which is no price of a
            # draft.
            if self._drafted:
                self.drafting.observe(drafted, max(0.0, seconds - known) if known else 0.0)
        else:
            self.seconds.observe(rows, seconds)
        if k == 0:
            self._unrefreshed = 0
        plain, active = self.plain(), max(1, len(outcomes))
        for (source, probabilities), accepted in outcomes:
            for i, chance in enumerate(probabilities[: accepted + 1]):
                self._believe(source, i, chance, i < accepted)
        extra = sum(accepted for _, accepted in outcomes) / active
        spent = seconds / plain
        self.speed += NEWEST_GAIN * ((1 + extra) / spent - self.speed)
        self.speed = max(1.0, self.speed)
        if k or drafted:
            self.credit -= spent - (1 + extra)
        self.credit = min(MOST_CREDIT, self.credit + LOSS * (1 + extra))
        self._note_tries(k, outcomes)
        copied = any(source == NGRAM for (source, _), _ in outcomes)
        self._unmatched = 0 if copied else self._unmatched + 1
        if self._drafted:
            by_heads = sum(accepted for (source, _), accepted in outcomes if source == HEADS)
            self._earn(by_heads / active - self.price(k) - self._draft_price(self._drafted))
        elif not drafted:
            # What was found not to pay is doubted more the longer ago that was.
            self.gain *= 1 - NEWEST_GAIN / 2
        self._drafted = drafted

    def _draft_price(self, drafts: int = 1) -> float:
        plain = self.plain()
        return self.speed * self.drafting(drafts) / plain if plain else 0.0

    def _believed(self, source: int) -> Iterator[float]:
        """The trust by position; one that was never seen has that of the one before it."""
        believed = PRIOR
        for trust, weight in zip(self.trust[source], self._weight[source], strict=True):
            believed = trust if weight > PRIOR_COUNT else believed
            yield believed

    def _earn(self, gain: float) -> None:
        self._calls += 1
        self.gain += max(NEWEST_GAIN, 1 / (self._calls + PRIOR_COUNT)) * (gain - self.gain)

    def _believe(self, source: int, position: int, chance: float, stood: bool) -> None:
        """Move a source's trust towards what was just seen, in proportion to its own chance."""
        weight = self._weight[source]
        weight[position] = min(weight[position] + 1, 1 / NEWEST_DRAFT)
        trust = self.trust[source]
        trust[position] += (stood - chance * trust[position]) / weight[position]
        trust[position] = min(max(trust[position], 0.0), 2.0)

    def _note_tries(self, k: int, outcomes: Sequence[tuple[Proposal, int]]) -> None:
        tried = {source for (source, probabilities), _ in outcomes if k and probabilities}
        paid = {source for (source, _), accepted in outcomes if accepted}
        for source in self._idle:
            if source in paid:
                self._rest[source] = RETRY
            elif source in tried and self._idle[source] >= self._rest[source]:
                self._rest[source] = min(2 * self._rest[source], MOST_RETRY)
            self._idle[source] = 0 if source in tried else self._idle[source] + 1
