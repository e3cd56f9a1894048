"""What happens at load, before the first request: kernels are compiled, steps captured or timed.

On a GPU a model's first load takes minutes, since Triton compiles; it keeps the binaries on disk,
where a second load finds them.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from mtpkern.config import SamplingParams
from mtpkern.decode import decode_step
from mtpkern.drafters.base import NO_DRAFTER, Drafter
from mtpkern.drafters.draft_length import FixedDraftLength
from mtpkern.errors import UserError
from mtpkern.graph import GraphPool, measure
from mtpkern.kernels._launch import TIERS, import_triton
from mtpkern.request import EncodedPrompt, Request
from mtpkern.runner import Batch, Runner
from mtpkern.status import Phase

# Values of K that have graphs besides 0 and the largest, where K is chosen while running.
GRAPH_DRAFTS = (1, 2, 4, 8)
# Timings per size of a step in `time_steps`, after an untimed one.
TIMED_STEPS = 3


def capture_graphs(runner: Runner, *, adaptive: bool) -> None:
    """Compile every kernel that may be launched, and capture a graph for every shape of a step.

    Compiling takes seconds, and no answer may wait for it. `adaptive` captures smaller K too, and
    times each graph. No sequence may be active. Raises UserError where the graphs take too much
    memory.
    """
    settings, k, max_batch = runner.settings, runner.k, runner.max_batch
    batches = {settings.batch_size(count, max_batch) for count in range(1, max_batch + 1)}
    drafts = {0, k, *(fewer for fewer in GRAPH_DRAFTS if adaptive and fewer < k)}
    shapes = [
        (batch, count, pages)
        for batch in sorted(batches, reverse=True)
        for count in sorted(drafts)
        for pages in runner.page_buckets
    ]
    # A launch of more rows than the largest tier has is a sequence of launches of the tiers.
    # Even without rows for the drafter, a prompt of two tokens has one for the trunk.
    prompts = sorted({min(tier, runner.max_length - 3) for tier in TIERS} - {-1})
    total = len(prompts) + len(shapes)
    with (
        runner.status.phase("compiling kernels and capturing graphs", total, "shapes") as phase,
        noting_kernels(phase),
    ):
        for rows in prompts:
            _prefill(runner, rows)
            phase.advance()
        torch.cuda.empty_cache()  # or else blocks that are freed later would hide the graphs'
        pool, free = GraphPool(), torch.cuda.mem_get_info()[0]
        for batch, count, pages in shapes:
            state = runner.state.view(batch, count)
            state = replace(state, cache=state.cache.columns(pages))
            step = Batch(state, FixedDraftLength(count), logprobs=True)
            runner.graphs[batch, count, pages] = replay = pool.capture(
                partial(runner.launch, step, count)
            )
            if adaptive and (batch, count) not in runner.graph_seconds:
                runner.graph_seconds[batch, count] = measure(replay)
            phase.advance()
    torch.cuda.empty_cache()
    runner.graph_bytes = free - torch.cuda.mem_get_info()[0]
    if runner.graph_bytes > settings.graph_memory:
        raise UserError(
            f"{len(runner.graphs)} graphs take {runner.graph_bytes >> 20} MiB, more than "
            f"{settings.graph_memory >> 20} MiB: lower max_batch or num_speculative_tokens"
        )
    runner.skip_used_numbers()


def _prefill(runner: Runner, rows: int) -> None:
    """Admit a made-up prompt of which the drafter sees `rows` rows, and release it."""
    prompt = EncodedPrompt([0] * (rows + 2), False)
    room, k = runner.max_length - len(prompt.ids), runner.k
    request = Request(0, prompt, SamplingParams(), k=k, room=room, ends=(), tokenizer=None)
    request.pages = list(range(1, 1 + runner.pages_for(request)))  # all are free
    runner.admit(Batch(runner.state.view(1, k), FixedDraftLength(k)), 0, request)
    runner.release(0)


class StepTimes(NamedTuple):
    """Seconds on a CPU, for one sequence and a short context, several of each."""

    steps: dict[int, list[float]]  # of a step without drafting, by its rows, 1 .. K + 1
    drafts: dict[int, list[float]]  # of the drafter, by how many tokens it drafts, 1 .. K


@torch.inference_mode()
def time_steps(runner: Runner) -> StepTimes:
    """Time steps of all sizes. The first of each, which does what no answer should wait for, is not
    counted."""
    times = StepTimes({}, {})
    for k in range(runner.k + 1):
        drafter: Drafter = runner.drafter if k else NO_DRAFTER
        state, steps, drafts = runner.state.view(1, k), [], []
        for _ in range(1 + TIMED_STEPS):
            started = time.perf_counter()
            output = decode_step(state, runner.trunk, drafter, runner.ops, min_probability=0.0)
            drafts.append(output.drafting_seconds)
            steps.append(time.perf_counter() - started - output.drafting_seconds)
        times.steps[k + 1] = steps[1:]
        if k:
            times.drafts[k] = drafts[1:]
    runner.drafter.reset(0)
    runner.skip_used_numbers()
    return times


@contextmanager
def noting_kernels(phase: Phase) -> Iterator[None]:
    """Note on `phase` each kernel that Triton is about to compile, until the block ends."""
    count = 0

    def note(*, fn: Any, **_: Any) -> None:
        nonlocal count
        count += 1
        op = fn.name.rpartition(".")[2].strip("_").removesuffix("_kernel")
        phase.advance(0, f"kernel {count}: {op}")

    runtime = import_triton().knobs.runtime
    before, runtime.jit_cache_hook = runtime.jit_cache_hook, note
    try:
        yield
    finally:
        runtime.jit_cache_hook = before
