"""accept: the longest agreeing prefix, and the token that the model itself puts after it."""

import itertools

import pytest
import torch

from mtpkern.kernels.accept import accept_ref


@pytest.mark.parametrize("k", range(5))
def test_every_pattern_of_agreement(k: int) -> None:
    patterns = list(itertools.product([True, False], repeat=k))
    target = torch.arange(len(patterns) * (k + 1)).view(len(patterns), k + 1)
    window = torch.full_like(target, -1)
    for b, pattern in enumerate(patterns):
        for i, agrees in enumerate(pattern):
            window[b, i + 1] = target[b, i] if agrees else -2
    accepted, bonus = accept_ref(window, target)
    for b, pattern in enumerate(patterns):
        expected = len(list(itertools.takewhile(bool, pattern)))
        assert (int(accepted[b]), int(bonus[b])) == (expected, int(target[b, expected]))


def test_shapes_that_differ_are_named() -> None:
    with pytest.raises(ValueError, match=r"target must be \[B, T\]=\[2, 3\]"):
        accept_ref(torch.zeros(2, 3), torch.zeros(2, 4))
