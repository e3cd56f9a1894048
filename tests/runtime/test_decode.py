"""The theorem: whatever drafts, and however many, tokens and log-probabilities are plain ones."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_checkpoint
from llama_layouts import write_layout

from mtpkern.config import SamplingParams
from mtpkern.decode import DecodeState, decode_step
from mtpkern.drafters.base import HEADS, Drafter, DraftInput, Drafts, NoDrafter
from mtpkern.drafters.draft_length import DraftLength, Proposal
from mtpkern.drafters.ngram import CompanionDrafter, NgramDrafter
from mtpkern.engine import LLM
from mtpkern.ops.definitions import DEFINITIONS

PROMPTS = [[5, 9, 33, 7, 7, 12], [11], [40 + i % 60 for i in range(150)]]


class Scripted(NoDrafter):
    """Drafts the tokens of `script(known tokens, K)`, for each sequence on its own."""

    def __init__(self, script: Callable[[list[int], int], Sequence[int]]):
        self.script = script

    def guess(self, step: DraftInput, count: int) -> Drafts:
        batch = step.tokens.shape[0]
        drafts = torch.tensor(
            [
                list(self.script(step.tokens[b, : int(step.lengths[b]) + 1].tolist(), count))
                for b in range(batch)
            ]
        ).view(batch, count)
        return Drafts(drafts, torch.full((batch,), HEADS), torch.full((batch,), count))


def perfect(answers: list[list[int]]) -> Drafter:
    """Drafts the answers, up to their end."""

    def script(known: list[int], count: int) -> list[int]:
        whole = next((a for a in answers if a[: len(known)] == known), known)
        follows = whole[len(known) : len(known) + count]
        return follows + [0] * (count - len(follows))

    return Scripted(script)


def half_right(answers: list[list[int]]) -> Drafter:
    """Right for a number of drafts that changes from step to step, then wrong."""

    def script(known: list[int], count: int) -> list[int]:
        whole = next((a for a in answers if a[: len(known)] == known), known)
        follows = (whole[len(known) : len(known) + count] + [0] * count)[:count]
        right = len(known) % (count + 1)
        return [t if i < right else (t + 1) % 97 for i, t in enumerate(follows)]

    return Scripted(script)


def random_drafts(_: list[list[int]]) -> Drafter:
    generator = torch.Generator().manual_seed(1)
    return Scripted(lambda known, k: torch.randint(97, (k,), generator=generator).tolist())


def hostile(answers: list[list[int]]) -> Drafter:
    """Wrong from the first draft on, and repeats the last token where it can."""

    def script(known: list[int], count: int) -> list[int]:
        whole = next((a for a in answers if a[: len(known)] == known), known)
        right = whole[len(known)] if len(whole) > len(known) else 0
        return [known[-1] if known[-1] != right else (right + 1) % 97] * count

    return Scripted(script)


DRAFTERS = [perfect, half_right, random_drafts, hostile, lambda _: NgramDrafter(DEFINITIONS, 2)]
NAMES = ["perfect", "half right", "random", "hostile", "n-gram"]


THEOREM = [
    ("grouped_ratio_3", "bfloat16"),
    ("grouped_ratio_3", "float32"),
    ("mistral_window_7", "bfloat16"),
    ("qwen3", "bfloat16"),
]


@pytest.fixture(scope="module", params=THEOREM, ids=" ".join)
def checkpoint(request: Any, tmp_path_factory: Any) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("theorem")
    family, dtype = request.param
    write_layout(family, directory, eos_token_id=None)
    return directory, dtype


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("make", DRAFTERS, ids=NAMES)
def test_drafts_never_change_a_token_or_a_logprob(
    checkpoint: tuple[Path, str], make: Any, temperature: float
) -> None:
    directory, dtype = checkpoint
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=7, logprobs=True)
    plain = LLM(directory, ngram=False, num_speculative_tokens=0, dtype=dtype, max_length=300)
    expected = [plain.generate(prompt, params)[0] for prompt in PROMPTS]
    answers = [p + c.token_ids for p, c in zip(PROMPTS, expected, strict=True)]
    for k in (1, 2, 3, 5, 8, 16):
        llm = LLM(
            directory, num_speculative_tokens=k, dtype=dtype, max_length=300, max_batch=len(PROMPTS)
        )
        llm.drafter = make(answers)
        # A ragged batch, so that neighbours of other lengths are in every launch.
        together = llm.generate(PROMPTS, params)
        for prompt, completion, plain_one in zip(PROMPTS, together, expected, strict=True):
            assert completion.token_ids == plain_one.token_ids, f"K = {k}"
            assert completion.logprobs == plain_one.logprobs, f"K = {k}"
            if make is perfect:
                # K + 1 tokens per step; a prompt of one token has no row to draft its first from.
                alone = len(prompt) == 1
                assert completion.stats.steps == alone + -(-(40 - alone) // (k + 1))
            if make is hostile:
                assert completion.stats.steps == 40


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("make", DRAFTERS, ids=NAMES)
def test_a_k_that_changes_from_step_to_step_changes_no_token(
    checkpoint: tuple[Path, str], make: Any, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU, where timings decide how many drafts are verified and when heads rest: here at
    random."""
    directory, dtype = checkpoint
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=7, logprobs=True)
    llm = LLM(directory, dtype=dtype, max_length=300, max_batch=len(PROMPTS))
    expected = llm.generate(PROMPTS, params, speculate=False)
    answers = [p + c.token_ids for p, c in zip(PROMPTS, expected, strict=True)]
    generator, chosen = random.Random(5), []

    def choose(self: DraftLength, windows: Sequence[Proposal]) -> int:
        chosen.append(generator.randint(0, max((len(w.probabilities) for w in windows), default=0)))
        return chosen[-1]

    def rest(self: DraftLength) -> list[int]:
        return [generator.choice([0, 1, 2]) for _ in range(generator.randint(0, 2))]

    monkeypatch.setattr(DraftLength, "rest", rest)
    monkeypatch.setattr(DraftLength, "choose", choose)
    monkeypatch.setattr(DraftLength, "use_heads", lambda self: generator.random() < 0.5)
    copies = make is DRAFTERS[NAMES.index("n-gram")]
    monkeypatch.setattr(DraftLength, "use_ngram", lambda self: copies or generator.random() < 0.7)
    monkeypatch.setattr(DraftLength, "active_source", lambda self: generator.choice([0, 1, 1, 2]))
    llm.drafter = CompanionDrafter(NgramDrafter(DEFINITIONS, 2), make(answers), DEFINITIONS)
    for completion, plain in zip(llm.generate(PROMPTS, params), expected, strict=True):
        assert completion.token_ids == plain.token_ids
        assert completion.logprobs == plain.logprobs
        assert sum(completion.stats.steps_by_k.values()) == completion.stats.steps
    assert len(set(chosen)) > 1


def test_a_poisoned_cache_changes_nothing(tmp_path: Path) -> None:
    """The contents of uncommitted slots must have no effect, not even as 0 x NaN."""
    llm = LLM(tiny_checkpoint(tmp_path), num_speculative_tokens=3, max_length=256, max_batch=2)
    prompts = [[5, 6, 7, 8] * 5, [9, 10, 11]]
    expected = llm.generate(prompts, SamplingParams(max_tokens=30, ignore_eos=True))

    @torch.inference_mode()
    def poison() -> None:
        for b in range(2):
            live, page = int(llm.runner.cache.lengths[b]), int(llm.runner.cache.page_table[b, 0])
            for cache in (llm.runner.cache.k, llm.runner.cache.v):
                cache[:, page, live:] = float("nan")

    class Poisoner(NgramDrafter):
        def guess(self, step: DraftInput, count: int) -> Drafts:
            poison()
            return super().guess(step, count)

    llm.drafter = Poisoner(DEFINITIONS)
    with torch.inference_mode():
        llm.runner.cache.k.fill_(float("nan"))
        llm.runner.cache.v.fill_(float("nan"))
    got = llm.generate(prompts, SamplingParams(max_tokens=30, ignore_eos=True))
    assert [c.token_ids for c in got] == [c.token_ids for c in expected]


def test_rejected_tokens_leave_no_trace(tmp_path: Path) -> None:
    """After any mix of drafts, the committed part of the cache has the bits of plain decoding."""
    directory = tiny_checkpoint(tmp_path, dtype=torch.bfloat16)
    caches = []
    for k, drafter in ((0, NoDrafter()), (4, random_drafts([])), (4, NgramDrafter(DEFINITIONS, 1))):
        llm = LLM(directory, num_speculative_tokens=k, max_length=200, max_batch=1)
        llm.drafter = drafter
        with torch.inference_mode():
            state = DecodeState.empty(llm.runner.cache, llm.max_length, k)
            state.window[0, 0] = state.progress.tokens[0, 0] = 9
            state.progress.active[0] = 1
            state.cache.assign(0, [1])
            while state.cache.lengths[0] < 100:
                decode_step(state, llm.trunk, drafter, llm.ops)
            caches.append([c[:, 1, :100].clone() for c in (llm.runner.cache.k, llm.runner.cache.v)])
            caches[-1].append(state.progress.tokens[:, :101].clone())
    for other in caches[1:]:
        for mine, theirs in zip(caches[0], other, strict=True):
            assert torch.equal(mine, theirs)


def test_a_finished_sequence_does_not_disturb_its_neighbours(tmp_path: Path) -> None:
    llm = LLM(tiny_checkpoint(tmp_path), num_speculative_tokens=4, max_length=256, max_batch=3)
    params = SamplingParams(max_tokens=50)
    prompts = [[3 + i, 20, 30 + i] * (1 + 4 * i) for i in range(7)]
    alone = [llm.generate(p, params, speculate=False)[0].token_ids for p in prompts]
    # Seven requests over three slots: they finish and are replaced at different steps.
    short = [SamplingParams(max_tokens=n) for n in (1, 2, 50)]
    assert [c.token_ids for c in llm.generate(prompts, params)] == alone
    for params in short:
        together = [c.token_ids for c in llm.generate(prompts, params)]
        assert together == [ids[: params.max_tokens] for ids in alone]
