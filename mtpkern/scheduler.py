"""Scheduler: which sequences decode now, in which slots and pages, and with which K."""

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence

from mtpkern.cache import PagePool, Prefix
from mtpkern.drafters.draft_length import (
    DraftLength,
    FixedDraftLength,
    KChooser,
    Proposal,
)
from mtpkern.drafters.graph_draft_length import GraphDraftLength
from mtpkern.drafters.ngram import NgramDrafter
from mtpkern.errors import UserError
from mtpkern.nvtx_ranges import span
from mtpkern.request import Event, Request
from mtpkern.runner import Batch, Runner, StepInFlight

_ADMIT, _STEP, _READ = span("admit"), span("step"), span("read")


class Scheduler:
    """Decodes requests on a runner, as many at a time as it has slots and pages for.

    No other code waits for the device: what a step emitted is read from the ring here.
    """

    def __init__(self, runner: Runner, adaptive: bool, prefix_caching: bool):
        """`adaptive` chooses K while running; prefix_caching reuses finished sequences' pages."""
        self.runner = runner
        self.pool = PagePool(runner.cache.k.shape[1] - 1)  # without the scratch page
        self.prefix_caching = prefix_caching
        # The K chooser of all runs where the host may read drafts; None if K is fixed, and on a
        # GPU, where each run has one of its own.
        self.draft_length: DraftLength | None = None
        if adaptive and runner.ops.host_may_read:
            self.draft_length = DraftLength(runner.k)

    def run(self, requests: Sequence[Request], k: int) -> Generator[tuple[int, Event], None, None]:
        """Decode all requests with up to `k` drafts per step -> each token, with its request's
        index.

        A slot is refilled as soon as its sequence has finished. Only one run may be under way;
        closing the generator ends it and frees all slots.
        """
        self._check(requests)
        runner, steps_ahead = self.runner, self.runner.settings.steps_ahead
        count = min(runner.max_batch, len(requests))
        size = runner.settings.batch_size(count, runner.max_batch)
        batch = runner.new_batch(
            size,
            k,
            self._k_chooser(size, k),
            logprobs=any(request.params.logprobs for request in requests),
            min_tokens=any(request.withheld for request in requests),
            prompts_kept=self.prefix_caching,
        )
        slots = batch.slots
        waiting, in_flight = deque(requests), deque[StepInFlight]()
        try:
            while waiting or any(slots):
                for slot in range(size):
                    if slots[slot] is None and waiting:
                        claim = self.pool.claim(runner.pages_for(waiting[0]), waiting[0].prompt)
                        if claim is None:
                            break
                        slots[slot] = request = waiting.popleft()
                        request.pages, request.known, request.pairs = claim
                        with _ADMIT:
                            runner.admit(batch, slot, request)
                # A step emits at least one token, so that more steps than this would be wasted.
                needed = max(request.left for request in slots if request is not None)
                while len(in_flight) < min(steps_ahead, needed):
                    with _STEP:
                        in_flight.append(self._start(batch))
                yield from self._collect(in_flight.popleft(), batch)
                for slot, occupant in enumerate(slots):
                    if occupant is not None and occupant.finish_reason:
                        self._release(slot, occupant)
                        slots[slot] = batch.proposals[slot] = None
        finally:
            _end_rest(batch)
            for slot, occupant in enumerate(slots):
                if occupant is not None:
                    self._release(slot, occupant)

    def _check(self, requests: Sequence[Request]) -> None:
        """Raise UserError for requests that the model or the device does not support."""
        if not self.runner.ops.host_may_read:
            if any(request.params.temperature > 0 for request in requests):
                raise UserError("temperature above 0 needs device cpu in this version")
            if any(request.withheld for request in requests):
                raise UserError("min_tokens needs device cpu in this version")
        vocab_size = self.runner.trunk.config.vocab_size
        if any(i >= vocab_size for request in requests for i in request.params.stop_token_ids):
            raise UserError(f"stop_token_ids must be in 0..{vocab_size - 1}")

    def _k_chooser(self, batch: int, k: int) -> KChooser:
        """The K chooser, up to k, of a run with `batch` slots."""
        if k and self.draft_length is not None:
            heads = not isinstance(self.runner.drafter, NgramDrafter)
            self.draft_length.begin(batch, heads=heads)
            return self.draft_length
        durations = self.runner.graph_seconds
        seconds = {drafts: cost for (size, drafts), cost in durations.items() if size == batch}
        return GraphDraftLength(seconds) if k and seconds else FixedDraftLength(k)

    def _start(self, batch: Batch) -> StepInFlight:
        """Start the next step: one of a rest, or with the K that the chooser chooses."""
        started, k_chooser = time.perf_counter(), batch.k_chooser
        if not batch.proposed:
            source = next(batch.rest, None)
            if source is None:
                _end_rest(batch)
                batch.rest = iter(k_chooser.rest())
                source = next(batch.rest, None)
            if source is not None:
                return self.runner.start_step(batch, 0, source, started, resting=True)
        _end_rest(batch)
        k = k_chooser.choose([p for p in batch.proposals if p is not None])
        return self.runner.start_step(batch, k, k_chooser.active_source(), started)

    def _collect(self, step: StepInFlight, batch: Batch) -> Iterator[tuple[int, Event]]:
        """Wait for a step and pass its tokens to their requests, which stop where they must."""
        with _READ:
            records = self.runner.ring.read(
                step.number,
                len(step.slots),
                step.k + 1,
                logprobs=batch.logprobs,
                check=self.runner.check_device,
            )
        now, k = time.perf_counter(), step.k
        seconds = now - step.started  # on a CPU, the step's duration
        outcomes, taken = [], []
        for request, proposal, record in zip(step.slots, step.proposals, records, strict=True):
            if request is not None and not request.finish_reason:
                if not step.resting:
                    if record.drafted > k:
                        record = record._replace(drafted=k)
                    if proposal is None:
                        proposal = Proposal(record.source, (1.0,) * record.drafted)
                    proposal = proposal._replace(probabilities=proposal.probabilities[:k])
                    outcomes.append((proposal, min(record.accepted, record.drafted)))
                taken.append((request, record))
        if step.resting:
            batch.rested.append(seconds)
        else:
            drafting = (step.heads_drafted, step.drafting_seconds)
            batch.k_chooser.observe(k, seconds, outcomes, *drafting)
        for request, record in taken:
            for event in request.take(record, k, now):
                yield request.index, event
            if record.broken and not request.finish_reason:
                raise UserError("the model's logits are not finite: another dtype may help")

    def _release(self, slot: int, request: Request) -> None:
        """Free a slot and its pages; with prefix_caching, later prompts can reuse the pages."""
        if self.prefix_caching:
            # The last step may have committed more tokens than the answer has; an interrupted run
            # may have committed fewer.
            committed = int(self.runner.cache.lengths[slot])
            tokens = (request.prompt + request.token_ids)[:committed]
            pairs = self.runner.drafter.cached_length(slot, len(tokens))
            self.pool.keep(Prefix(tokens, request.pages, pairs))
        else:
            self.pool.release(request.pages)
        self.runner.release(slot)


def _end_rest(batch: Batch) -> None:
    """Tell the chooser of the resting steps that it has not observed."""
    batch.rest = iter(())
    if batch.rested:
        batch.k_chooser.observe_rest(batch.rested)
        batch.rested = []
