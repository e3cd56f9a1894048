"""DraftLength: the K that gives the most tokens a second, found and kept, at a bounded price."""

import random

import pytest

from mtpkern.draft_length import PROBE_BUDGET, DraftLength

FLAT = {0: 1.0, 1: 1.01, 2: 1.02, 4: 1.04}
STEEP = {0: 1.0, 1: 1.5, 2: 2.0, 4: 3.0}


def simulate(
    chooser: DraftLength, rates: list[float], steps: int, seed: int = 0
) -> tuple[int, float]:
    """Tokens and seconds of a run whose drafts stand at `rates`; the K of the step before says how
    many of a window's drafts are meant."""
    generator = random.Random(seed)
    tokens, seconds, meant = 0, 0.0, 0
    for _ in range(steps):
        k = chooser.choose()
        drafted = min(meant, k)
        accepted = 0
        while accepted < drafted and generator.random() < rates[accepted]:
            accepted += 1
        chooser.observe(drafted, accepted)
        tokens, seconds, meant = tokens + accepted + 1, seconds + chooser.seconds[k], k
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
    chooser = DraftLength(costs)
    simulate(chooser, rates, 3000)
    assert chooser.best() == best


@pytest.mark.parametrize("costs", [FLAT, STEEP])
def test_useless_drafts_cost_less_than_two_percent(costs: dict[int, float]) -> None:
    tokens, seconds = simulate(DraftLength(costs), [0.0] * 4, 20000)
    assert tokens / seconds > 0.98 * 1 / costs[0]


def test_drafts_that_become_good_are_noticed() -> None:
    chooser = DraftLength(FLAT)
    simulate(chooser, [0.0] * 4, 3000)
    assert chooser.best() == 0
    simulate(chooser, [0.9] * 4, 6000, seed=1)
    assert chooser.best() == 4


def test_expected_tokens_are_a_sum_of_products() -> None:
    chooser = DraftLength(FLAT)
    chooser.stands = [0.5, 0.4, 0.1, 1.0]
    assert chooser.tokens(0) == 1
    assert chooser.tokens(2) == pytest.approx(1 + 0.5 + 0.2)
    assert chooser.tokens(4) == pytest.approx(1 + 0.5 + 0.2 + 0.02 + 0.02)
    assert 0 < PROBE_BUDGET < 0.02


def test_what_was_not_reached_is_not_counted() -> None:
    chooser = DraftLength(FLAT)
    before = list(chooser.stands)
    chooser.observe(3, 1)  # the first stood, the second fell, the third was never reached
    assert chooser.stands[0] > before[0] and chooser.stands[1] < before[1]
    assert chooser.stands[2:] == before[2:]
    chooser.observe(0, 0)
    assert chooser.stands[2:] == before[2:]


def test_costs_without_plain_decoding_are_refused() -> None:
    with pytest.raises(ValueError, match="seconds must hold K = 0"):
        DraftLength({1: 1.0})
