"""How many tokens to draft: the K that gives the most tokens a second, by what was seen so far.

    tokens(K) = 1 + a_1 + a_1 a_2 + ... + a_1 ... a_K;   best K = argmax tokens(K) / seconds(K)

where a_i is how often draft i stood once those before it had. Costs are measured when the graphs
are made; acceptance is a running mean of the steps that the host has read.
"""

from collections.abc import Mapping

# Weight of the newest observation in a running mean: it forgets in some hundred steps.
NEWEST = 0.02
# Before anything was seen, as many drafts stand as to make trying worthwhile.
PRIOR = 0.7
# What looking beyond the best K may cost, of a second's tokens.
PROBE_BUDGET = 0.01
# A probe drafts in one step and verifies in the next.
PROBE_STEPS = 2


class DraftLength:
    """Chooses K for one batch size, step by step. `seconds` maps each K that has a graph to the
    cost of its step; it must hold 0."""

    def __init__(self, seconds: Mapping[int, float]):
        if 0 not in seconds or min(seconds.values()) <= 0:
            raise ValueError(f"seconds must hold K = 0 and be positive, got {dict(seconds)}")
        self.seconds = dict(seconds)
        self.most = max(seconds)
        self.stands = [PRIOR] * self.most
        self._probing = 0  # steps left of a probe
        self._since = 0  # steps since the last one

    def observe(self, drafted: int, accepted: int) -> None:
        """Take in one sequence's step: of `drafted` meant drafts the first `accepted` stood."""
        for i in range(min(drafted, accepted + 1)):
            self.stands[i] += NEWEST * ((i < accepted) - self.stands[i])

    def tokens(self, k: int) -> float:
        """Tokens that a step with K = k is expected to emit."""
        emitted, reached = 1.0, 1.0
        for stands in self.stands[:k]:
            reached *= stands
            emitted += reached
        return emitted

    def best(self) -> int:
        """The K of the highest rate; the smaller one where two are level."""
        return max(sorted(self.seconds), key=lambda k: self.tokens(k) / self.seconds[k])

    def choose(self) -> int:
        """K of the next step: the best one, or now and then the largest, to see what that does."""
        best = self.best()
        if self._probing == 0 and best < self.most:
            self._since += 1
            if self._since >= self._interval(best):
                self._probing, self._since = PROBE_STEPS, 0
        if self._probing:
            self._probing -= 1
            return self.most
        return best

    def _interval(self, best: int) -> int:
        """Steps between probes, so that what they lose stays within the budget."""
        lost = self.seconds[self.most] / self.seconds[best] - 1 / self.tokens(best)
        return max(16, round(PROBE_STEPS * lost / PROBE_BUDGET))
