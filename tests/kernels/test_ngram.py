"""ngram: the most recent earlier match, by brute force, and copies that never leave the text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import guarded_output

from mtpkern.kernels.ngram import BLOCK, ngram, ngram_ref


def brute_force(known: list[int], drafts: int, size: int) -> list[int] | None:
    pattern = known[-size:]
    for start in range(len(known) - size - 1, -1, -1):
        if len(known) >= size and known[start : start + size] == pattern:
            follows = known[start + size :]
            return [follows[i % len(follows)] for i in range(drafts)]
    return None


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=30), min_size=1, max_size=4),
    st.integers(0, 6),
    st.integers(1, 4),
)
def test_equals_a_search_by_hand(texts: list[list[int]], drafts: int, size: int) -> None:
    # Tokens past `known` are undefined; here they look like a match.
    tokens = torch.tensor([(text * 48)[:48] for text in texts])
    known = torch.tensor([len(text) for text in texts])
    got, found = ngram_ref(tokens, known, drafts, size)
    for b, text in enumerate(texts):
        expected = brute_force(text, drafts, size)
        assert bool(found[b]) == (expected is not None)
        assert got[b].tolist() == (expected or [0] * drafts)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("drafts", [0, 1, 5])
@pytest.mark.parametrize("block", [16, 1024])
def test_the_kernel_equals_the_definition_on_short_texts(
    gpu: str, drafts: int, size: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{ngram.__module__}.BLOCK", block)
    generator = torch.Generator().manual_seed(drafts + size)
    tokens = torch.randint(3, (64, 60), generator=generator)[:, :47]
    known = torch.randint(1, 48, (64,), generator=generator)
    expected = ngram_ref(tokens, known, drafts, size)
    with guarded_output((64, drafts), torch.int64, gpu) as drafted:
        out = drafted, torch.empty(64, dtype=torch.bool, device=gpu)
        found = ngram(tokens.to(gpu), known.to(gpu), drafts, size, out=out)[1]
        assert torch.equal(drafted.cpu(), expected[0]) and torch.equal(found.cpu(), expected[1])
    assert bool(expected[1].any()) and not bool(expected[1].all())


@pytest.mark.parametrize("block", [16, 1024])
def test_the_kernel_finds_a_match_anywhere_in_a_long_text(
    gpu: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any of three blocks, or of more than the 128 whose matches are compared at a time."""
    monkeypatch.setattr(f"{ngram.__module__}.BLOCK", block)
    places = [0, 1, 1020, 1021, 1023, 1024, 1025, 2046, 2047, 2048, 2049]
    tokens = torch.arange(10, 10 + 2100).repeat(len(places), 1)
    known = torch.tensor([2060 + b for b in range(len(places))])
    for b, place in enumerate(places):
        tokens[b, int(known[b]) - 3 : int(known[b])] = tokens[b, place : place + 3]
    drafts, found = ngram(tokens.to(gpu), known.to(gpu), 4)
    expected = ngram_ref(tokens, known, 4)
    assert torch.equal(drafts.cpu(), expected[0]) and bool(found.all())
    assert drafts[:, 0].tolist() == [10 + place + 3 for place in places]


def test_the_latest_of_two_matches_wins_wherever_they_are(
    gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where more than 128 blocks lie between them."""
    monkeypatch.setattr(f"{ngram.__module__}.BLOCK", 16)
    tokens = torch.arange(10, 10 + 2400).repeat(3, 1)
    tokens[:, 5:8] = tokens[:, 2390:2393] = torch.tensor([1, 2, 3])
    for b, later in enumerate((700, 2060, 2300)):
        tokens[b, later : later + 3] = tokens[b, 5:8]
    known = torch.full((3,), 2393)
    drafts, found = ngram(tokens.to(gpu), known.to(gpu), 2)
    assert bool(found.all())
    assert drafts.tolist() == [[10 + n + 3, 10 + n + 4] for n in (700, 2060, 2300)]


def test_a_long_text_is_searched_by_many_blocks() -> None:
    """Of 1,024 starts each: one block would take some 55 us for 32k tokens."""
    pretend_gpu = pytest.importorskip("pretend_gpu").pretend_gpu
    with pretend_gpu() as gpu:
        ngram(torch.zeros(2, 32768, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), 4)
    assert BLOCK <= 1024
    assert gpu.grids == {"_latest_match_kernel": {(32, 2)}, "_ngram_kernel": {(2,)}}


def test_arguments_that_do_not_fit_are_named() -> None:
    tokens = torch.zeros(2, 9, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"known must be \[B\]=\[2\], got \[3\]"):
        ngram(tokens, torch.zeros(3, dtype=torch.int64), 4)
    with pytest.raises(
        ValueError, match="size must be 1 or more and drafts 0 or more, got 0 and 4"
    ):
        ngram(tokens, tokens[0, :2], 4, 0)
