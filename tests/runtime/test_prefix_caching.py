"""Prompts that reuse a finished sequence's cache have the bits of a fresh run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_checkpoint
from head_files import write_eagle3, write_hydra, write_layers, write_medusa, write_mtp
from llama_layouts import write_layout

from mtpkern.cache import PagePool, Prefix
from mtpkern.config import SamplingParams
from mtpkern.drafters.draft_length import DraftLength
from mtpkern.drafters.ngram import CompanionDrafter
from mtpkern.engine import LLM
from mtpkern.errors import UserError
from mtpkern.ops.gpu import TRITON
from mtpkern.request import Completion

LENGTH = 512


def model_with(kind: str, directory: Path) -> dict[str, Any]:
    """A tiny model and heads of one kind, as arguments of LLM."""
    trunk, heads = directory / "trunk", directory / "heads"
    writers = {"mtp": write_mtp, "medusa": write_medusa, "eagle3": write_eagle3}
    if kind == "modules":
        write_layout("mimo", trunk, modules=3)
        return dict(model=trunk)
    if kind == "layers":
        write_layers(trunk)
        return dict(model=trunk)
    tiny_checkpoint(
        trunk, dtype=torch.bfloat16, num_hidden_layers=8 if kind == "eagle3" else 3, eos_token_id=5
    )
    if kind == "hydra":
        write_hydra(heads)
    elif kind != "ngram":
        writers[kind](heads)
    return dict(model=trunk, heads=heads if kind != "ngram" else "none")


def conversation(answer: Callable[[list[int], int], Completion]) -> list[list[int]]:
    """Answer growing, repeated, shortened and changed prompts -> those prompts, in order."""
    torch.manual_seed(3)
    known = torch.randint(6, 96, (7,)).tolist()
    prompts = []
    for turn, more in enumerate((20, 3, 90, 40, 1)):
        prompts.append(list(known))
        completion = answer(known, 30 + 7 * turn)
        known = known + completion.token_ids + torch.randint(6, 96, (more,)).tolist()
    prompts += [known, known[:100], known[:128], known[:129], known[:60] + [9] * 20, known[:2]]
    for prompt in prompts[-6:]:
        answer(prompt, 25)
    return prompts


def held(llm: LLM) -> tuple[list[torch.Tensor], Prefix]:
    """K and V of the prefix that was kept last: the trunk's, and a drafter's own."""
    prefix = llm.scheduler.pool.prefixes[-1]
    (page,) = prefix.pages
    drafter = llm.drafter
    drafter = drafter.drafter if isinstance(drafter, CompanionDrafter) else drafter
    caches = [(llm.runner.cache, len(prefix.tokens))]
    if hasattr(drafter, "cache"):
        caches.append((drafter.cache, prefix.pairs))
    return [t[:, page, :count] for cache, count in caches for t in (cache.k, cache.v)], prefix


CASES = [
    ("ngram", True, True, 0.0),
    ("mtp", True, True, 0.0),
    ("mtp", False, True, 0.9),
    ("mtp", True, False, 0.0),
    ("modules", True, True, 0.0),
    ("modules", False, True, 0.9),
    ("eagle3", False, True, 0.0),
    ("layers", False, True, 0.0),
    ("hydra", False, True, 0.0),
    ("medusa", False, True, 0.0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ngram", "speculate", "temperature"), CASES)
def test_a_conversation_has_the_bits_of_fresh_prompts(
    kind: str, ngram: bool, speculate: bool, temperature: float, tmp_path: Path
) -> None:
    setting = model_with(kind, tmp_path) | dict(
        ngram=ngram, num_speculative_tokens=3, max_batch=1, max_length=LENGTH, prefix_caching=True
    )
    llm, fresh_llm = LLM(**setting), LLM(**setting)
    reused = []

    def both(prompt: list[int], count: int) -> Completion:
        params = SamplingParams(max_tokens=count, temperature=temperature, seed=0, logprobs=True)
        before = held(llm)[1].tokens if llm.scheduler.pool.prefixes else []
        mine = llm.generate(prompt, params, speculate=speculate)[0]
        while fresh_llm.scheduler.pool.prefixes:
            fresh_llm.scheduler.pool.release(fresh_llm.scheduler.pool.prefixes.pop().pages)
        fresh = fresh_llm.generate(prompt, params, speculate=speculate)[0]
        assert (mine.token_ids, mine.logprobs) == (fresh.token_ids, fresh.logprobs)
        assert (mine.stats.steps, mine.drafted) == (fresh.stats.steps, fresh.drafted)
        assert fresh.stats.cached_tokens == 0
        (tensors, prefix), (others, other) = held(llm), held(fresh_llm)
        assert prefix.tokens == other.tokens and prefix.tokens[: len(prompt)] == prompt
        # A run without drafts leaves the heads' caches as they were.
        if speculate:
            assert prefix.pairs == other.pairs
            assert all(map(torch.equal, tensors, others))
        else:
            assert all(map(torch.equal, tensors[:2], others[:2]))
        common = next(
            (i for i, (a, b) in enumerate(zip(before, prompt, strict=False)) if a != b),
            min(len(before), len(prompt)),
        )
        reused.append((mine.stats.cached_tokens, min(common, len(prompt) - 2)))
        return mine

    conversation(both)
    assert all(cached <= most for cached, most in reused)
    if kind == "ngram" or kind == "medusa" or not speculate:
        assert all(cached == most for cached, most in reused), "all that is there is used"
    else:
        # The heads may have put off the last pairs, and those with a draft in them come again.
        assert sum(cached for cached, _ in reused) > 0.8 * sum(most for _, most in reused)


def test_runs_with_and_without_drafts_share_what_they_can(tmp_path: Path) -> None:
    setting = model_with("mtp", tmp_path) | dict(ngram=False, num_speculative_tokens=3)
    llm = LLM(**setting, max_batch=1, max_length=LENGTH, prefix_caching=True)
    fresh = LLM(**setting, max_batch=1, max_length=LENGTH)
    params = SamplingParams(max_tokens=40, logprobs=True, ignore_eos=True)
    known, cached = [30, 31, 32, 33], []
    for speculate in (True, False, False, True, True, False):
        mine, other = (m.generate(known, params, speculate=speculate)[0] for m in (llm, fresh))
        assert (mine.token_ids, mine.logprobs) == (other.token_ids, other.logprobs)
        assert mine.drafted == other.drafted
        cached.append(mine.stats.cached_tokens)
        known += [*mine.token_ids, 40, 41]
    # The heads' cache lacks the tokens decoded without drafts, which are then run again.
    assert cached[3] <= 4 + 40 < cached[2]
    assert cached[4] > cached[2]


def test_a_stream_that_was_closed_early_leaves_its_prefix(tmp_path: Path) -> None:
    setting = model_with("mtp", tmp_path) | dict(max_batch=1, max_length=LENGTH)
    llm, fresh = LLM(**setting, prefix_caching=True), LLM(**setting)
    params = SamplingParams(max_tokens=60, logprobs=True, ignore_eos=True)
    for count in (1, 2, 3, 11, 12, 13):
        prompt = [60 + count, 70, 71]
        stream = llm.stream(prompt, params)
        said = [next(stream).token_id for _ in range(count)]
        stream.close()  # type: ignore[attr-defined]
        follow_up = [*prompt, *said, 33]
        mine, other = (m.generate(follow_up, params)[0] for m in (llm, fresh))
        assert (mine.token_ids, mine.logprobs) == (other.token_ids, other.logprobs)
        assert mine.stats.cached_tokens > 0


def test_a_stop_string_keeps_no_more_than_was_answered(tmp_path: Path) -> None:
    """A step may commit tokens past the point where the host cuts the answer."""
    setting = model_with("ngram", tmp_path)
    setting |= dict(num_speculative_tokens=4, max_batch=1, max_length=LENGTH)
    llm, fresh = LLM(**setting, prefix_caching=True), LLM(**setting)
    text = "the quick brown fox jumps over the lazy dog "
    whole = fresh.generate(text, SamplingParams(max_tokens=50, ignore_eos=True))[0]
    assert whole.stats.mean_acceptance_length > 1.2, "the case must have accepted runs to cut"
    for begin in range(1, len(whole.text) - 3, 4):
        stop = SamplingParams(max_tokens=50, stop=(whole.text[begin : begin + 2],), ignore_eos=True)
        said = llm.generate(text, stop)[0].token_ids
        prompt = llm.encode(text)
        assert llm.scheduler.pool.prefixes[-1].tokens == [*prompt, *said][
            : len(prompt) + len(said) - 1
        ] or (llm.scheduler.pool.prefixes[-1].tokens == [*prompt, *said])
        after = [*prompt, *said, 40, 41]
        params = SamplingParams(max_tokens=20, logprobs=True, ignore_eos=True)
        mine, other = (m.generate(after, params)[0] for m in (llm, fresh))
        assert (mine.token_ids, mine.logprobs) == (other.token_ids, other.logprobs)


def test_sequences_side_by_side_each_find_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the heads do not pay in the first run, but in later ones."""
    decisions = iter([False] * 2 + [True] * 100)
    monkeypatch.setattr(DraftLength, "_could_pay", lambda self: next(decisions))
    setting = model_with("mtp", tmp_path) | dict(max_batch=3, max_length=LENGTH)
    llm, fresh = LLM(**setting, prefix_caching=True), LLM(**setting)
    params = SamplingParams(max_tokens=30, logprobs=True, ignore_eos=True)
    prompts = [[30 + i, 50, 51, 52 + i] * (1 + 9 * i) for i in range(3)]
    for turn in range(3):
        mine, other = (m.generate(prompts, params) for m in (llm, fresh))
        assert [(c.token_ids, c.logprobs) for c in mine] == [
            (c.token_ids, c.logprobs) for c in other
        ]
        assert all((c.stats.cached_tokens > 0) == (turn > 0) for c in mine)
        # In another order: pages are found wherever they were used before.
        prompts = [[*p, *c.token_ids, 44] for p, c in zip(prompts, mine, strict=True)][::-1]
    assert len(llm.generate([[9, 8, i] for i in range(5)], params)) == 5
    assert (
        len(llm.scheduler.pool.free) + sum(len(p.pages) for p in llm.scheduler.pool.prefixes) == 3
    )


def test_prefixes_are_dropped_when_a_request_needs_their_pages() -> None:
    pool = PagePool(4)
    first, second = pool.claim(2), pool.claim(2)
    assert first is not None and second is not None
    pool.keep(Prefix([1, 2, 3, 4], first.pages, 3))
    pool.keep(Prefix([5, 6, 7, 8], second.pages, 2))
    assert pool.claim(5) is None and len(pool.prefixes) == 2
    # Half of the second begins this prompt; it needs a page more, which the first gives.
    claim = pool.claim(3, [5, 6, 9, 9, 9])
    assert claim is not None
    assert (claim.pages[:2], claim.known, claim.pairs) == (second.pages, 2, 2)
    assert claim.pages[2] in first.pages and len(pool.free) == 1 and not pool.prefixes
    pool.release(claim.pages)
    assert sorted(pool.free) == [1, 2, 3, 4]


def test_a_prefix_is_not_dropped_for_one_common_token() -> None:
    pool = PagePool(2)
    kept = pool.claim(1)
    assert kept is not None
    pool.keep(Prefix([1, 2, 3, 4, 5], kept.pages, 5))
    other = pool.claim(1, [1, 9, 9])
    assert other is not None and other.known == 0 and len(pool.prefixes) == 1
    # With no page left, it is, and then what they have in common is used.
    last = pool.claim(1, [1, 9, 9])
    assert last is not None and (last.pages, last.known) == (kept.pages, 1)


def test_a_gpu_refuses_it_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prefix_caching needs device cpu"):
        LLM(tiny_checkpoint(tmp_path), ops=TRITON, prefix_caching=True)
