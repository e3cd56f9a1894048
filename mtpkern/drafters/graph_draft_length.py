"""K chosen while running on a GPU, among those with a CUDA graph.

It is chosen before a step is launched: the host, some steps ahead of the device, cannot read the
drafts.
"""

from collections.abc import Mapping, Sequence

from mtpkern.drafters.draft_length import PRIOR, FixedDraftLength, Proposal

# Weight of the newest observation in a running mean, which follows changes in about 100 steps.
NEWEST = 0.02
# Share of the tokens per second that probes may cost.
PROBE_BUDGET = 0.01
# A probe drafts in one step and verifies in the next.
PROBE_STEPS = 2


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
        drafting: float,
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
