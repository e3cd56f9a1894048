"""How many tokens to draft: the K that gives the most tokens per second, from measured costs.

    gain(K) = extra tokens expected - speed x (seconds(K) - seconds(0)) / seconds(0)

The gain is in tokens: what K drafts add to the one token of a plain step, less what their extra
time would have brought at the present speed (tokens per duration of a plain step). The best K has
the highest gain; K = 0, plain decoding, has gain 0.

`GraphDraftLength` is for a GPU: it chooses before a step is launched, and the host, some steps
ahead of the device, cannot read the drafts. `DraftLength` is for a CPU: it chooses after
drafting, from the source of the drafts and their probabilities.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from mtpkern.drafters.base import HEADS, MIN_PROBABILITY, NGRAM, NONE, SOURCES
from mtpkern.drafters.timings import Timings

# Weight of the newest observation in a running mean, which follows changes in about 100 steps.
NEWEST = 0.02
# Acceptance rate assumed before any observation: high enough that drafts are tried.
PRIOR = 0.7
# Share of the tokens per second that probes may cost.
PROBE_BUDGET = 0.01
# A probe drafts in one step and verifies in the next.
PROBE_STEPS = 2


class Proposal(NamedTuple):
    """The drafts of one sequence: their source, and for each the source's own estimate that it is
    accepted if those before it are (1 from a source without estimates)."""

    source: int
    probabilities: Sequence[float]


class KChooser(Protocol):
    """Chooses K for each step of a batch."""

    def choose(self, proposals: Sequence[Proposal]) -> int:
        """K of the next step, given the drafts of each active sequence (empty if unknown)."""

    def use_heads(self) -> bool:
        """Whether the heads should draft at the end of the next step."""

    def active_source(self) -> int:
        """Who is given the next step: HEADS (heads and n-gram), NGRAM alone, or NONE."""

    def min_probability(self) -> float:
        """From which probability of acceptance one more draft of the heads is worth its cost."""

    def spend(self, seconds: float, drafted: int) -> None:
        """Account for `drafted` tokens that the heads drafted outside of a step, after a prompt."""

    def observe(
        self,
        k: int,
        seconds: float,
        outcomes: Sequence[tuple[Proposal, int]],
        drafted: int,
    ) -> None:
        """Learn from a step of K = k that took `seconds`: `outcomes` has each active sequence's
        proposal, cut to k, and how many of its drafts were accepted; `drafted` is how many tokens
        the heads drafted at the step's end."""


class FixedDraftLength:
    """The K that the caller asked for, at every step."""

    def __init__(self, k: int):
        self.k = k

    def choose(self, proposals: Sequence[Proposal]) -> int:
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
    """Chooses K among those with a CUDA graph, for one batch size."""

    def __init__(self, seconds: Mapping[int, float]):
        """`seconds` maps each K that has a graph, 0 included, to the duration of its step."""
        if 0 not in seconds or min(seconds.values()) <= 0:
            raise ValueError(f"seconds must hold K = 0 and be positive, got {dict(seconds)}")
        super().__init__(max(seconds))
        self.seconds = dict(seconds)
        self.acceptance_rates = [PRIOR] * self.k
        self._probing = 0  # remaining steps of a probe
        self._since = 0  # steps since the last probe

    def observe(
        self,
        k: int,
        seconds: float,
        outcomes: Sequence[tuple[Proposal, int]],
        drafted: int,
    ) -> None:
        for proposal, accepted in outcomes:
            for i in range(min(len(proposal.probabilities), accepted + 1)):
                self.acceptance_rates[i] += NEWEST * ((i < accepted) - self.acceptance_rates[i])

    def tokens(self, k: int) -> float:
        """How many tokens a step of K = k is expected to emit."""
        emitted, reached = 1.0, 1.0
        for rate in self.acceptance_rates[:k]:
            reached *= rate
            emitted += reached
        return emitted

    def best(self) -> int:
        """The K with the most tokens per second; of equal ones the smallest."""
        return max(sorted(self.seconds), key=lambda k: self.tokens(k) / self.seconds[k])

    def choose(self, proposals: Sequence[Proposal]) -> int:
        """K of the next step: the best one, or now and then the largest, as a probe."""
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
        """Steps between probes, so that their cost stays within the budget."""
        lost = self.seconds[self.k] / self.seconds[best] - 1 / self.tokens(best)
        return max(16, round(PROBE_STEPS * lost / PROBE_BUDGET))


# How much time drafting may lose, in durations of a plain step: at first (START), from the start
# of each later run on if the heads have paid lately (RENEWED) or not (DOUBTED), at most, however
# much it has earned (MOST_CREDIT), and per token (LOSS).
START, RENEWED, DOUBTED, MOST_CREDIT = 4.0, 1.5, 0.75, 16.0
LOSS = 0.005
# The gain assumed of a call of the heads before any was observed.
HOPE = 0.3
# How many observations a prior counts for, and the least weight of a new draft and a new gain.
PRIOR_COUNT, NEWEST_DRAFT, NEWEST_GAIN = 4.0, 0.02, 0.05
# Steps until a source that does not pay is tried again, doubled after each failure up to
# MOST_RETRY; steps until a plain step is timed again (REFRESH).
RETRY, MOST_RETRY, REFRESH = 32, 256, 128
# The heads are given steps again AWAKE steps before they are tried. For AWAKE steps after the last
# n-gram match that was verified each step is searched for another one, then one step in LOOKS.
AWAKE, LOOKS = 16, 4


class DraftLength:
    """Chooses K on a CPU, for any batch size, and learns from every step.

    A step's cost is that of its rows, batch x (K + 1). The probability that a draft is accepted is
    the source's own estimate, corrected by how often its drafts were accepted so far. The heads
    draft as long as that brings more than it costs. An account of what drafting has lost keeps
    decoding within `LOSS` of plain decoding, however wrong the estimates are.
    """

    def __init__(self, most: int):
        """`most` is the largest K."""
        self.most = most
        self.seconds = Timings()  # of a step, by its rows, drafting left out
        self.drafting = Timings()  # of the heads, by how many tokens they draft
        self.trust = [[PRIOR] * most for _ in SOURCES]  # accepted / expected, by source, position
        self.gain = HOPE  # tokens gained by a call of the heads, a running mean
        self.speed = 1.0  # tokens per duration of a plain step, a running mean
        self.credit = START  # what drafting may still lose, in durations of a plain step
        self._weight = [[PRIOR_COUNT] * most for _ in SOURCES]
        self._calls = 0  # calls of the heads whose drafts were verified
        self._idle = dict.fromkeys(range(len(SOURCES)), RETRY)  # steps since the last try
        self._rest = dict.fromkeys(range(len(SOURCES)), RETRY)  # steps between tries
        self._unrefreshed = 0  # steps since the last plain one
        self._unmatched = 0  # steps since an n-gram match was verified
        self._drafted = 0  # tokens that the heads drafted in the last step
        self._warm = False  # whether the heads have run: the first call includes one-time work
        self._batch = 1

    def begin(self, batch: int) -> None:
        """Start a run of `batch` sequences at a time."""
        self._batch = batch
        self._drafted = 0
        if self._warm:
            self.credit = RENEWED if self.gain > 0 else DOUBTED

    def plain(self) -> float:
        """Seconds of a step without drafts."""
        return self.seconds(self._batch)

    def extra(self, proposals: Sequence[Proposal], k: int) -> float:
        """How many of k drafts are expected to be accepted, on average over the sequences."""
        total = 0.0
        for source, probabilities in proposals:
            reached = 1.0
            for probability, trust in zip(probabilities[:k], self._trusted(source), strict=False):
                reached *= min(1.0, probability * trust)
                total += reached
        return total / max(1, len(proposals))

    def price(self, k: int) -> float:
        """What verifying k drafts costs beyond a plain step, in tokens."""
        plain = self.plain()
        beyond = self.seconds(self._batch * (k + 1)) - plain
        return self.speed * max(0.0, beyond) / plain if plain else 0.0

    def choose(self, proposals: Sequence[Proposal]) -> int:
        most = max((len(probabilities) for _, probabilities in proposals), default=0)
        self._unrefreshed += 1
        if most == 0 or self._unrefreshed > REFRESH:
            return 0
        # The heads' time is already spent: their drafts may be verified whatever the credit is.
        lengths = [k for k in range(most + 1) if self._drafted or self.price(k) <= self.credit]
        gains = {k: self.extra(proposals, k) - self.price(k) for k in lengths}
        best = max(gains, key=gains.__getitem__, default=0)
        if best == 0 and len(gains) > 1:
            sources = {source for source, probabilities in proposals if probabilities}
            if all(self._idle[source] >= self._rest[source] for source in sources):
                best = max(lengths[1:], key=gains.__getitem__)
        return best

    def use_heads(self) -> bool:
        return self._may_try_heads(0)

    def active_source(self) -> int:
        if self._may_try_heads(AWAKE):
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
            # After a rest the heads first write the pairs that they missed: not a cost of drafting.
            if self._drafted:
                self.drafting.observe(drafted, max(0.0, seconds - known) if known else 0.0)
        else:
            self.seconds.observe(rows, seconds)
        if k == 0:
            self._unrefreshed = 0
        plain, active = self.plain(), max(1, len(outcomes))
        for (source, probabilities), accepted in outcomes:
            for i, probability in enumerate(probabilities[: accepted + 1]):
                self._update_trust(source, i, probability, i < accepted)
        extra = sum(accepted for _, accepted in outcomes) / active
        spent = seconds / plain
        self.speed += NEWEST_GAIN * ((1 + extra) / spent - self.speed)
        self.speed = max(1.0, self.speed)
        if k or drafted:
            self.credit -= spent - (1 + extra)
        self.credit = min(MOST_CREDIT, self.credit + LOSS * (1 + extra))
        self._note_tries(k, outcomes)
        copied = k > 0 and any(source == NGRAM for (source, _), _ in outcomes)
        self._unmatched = 0 if copied else self._unmatched + 1
        if self._drafted:
            by_heads = sum(accepted for (source, _), accepted in outcomes if source == HEADS)
            self._update_gain(by_heads / active - self.price(k) - self._draft_price(self._drafted))
        elif not drafted:
            # An estimate loses weight with age, so that a source that did not pay is tried again.
            self.gain *= 1 - NEWEST_GAIN / 2
        self._drafted = drafted

    def _may_try_heads(self, steps: int) -> bool:
        """Whether the credit allows a call of the heads, and they are not at rest, `steps` plain
        steps from now."""
        if self.price(1) + self._draft_price() > self.credit + LOSS * steps:
            return False
        return self.gain >= 0 or self._idle[HEADS] + steps >= self._rest[HEADS]

    def _draft_price(self, drafts: int = 1) -> float:
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
