"""ngram: the most recent earlier match, by brute force, and copies that never leave the text."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtpkern.kernels.ngram import ngram_ref


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
    # What lies behind the known tokens is garbage, and looks like a match.
    tokens = torch.tensor([(text * 48)[:48] for text in texts])
    known = torch.tensor([len(text) for text in texts])
    got, found = ngram_ref(tokens, known, drafts, size)
    for b, text in enumerate(texts):
        expected = brute_force(text, drafts, size)
        assert bool(found[b]) == (expected is not None)
        assert got[b].tolist() == (expected or [0] * drafts)
