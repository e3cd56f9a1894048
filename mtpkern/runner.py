"""Runner: a model and its decode state on a device. It fills slots with prompts and starts steps.

The scheduler decides which sequences those are, and their pages and K.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mtpkern.cache import KVCache
from mtpkern.decode import DecodeState, StepOutput, decode_step
from mtpkern.device import settings_for
from mtpkern.drafters.base import (
    HEADS,
    MIN_PROBABILITY,
    NGRAM,
    NO_DRAFTER,
    NONE,
    Drafter,
    Drafts,
    NoDrafter,
)
from mtpkern.drafters.draft_length import KChooser, Proposal
from mtpkern.drafters.pairs import MAX_PENDING
from mtpkern.drafters.synthetic import draw_counts
from mtpkern.kernels.sample import sampling_key
from mtpkern.model import Llama
from mtpkern.ops.base import Ops, Withheld
from mtpkern.prefill import first_drafts, run_prompt
from mtpkern.request import Request
from mtpkern.ring import Ring
from mtpkern.status import SILENT, Status

NO_PROPOSAL = Proposal(NONE, ())
# A sequence's slots in the cache come in multiples of this.
CAPACITY_MULTIPLE = 128


def capacity(tokens: int, k: int) -> int:
    """Cache slots for a sequence of at most `tokens` tokens, decoded with up to `k` drafts.

    The last windows may overhang, and so may pairs that a sequential head has put off.
    """
    return -(-(tokens + 2 * (k + 1) + MAX_PENDING) // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE


@dataclass
class Batch:
    """The sequences that one run decodes together: slots[b] is row b of `state`."""

    state: DecodeState  # a view of the runner's, for these slots and the run's K
    k_chooser: KChooser
    logprobs: bool = False  # whether steps write log-probabilities
    withheld: Withheld | None = None  # for `min_tokens`; None in a run without
    prompts_kept: bool = False  # whether later runs reuse its prompts, with the heads' caches

    def __post_init__(self) -> None:
        self.k = self.state.window.shape[1] - 1
        # For steps without drafts.
        self.plain_state = replace(self.state, window=self.state.windows[1])
        self.slots: list[Request | None] = [None] * len(self.state.window)
        # The drafts of each slot's next step, where the host may read them.
        self.proposals: list[Proposal | None] = [None] * len(self.slots)
        self.proposed = False  # whether there are any
        # The sources that are given each of the next steps, which have K = 0: see `KChooser.rest`.
        self.rest: Iterator[int] = iter(())
        # Seconds of such steps that the chooser has not observed yet.
        self.rested: list[float] = []


class StepInFlight(NamedTuple):
    """A step that was started and not yet read."""

    number: int
    k: int
    slots: tuple[Request | None, ...]  # as they were when it started
    proposals: tuple[Proposal | None, ...]  # the drafts that it verifies, where the host may read
    started: float  # seconds, by time.perf_counter()
    # Tokens that the heads drafted at its end, and how long they took, where the host may read.
    heads_drafted: int
    drafting_seconds: float
    resting: bool  # whether it is one of `Batch.rest`


class Runner:
    """The trunk, the drafter, and the state of max_batch slots."""

    def __init__(
        self,
        trunk: Llama,
        drafter: Drafter,
        cache: KVCache,
        ops: Ops,
        *,
        ngram: NoDrafter,
        k: int,
        max_length: int,
        ends: int,
        synthetic_acceptance: Sequence[float] | None,
        device: torch.device,
        status: Status = SILENT,
    ):
        """`ngram` drafts alone while the heads rest. `k` is the most drafts per step, `ends` the
        most end tokens of a sequence; synthetic_acceptance is as in `LLM`."""
        self.trunk, self.drafter, self.ngram, self.cache = trunk, drafter, ngram, cache
        self.ops = ops
        self.k, self.max_batch, self.max_length = k, len(cache.lengths), max_length
        self.device, self.status = device, status
        self.settings = settings = settings_for(device)
        self.page_size = cache.k.shape[2]
        # Columns of the page table that graphs span, ascending; the last spans all.
        max_pages = cache.page_table.shape[1]
        columns = [context // self.page_size for context in settings.graph_contexts]
        self.page_buckets = [*(pages for pages in columns if pages < max_pages), max_pages]
        steps, pinned = 2 * settings.steps_ahead, settings.uses_graphs
        self.ring = Ring(steps, self.max_batch, k + 1, pinned=pinned)
        rates = synthetic_acceptance
        self.state = DecodeState.empty(
            cache,
            max_length,
            k,
            ends=ends,
            ring=self.ring.words,
            forced=draw_counts(rates[:k]).to(device) if rates and k else None,
        )
        self.clock = 0  # the number of the latest step
        # Replays of steps by (batch, K, columns of the page table); empty without graphs.
        self.graphs: dict[tuple[int, int, int], Callable[[], object]] = {}
        self.graph_bytes = 0
        # The duration of a graph by (batch, K), where K is chosen while running.
        self.graph_seconds: dict[tuple[int, int], float] = {}
        self._heads_rested = False  # whether they did not observe the latest step

    def pages_for(self, request: Request) -> int:
        """The most pages that a request can need."""
        tokens = capacity(len(request.prompt) + request.room, self.k)
        return -(-tokens // self.page_size)

    def new_batch(
        self,
        count: int,
        k: int,
        k_chooser: KChooser,
        *,
        logprobs: bool = False,
        min_tokens: bool = False,
        prompts_kept: bool = False,
    ) -> Batch:
        """The first `count` slots, all free, for a run of at most `k` drafts per step."""
        state = self.state.view(count, k)
        state.progress.clock.fill_(self.clock)
        withheld = None
        if min_tokens:
            tokens = torch.zeros(count, self.trunk.config.vocab_size, dtype=torch.bool)
            withheld = Withheld(tokens, torch.zeros(count, dtype=torch.int64))
        return Batch(state, k_chooser, logprobs, withheld, prompts_kept)

    def admit(self, batch: Batch, slot: int, request: Request) -> None:
        """Fill a slot with a request whose pages are set: run its prompt but for the last token,
        and draft the first window."""
        started = time.perf_counter()
        prompt = torch.tensor(request.prompt)
        self._write_slot(batch, slot, request, prompt)
        use_heads = batch.k > 0 and (batch.prompts_kept or batch.k_chooser.heads_may_pay())
        begin = self._cached_tokens(slot, request, use_heads=use_heads)
        drafter = self.drafter if use_heads else NO_DRAFTER
        with self.status.phase("reading the prompt", len(prompt) - 1 - begin, "tokens") as phase:
            last = run_prompt(
                self.trunk,
                prompt,
                begin,
                self.cache.rows(slot, slot + 1),
                self.ops,
                drafter,
                slot=slot,
                settings=self.settings,
                on_tokens=phase.advance,
            )
        self.state.progress.active[slot] = 1
        request.started = time.perf_counter()
        request.stats.prefill_seconds = request.started - started
        request.stats.cached_tokens = begin
        drafts = None
        if batch.k and last is not None:
            drafts = first_drafts(
                self.state.view(1, batch.k, slot),
                self.trunk,
                last,
                self._drafter_for(batch.k_chooser.active_source()),
                self.ops,
                slot=slot,
                use_heads=batch.k_chooser.use_heads_first(),
                use_ngram=batch.k_chooser.use_ngram(),
                min_probability=batch.k_chooser.min_probability(),
            )
        if self.ops.host_may_read:
            (proposal,) = _proposals(drafts, [request])
            batch.proposals[slot] = proposal
            batch.proposed |= proposal is not NO_PROPOSAL

    def _write_slot(self, batch: Batch, slot: int, request: Request, prompt: Tensor) -> None:
        """Write a request's tokens, limits, sampling parameters and pages into a slot."""
        state, progress, params = self.state, self.state.progress, request.params
        progress.tokens[slot, : len(prompt)] = prompt.to(self.device)
        state.window[slot] = 0
        state.window[slot, 0] = request.prompt[-1]
        seed = params.seed or 0
        for tensor, value in (
            (progress.limits, len(prompt) + request.room),
            (progress.source, 0),
            (progress.drafted, 0),
            (state.sampling.temperature, params.temperature),
            (state.sampling.top_k, params.top_k),
            (state.sampling.top_p, params.top_p),
            (state.sampling.min_p, params.min_p),
            (state.sampling.key, sampling_key(seed, request.completion_index, request.prompt)),
        ):
            tensor[slot] = value
        if batch.withheld is not None:
            batch.withheld.tokens[slot] = False
            batch.withheld.tokens[slot, list(request.withheld)] = True
            batch.withheld.until[slot] = len(prompt) + params.min_tokens
        ends = progress.ends[slot].fill_(-1)
        known = request.ends[: len(ends)]  # the host checks for all of them
        ends[: len(known)] = torch.tensor(known, dtype=torch.int64, device=self.device)
        self.cache.assign(slot, request.pages)

    def _cached_tokens(self, slot: int, request: Request, *, use_heads: bool) -> int:
        """How many tokens of its prompt a request's pages hold, and prefill can leave out."""
        pairs = max(0, min(request.pairs, request.known - self.drafter.lookahead))
        # One row is run in any case, since the first window is drafted from it.
        begin = max(0, min(pairs if use_heads else request.known, len(request.prompt) - 2))
        self.drafter.reset(slot, begin if use_heads else pairs)
        return begin

    @torch.inference_mode()  # an abandoned run may be closed by Python itself, outside this mode
    def release(self, slot: int) -> None:
        """Free a slot. The device does so in stream order, after the steps in flight."""
        self.state.progress.active[slot] = 0
        self.cache.reset(slot)
        self.drafter.reset(slot)

    def start_step(
        self, batch: Batch, k: int, source: int, started: float, *, resting: bool = False
    ) -> StepInFlight:
        """Start a step that verifies `k` drafts and is given to `source`, as in
        `KChooser.active_source`; batch.proposals are then those of the next.

        The choice of k began at `started`.
        """
        verified = tuple(batch.proposals)
        self.clock += 1
        heads_drafted, drafting = 0, 0.0
        if self.graphs:
            self.graphs[len(batch.slots), k, self._graph_pages(batch.slots)]()
        else:
            output = self.launch(batch, k, source)
            drafts = output.drafts
            if self.ops.host_may_read and (batch.proposed or not (drafts is None or drafts.empty)):
                batch.proposals[:] = _proposals(drafts, batch.slots)
                heads_drafted = _heads_drafted(batch.proposals)
                drafting = output.drafting_seconds if heads_drafted else 0.0
                batch.proposed = any(p is not None and p.probabilities for p in batch.proposals)
        slots = tuple(batch.slots)
        made = (heads_drafted, drafting)
        return StepInFlight(self.clock, k, slots, verified, started, *made, resting)

    def launch(self, batch: Batch, k: int, source: int = HEADS) -> StepOutput:
        """Run a step kernel by kernel: on a CPU, under capture, and on a GPU without graphs."""
        on_host, state, k_chooser = self.ops.host_may_read, batch.state, batch.k_chooser
        drafter = self._drafter_for(source) if batch.k else NO_DRAFTER
        use_heads, use_ngram, min_probability = True, True, MIN_PROBABILITY
        if not on_host:
            state = replace(self.state.view(len(batch.slots), k), cache=state.cache)
        elif drafter is self.drafter:
            use_heads, use_ngram = k_chooser.use_heads(), k_chooser.use_ngram()
            min_probability = k_chooser.min_probability() if use_heads else 1.0
        elif drafter is NO_DRAFTER and k == 0 and state.forced is None:
            state = batch.plain_state
        return decode_step(
            state,
            self.trunk,
            drafter,
            self.ops,
            logprobs=batch.logprobs,
            rows=k + 1,
            use_heads=use_heads,
            use_ngram=use_ngram,
            min_probability=min_probability,
            withheld=batch.withheld,
        )

    def _drafter_for(self, source: int) -> Drafter:
        """The drafter that is given the next step, without the sources that rest."""
        if source == HEADS and self._heads_rested:
            self.drafter.mark_gap()
        self._heads_rested = source != HEADS
        return self.drafter if source == HEADS else self.ngram if source == NGRAM else NO_DRAFTER

    def skip_used_numbers(self) -> None:
        """Continue the numbering after steps that were not read. The ring still holds their words,
        so that no later step may have one of their numbers."""
        self.clock = int(self.state.progress.clock.max())

    def check_device(self) -> None:
        """Raise the device's error if it has failed."""
        if self.device.type == "cuda":
            torch.cuda.current_stream().query()

    def _graph_pages(self, slots: Sequence[Request | None]) -> int:
        """The page bucket of the next step, from the most tokens that a sequence can have by then:
        the host has not yet read the steps in flight. The drafter writes past them."""
        known = max(len(r.prompt) + len(r.token_ids) for r in slots if r is not None)
        tokens = known + (self.settings.steps_ahead + 1) * (self.k + 1)
        tokens += self.drafter.lookahead
        pages = -(-tokens // self.page_size)
        *some, whole = self.page_buckets
        return next((most for most in some if pages <= most), whole)


def _proposals(drafts: Drafts | None, slots: Sequence[Request | None]) -> list[Proposal | None]:
    """The drafts of each occupied slot, read by the host of a CPU; None: there are none."""
    if drafts is None or drafts.empty:
        return [None if slot is None else NO_PROPOSAL for slot in slots]
    count = len(slots)
    sources, lengths = (
        [value] * count if isinstance(value, int) else value.expand(count).tolist()
        for value in (drafts.source, drafts.num_proposed)
    )
    certain = [[1.0] * drafts.tokens.shape[1]] * count
    probabilities = certain if drafts.probabilities is None else drafts.probabilities.tolist()
    rows = zip(slots, sources, probabilities, lengths, strict=True)
    return [
        None if slot is None else Proposal(source, tuple(row[:length]))
        for slot, source, row, length in rows
    ]


def _heads_drafted(proposals: Sequence[Proposal | None]) -> int:
    """How many tokens the heads drafted: the length of their longest proposal."""
    return max((len(p.probabilities) for p in proposals if p and p.source == HEADS), default=0)
