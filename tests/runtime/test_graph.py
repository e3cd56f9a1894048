"""What only a GPU can show: steps in graphs, and a host that runs ahead of them and never waits."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_checkpoint
from head_files import write_mtp

from mtpkern.config import SamplingParams
from mtpkern.engine import LLM

PROMPTS = [[5, 9, 33, 7, 7, 12, 9, 33, 7], [11], [40 + i % 60 for i in range(70)]]
GREEDY = SamplingParams(max_tokens=60, ignore_eos=True, logprobs=True)


@pytest.fixture
def llm(cuda: str, tmp_path: Path) -> LLM:
    directory = tiny_checkpoint(tmp_path / "trunk", dtype=torch.bfloat16)
    heads = write_mtp(tmp_path / "heads")
    return LLM(directory, heads=heads, device=cuda, num_speculative_tokens=3, max_length=256)


def test_graphs_give_what_launches_one_by_one_give(cuda: str, llm: LLM, tmp_path: Path) -> None:
    one_by_one = LLM(
        tmp_path / "trunk",
        heads=tmp_path / "heads",
        device=cuda,
        num_speculative_tokens=3,
        max_length=256,
        graph=False,
    )
    for speculate in (True, False):
        expected = one_by_one.generate(PROMPTS, GREEDY, speculate=speculate)
        for mine, theirs in zip(
            llm.generate(PROMPTS, GREEDY, speculate=speculate), expected, strict=True
        ):
            assert (mine.token_ids, mine.logprobs) == (theirs.token_ids, theirs.logprobs)


def test_drafts_never_change_a_token_or_a_logprob(llm: LLM) -> None:
    plain = llm.generate(PROMPTS, GREEDY, speculate=False)
    for drafted, undrafted in zip(llm.generate(PROMPTS, GREEDY), plain, strict=True):
        assert drafted.token_ids == undrafted.token_ids
        assert drafted.logprobs == undrafted.logprobs


def test_the_host_never_waits_for_the_device_between_the_first_token_and_the_last(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], GREEDY)
    next(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        # What frees the slot at the end may wait.
        for _ in range(40):
            next(stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    list(stream)
