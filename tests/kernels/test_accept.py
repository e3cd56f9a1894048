"""accept: the longest agreeing prefix, and the model's own token after it."""

import itertools

import pytest
import torch
from kernel_checks import guarded_output

from mtpkern.kernels.accept import accept, accept_ref


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


@pytest.mark.parametrize("T", [1, 2, 5, 17, 64])
def test_the_kernel_decides_as_the_definition_does(gpu: str, T: int) -> None:
    torch.manual_seed(T)
    target = torch.randint(2**40, (7, T + 2))[:, :T]
    window = torch.randint(2**40, (7, T + 3))[:, 3:]
    for b in range(7):
        standing = min(T - 1, b * T // 6)
        window[b, 1 : 1 + standing] = target[b, :standing]
    # A draft that agrees after one that does not is not accepted.
    window[0, 2:] = target[0, 1:-1]
    with (
        guarded_output((7,), torch.int64, gpu) as accepted,
        guarded_output((7,), torch.int64, gpu) as bonus,
    ):
        accept(window.to(gpu), target.to(gpu), out=(accepted, bonus))
        expected = accept_ref(window, target)
        assert torch.equal(accepted.cpu(), expected[0]) and torch.equal(bonus.cpu(), expected[1])


def test_the_launcher_names_what_does_not_fit() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"target must be \[B, T\]=\[2, 3\], got \[2, 4\]"):
        accept(ids, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="window must be torch.int64, got torch.int32"):
        accept(ids.int(), ids)
