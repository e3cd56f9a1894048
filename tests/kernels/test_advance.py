"""advance: what a step decided reaches the cache, the tokens and the ring as defined."""

import pytest
import torch
from ending_steps import make

from mtpkern.kernels.advance import STEP_MASK, Progress, advance, advance_ref


@pytest.mark.parametrize("rows", [1, 2, 5, 17, 64])
@pytest.mark.parametrize("with_logprobs", [False, True])
def test_the_kernel_ends_a_step_as_the_definition_does(
    gpu: str, rows: int, with_logprobs: bool
) -> None:
    for batch, seed in ((1, 0), (7, 1), (33, 2)):
        window, target, largest, progress = make(batch, rows, seed)
        logprobs = -torch.rand(batch, rows, generator=torch.Generator().manual_seed(3))
        wider = torch.nn.functional.pad(largest, (0, 3)).to(gpu)
        given = (window.to(gpu).clone(), target.to(gpu), wider[:, :rows])
        on_gpu = Progress(*(t.to(gpu).clone() for t in progress))
        out = advance(*given, logprobs.to(gpu) if with_logprobs else None, on_gpu)
        of_both = logprobs if with_logprobs else None
        expected = advance_ref(window, target, largest, of_both, progress)
        for mine, theirs in zip((*out, given[0]), (*expected, window), strict=True):
            torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=0)
        written = 1 + rows * (2 if with_logprobs else 1)
        for name, mine, theirs in zip(Progress._fields, on_gpu, progress, strict=True):
            if name == "ring":
                mine, theirs = mine[..., :written], theirs[..., :written]
            torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=0, msg=name)


def test_a_word_of_the_ring_carries_its_step_and_its_content() -> None:
    window, target, _, progress = make(4, 3, 5)
    largest = torch.ones(4, 3)
    before = progress.active.clone()
    logprobs = torch.tensor([[-0.5, -1.5, -2.5]] * 4)
    accepted, _ = advance_ref(window, target, largest, logprobs, progress)
    step = int(progress.clock[0])
    words = progress.ring[step % 3]
    assert (words[:, :7] >> 32 == step & STEP_MASK).all()
    assert torch.equal(words[:, 0] & 0xFF, accepted)
    assert torch.equal(words[:, 0] >> 24 & 0xFF, before)
    assert torch.equal(words[:, 1:4] & 0xFFFFFFFF, target)
    assert torch.equal(words[:, 4:7].to(torch.int32).view(torch.float32), logprobs)


def test_a_finished_sequence_stays_as_it_is() -> None:
    window, target, _, progress = make(6, 4, 7)
    progress.active.zero_()
    before = [t.clone() for t in (*progress[:3], window)]
    _, count = advance_ref(window, target, torch.full((6, 4), torch.nan), None, progress)
    assert not count.any() and not (progress.ring >> 24 & 0xFF).any()
    for mine, theirs in zip((*progress[:3], window), before, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_no_draft_is_accepted_after_a_row_whose_largest_logit_is_not_finite(value: float) -> None:
    """Two of three drafts agree; the logits of each row in turn are not finite."""
    for row in range(4):
        _, _, _, progress = make(1, 4, 0)
        progress.active.fill_(1), progress.limits.fill_(100), progress.ends.fill_(-1)
        before = progress.lengths.clone()
        window, target = torch.tensor([[9, 1, 2, 3]]), torch.tensor([[1, 2, 8, 4]])
        largest = torch.ones(1, 4)
        largest[0, row] = value
        accepted, count = advance_ref(window, target, largest, None, progress)
        state = progress.ring[progress.clock % 3, 0, 0] >> 24 & 0xFF
        assert int(accepted) == min(row, 2) and int(count) == int(accepted) + 1
        assert torch.equal(progress.lengths, before + count)
        assert (int(state), int(progress.active)) == ((3, 0) if row < 3 else (1, 1))


def test_a_sequence_ends_at_its_limit_and_at_its_tokens() -> None:
    def after(limit: int, end: int) -> int:
        window, target = torch.tensor([[9, 1, 2]]), torch.tensor([[1, 2, 3]])
        one = torch.ones(1, dtype=torch.int64)
        progress = Progress(
            torch.zeros(1, 20).long(),
            4 * one,
            one.clone(),
            limit * one,
            torch.tensor([[-1, end]]),
            one,
            one,
            one,
            torch.zeros(2, 1, 7).long(),
        )
        advance_ref(window, target, torch.ones(1, 3), None, progress)
        assert progress.lengths.item() == 7
        return int(progress.active)

    assert after(limit=9, end=7) == 1
    assert after(limit=8, end=7) == 0
    for end in (1, 2, 3):
        assert after(limit=100, end=end) == 0
