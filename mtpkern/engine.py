"""LLM: prompts in, completions out. What users call; scheduler.py and runner.py do the work."""

import gc
import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mtpkern import loading
from mtpkern.checkpoints.llama import load_config
from mtpkern.checkpoints.resolve import model_name, resolve_model
from mtpkern.config import MAX_SPECULATIVE_TOKENS, SamplingParams
from mtpkern.device import compile_kernels, resolve_device
from mtpkern.drafters.base import Drafter
from mtpkern.drafters.load import find_heads
from mtpkern.errors import UserError
from mtpkern.model import Llama
from mtpkern.ops.base import Ops
from mtpkern.prompts import Job, Message, Prompt, as_list, encode_prompt, is_chat, plan_jobs
from mtpkern.request import Completion, EncodedPrompt, Event, Request, Stats
from mtpkern.scheduler import Scheduler
from mtpkern.status import SILENT, Status
from mtpkern.threads import use_threads
from mtpkern.validation import at_least, choice, flag, integer, location, rates, shown
from mtpkern.warmup import capture_graphs, time_steps

__all__ = ["LLM", "Completion", "Event", "Stats"]

MAX_BATCH = 4096

_log = logging.getLogger(__name__)


class LLM:
    """A model, its heads and its cache, ready to generate.

    `model` is a name, a directory or a hub id (None: the default model); `heads` "auto" (the ones
    that ship for the model, if any), "none", a name or a directory; `ngram` adds drafts copied from
    the sequence itself. num_speculative_tokens is K in 0..16; None chooses K while running, from
    measured costs: at most 4, and 0 where drafts do not pay.

    `max_batch` sequences of up to `max_length` tokens (None: the model's limit, at most 8192) share
    a cache of `cache_tokens` (None: room for all of them). A request waits until there are pages
    for all that it can need. With `prefix_caching`, on a CPU, the cache of a finished sequence is
    reused for a later prompt with the same beginning; the tokens are those of a fresh computation.

    `device` is "auto", "cpu", "cuda" or a torch.device, `dtype` a name or a torch.dtype. On a CPU
    the weights of a GGUF stay in its own format unless a dtype is given; `weights` names a format
    to round the weights of any checkpoint to: q4_0, q4_1, q8_0, q8, bf16, fp16 or fp32. `threads`
    is the number of CPU threads (None: at most one per physical core), set for the whole process.
    `ops` replaces the device's own operations, and `status` shows the progress of loading, of long
    prompts and of `generate`. `before_loading(llm)` is called when the settings are checked and
    `encode` works: what it raises comes before kernels are compiled and weights are read.

    For measurements only, with meaningless answers: load_format "dummy" makes up weights for a
    directory that holds config.json alone, and `synthetic_acceptance` accepts drafts at these rates
    by position. `graph=False` launches a GPU's kernels one by one, for profilers.

    A context manager: `close` frees the memory. What a caller can correct raises UserError.
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
        before_loading: Callable[["LLM"], object] = lambda llm: None,
    ):
        self.device, usual = resolve_device(device)
        chosen_ops = usual if ops is None else ops
        self.max_batch = integer("max_batch", max_batch, 1, MAX_BATCH)
        dummy = choice("load_format", load_format, ("auto", "dummy")) == "dummy"
        ngram, graph = flag("ngram", ngram), flag("graph", graph)
        if num_speculative_tokens is not None:
            num_speculative_tokens = integer(
                "num_speculative_tokens", num_speculative_tokens, 0, MAX_SPECULATIVE_TOKENS
            )
        if cache_tokens is not None:
            cache_tokens = at_least("cache_tokens", cache_tokens, 1)
        if synthetic_acceptance is not None:
            synthetic_acceptance = rates("synthetic_acceptance", synthetic_acceptance)
        self.synthetic_acceptance = synthetic_acceptance
        loading.check_formats(dtype, weights, chosen_ops)
        if flag("prefix_caching", prefix_caching) and not chosen_ops.host_may_read:
            # There prefill and decoding run different code, so that the bits of K and V differ.
            raise UserError("prefix_caching needs device cpu in this version")
        use_threads(threads)
        heads = location("heads", heads)
        named = None if heads == "auto" else find_heads(heads)
        directory = resolve_model(model, status=status)
        started = time.perf_counter()
        self.status, self.config = status, load_config(directory)
        self.name = model_name(directory)
        heads_directory = find_heads(heads, self.name, directory) if heads == "auto" else named
        self.heads_name = None if heads_directory is None else heads_directory.name
        self.max_length = loading.resolve_length(max_length, self.config)
        self._default_length = max_length is None
        self.tokenizer = loading.load_tokenizer(directory, self.config)
        self.eos_token_ids = loading.end_tokens(self.config, self.tokenizer)
        self._events: Generator[tuple[int, Event], None, None] | None = None  # of the current run
        self._closed = False
        with torch.inference_mode():
            plan = loading.RunnerPlan(
                directory,
                self.config,
                heads_directory,
                ops=chosen_ops,
                device=self.device,
                dtype=dtype,
                weights=weights,
                dummy=dummy,
                ngram=ngram,
                num_speculative_tokens=num_speculative_tokens,
                max_batch=self.max_batch,
                max_length=self.max_length,
                cache_tokens=cache_tokens,
            )
            checked = time.perf_counter()
            before_loading(self)
            compile_kernels(chosen_ops, status)
            started += time.perf_counter() - checked
            self.runner = plan.load(
                ends=max(1, len(self.eos_token_ids)),
                synthetic_acceptance=self.synthetic_acceptance,
                status=status,
            )
            self.k, self.dtype = self.runner.k, self.runner.cache.k.dtype
            self.weights = loading.weights_format(self.runner.trunk)
            adaptive = num_speculative_tokens is None and self.k > 0
            self.scheduler = Scheduler(self.runner, adaptive, prefix_caching)
            if graph and self.runner.settings.uses_graphs:
                capture_graphs(self.runner, adaptive=adaptive)
            elif self.scheduler.draft_length is not None:
                with status.phase("timing steps"):
                    times = time_steps(self.runner)
                self.scheduler.draft_length.start_with(times.steps, times.drafts)
        # Without downloading and compiling, which happen once.
        self.load_seconds = time.perf_counter() - started
        _log.info("loaded %s as %s from %s", self, self.weights, directory)

    @property
    def trunk(self) -> Llama:
        return self.runner.trunk

    @property
    def drafter(self) -> Drafter:
        """What drafts; another one may be assigned between runs."""
        return self.runner.drafter

    @drafter.setter
    def drafter(self, drafter: Drafter) -> None:
        self.runner.drafter = drafter

    @property
    def ops(self) -> Ops:
        return self.runner.ops

    @property
    def graph_bytes(self) -> int:
        """Device memory that the CUDA graphs take."""
        return self.runner.graph_bytes

    def time_steps(self) -> dict[int, float]:
        """Seconds per step of one sequence by its rows, 1 .. K + 1, without drafting, measured on a
        CPU after a short context: the median of a few."""
        return {rows: median(some) for rows, some in time_steps(self.runner).steps.items()}

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
        """Free the memory of graphs, cache and weights; every later call but `close` raises
        UserError, and so does a stream that is still open."""
        if self._closed:
            return
        self._closed = True
        if self._events is not None:
            with torch.inference_mode():
                self._events.close()
        self.runner.graphs.clear()
        del self.scheduler, self.runner
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
        """Answer a conversation, a list of messages. Its next turn is that list, the answer as
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
        encoded = [self._encoded(prompt, chat) for prompt in as_list(prompts)]
        jobs, speculate = plan_jobs(encoded, params), flag("speculate", speculate)
        completions: dict[int, Completion] = {}
        most = [min(job.params.max_tokens, self.max_length - len(job.prompt.ids)) for job in jobs]
        with torch.inference_mode(), self.status.phase("answering", sum(most), "tokens") as phase:
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
        jobs = plan_jobs([self._encoded(prompt, chat)], params)
        if len(jobs) > 1:
            raise UserError(f"n must be 1 for a stream, got {len(jobs)}")
        return (event for _, event in self._stream(jobs, speculate))

    def stream_batch(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        speculate: bool = True,
        **chat: Any,
    ) -> Generator[tuple[int, Event], None, None]:
        """Complete prompts as `generate` does, token by token -> (i, event), where i is the place
        of the completion in what `generate` returns; its last event carries it."""
        encoded = [self._encoded(prompt, chat) for prompt in as_list(prompts)]
        return self._stream(plan_jobs(encoded, params), speculate)

    def _stream(self, jobs: list[Job], speculate: bool) -> Generator[tuple[int, Event], None, None]:
        # As a decorator of a generator, it leaves inference mode between two events.
        return torch.inference_mode()(self._run)(jobs, flag("speculate", speculate))

    def _encoded(self, prompt: Prompt, chat: Mapping[str, Any]) -> EncodedPrompt:
        """A prompt's ids, and whether the answer continues the prompt's own text."""
        ids = self.encode(prompt, **chat)
        given = {**(chat.get("chat_template_kwargs") or {}), **chat}
        return EncodedPrompt(ids, not is_chat(prompt) or bool(given.get("continue_final_message")))

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

        The template gets `tools` (JSON schemas), `documents` and `chat_template_kwargs`, and may
        leave the last message to be continued: see `Tokenizer.apply_chat_template`.
        """
        self._check_open()
        ids = encode_prompt(
            prompt,
            tokenizer=self.tokenizer,
            vocab_size=self.config.vocab_size,
            model=self.name,
            tools=tools,
            documents=documents,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )
        loading.check_length(ids, self.max_length, self.config, by_default=self._default_length)
        return ids

    def _run(self, jobs: list[Job], speculate: bool) -> Generator[tuple[int, Event], None, None]:
        """Run all jobs -> each token, with its job's index. One run at a time."""
        self._check_open()
        if self._events is not None:
            raise UserError(
                "this LLM is answering already: exhaust or close the other stream first"
            )
        k = self.k if speculate else 0
        requests = [
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
        ]
        events = self._events = self.scheduler.run(requests, k)
        try:
            for event in events:
                yield event
                self._check_open()
        finally:
            events.close()
            self._events = None
