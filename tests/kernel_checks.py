"""For the kernel tests: outputs that reveal stray writes, and the budget of an error."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def guarded_output(shape: Sequence[int], dtype: torch.dtype, device: str) -> Iterator[Tensor]:
    """An output filled with NaN (integers: -77) inside a tensor of sevens that must not change."""
    around = torch.full([n + 6 for n in shape], 7, dtype=dtype, device=device)
    inside = around[tuple(slice(3, -3) for _ in shape)]
    inside.fill_(float("nan") if dtype.is_floating_point else -77)
    yield inside
    inside.fill_(7)
    assert bool((around == 7).all()), "the kernel wrote outside its output"


def assert_within_budget(out: Tensor, in_dtype: Tensor, truth: Tensor, *, terms: int) -> None:
    """Assert err(out) <= 2 err(in_dtype), both against `truth` in float64.

    Since err(in_dtype) may be small by chance, two allowances are added: one rounding to the dtype,
    and float32 sums of `terms` terms in another order.
    """
    if truth.numel():
        granted = torch.finfo(out.dtype).eps + 2 * torch.finfo(torch.float32).eps * terms**0.5
        budget = 2 * (in_dtype.double() - truth).abs().max() + granted * truth.abs().max()
        torch.testing.assert_close(out.cpu().double(), truth, atol=float(budget), rtol=0)
