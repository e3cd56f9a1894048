"""LLM: prompts in, completions out. Prefill, batching, the loop.

The only file that waits for the device: what a step emitted is read here, from the ring.
"""

import gc
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtpkern.cache import KVCache, PagePool, Prefix
from mtpkern.checkpoints.llama import load_config
from mtpkern.checkpoints.quantised import ROUNDED_FORMATS
from mtpkern.checkpoints.resolve import model_name, resolve_model
from mtpkern.checkpoints.tokenizer_files import has_tokenizer
from mtpkern.config import (
    MAX_SPECULATIVE_TOKENS,
    ModelConfig,
    SamplingParams,
    resolve_dtype,
)
from mtpkern.decode import DecodeState, StepOutput, decode_step, draft, join_taps
from mtpkern.drafters.base import (
    HEADS,
    MIN_PROBABILITY,
    NGRAM,
    NONE,
    Drafter,
    DraftInput,
    Drafts,
    NoDrafter,
)
from mtpkern.drafters.draft_length import (
    DraftLength,
    FixedDraftLength,
    GraphDraftLength,
    KChooser,
    Proposal,
)
from mtpkern.drafters.load import find_heads, load_heads
from mtpkern.drafters.ngram import CompanionDrafter, NgramDrafter
from mtpkern.drafters.pairs import MAX_PENDING
from mtpkern.drafters.synthetic import draw_counts
from mtpkern.errors import UserError, counted, printable
from mtpkern.graph import GraphPool, measure
from mtpkern.kernels._launch import TIERS
from mtpkern.kernels.cpu.quants import Quants
from mtpkern.kernels.sample import sampling_key
from mtpkern.model import Llama, run_trunk
from mtpkern.nvtx_ranges import span
from mtpkern.ops.base import Ops, Withheld
from mtpkern.ops.cpu import cpu_ops
from mtpkern.ops.cpu_programs import kernels
from mtpkern.ops.gpu import HAS_TRITON, with_pdl
from mtpkern.ops.prefill import prefill_ops
from mtpkern.request import Completion, EncodedPrompt, Event, Request, Stats
from mtpkern.ring import Ring
from mtpkern.status import SILENT, Phase, Status
from mtpkern.threads import use_threads
from mtpkern.tokenizer import Tokenizer
from mtpkern.validation import at_least, choice, flag, integer, location, real, shown
from mtpkern.warmup import noting_kernels

__all__ = ["LLM", "Completion", "Event", "Stats"]

DEFAULT_SPECULATIVE_TOKENS = 4
MAX_BATCH = 4096
# What max_length is for models that take more, so that the cache stays small.
DEFAULT_MAX_LENGTH = 8192
# Tokens that prefill takes at a time: what fills the machine.
CPU_CHUNK, GPU_CHUNK = 128, 512
GPU_PAGE = 64
# What the graphs of all shapes may take of a GPU's memory, in bytes.
GRAPH_CEILING = 2 << 30
# Tokens behind which a step has a graph of its own: an attention's grid spans the page table, and
# where that is long, starting blocks that have no keys to read takes longer than reading.
GRAPH_CONTEXTS = (8192, 32768)
NO_DRAFTER = NoDrafter()
# Steps that a GPU may be ahead of the host, which then never waits for a step that just began.
STEPS_AHEAD = 4
# Timings of each step at load, behind one that sets things up.
TIMED_STEPS = 3
# Of a seed that nobody gave: as many as every reader of JSON keeps.
SEED_BITS = 53

# A message's content is text, or a list of parts {"type": "text", "text": ...}.
Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]

_log = logging.getLogger(__name__)

_ADMIT, _STEP, _READ = span("admit"), span("step"), span("read")


class _Flight(NamedTuple):
    """A step that was started: its number, its K, whose slots it decodes, what was drafted for
    each of them before it, and, where the host knows, what it took and what it drafted."""

    number: int
    drafts: int
    slots: tuple[Request | None, ...]
    windows: tuple[Proposal | None, ...]
    seconds: float
    heads_drafted: int


class _Job(NamedTuple):
    """One completion to make, and which of its prompt's it is."""

    prompt: EncodedPrompt
    params: SamplingParams
    completion_index: int


class LLM:
    """A model, its heads and its cache, ready to generate.

    `model` is a name, a directory or a hub id (None: the default model); `heads` "auto" (those that
    ship for the model, if any), "none", a name or a directory; `ngram` adds drafting from the
    sequence itself. num_speculative_tokens is K in 0..16; None is up to 4 where anything drafts,
    chosen while running by measured costs, down to 0 where drafts do not pay.
    `max_batch` sequences of up to `max_length` tokens (None: what the model takes, at most 8192)
    share a cache of `cache_tokens` (None: room for all of them); one waits until there are pages
    for all that it may become. With `prefix_caching`, on a CPU, what the cache holds of a finished
    sequence serves a later prompt that begins alike, with the same tokens as if it were computed
    again. device is "auto", "cpu", "cuda" or a torch.device, dtype a name or a torch.dtype. On a
    CPU a GGUF's weights keep their own bits, unless a dtype is asked for; `weights` names a format
    to round those of any checkpoint to: q4_0, q4_1, q8_0, q8, bf16, fp16 or fp32.
    load_format "dummy" makes up weights for a directory that holds config.json alone;
    `synthetic_acceptance` accepts drafts at these rates by position, whatever they are: both for
    measuring, and no answer means anything then. `graph=False` launches a GPU's kernels one by one,
    as a profiler wants them; `threads` is how many a CPU computes with (None: at most one per
    physical core), set for the whole process; `ops` are others than the device's own; `status`
    shows loading, long prompts and how far `generate` is.
    A context manager: `close` gives the memory back. Raises UserError for whatever the caller can
    mend.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        heads: str | Path = "auto",
        ngram: bool = True,
        num_speculative_tokens: int | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        weights: str = "auto",
        max_batch: int = 8,
        max_length: int | None = None,
        cache_tokens: int | None = None,
        prefix_caching: bool = False,
        load_format: str = "auto",
        synthetic_acceptance: Sequence[float] | None = None,
        graph: bool = True,
        threads: int | None = None,
        ops: Ops | None = None,
        status: Status = SILENT,
    ):
        self.device, usual = resolve_device(device)
        self.ops = usual if ops is None else ops
        self.max_batch = integer("max_batch", max_batch, 1, MAX_BATCH)
        choice("load_format", load_format, ("auto", "dummy"))
        ngram, graph = flag("ngram", ngram), flag("graph", graph)
        if num_speculative_tokens is not None:
            num_speculative_tokens = integer(
                "num_speculative_tokens", num_speculative_tokens, 0, MAX_SPECULATIVE_TOKENS
            )
        if cache_tokens is not None:
            cache_tokens = at_least("cache_tokens", cache_tokens, 1)
        rates = _checked_rates(synthetic_acceptance)
        heads = location("heads", heads)
        if flag("prefix_caching", prefix_caching) and not self.ops.host_may_read:
            # There prefill runs on other code than decoding, so that the bits of K and V differ.
            raise UserError("prefix_caching needs device cpu in this version")
        directory = resolve_model(model, status=status)
        started = time.perf_counter()
        self.status, self._prefix_caching = status, prefix_caching
        config = load_config(directory)
        self.name = model_name(directory)
        heads_directory = find_heads(heads, self.name, directory)
        self.heads_name = None if heads_directory is None else heads_directory.name
        self._running = self._closed = False
        use_threads(threads)
        if self.device.type == "cpu" and ops is None:
            with status.phase("compiling kernels for this CPU, which happens once"):
                kernels()
        choice("weights", weights, ("auto", *ROUNDED_FORMATS))
        if weights != "auto" and not self.ops.takes_quants:
            raise UserError(f"weights {weights} needs device cpu")
        self.dtype = resolve_dtype(dtype, config)
        self.k = _resolve_k(num_speculative_tokens, heads_directory is not None or ngram)
        self.max_length = _resolve_length(max_length, config)
        self._default_length = max_length is None
        self.config = config
        self.tokenizer = _load_tokenizer(directory, config)
        self.eos_token_ids = config.eos_token_ids
        if not self.eos_token_ids and self.tokenizer and self.tokenizer.eos_token_id is not None:
            self.eos_token_ids = (self.tokenizer.eos_token_id,)
        with torch.inference_mode():
            with status.phase("loading the model", config.num_layers, "layers") as phase:
                self.trunk = Llama.load(
                    directory,
                    dtype=self.dtype,
                    ops=self.ops,
                    device=self.device,
                    dummy=load_format == "dummy",
                    # A dtype that is asked for is what a quantised checkpoint is expanded to.
                    weights=_own_bits(weights, dtype, self.ops),
                    on_layer=phase.advance,
                )
            self.weights = str(self.dtype).removeprefix("torch.")
            if isinstance(self.trunk.lm_head, Quants):
                self.weights = self.trunk.layers[0].down.format
                # Of keys and values; activations are float32.
                self.dtype = torch.float16 if dtype == "auto" else self.dtype
            _log.info("loaded %s as %s from %s", self.name, self.weights, directory)
            try:
                self._cache, self._pool = self._make_cache(cache_tokens)
            except (MemoryError, RuntimeError) as error:
                raise UserError(
                    f"no memory for a cache of max_batch={self.max_batch} sequences of "
                    f"max_length={self.max_length} ({printable(str(error).splitlines()[0])}): "
                    "lower one of them, or cache_tokens"
                ) from None
            copier = NgramDrafter(self.ops) if ngram else NoDrafter()
            self.drafter: Drafter = copier
            self._copier, self._asleep = copier, False
            if heads_directory is not None and self.k:
                with status.phase("loading the heads"):
                    drafter, most = load_heads(
                        heads_directory,
                        self.trunk,
                        self._cache,
                        ops=self.ops,
                        base=None if load_format == "dummy" else directory,
                    )
                _log.info("loaded heads from %s", heads_directory)
                if most is not None and self.k > most:
                    if num_speculative_tokens is not None:
                        raise UserError(
                            f"num_speculative_tokens must be at most {most}, the number of heads, "
                            f"got {self.k}"
                        )
                    self.k = most
                if ngram or self.ops.host_may_read:
                    drafter = CompanionDrafter(copier, drafter, self.ops)
                self.drafter = drafter
            self._prefill_ops = prefill_ops(self.ops)
            on_cpu = self.device.type == "cpu"
            self._ahead = 1 if on_cpu else STEPS_AHEAD
            self.synthetic_acceptance = rates
            forced = None
            if rates and self.k:
                forced = draw_counts(rates[: self.k]).to(self.device)
            self._ring = Ring(2 * self._ahead, self.max_batch, self.k + 1, pinned=not on_cpu)
            self._state = DecodeState.empty(
                self._cache,
                self.max_length,
                self.k,
                ends=max(1, len(self.eos_token_ids)),
                ring=self._ring.words,
                forced=forced,
            )
            # For `min_tokens`; None in a run without.
            self._withheld: Withheld | None = None
            self._clock = 0
            # Steps by (batch, K, pages that a sequence has at most).
            self._graphs: dict[tuple[int, int, int], Callable[[], object]] = {}
            self.graph_bytes = 0
            # What a graph of (batch, K) takes, where K is chosen while running.
            self._seconds: dict[tuple[int, int], float] = {}
            self._adaptive = num_speculative_tokens is None and self.k > 0
            self._draft_length = DraftLength(self.k)
            if graph and not on_cpu:
                self._capture_all()
            elif self._adaptive and self.ops.host_may_read:
                with status.phase("timing steps"):
                    for timings in self.time_steps().items():
                        self._draft_length.seconds.observe(*timings)
        # Without the download, which happens once.
        self.load_seconds = time.perf_counter() - started
        _log.info("ready on %s after %.1f s", self.device.type, self.load_seconds)

    def _make_cache(self, cache_tokens: int | None) -> tuple[KVCache, PagePool]:
        """The cache and its free pages: on a CPU one long page a sequence, read without a copy."""
        most = self._capacity(self.max_length)
        page_size = GPU_PAGE if self.device.type == "cuda" else most
        max_pages = -(-most // page_size)
        pages = max_pages * self.max_batch
        if cache_tokens is not None:
            pages = min(pages, cache_tokens // page_size)
        if pages < max_pages:
            raise UserError(
                f"cache_tokens must be at least {max_pages * page_size} to hold one sequence of "
                f"max_length={self.max_length}, got {cache_tokens}"
            )
        inverse_frequencies, scaling = self.config.rope.inverse_frequencies(self.config.head_dim)
        cache = KVCache.empty(
            layers=self.config.num_layers,
            pages=pages,
            page_size=page_size,
            page_table=torch.zeros(
                self.max_batch, max_pages, dtype=torch.int32, device=self.device
            ),
            kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            inverse_frequencies=inverse_frequencies,
            rope_scaling=scaling,
            dtype=self.dtype,
            padded_dim=self.ops.padded_dim,
        )
        return cache, PagePool(pages)

    def _capacity(self, tokens: int) -> int:
        """Slots for a sequence of at most `tokens` tokens, a whole number of CPU chunks.

        The last windows may overhang, and so may pairs that a head has put off.
        """
        return -(-(tokens + 2 * (self.k + 1) + MAX_PENDING) // CPU_CHUNK) * CPU_CHUNK

    def __enter__(self) -> "LLM":
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        settings = {
            "heads": self.heads_name,
            "num_speculative_tokens": self.k,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "max_batch": self.max_batch,
            "max_length": self.max_length,
        }
        given = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        return f"<LLM {self.name!r}, {given}{', closed' if self._closed else ''}>"

    def close(self) -> None:
        """Give back the memory of graphs, cache and weights; nothing but `close` can follow.

        A stream that is still open raises UserError at its next token.
        """
        if self._closed:
            return
        self._closed = True
        self._graphs.clear()
        for name in (
            "trunk",
            "drafter",
            "_copier",
            "ops",
            "_prefill_ops",
            "_cache",
            "_state",
            "_ring",
        ):
            delattr(self, name)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check_open(self) -> None:
        if self._closed:
            raise UserError("this LLM is closed: load it again")

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        speculate: bool = True,
        **chat: Any,
    ) -> Completion:
        """Answer a conversation, a list of messages; its next turn is that list, the answer as
        {"role": "assistant", "content": completion.text}, and the user's next message. `chat` is as
        in `encode`."""
        if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) for m in messages):
            raise UserError(
                f'messages must be a list of {{"role": ..., "content": ...}}, got {shown(messages)}'
            )
        if isinstance(params, SamplingParams) and params.n > 1:
            raise UserError(f"n must be 1 in a conversation, got {params.n}")
        return self.generate([messages], params, speculate=speculate, **chat)[0]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        speculate: bool = True,
        **chat: Any,
    ) -> list[Completion]:
        """Complete prompts (text, token ids or chat messages), `max_batch` at a time.

        `params` are for all prompts, or a list of one for each. The completions come in the order
        of the prompts, each prompt's `params.n` one after another; `Completion.index` counts them.
        `speculate=False` is K = 0 through the same step, and gives the same tokens. `chat` is as in
        `encode`, for all prompts.
        """
        self._check_open()
        encoded = [self._encoded(prompt, chat) for prompt in _as_list(prompts)]
        jobs, speculate = _jobs(encoded, params), flag("speculate", speculate)
        completions: dict[int, Completion] = {}
        most = [min(job.params.max_tokens, self.max_length - len(job.prompt.ids)) for job in jobs]
        with self.status.phase("answering", sum(most), "tokens") as phase:
            for number, event in self._run(jobs, speculate):
                phase.advance()
                if event.completion is not None:
                    completions[number] = event.completion
                    most[number] = len(event.completion.token_ids)
                    phase.total = sum(most)
        return [completions[i] for i in range(len(jobs))]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        speculate: bool = True,
        **chat: Any,
    ) -> Generator[Event, None, None]:
        """Complete one prompt, token by token; the last event carries the completion."""
        jobs = _jobs([self._encoded(prompt, chat)], params)
        if len(jobs) > 1:
            raise UserError(f"n must be 1 for a stream, got {len(jobs)}")
        return self._events(jobs, flag("speculate", speculate))

    def _events(self, jobs: list[_Job], speculate: bool) -> Generator[Event, None, None]:
        for _, event in self._run(jobs, speculate):
            yield event

    def _encoded(self, prompt: Prompt, chat: Mapping[str, Any]) -> EncodedPrompt:
        """A prompt's ids, and whether the answer goes on in the prompt's own text."""
        ids = self.encode(prompt, **chat)
        given = {**(chat.get("chat_template_kwargs") or {}), **chat}
        return EncodedPrompt(ids, not _is_chat(prompt) or bool(given.get("continue_final_message")))

    def encode(
        self,
        prompt: Prompt,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool | str = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a prompt; chat messages go through the model's template.

        That is given `tools` (JSON schemas), `documents` and `chat_template_kwargs`, and may leave
        the last message to be continued: see `Tokenizer.apply_chat_template`.
        """
        self._check_open()
        given = chat_template_kwargs or {}
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise UserError(f"chat_template_kwargs must have names as keys, got {shown(given)}")
        chat = dict(given)
        for name, value in (
            ("tools", tools),
            ("documents", documents),
            ("continue_final_message", continue_final_message or None),
        ):
            if value is not None:
                chat[name] = value
        if isinstance(prompt, torch.Tensor | np.ndarray):
            prompt = prompt.tolist()
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise UserError(
                f"a prompt must be text, token ids or a list of messages, got {shown(prompt)}"
            )
        if not len(prompt):
            raise UserError("the prompt is empty")
        if chat and not _is_chat(prompt):
            raise UserError(f"{sorted(chat)[0]} needs a prompt of chat messages")
        if not isinstance(prompt, str) and not _is_chat(prompt):
            ids = [integer("a token id", i, 0, self.config.vocab_size - 1) for i in prompt]
        elif self.tokenizer is None:
            raise UserError(f"{self.name} has no tokenizer: prompts must be token ids")
        elif isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        else:
            ids = self.tokenizer.apply_chat_template(prompt, **chat)  # type: ignore[arg-type]
        if not ids:
            raise UserError("the prompt is empty")
        if len(ids) >= self.max_length:
            raise UserError(self._too_long(len(ids)))
        if max(ids) >= self.config.vocab_size:
            raise UserError(f"token ids must be in 0..{self.config.vocab_size - 1}")
        return ids

    def _too_long(self, count: int) -> str:
        """What to say of a prompt of `count` tokens, and what can be done."""
        limit = self.config.max_position_embeddings
        way = "and the model takes no more"
        if self.max_length < limit:
            way = f"and the model takes {limit}: raise max_length"
        default = " by default" if self._default_length else ""
        return (
            f"the prompt has {counted(count, 'token')}; the context holds "
            f"{self.max_length}{default}, of which at least one must be left for the answer, {way}"
        )

    @torch.inference_mode()
    def _run(self, jobs: list[_Job], speculate: bool) -> Iterator[tuple[int, Event]]:
        """Decode all jobs; the cache serves one run at a time."""
        self._check_open()
        if self._running:
            raise UserError(
                "this LLM is answering already: exhaust or close the other stream first"
            )
        if any(job.params.temperature > 0 for job in jobs) and not self.ops.host_may_read:
            raise UserError("temperature above 0 needs device cpu in this version")
        if any(i >= self.config.vocab_size for job in jobs for i in job.params.stop_token_ids):
            raise UserError(f"stop_token_ids must be in 0..{self.config.vocab_size - 1}")
        self._running = True
        slots: list[Request | None] = []
        try:
            for event in self._decode(slots, jobs, self.k if speculate else 0):
                yield event
                self._check_open()
        finally:
            for slot, request in enumerate(slots):
                if request is not None and not self._closed:
                    self._leave(slot, request)
            self._withheld = None
            self._running = False

    def _decode(
        self,
        slots: list[Request | None],
        jobs: list[_Job],
        k: int,
    ) -> Iterator[tuple[int, Event]]:
        """Take steps until all are done, refilling a slot as soon as its sequence has finished."""
        waiting = deque(
            Request(
                number,
                job.prompt,
                job.params,
                completion_index=job.completion_index,
                k=k,
                room=self.max_length - len(job.prompt.ids),
                ends=self.eos_token_ids,
                tokenizer=self.tokenizer,
            )
            for number, job in enumerate(jobs)
        )
        if any(request.withheld for request in waiting):
            if not self.ops.host_may_read:
                raise UserError("min_tokens needs device cpu in this version")
            shape = self.max_batch, self.config.vocab_size
            until = torch.zeros(self.max_batch, dtype=torch.int64)
            self._withheld = Withheld(torch.zeros(shape, dtype=torch.bool), until)
        logprobs = any(job.params.logprobs for job in jobs)
        batch = self._bucket(min(self.max_batch, len(jobs)))
        slots += [None] * batch
        state = self._state.view(batch, k)
        state.progress.clock.fill_(self._clock)
        lengths = self._choice(batch, k)
        windows: list[Proposal | None] = [None] * batch
        flights: deque[_Flight] = deque()
        while waiting or any(slots):
            for slot in range(batch):
                if slots[slot] is None and waiting:
                    claim = self._pool.claim(self._pages(waiting[0]), waiting[0].prompt)
                    if claim is None:
                        break
                    slots[slot] = request = waiting.popleft()
                    request.pages, request.known, request.pairs = claim
                    with _ADMIT:
                        windows[slot] = self._admit(slot, request, k, lengths)
            # A step brings a token at least, so more would only be thrown away.
            wanted = max(request.left for request in slots if request is not None)
            while len(flights) < min(self._ahead, wanted):
                with _STEP:
                    flights.append(self._take_step(state, slots, windows, lengths, logprobs))
            yield from self._land(flights.popleft(), lengths, logprobs)
            for slot, occupant in enumerate(slots):
                if occupant is not None and occupant.finish_reason:
                    self._leave(slot, occupant)
                    slots[slot] = windows[slot] = None

    def _take_step(
        self,
        state: DecodeState,
        slots: list[Request | None],
        windows: list[Proposal | None],
        lengths: KChooser,
        logprobs: bool,
    ) -> _Flight:
        """Start a step of the K that `lengths` chooses; `windows` then hold what it drafted."""
        verified = tuple(windows)
        k = lengths.choose([w for w in verified if w is not None])
        self._clock += 1
        heads_drafted = 0
        started = time.perf_counter()
        if self._graphs:
            self._graphs[len(slots), k, self._graph_pages(slots)]()
        else:
            output = self._launch(state, k, lengths, logprobs)
            if output.drafts is not None and self.ops.host_may_read:
                windows[:] = _windows(output.drafts, slots)
                heads_drafted = _heads_drafted(windows)
        seconds = time.perf_counter() - started
        return _Flight(self._clock, k, tuple(slots), verified, seconds, heads_drafted)

    def _launch(self, state: DecodeState, k: int, lengths: KChooser, logprobs: bool) -> StepOutput:
        """Launch a step of K = k one kernel after another, as a GPU's graphs do not."""
        on_host, withheld, batch = self.ops.host_may_read, self._withheld, len(state.window)
        if withheld is not None:
            withheld = Withheld(*(tensor[:batch] for tensor in withheld))
        return decode_step(
            state if on_host else replace(self._state.view(batch, k), cache=state.cache),
            self.trunk,
            self._watching(lengths) if state.window.shape[1] > 1 else NoDrafter(),
            self.ops,
            logprobs=logprobs,
            rows=k + 1,
            use_heads=lengths.use_heads() if on_host else True,
            min_probability=lengths.min_probability() if on_host else MIN_PROBABILITY,
            withheld=withheld,
        )

    def _watching(self, lengths: KChooser) -> Drafter:
        """What sees the next step: on a CPU, sources that rest are spared it."""
        if not self.ops.host_may_read:
            return self.drafter
        source = lengths.active_source()
        if source == HEADS and self._asleep:
            self.drafter.mark_gap()
        self._asleep = source != HEADS
        return self.drafter if source == HEADS else self._copier if source == NGRAM else NO_DRAFTER

    def _capture_all(self) -> None:
        """Compile whatever a launch may need, and capture every shape of a step, while no sequence
        is active: a compilation takes seconds, and no answer may wait for it."""
        batches = sorted({self._bucket(n) for n in range(1, self.max_batch + 1)}, reverse=True)
        ladder = {0, *(k for k in (1, 2, 4, 8) if k < self.k)} if self._adaptive else {0}
        shapes = [
            (batch, k, pages)
            for batch in batches
            for k in sorted(ladder | {self.k})
            for pages in self._page_buckets()
        ]
        # More rows than the last tier's launch its kernels again.
        known = sorted({min(tier, self.max_length - 3) for tier in TIERS} - {-1, 0})
        count = len(known) + len(shapes)
        with (
            self.status.phase("compiling kernels and capturing graphs", count, "shapes") as phase,
            noting_kernels(phase),
        ):
            for rows in known:
                self._warm_up_prefill(rows)
                phase.advance()
            torch.cuda.empty_cache()  # else what it holds would flow back into what is free
            pool, free = GraphPool(), torch.cuda.mem_get_info()[0]
            for batch, k, pages in shapes:
                state, lengths = self._state.view(batch, k), FixedDraftLength(k)
                state = replace(state, cache=state.cache.columns(pages))
                step = partial(self._launch, state, k, lengths, True)
                self._graphs[batch, k, pages] = replay = pool.capture(step)
                if self._adaptive and (batch, k) not in self._seconds:
                    self._seconds[batch, k] = measure(replay)
                phase.advance()
        torch.cuda.empty_cache()
        self.graph_bytes = free - torch.cuda.mem_get_info()[0]
        if self.graph_bytes > GRAPH_CEILING:
            raise UserError(
                f"{len(self._graphs)} graphs take {self.graph_bytes >> 20} MiB, more than "
                f"{GRAPH_CEILING >> 20} MiB: lower max_batch or num_speculative_tokens"
            )
        # Those steps left words in the ring: no later one may bear their numbers.
        self._clock = int(self._state.progress.clock.max())

    def _page_buckets(self) -> list[int]:
        """Columns of the page table that a graph may read, ascending, up to all of them."""
        max_pages, page_size = self._cache.page_table.shape[1], self._cache.k.shape[2]
        some = (context // page_size for context in GRAPH_CONTEXTS)
        return [*(pages for pages in some if pages < max_pages), max_pages]

    def _graph_pages(self, slots: Sequence[Request | None]) -> int:
        """The bucket for a step behind those under way: the host knows how long no sequence is."""
        known = max(len(r.prompt) + len(r.token_ids) for r in slots if r is not None)
        pages = -(-(known + (self._ahead + 1) * (self.k + 1)) // self._cache.k.shape[2])
        *some, whole = self._page_buckets()
        return next((most for most in some if pages <= most), whole)

    def _warm_up_prefill(self, rows: int) -> None:
        """Admit a made-up prompt of which the drafter takes in `rows` rows, and forget it."""
        prompt = EncodedPrompt([0] * (rows + 2), False)
        room = self.max_length - len(prompt.ids)
        request = Request(
            0, prompt, SamplingParams(), k=self.k, room=room, ends=(), tokenizer=self.tokenizer
        )
        claim = self._pool.claim(self._pages(request))
        assert claim is not None, "no sequence holds a page yet"
        request.pages, request.known, request.pairs = claim
        self._admit(0, request, self.k, FixedDraftLength(self.k))
        self._leave(0, request)

    @torch.inference_mode()
    def time_steps(self) -> dict[int, float]:
        """Seconds of a step of one sequence by its rows, 1 .. K + 1, drafting left out, as measured
        now on a CPU: the median of a few, behind a short context."""
        seconds = {}
        state = self._state.view(1, self.k)
        # Once with all that drafts, which sets things up that an answer should not wait for.
        decode_step(state, self.trunk, self.drafter, self.ops)
        self.drafter.reset(0)
        for k in range(self.k + 1):
            state, timings = self._state.view(1, k), []
            for _ in range(1 + TIMED_STEPS):
                started = time.perf_counter()
                decode_step(state, self.trunk, NoDrafter(), self.ops)
                timings.append(time.perf_counter() - started)
            seconds[k + 1] = median(timings[1:])
        self._clock = int(self._state.progress.clock.max())
        return seconds

    def _choice(self, batch: int, k: int) -> KChooser:
        """What chooses K for this batch, of 0..k."""
        if k and self._adaptive and self.ops.host_may_read:
            self._draft_length.begin(batch)
            return self._draft_length
        seconds = {k: cost for (size, k), cost in self._seconds.items() if size == batch}
        return GraphDraftLength(seconds) if k and seconds else FixedDraftLength(k)

    def _bucket(self, batch: int) -> int:
        """The sequences of a step's shape: on a GPU a power of two, since each shape is a graph."""
        if self.device.type == "cpu":
            return batch
        return min(self.max_batch, 1 << (batch - 1).bit_length())

    def _pages(self, request: Request) -> int:
        """How many pages a request may come to need."""
        tokens = self._capacity(len(request.prompt) + request.room)
        return -(-tokens // self._cache.k.shape[2])

    def _admit(self, slot: int, request: Request, k: int, lengths: KChooser) -> Proposal | None:
        """Fill a slot: settings, known tokens, and the cache for all but the last of them.

        -> what was drafted for its first step, where the host knows.
        """
        started = time.perf_counter()
        state, progress, params = self._state, self._state.progress, request.params
        prompt = torch.tensor(request.prompt)
        progress.tokens[slot, : len(prompt)] = prompt.to(self.device)
        state.window[slot] = 0
        state.window[slot, 0] = request.prompt[-1]
        for tensor, value in (
            (progress.limits, len(prompt) + request.room),
            (progress.source, 0),
            (progress.drafted, 0),
            (state.sampling.temperature, params.temperature),
            (state.sampling.top_k, params.top_k),
            (state.sampling.top_p, params.top_p),
            (state.sampling.min_p, params.min_p),
            (
                state.sampling.key,
                sampling_key(params.seed or 0, request.completion_index, request.prompt),
            ),
        ):
            tensor[slot] = value
        if self._withheld is not None:
            self._withheld.tokens[slot] = False
            self._withheld.tokens[slot, list(request.withheld)] = True
            self._withheld.until[slot] = len(prompt) + params.min_tokens
        ends = progress.ends[slot].fill_(-1)
        known = request.ends[: len(ends)]  # the host knows them all
        ends[: len(known)] = torch.tensor(known, dtype=torch.int64, device=self.device)
        state.cache.assign(slot, request.pages)
        begin = self._resume(slot, request, k)
        drafter = self.drafter if k else NoDrafter()
        with self.status.phase("reading the prompt", len(prompt) - 1 - begin, "tokens") as phase:
            last = self._prefill(slot, prompt, drafter, begin, phase)
        progress.active[slot] = 1
        request.started = time.perf_counter()
        request.stats.prefill_seconds = request.started - started
        request.stats.cached_tokens = begin
        if not k or last is None:
            return Proposal(NONE, ()) if self.ops.host_may_read else None
        drafts = self._first_drafts(slot, prompt[-1:], *last, k, lengths)
        if not self.ops.host_may_read:
            return None
        (window,) = _windows(drafts, [request])
        if drafted := _heads_drafted([window]):
            lengths.spend(time.perf_counter() - request.started, drafted)
        return window

    def _resume(self, slot: int, request: Request, k: int) -> int:
        """How many tokens of its prompt a request need not run, since its pages hold them."""
        pairs = max(0, min(request.pairs, request.known - self.drafter.lookahead))
        # One row is run in any case: the first drafts are made of it.
        begin = max(0, min(pairs if k else request.known, len(request.prompt) - 2))
        self.drafter.reset(slot, begin if k else pairs)
        return begin

    def _prefill(
        self, slot: int, prompt: Tensor, drafter: Drafter, start: int, phase: Phase
    ) -> tuple[Tensor, list[Tensor]] | None:
        """Run the prompt from token `start` on but for the last, in padded chunks that end at
        absolute multiples.

        The drafter takes in all rows but the last of them; that one's hidden state [1, E] and taps
        come back, if there is one.
        """
        layers, eps = self.config.num_layers, self.config.rms_norm_eps
        inner = [tap for tap in drafter.taps if tap < layers]
        cache = self._cache.rows(slot, slot + 1)
        count = len(prompt) - 1
        on_cpu = self.device.type == "cpu"
        most = CPU_CHUNK if on_cpu else GPU_CHUNK
        last, begin = None, start
        while begin < count:
            chunk = prompt[begin : min(begin - begin % most + most, count)]
            rows = len(chunk) if on_cpu else -(-len(chunk) // GPU_PAGE) * GPU_PAGE
            padded = torch.zeros(1, rows, dtype=torch.int64)
            padded[0, : len(chunk)] = chunk
            hidden, tapped = run_trunk(
                self.trunk,
                padded.to(self.device),
                cache.at(torch.tensor([begin])),
                self._prefill_ops,
                inner,
            )
            known = len(chunk)
            if begin + known == count:
                known -= 1
                last = hidden[known : known + 1], [tap[known : known + 1] for tap in tapped]
            if drafter.taps and known:
                normed = self._prefill_ops.rms_norm(hidden, self.trunk.norm, eps)
                features = join_taps(drafter, tapped, normed, layers)[:known]
                after = prompt[begin + 1 : begin + 1 + known].to(self.device)
                drafter.prefill(slot, features, after)
            begin += len(chunk)
            phase.advance(len(chunk))
        cache.lengths.fill_(count)
        return last

    def _first_drafts(
        self,
        slot: int,
        token: Tensor,
        hidden: Tensor,
        tapped: list[Tensor],
        k: int,
        lengths: KChooser,
    ) -> Drafts:
        """Draft a prompt's first window, from the last row before it.

        To a drafter that row is a committed step, whose bonus is the prompt's last token [1].
        """
        config, state = self.config, self._state.view(1, k, slot)
        normed, projected = self.ops.project(
            hidden,
            self.trunk.norm,
            config.rms_norm_eps,
            self.trunk.vocabulary,
            self.drafter.parallel_heads,
        )
        one = torch.ones(1, dtype=torch.int64, device=self.device)
        step = DraftInput(
            features=join_taps(self.drafter, tapped, normed, config.num_layers)[None],
            projected=projected,
            target=token.to(self.device)[None],
            tokens=state.progress.tokens,
            lengths=state.progress.lengths,
            accepted=one - 1,
            advance=one,
            sampling=state.sampling,
            first=slot,
            use_heads=lengths.use_heads(),
            min_probability=lengths.min_probability(),
        )
        return draft(state, self.drafter, step)

    def _land(
        self, flight: _Flight, lengths: KChooser, logprobs: bool
    ) -> Iterator[tuple[int, Event]]:
        """Hand a step's tokens to their requests, each of which stops where it must."""
        with _READ:
            records = self._ring.read(
                flight.number,
                len(flight.slots),
                flight.drafts + 1,
                logprobs=logprobs,
                check=self._check_device,
            )
        now, k = time.perf_counter(), flight.drafts
        outcomes, taken = [], []
        for request, window, record in zip(flight.slots, flight.windows, records, strict=True):
            if request is not None and not request.finish_reason:
                record = record._replace(drafted=min(record.drafted, k))
                if window is None:
                    window = Proposal(record.source, (1.0,) * record.drafted)
                window = window._replace(probabilities=window.probabilities[:k])
                outcomes.append((window, min(record.accepted, record.drafted)))
                taken.append((request, record))
        lengths.observe(k, flight.seconds, outcomes, flight.heads_drafted)
        for request, record in taken:
            for event in request.take(record, k, now):
                yield request.index, event
            if record.broken and not request.finish_reason:
                raise UserError("the model's logits are no numbers: another dtype may hold them")

    def _check_device(self) -> None:
        """Raise what the device died of, if it did."""
        if self.device.type == "cuda":
            torch.cuda.current_stream().query()

    def _leave(self, slot: int, request: Request) -> None:
        """Free a slot. The device follows in order, behind the steps that are under way."""
        self._state.progress.active[slot] = 0
        if self._prefix_caching:
            # A step may have committed more than the answer took, and an interrupted one less.
            tokens = (request.prompt + request.token_ids)[: int(self._cache.lengths[slot])]
            pairs = self.drafter.cached_length(slot, len(tokens))
            self._pool.keep(Prefix(tokens, request.pages, pairs))
        else:
            self._pool.release(request.pages)
        self._cache.reset(slot)
        self.drafter.reset(slot)


def resolve_device(device: str | torch.device) -> tuple[torch.device, Ops]:
    """Where to run, and on which code; "auto" is a GPU that can run the kernels, else the CPU."""
    if isinstance(device, torch.device):
        device = _current(device)
    name = choice("device", device, ("auto", "cpu", "cuda"))
    usable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if name == "cpu" or (name == "auto" and not (usable and HAS_TRITON)):
        return torch.device("cpu"), cpu_ops()
    if not usable:
        raise UserError("device cuda needs an NVIDIA GPU of compute capability 8.0 or newer")
    if not HAS_TRITON:
        raise UserError(
            "device cuda needs Triton, which is not installed (it has wheels for Linux)"
        )
    return torch.device("cuda"), with_pdl(torch.cuda.get_device_capability() >= (9, 0))


def _windows(drafts: Drafts, slots: Sequence[Request | None]) -> list[Proposal | None]:
    """What was drafted for each occupied slot, as the host of a CPU may look at it."""
    if isinstance(drafts.num_proposed, int) and drafts.num_proposed == 0:
        return [None if slot is None else Proposal(NONE, ()) for slot in slots]
    count = len(slots)
    sources, lengths = (
        torch.as_tensor(said).expand(count).tolist()
        for said in (drafts.source, drafts.num_proposed)
    )
    sure = [[1.0] * drafts.tokens.shape[1]] * count
    probabilities = sure if drafts.probabilities is None else drafts.probabilities.tolist()
    rows = zip(slots, sources, probabilities, lengths, strict=True)
    return [
        None if slot is None else Proposal(source, tuple(row[:length]))
        for slot, source, row, length in rows
    ]


def _heads_drafted(windows: Sequence[Proposal | None]) -> int:
    """How many tokens the heads drafted, where they did."""
    return max((len(w.probabilities) for w in windows if w and w.source == HEADS), default=0)


def _current(device: torch.device) -> str:
    """The type of a device; UserError for another GPU than torch's current one."""
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        raise UserError(
            f"device {device} is not the current one: call torch.cuda.set_device({device.index}) "
            "first, or set CUDA_VISIBLE_DEVICES"
        )
    return device.type


def _is_chat(prompt: Any) -> bool:
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Tell one prompt from a list of prompts."""
    if isinstance(prompts, torch.Tensor | np.ndarray):
        prompts = prompts.tolist()
    if isinstance(prompts, Mapping):
        raise UserError(f"messages go in a list: [message], got one message {shown(prompts)}")
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise UserError(
            "prompts must be text, token ids, a list of messages, or a list of these, "
            f"got {shown(prompts)}"
        )
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) and isinstance(prompts[0], Integral | Mapping):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _jobs(
    prompts: list[EncodedPrompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[_Job]:
    """The completions to make for each prompt, all of one prompt under one seed."""
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(prompts)
    wanted = "params must be SamplingParams, or a list of one for each prompt, got"
    if not isinstance(params, list | tuple):
        raise UserError(f"{wanted} {shown(params)}")
    if strange := [one for one in params if not isinstance(one, SamplingParams)]:
        raise UserError(f"{wanted} a list that holds {shown(strange[0])}")
    if len(params) != len(prompts):
        raise UserError(f"{wanted} {len(params)} for {counted(len(prompts), 'prompt')}")
    jobs = []
    for prompt, one in zip(prompts, params, strict=True):
        if one.seed is None and one.temperature > 0:
            one = replace(one, seed=secrets.randbits(SEED_BITS))
        jobs += [_Job(prompt, one, index) for index in range(one.n)]
    return jobs


def _checked_rates(rates: Sequence[float] | None) -> tuple[float, ...] | None:
    if rates is None:
        return None
    if isinstance(rates, torch.Tensor | np.ndarray):
        rates = rates.tolist()
    if not isinstance(rates, list | tuple) or not rates:
        raise UserError(f"synthetic_acceptance must be one rate or more, got {shown(rates)}")
    return tuple(real("synthetic_acceptance", rate, 0.0, 1.0) for rate in rates)


def _load_tokenizer(directory: Path, config: ModelConfig) -> Tokenizer | None:
    """The checkpoint's tokenizer; None where it has none, which leaves prompts of token ids."""
    if not has_tokenizer(directory):
        return None
    tokenizer = Tokenizer.from_directory(directory)
    tokenizer.check_against(config)
    return tokenizer


def _own_bits(weights: str, dtype: str | torch.dtype, ops: Ops) -> str | None:
    """What `load_model` is to make quants of, if anything."""
    if weights == "auto" and (dtype != "auto" or not ops.takes_quants):
        return None
    return weights


def _resolve_k(k: int | None, drafts: bool) -> int:
    if k is None:
        return DEFAULT_SPECULATIVE_TOKENS if drafts else 0
    if k and not drafts:
        raise UserError(f"num_speculative_tokens is {k}, but there is nothing to draft with")
    return k


def _resolve_length(length: int | None, config: ModelConfig) -> int:
    limit = config.max_position_embeddings
    if length is None:
        return min(limit, DEFAULT_MAX_LENGTH)
    return integer("max_length", length, 2, limit)
