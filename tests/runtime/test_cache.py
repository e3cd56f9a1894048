"""Pages: each is free or belongs to one sequence, whatever the requests."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_checkpoint

from mtpkern.cache import SCRATCH, PagePool
from mtpkern.config import SamplingParams
from mtpkern.engine import LLM


def test_a_pool_hands_out_every_page_once() -> None:
    pool = PagePool(7)
    first, second = pool.claim(3), pool.claim(4)
    assert first is not None and second is not None
    assert sorted(first.pages + second.pages) == list(range(1, 8)), (
        "the scratch page belongs to no sequence"
    )
    assert pool.claim(1) is None
    pool.release(first.pages)
    assert pool.claim(4) is None
    again = pool.claim(3)
    assert again is not None and sorted(again.pages) == sorted(first.pages)


@pytest.fixture
def llm(tmp_path: Path) -> LLM:
    directory = tiny_checkpoint(tmp_path, eos_token_id=None)
    # Two pages for three slots: the third sequence waits until one has ended.
    return LLM(directory, num_speculative_tokens=2, max_batch=3, max_length=200, cache_tokens=768)


def test_a_sequence_waits_for_pages_and_gets_the_same_tokens(llm: LLM) -> None:
    prompts = [[3 + i, 20, 30 + i] * (1 + i) for i in range(6)]
    params = SamplingParams(max_tokens=30)
    alone = [llm.generate(prompt, params)[0].token_ids for prompt in prompts]
    assert len(llm.scheduler.pool.free) == 2
    assert [c.token_ids for c in llm.generate(prompts, params)] == alone
    assert sorted(llm.scheduler.pool.free) == [1, 2]


def test_no_page_leaks_when_a_stream_is_closed_early(llm: LLM) -> None:
    whole = llm.generate([7, 8, 9], SamplingParams(max_tokens=20))[0].token_ids
    for count in (1, 3, 8):
        stream = llm.stream([5, 6], SamplingParams(max_tokens=100))
        for _ in range(count):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert sorted(llm.scheduler.pool.free) == [1, 2]
        assert bool((llm.runner.cache.page_table == SCRATCH).all())
        assert not llm.runner.state.progress.active.any()
    assert llm.generate([7, 8, 9], SamplingParams(max_tokens=20))[0].token_ids == whole


def test_a_sequence_reads_no_pages_but_its_own(llm: LLM) -> None:
    """Every other slot is NaN, which would propagate to whatever reads it."""
    params = SamplingParams(max_tokens=40)
    expected = llm.generate([7, 8, 9], params)[0].token_ids
    with torch.inference_mode():
        llm.runner.cache.k.fill_(float("nan"))
        llm.runner.cache.v.fill_(float("nan"))
    assert llm.generate([7, 8, 9], params)[0].token_ids == expected


def test_untouched_pages_take_no_memory(tmp_path: Path) -> None:
    """A cache for many long sequences takes memory only as they are decoded."""
    directory = tiny_checkpoint(tmp_path, max_position_embeddings=2**20)
    program = f"""
import resource
from mtpkern.engine import LLM
from mtpkern.config import SamplingParams
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
llm = LLM({str(directory)!r}, max_batch=1, max_length=128)
before = peak()
llm = LLM({str(directory)!r}, max_batch=16, max_length=2**17)
llm.generate([5, 6, 7], SamplingParams(max_tokens=5))
print(llm.runner.cache.k.nbytes // 2**20, peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    size, grown = map(int, done.stdout.split())
    assert size > 300, "the case must have much room"
    assert grown < size / 2
