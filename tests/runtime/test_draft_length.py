"""DraftLength finds the K with the most tokens per second, at a bounded cost."""

import random
from statistics import mean
from typing import Any

import pytest

from mtpkern.drafters.base import HEADS, NGRAM, NONE
from mtpkern.drafters.draft_length import (
    AWAKE,
    CREDIT,
    LOSS,
    MOST_LOOK,
    MOST_REST,
    RETRY,
    DraftLength,
    FixedDraftLength,
    Proposal,
)
from mtpkern.drafters.graph_draft_length import PROBE_BUDGET, GraphDraftLength
from mtpkern.drafters.timings import Timings

FLAT = {0: 1.0, 1: 1.01, 2: 1.02, 4: 1.04}
STEEP = {0: 1.0, 1: 1.5, 2: 2.0, 4: 3.0}


def observe(chooser: GraphDraftLength, drafted: int, accepted: int) -> None:
    chooser.observe(4, 0.0, [(Proposal(HEADS, (1.0,) * drafted), accepted)], 0, 0.0)


def simulate(
    chooser: GraphDraftLength, rates: list[float], steps: int, seed: int = 0
) -> tuple[int, float]:
    """Tokens and seconds of a run whose drafts are accepted at `rates`; as many drafts are
    proposed as the K of the step before."""
    generator = random.Random(seed)
    tokens, seconds, num_proposed = 0, 0.0, 0
    for _ in range(steps):
        k = chooser.choose([])
        drafted = min(num_proposed, k)
        accepted = 0
        while accepted < drafted and generator.random() < rates[accepted]:
            accepted += 1
        observe(chooser, drafted, accepted)
        tokens, seconds, num_proposed = tokens + accepted + 1, seconds + chooser.seconds[k], k
    return tokens, seconds


@pytest.mark.parametrize(
    ("costs", "rates", "best"),
    [
        (FLAT, [0.8, 0.7, 0.6, 0.5], 4),
        (FLAT, [0.0] * 4, 0),
        (STEEP, [0.9, 0.1, 0.1, 0.1], 1),
        (STEEP, [0.3] * 4, 0),
        ({0: 1.0, 1: 1.3, 2: 1.31, 4: 3.0}, [0.9, 0.8, 0.1, 0.1], 2),
    ],
)
def test_the_best_k_is_found(costs: dict[int, float], rates: list[float], best: int) -> None:
    chooser = GraphDraftLength(costs)
    simulate(chooser, rates, 3000)
    assert chooser.best() == best


@pytest.mark.parametrize("costs", [FLAT, STEEP])
def test_useless_drafts_cost_less_than_two_percent(costs: dict[int, float]) -> None:
    tokens, seconds = simulate(GraphDraftLength(costs), [0.0] * 4, 20000)
    assert tokens / seconds > 0.98 * 1 / costs[0]


def test_drafts_that_become_good_are_noticed() -> None:
    chooser = GraphDraftLength(FLAT)
    simulate(chooser, [0.0] * 4, 3000)
    assert chooser.best() == 0
    simulate(chooser, [0.9] * 4, 6000, seed=1)
    assert chooser.best() == 4


def test_expected_tokens_are_a_sum_of_products() -> None:
    chooser = GraphDraftLength(FLAT)
    chooser.acceptance_rates = [0.5, 0.4, 0.1, 1.0]
    assert chooser.tokens(0) == 1
    assert chooser.tokens(2) == pytest.approx(1 + 0.5 + 0.2)
    assert chooser.tokens(4) == pytest.approx(1 + 0.5 + 0.2 + 0.02 + 0.02)
    assert 0 < PROBE_BUDGET < 0.02


def test_what_was_not_reached_is_not_counted() -> None:
    chooser = GraphDraftLength(FLAT)
    before = list(chooser.acceptance_rates)
    observe(chooser, 3, 1)  # the first stood, the second fell, the third was never reached
    assert chooser.acceptance_rates[0] > before[0] and chooser.acceptance_rates[1] < before[1]
    assert chooser.acceptance_rates[2:] == before[2:]
    observe(chooser, 0, 0)
    assert chooser.acceptance_rates[2:] == before[2:]


def test_costs_without_plain_decoding_are_refused() -> None:
    with pytest.raises(ValueError, match="seconds must hold K = 0"):
        GraphDraftLength({1: 1.0})


class Machine:
    """Decoding in a model: what steps cost in plain steps, and which drafts exist and are accepted.

    `row` is the cost of one more row, `pass_` of a token that the heads draft. Heads claim
    `claimed` for each draft, which is accepted at `rate`; a share `matches` of the steps has
    copies, which are accepted at `copied`. `noise` is a relative standard deviation of each timing.
    """

    def __init__(
        self,
        row: float,
        pass_: float,
        *,
        claimed: float = 0.8,
        rate: float = 0.8,
        matches: float = 0.0,
        copied: float = 0.0,
        noise: float = 0.0,
        batch: int = 1,
        seed: int = 3,
    ):
        self.row, self.pass_, self.noise, self.batch = row, pass_, noise, batch
        self.claimed, self.rate, self.matches, self.copied = claimed, rate, matches, copied
        self.generator = random.Random(seed)

    def step(self, k: int) -> float:
        return (1 + self.row * (k + 1) * self.batch) * (1 + self.generator.gauss(0, self.noise))

    def window(self, use_heads: bool, use_ngram: bool, least: float) -> Proposal:
        if self.generator.random() < self.matches and use_ngram:
            return Proposal(NGRAM, (1.0,) * 4)
        if not use_heads:
            return Proposal(NONE, ())
        drafts = 1
        while drafts < 4 and self.claimed**drafts >= least:
            drafts += 1
        return Proposal(HEADS, (self.claimed,) * drafts)

    def stood(self, window: Proposal, k: int) -> int:
        rate = self.copied if window.source == NGRAM else self.rate
        drafted = min(k, len(window.probabilities))
        return next((i for i in range(drafted) if self.generator.random() >= rate), drafted)

    def run(self, chooser: DraftLength | FixedDraftLength, tokens: int) -> float:
        """Decode that many tokens per sequence -> the rate over that of plain decoding."""
        seconds, emitted, rested = 0.0, 0.0, []
        self.choices = 0
        windows = [Proposal(NONE, ())] * self.batch
        rest = iter(())
        while emitted < tokens:
            # As the scheduler does: a rest ends where something is drafted.
            source = None
            if not any(window.probabilities for window in windows):
                source = next(rest, None)
                if source is None:
                    if rested:
                        chooser.observe_rest(rested)
                        rested = []
                    rest = iter(chooser.rest())
                    source = next(rest, None)
            if source is not None:
                rested.append(self.step(0))
                seconds += rested[-1]
                emitted += 1
                if source != NONE:
                    windows = [self.window(False, chooser.use_ngram(), 1.0) for _ in windows]
                continue
            rest = iter(())
            if rested:
                chooser.observe_rest(rested)
                rested = []
            self.choices += 1
            k = chooser.choose(windows)
            use = chooser.use_heads(), chooser.use_ngram(), chooser.min_probability()
            stood = [self.stood(window, k) for window in windows]
            outcomes = [
                (window._replace(probabilities=window.probabilities[:k]), accepted)
                for window, accepted in zip(windows, stood, strict=True)
            ]
            windows = [self.window(*use) for _ in windows]
            drafted = max((len(w.probabilities) for w in windows if w.source == HEADS), default=0)
            took = self.step(k) + drafted * self.pass_
            chooser.observe(k, took, outcomes, drafted, drafted * self.pass_)
            seconds += took
            emitted += 1 + sum(stood) / self.batch
        return emitted / seconds * (1 + self.row * self.batch)

    def loaded(self) -> DraftLength:
        """A chooser as it is after load: steps of one sequence were timed."""
        chooser = DraftLength(4)
        for k in range(5):
            for _ in range(3):
                cost = (1 + self.row * (k + 1)) * (1 + self.generator.gauss(0, self.noise))
                chooser.seconds.observe(k + 1, cost)
        chooser.begin(self.batch)
        return chooser


HOSTILE: dict[str, Any] = dict(claimed=0.95, rate=0.0, matches=0.3, copied=0.0)


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("row", [0.02, 0.3, 1.0])
def test_hostile_drafts_cost_less_than_two_percent(row: float, batch: int, noise: float) -> None:
    machine = Machine(row, 0.1, batch=batch, noise=noise, **HOSTILE)
    chooser = machine.loaded()
    machine.run(chooser, 8)  # what starts a process may pay for what is learned
    for _ in range(5):
        chooser.begin(batch)
        assert machine.run(chooser, 128) > 0.98


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("row", "rate", "least"), [(0.02, 0.8, 2.1), (0.02, 0.5, 1.35), (0.3, 0.8, 1.15)]
)
def test_good_drafts_are_used(row: float, rate: float, least: float, batch: int) -> None:
    """The first 400 tokens of one run, and later ones on average: an unlucky run rests for long."""
    if batch == 1:
        machine = Machine(row, 0.1, rate=rate, noise=0.02)
        assert machine.run(machine.loaded(), 400) > least
    ratios = []
    for seed in range(12):
        machine = Machine(row, 0.1, rate=rate, batch=batch, noise=0.02, seed=seed)
        chooser = machine.loaded()
        if batch == 1:
            machine.run(chooser, 400)
        ratios.append(machine.run(chooser, 4000) / machine.run(FixedDraftLength(4), 4000))
    assert mean(ratios) > 0.95


def test_copies_are_used_while_heads_rest() -> None:
    machine = Machine(0.1, 0.4, claimed=0.9, rate=0.0, matches=0.5, copied=0.9)
    chooser = machine.loaded()
    assert machine.run(chooser, 2000) > 1.5
    assert not chooser.use_heads()


def test_heads_draft_where_copies_do_not_pay() -> None:
    machine = Machine(0.1, 0.05, matches=0.7, copied=0.0)
    chooser = machine.loaded()
    machine.run(chooser, 500)
    assert machine.run(chooser, 2000) > 1.5


def test_one_slow_timing_does_not_end_copies_for_good() -> None:
    machine = Machine(0.05, 0.1, claimed=0.9, rate=0.0, matches=0.5, copied=0.9, batch=3)
    chooser = machine.loaded()
    chooser.seconds.observe(6, 1.8)
    chooser.begin(3)
    assert not chooser.use_ngram()
    for _ in range(20):
        machine.run(chooser, 100)
        chooser.begin(3)
    assert machine.run(chooser, 1000) > 1.3


def test_steps_that_were_slow_at_load_are_timed_again() -> None:
    """The heads' time is not what a step takes beyond those: they would seem to cost nothing."""
    machine = Machine(0.3, 0.1)
    chooser = DraftLength(4)
    steps = {rows: [2 * machine.step(rows - 1)] * 3 for rows in range(1, 6)}
    chooser.start_with(steps, {n: [0.2 * n] * 3 for n in range(1, 5)})
    chooser.begin(1)
    assert machine.run(chooser, 2500) > 1.3


def test_sources_that_rest_are_spared_steps_until_shortly_before_a_try() -> None:
    chooser = DraftLength(4)
    chooser.start_with({1: [0.01], 2: [0.011]}, {})
    assert chooser.active_source() == HEADS
    chooser.gain, chooser._idle[HEADS] = -0.5, 0
    seen = list(chooser.rest())
    assert seen == [NGRAM] * (RETRY - AWAKE)
    chooser.observe_rest([0.01] * len(seen))
    assert list(chooser.rest()) == [HEADS] * AWAKE and not chooser.use_heads()
    chooser.observe_rest([0.01] * AWAKE)
    assert list(chooser.rest()) == [] and chooser.use_heads()
    # Searches become rarer with each match that is not worth verifying.
    chooser._rest[HEADS], chooser._idle[HEADS] = 256, 0
    chooser.seconds.observe(2, 0.03, 0.03)
    chooser._idle[NGRAM], chooser._rest[NGRAM] = 0, 256
    assert NGRAM not in chooser.rest()  # a copy would cost more than it may lose
    chooser.credit[NGRAM] = 3.0
    match, searches = Proposal(NGRAM, (1.0,)), []
    for _ in range(6):
        assert chooser.choose([match]) == 0
        chooser.observe(0, 0.01, [(match._replace(probabilities=()), 0)], 0, 0.0)
        searches.append(list(chooser.rest()).count(NGRAM))
    assert searches == [16, 8, 4, 2, 1, 1] and MOST_REST == MOST_LOOK
    # One that brings a token is followed by a search in each step.
    chooser.seconds.observe(2, *[0.01] * 7)
    assert chooser.choose([match]) == 1 and chooser.active_source() == NGRAM
    chooser.observe(1, 0.01, [(match, 1)], 0, 0.0)
    assert list(chooser.rest()) == [NGRAM] * MOST_REST


@pytest.mark.parametrize("batch", [1, 3])
def test_drafts_that_never_pay_need_few_choices(batch: int) -> None:
    machine = Machine(1.0, 0.1, batch=batch, **HOSTILE)
    chooser = machine.loaded()
    machine.run(chooser, 500)
    chooser.begin(batch)
    machine.run(chooser, 100)
    assert machine.choices <= 25  # of 100 steps, and each of three sequences often has a match


def test_heads_that_cannot_pay_are_neither_given_prompts_nor_steps() -> None:
    machine = Machine(1.0, 0.1, rate=1.0, batch=3)
    chooser = machine.loaded()
    assert not chooser.heads_may_pay()  # a draft costs 0.75 steps
    machine.run(chooser, 200)
    assert not chooser.drafting and HEADS not in chooser.rest() and not chooser.use_heads()
    chooser.begin(1)
    assert chooser.heads_may_pay()
    cheap = Machine(0.1, 0.1).loaded()
    assert cheap.heads_may_pay() and FixedDraftLength(4).heads_may_pay()
    cheap.begin(1, heads=False)
    assert not cheap.heads_may_pay()


def test_a_copy_is_tried_only_where_it_could_pay() -> None:
    """One sequence of three has a match: even if all of it stood, verifying it costs more."""
    chooser = Machine(0.3, 0.1, batch=3).loaded()
    nothing, match = Proposal(NONE, ()), Proposal(NGRAM, (1.0,) * 4)
    chooser.trust[NGRAM] = [0.0] * 4
    chooser._weight[NGRAM] = [50.0] * 4
    assert chooser.choose([match, nothing, nothing]) == 0
    assert chooser.choose([match] * 3) > 0


def test_without_heads_or_copies_steps_are_searched_and_not_chosen() -> None:
    machine = Machine(0.1, 0.1)
    chooser = machine.loaded()
    chooser.begin(1, heads=False)
    machine.run(chooser, 100)
    assert machine.choices == 0 and not chooser.use_heads() and chooser.active_source() == NGRAM


def test_a_fixed_k_of_zero_rests_always() -> None:
    machine = Machine(0.1, 0.1)
    assert machine.run(FixedDraftLength(0), 1000) == pytest.approx(1) and machine.choices == 0
    assert not list(FixedDraftLength(4).rest()) and not list(GraphDraftLength(FLAT).rest())


def test_drafts_that_become_good_are_noticed_on_a_cpu() -> None:
    machine = Machine(0.05, 0.1, claimed=0.8, rate=0.0)
    chooser = machine.loaded()
    machine.run(chooser, 1000)
    assert not chooser.use_heads()
    machine.rate = 0.8
    machine.run(chooser, 1500)
    assert machine.run(chooser, 500) > 1.7


def test_a_neighbour_that_slows_drafts_down_is_noticed() -> None:
    machine = Machine(0.05, 0.05)
    chooser = machine.loaded()
    assert machine.run(chooser, 500) > 1.7
    machine.row = 2.0
    machine.run(chooser, 200)
    assert machine.run(chooser, 1000) > 0.98


def test_timings_are_medians_with_lines_in_between() -> None:
    timings = Timings()
    assert not timings and timings(3) == 0.0
    for seconds in (1.0, 9.0, 1.2):
        timings.observe(1, seconds)
    assert timings(1) == timings(0) == 1.2 and timings(4) == pytest.approx(4.8)
    timings.observe(5, 2.0)
    assert timings(3) == pytest.approx(1.6) and timings(9) == pytest.approx(2.8)


def paid(chooser: DraftLength, source: int, drafts: int, accepted: int) -> float:
    """What a step of 1.5 plain steps adds to a source's account, without what tokens earn."""
    before = chooser.credit[source]
    proposal = Proposal(source, (0.8,) * drafts)
    chooser.observe(drafts, 1.5, [(proposal, accepted)], 0, 0.0)
    return chooser.credit[source] - before - LOSS[source] * (1 + accepted)


def test_each_source_pays_for_its_own_drafts() -> None:
    chooser = DraftLength(4)
    chooser.start_with({rows: [1.0] * 3 for rows in range(1, 6)}, {n: [0.3] * 3 for n in (1, 4)})
    chooser._warm = True
    assert paid(chooser, NGRAM, 2, 0) == pytest.approx(-0.5)
    heads = chooser.credit[HEADS]
    assert paid(chooser, NGRAM, 2, 2) == pytest.approx(1.5)
    assert chooser.credit[HEADS] == pytest.approx(heads + 3 * LOSS[HEADS])
    assert paid(chooser, HEADS, 1, 1) == pytest.approx(0.5)
    # Copies were verified in 1.0 plain steps, and the heads drafted in the other 0.5.
    copies = chooser.credit[NGRAM]
    chooser.observe(2, 1.5, [(Proposal(NGRAM, (1.0, 1.0)), 0)], 4, 0.5)
    assert chooser.credit[NGRAM] == pytest.approx(copies + LOSS[NGRAM])
    # Without credit copies are not verified, whatever is expected of them.
    chooser.seconds.observe(2, *[1.1] * 7)
    chooser.credit[NGRAM], chooser._drafted, chooser._idle[NGRAM] = -1.0, 0, 0
    assert chooser.choose([Proposal(NGRAM, (1.0,))]) == 0
    chooser.credit[HEADS], chooser.credit[NGRAM] = -1.0, 1.0
    assert chooser.choose([Proposal(NGRAM, (1.0,))]) == 1


def test_what_a_source_may_lose_in_a_new_run_follows_from_the_runs_before() -> None:
    machine = Machine(0.3, 0.1, **HOSTILE)
    chooser = machine.loaded()
    for _ in range(6):
        machine.run(chooser, 128)
        chooser.begin(1)
    chooser.credit = {HEADS: -3.0, NGRAM: 3.0}
    chooser.begin(1)
    assert 0 <= chooser.credit[HEADS] < CREDIT[HEADS] / 10
    assert chooser.credit[NGRAM] == chooser.cost(1)  # of one try
    chooser.begin(3)
    assert chooser.credit == CREDIT  # at another batch size they may pay
    chooser.begin(1)
    machine.rate = machine.copied = 0.95
    machine.run(chooser, 6000)
    chooser.gain = -0.1  # an unlucky end
    chooser.begin(1)
    assert chooser.credit[HEADS] > CREDIT[HEADS] / 2 and chooser.credit[NGRAM] > CREDIT[NGRAM] / 2
    assert chooser.gain == 0 and chooser.use_heads()
