"""sample: the right distribution, the right filters, and noise that depends on nothing else."""

import pytest
import torch
from kernel_checks import guarded_output
from torch import Tensor

from mtpkern.kernels.sample import (
    SamplingRows,
    gumbel_ref,
    gumbel_sample,
    sample,
    sample_ref,
    sampling_key,
)


def rows(
    batch: int = 1,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
) -> SamplingRows:
    return SamplingRows(
        torch.full((batch,), temperature),
        torch.full((batch,), top_k),
        torch.full((batch,), top_p),
        torch.full((batch,), min_p),
        torch.tensor([sampling_key(seed, 0)] * batch),
    )


def draw(logits: Tensor, count: int, settings: SamplingRows) -> Tensor:
    """One token at each of `count` positions, all from the same logits [n]."""
    return gumbel_sample(logits.expand(1, count, -1), torch.arange(count)[None], settings)[0]


def test_greedy_takes_the_lowest_of_equal_logits() -> None:
    logits = torch.tensor([[[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]]])
    position = torch.zeros(1, 2, dtype=torch.int64)
    assert gumbel_sample(logits, position, rows(temperature=0.0)).tolist() == [[1, 0]]
    assert gumbel_sample(logits.bfloat16(), position, rows(temperature=0.0)).tolist() == [[1, 0]]
    assert sample_ref(logits[0]).tolist() == sample_ref(logits[0].bfloat16()).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    torch.manual_seed(0)
    logits, count = torch.randn(12) * 2, 200_000
    expected = (logits / temperature).softmax(-1) * count
    drawn = draw(logits, count, rows(temperature=temperature, seed=5)).bincount(minlength=12)
    chi_square = ((drawn - expected) ** 2 / expected).sum()
    # The 0.999 quantile of chi-square with 11 degrees of freedom.
    assert chi_square < 31.3


def test_noise_is_uniform_and_uncorrelated_along_every_counter() -> None:
    keys = torch.tensor([sampling_key(seed, index) for seed in range(40) for index in range(5)])
    position = torch.arange(100).repeat(2)
    noise = gumbel_ref(keys, position, torch.arange(500))
    uniform = (-(-noise).exp()).exp()
    assert abs(uniform.mean() - 0.5) < 5 / (12 * uniform.numel()) ** 0.5
    counts = uniform.view(-1).mul(100).long().clamp_(max=99).bincount(minlength=100)
    expected = uniform.numel() / 100
    assert ((counts - expected) ** 2 / expected).sum() < 148.2  # 99 degrees of freedom, 0.999
    for other in (uniform.roll(1, 0), uniform.roll(1, 1)):
        correlation = torch.corrcoef(torch.stack([uniform.view(-1), other.view(-1)]))[0, 1]
        assert abs(correlation) < 5 / uniform.numel() ** 0.5


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (dict(top_k=2), {3, 1}),
        (dict(top_p=0.5), {3}),
        (dict(top_p=0.7), {3, 1}),
        (dict(min_p=0.2), {3, 1, 0}),
        (dict(top_k=3, top_p=0.99), {3, 1, 0}),
        (dict(top_k=1), {3}),
        (dict(min_p=1.0), {3}),
        (dict(top_p=1e-6), {3}),
    ],
)
def test_filters_keep_the_tokens_that_their_definitions_keep(
    settings: dict[str, float], kept: set[int]
) -> None:
    logits = torch.tensor([0.14, 0.22, 0.04, 0.6]).log()
    drawn = draw(logits, 4000, rows(**settings))  # type: ignore[arg-type]
    assert set(drawn.tolist()) == kept


def test_a_token_depends_on_its_position_and_seed_and_not_on_its_neighbours() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 1000)
    position = torch.tensor([[7, 8, 9, 10, 11], [100, 101, 102, 103, 104], [0, 1, 2, 3, 4]])
    settings = rows(3, top_p=0.9, min_p=0.01)
    together = gumbel_sample(logits, position, settings)
    for b in range(3):
        one = SamplingRows(*(t[b : b + 1] for t in settings))
        for t in range(5):
            alone = gumbel_sample(logits[b : b + 1, t : t + 1], position[b : b + 1, t : t + 1], one)
            assert int(alone) == int(together[b, t])
    flat = torch.zeros(1, 60, 50)
    here, there = torch.arange(60)[None], torch.arange(1, 61)[None]
    first = gumbel_sample(flat, here, rows())
    assert torch.equal(first, gumbel_sample(flat, here, rows()))
    assert torch.equal(first[:, 1:], gumbel_sample(flat, there, rows())[:, :-1])
    assert not torch.equal(first, gumbel_sample(flat, here, rows(seed=1)))


def test_a_key_is_the_same_in_every_process_and_of_one_prompt_alone() -> None:
    assert sampling_key(7, 3, [5, 9, 200]) == 8084376279085121014
    others = [sampling_key(8, 3, [5, 9, 200]), sampling_key(7, 4, [5, 9, 200])]
    others += [sampling_key(7, 3, prompt) for prompt in ([5, 9, 201], [9, 5, 200], [5, 9, 200, 0])]
    assert len({sampling_key(7, 3, [5, 9, 200]), *others}) == 6
    # Recordings of answers that were begun with it go on with it.
    assert sampling_key(7, 3) == 7736421098321668917


@pytest.mark.parametrize("temperature", [9e-6, 1e-12, 1e-30, 1e-39, 1e-45])
def test_towards_temperature_0_the_choice_is_the_greedy_one(temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 50, 300) * torch.logspace(-30, 35, 50)[:, None]
    logits[:, ::2, 3] = logits[:, ::2].amax(-1)
    position = torch.arange(50)[None]
    expected = gumbel_sample(logits, position, rows(temperature=0.0))
    for settings in ({}, {"top_p": 0.9, "top_k": 5}, {"min_p": 0.1}):
        chosen = gumbel_sample(logits, position, rows(temperature=temperature, **settings))
        assert torch.equal(chosen, expected)


def test_large_logits_over_a_small_temperature_do_not_overflow() -> None:
    logits = torch.tensor([3e38, 2.9e38, -3e38, 0.0])
    for settings in ({}, {"top_p": 0.9, "top_k": 2}, {"min_p": 0.1}):
        assert set(draw(logits, 50, rows(temperature=1e-4, **settings)).tolist()) == {0}
    # Two near the top differ by one, which at temperature 1 is a factor of e.
    near = draw(torch.tensor([2.0**23, 2.0**23 + 1]), 20_000, rows()).float().mean()
    assert abs(near - 0.731) < 0.015


def test_a_reduced_vocabulary_draws_the_same_token_where_it_holds_it() -> None:
    """The heads' guess uses the noise of the token's own id, not of its column."""
    torch.manual_seed(0)
    logits = torch.randn(1, 200, 64)
    position = torch.arange(200)[None]
    full = gumbel_sample(logits, position, rows())
    ids = torch.arange(0, 64, 2)
    part = gumbel_sample(logits[..., ids], position, rows(), ids)
    even = full % 2 == 0
    assert even.any() and torch.equal(part[even], full[even])
    assert (part % 2 == 0).all()


def test_one_batch_may_mix_greedy_and_sampled_sequences() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 30, 64)
    position = torch.arange(30).expand(2, 30)
    mixed = rows(2)
    mixed.temperature[0] = 0.0
    drawn = gumbel_sample(logits, position, mixed)
    assert torch.equal(drawn[0], logits[0].argmax(-1))
    assert not torch.equal(drawn[1], logits[1].argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 2, 4095, 4096, 4097, 9001])
def test_the_greedy_kernel_takes_the_lowest_of_the_largest(
    gpu: str, columns: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(columns)
    logits = torch.randn(9, columns + 5).to(dtype)[:, :columns]
    logits[1] = -torch.inf
    logits[2, columns // 2 :] = 1e30
    logits[3] = torch.tensor([-0.0, 0.0]).repeat(columns)[:columns]
    logits[4, -1] = logits[4, 0] = 50.0
    logits[5, columns // 3] = torch.inf
    logits[6] = -logits[6].abs() - 1
    logits[7, [columns // 2, -1]] = torch.nan
    token_ids = torch.randperm(2 * columns)[:columns]
    expected = torch.stack([(row == row.max()).nonzero()[0, 0] for row in logits.float()[:7]])
    with guarded_output((9,), torch.int64, gpu) as out:
        found = sample(logits.to(gpu), out=out).cpu().clone()
        assert torch.equal(found[:7], expected) and int(found[7]) == columns // 2
        assert int(found[8]) == int(logits[8].float().argmax())
        named = sample(logits.to(gpu), token_ids.to(gpu), out=out).cpu()
        assert torch.equal(named, token_ids[found])


def test_the_greedy_kernel_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"logits must be \[R, n\] with n >= 1, got \[3, 0\]"):
        sample(torch.empty(3, 0))
    with pytest.raises(ValueError, match=r"token_ids must be \[n\]=\[4\], got \[5\]"):
        sample(torch.empty(3, 4), torch.arange(5))
