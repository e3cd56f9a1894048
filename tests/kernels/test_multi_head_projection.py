"""multi_head_projection: the LM head and every parallel head as the equations say."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import assert_within_budget, guarded_output
from torch import Tensor

from mtpkern.kernels import _launch
from mtpkern.kernels.medusa_blocks import medusa_blocks_ref
from mtpkern.kernels.multi_head_projection import (
    Projection,
    multi_head_projection,
    multi_head_projection_ref,
)
from mtpkern.kernels.rms_norm import rms_norm_ref


def defined_logits(rows: Tensor, head: Tensor) -> Tensor:
    """rows [R, n, E], head [V, E] -> [R, n, V], as the definition writes them out."""
    flat = rows.flatten(0, 1)
    logits = multi_head_projection_ref(flat, head, logits_rows=len(flat)).logits
    assert logits is not None
    return logits.view(*rows.shape[:2], -1)


def test_each_head_is_its_stack_of_residual_blocks_through_the_same_vocabulary() -> None:
    torch.manual_seed(0)
    width, vocabulary, rows = 24, 101, 5
    x, norm, head = torch.randn(rows, width), torch.randn(width), torch.randn(vocabulary, width)
    w, bias = torch.randn(3, 2, width, width), torch.randn(3, 2, width)
    normed = rms_norm_ref(x, norm, 1e-5)
    logits = defined_logits(medusa_blocks_ref(normed, w, bias), head)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm
    torch.testing.assert_close(normed, expected)
    torch.testing.assert_close(logits[:, 0], expected @ head.T, atol=1e-4, rtol=1e-4)
    for h in range(3):
        hidden = expected
        for w_d, b in zip(w[h], bias[h], strict=True):
            hidden = hidden + F.silu(hidden @ w_d.T + b)
        torch.testing.assert_close(logits[:, 1 + h], hidden @ head.T, atol=1e-2, rtol=1e-4)


def test_other_heads_do_not_change_the_bits_of_the_lm_head() -> None:
    torch.manual_seed(0)
    x, norm, head = (torch.randn(shape).bfloat16() for shape in ((5, 24), 24, (101, 24)))
    w, bias = torch.randn(4, 1, 24, 24).bfloat16(), torch.randn(4, 1, 24).bfloat16()
    normed = rms_norm_ref(x, norm, 1e-5)
    alone = defined_logits(normed[2:3, None], head)
    beside = defined_logits(medusa_blocks_ref(normed, w, bias), head)
    torch.testing.assert_close(beside[2, 0], alone[0, 0], atol=0, rtol=0)


def test_the_definition_ranks_logits_sums_exponentials_and_looks_up_ids() -> None:
    logits, token_ids = torch.zeros(2, 40), torch.arange(40) * 3
    logits[0, [7, 30, 31]] = 1.0
    logits[1] = -torch.arange(40.0)
    given = torch.tensor([[21, 22], [-1, 117]])
    rows, vocabulary = torch.eye(2), logits.T.contiguous()
    found = multi_head_projection_ref(
        rows, vocabulary, top_k=4, given=given, logits_rows=1, token_ids=token_ids
    )
    assert found.ids.tolist() == [[21, 90, 93, 0], [0, 3, 6, 9]]
    assert found.values.tolist() == [[1, 1, 1, 0], [0, -1, -2, -3]]
    torch.testing.assert_close(found.logsumexp, logits.logsumexp(-1))
    assert found.given is not None and found.logits is not None
    assert found.given.tolist() == [[1, -float("inf")], [-float("inf"), -39]]
    assert torch.equal(found.logits, logits[:1])


# R, V, E: empty, one row, one past a tile, a tier and a pass; odd, prime.
LAUNCHES = [
    (0, 16, 16),
    (1, 1, 1),
    (5, 7, 13),
    (17, 129, 65),
    (33, 131, 64),
    (133, 257, 40),
    (257, 128, 33),
]


class Truth(NamedTuple):
    """The logits in float64, and in the inputs' dtype."""

    logits: Tensor
    in_dtype: Tensor


def make(R: int, V: int, E: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Truth]:
    torch.manual_seed(R + V + E)
    hidden, vocabulary = torch.randn(R, E).to(dtype), torch.randn(V, E).to(dtype)
    truth = Truth(hidden.double() @ vocabulary.double().T, hidden @ vocabulary.T)
    return hidden, vocabulary, truth


@pytest.mark.parametrize(
    ("dtype", "capability"), [(torch.float32, 80), (torch.bfloat16, 80), (torch.bfloat16, 90)]
)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_values_logsumexp_given_and_logits_are_within_twice_the_error_of_the_dtype(
    gpu: str,
    launch: tuple[int, int, int],
    dtype: torch.dtype,
    capability: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the tiles of mma.sync, and with those of wgmma."""
    monkeypatch.setattr(_launch, "compute_capability", lambda: capability)
    (R, V, E), n = launch, 3
    hidden, vocabulary, truth = make(*launch, dtype)
    top_k, rows = min(V, 3), R - R // 3
    given = torch.randint(V, (R, n))
    with (
        guarded_output((R, top_k), torch.float32, gpu) as values,
        guarded_output((R, top_k), torch.int64, gpu) as ids,
        guarded_output((R,), torch.float32, gpu) as logsumexp,
        guarded_output((R, n), torch.float32, gpu) as given_logits,
        guarded_output((rows, V), torch.float32, gpu) as logits,
    ):
        out = Projection(values, ids, logsumexp, given_logits, logits if rows else None)
        multi_head_projection(
            hidden.to(gpu),
            vocabulary.to(gpu),
            top_k=top_k,
            given=given.to(gpu),
            logits_rows=rows,
            out=out,
        )
        assert_within_budget(logits, truth.in_dtype[:rows], truth.logits[:rows], terms=E)
        for found, of in (
            (values, lambda logits: logits.topk(top_k).values),
            (logsumexp, lambda logits: logits.logsumexp(-1)),
            (given_logits, lambda logits: logits.gather(1, given)),
        ):
            assert_within_budget(found, of(truth.in_dtype), of(truth.logits), terms=E + V)
        # The ids, and all else, are those of the logits that were written.
        at = values.cpu()[:rows], ids.cpu()[:rows], given_logits.cpu()[:rows]
        written = logits.cpu()
        torch.testing.assert_close(at[0], written.topk(top_k).values, atol=0, rtol=0)
        torch.testing.assert_close(written.gather(1, at[1]), at[0], atol=0, rtol=0)
        torch.testing.assert_close(written.gather(1, given[:rows]), at[2], atol=0, rtol=0)


def chosen(gpu: str, logits: Tensor, **arguments: Any) -> Projection:
    """What a projection keeps of these logits [R, V], which it finds by multiplying with 1."""
    rows = torch.eye(logits.shape[0]).to(gpu)
    return multi_head_projection(rows, logits.T.contiguous().to(gpu), **arguments)


def test_between_equal_logits_the_lowest_id_comes_first_across_tiles_too(gpu: str) -> None:
    logits = torch.zeros(3, 300)
    logits[0, [7, 130, 131, 290]] = 1.0
    logits[1, 299] = -0.0
    logits[2] = -torch.arange(300.0)
    logits[2, [128, 256]] = 5.0
    found = chosen(gpu, logits, top_k=5)
    expected = [[7, 130, 131, 290, 0], [0, 1, 2, 3, 4], [128, 256, 0, 1, 2]]
    assert found.ids.tolist() == expected
    assert found.values.tolist() == [[1, 1, 1, 1, 0], [0] * 5, [5, 5, 0, -1, -2]]
    torch.testing.assert_close(found.logsumexp.cpu(), logits.logsumexp(-1))


def test_infinite_logits_and_nan_do_what_they_do_in_torch(gpu: str) -> None:
    """One row per launch, whose logits 0 x inf does not change."""
    inf, nan = float("inf"), float("nan")
    for special in ([(5, inf)], [(5, -inf)], [(200, nan), (250, nan)], [(5, inf), (200, inf)]):
        logits = torch.randn(1, 270)
        for column, value in special:
            logits[0, column] = value
        found = chosen(gpu, logits, top_k=1)
        assert int(found.ids) == int(logits.max(-1).indices)
        expected = logits.amax(-1), logits.logsumexp(-1)
        torch.testing.assert_close(found.values[0].cpu(), expected[0], equal_nan=True)
        torch.testing.assert_close(found.logsumexp.cpu(), expected[1], equal_nan=True)
    found = chosen(gpu, torch.full((1, 270), -inf), top_k=3)
    assert found.ids.tolist() == [[0, 1, 2]] and found.logsumexp.tolist() == [-inf]


def test_large_logits_do_not_overflow_the_sum(gpu: str) -> None:
    logits = torch.randn(4, 391) * torch.tensor([1.0, 100.0, 1e4, 1e30])[:, None]
    found = chosen(gpu, logits)
    torch.testing.assert_close(found.logsumexp.cpu(), logits.logsumexp(-1))


def test_a_reduced_vocabulary_is_addressed_by_token_id(gpu: str) -> None:
    torch.manual_seed(3)
    logits, token_ids = torch.randn(6, 150), torch.randperm(1000)[:150]
    given = torch.stack([token_ids[:6], token_ids[140:146]], 1)
    given[2, 0] = next(i for i in range(1000) if i not in token_ids)
    given[3, 1] = -1
    found = chosen(gpu, logits, top_k=2, given=given.to(gpu), token_ids=token_ids.to(gpu))
    assert torch.equal(found.ids.cpu(), token_ids[logits.topk(2).indices])
    expected = torch.stack([logits[range(6), range(6)], logits[range(6), range(140, 146)]], 1)
    expected[2, 0] = expected[3, 1] = -float("inf")
    assert found.given is not None
    torch.testing.assert_close(found.given.cpu(), expected, atol=0, rtol=0)


def test_an_id_outside_of_the_vocabulary_has_no_logit(gpu: str) -> None:
    given = torch.tensor([[-1, 0, 149, 150, 2**40]]).to(gpu)
    found = chosen(gpu, torch.ones(1, 150), given=given).given
    assert found is not None
    assert found.tolist() == [[-float("inf"), 1, 1, -float("inf"), -float("inf")]]


@pytest.mark.parametrize("tier", [16, 32, 64])
def test_a_row_keeps_its_bits_within_a_tier(gpu: str, tier: int) -> None:
    hidden, vocabulary, _ = make(tier, 200, 72, torch.bfloat16)
    hidden, vocabulary = hidden.to(gpu), vocabulary.to(gpu)

    def kept(rows: Tensor, **more: Any) -> Tensor:
        found = multi_head_projection(rows, vocabulary, logits_rows=len(rows), **more)
        assert found.logits is not None
        alone = found.values[:, :1], found.ids[:, :1].float(), found.logsumexp[:, None]
        return torch.cat([*alone, found.logits], 1)

    expected = kept(hidden)
    for count in (tier // 2 + 1, tier - 1):
        for shift in (0, 3):
            rows = kept(hidden.roll(shift, 0)[:count])
            torch.testing.assert_close(rows, expected.roll(shift, 0)[:count], atol=0, rtol=0)
    given = torch.zeros(tier, 2, dtype=torch.int64, device=gpu)
    torch.testing.assert_close(kept(hidden, top_k=4, given=given), expected, atol=0, rtol=0)
    hidden[1:] = float("nan")
    torch.testing.assert_close(kept(hidden)[0], expected[0], atol=0, rtol=0)


def test_a_row_keeps_its_bits_across_tiers(gpu: str) -> None:
    """Exact on a GPU, where all tiers multiply with one instruction; a CPU's dot depends on shape,
    but the ids, and the sum of given logits, are as good there.
    """
    hidden, vocabulary, _ = make(300, 391, 72, torch.bfloat16)
    hidden, vocabulary = hidden.to(gpu), vocabulary.to(gpu)
    exact = dict(atol=0, rtol=0) if torch.version.cuda else {}
    expected = multi_head_projection(hidden[:1], vocabulary, logits_rows=1)
    for rows in (20, 64, 100, 160, 256, 300):
        found = multi_head_projection(hidden[:rows], vocabulary, logits_rows=1)
        assert torch.equal(found.ids[:1], expected.ids)
        for of in ("values", "logsumexp", "logits"):
            torch.testing.assert_close(getattr(found, of)[:1], getattr(expected, of), **exact)


def test_arguments_that_do_not_fit_are_named() -> None:
    hidden, vocabulary = torch.randn(5, 24), torch.randn(31, 24)
    ids = torch.zeros(5, 2, dtype=torch.int64)
    refused: list[tuple[str, dict[str, Any]]] = [
        (
            r"vocabulary must be \[V, E\]=\[31, 24\], got \[31, 23\]",
            dict(vocabulary=vocabulary[:, :23]),
        ),
        (r"vocabulary must have hidden's dtype torch.float32", dict(vocabulary=vocabulary.half())),
        (r"top_k must be 1\.\.V=31, got 32", dict(top_k=32)),
        (r"top_k must be 1\.\.V=31, got 0", dict(top_k=0)),
        (r"logits_rows must be 0\.\.R=5, got 6", dict(logits_rows=6)),
        (r"given must be \[R, n\]=\[5, 2\], got \[4, 2\]", dict(given=ids[:4])),
        (r"token_ids must be \[V\]=\[31\], got \[2\]", dict(token_ids=ids[0])),
    ]
    for message, change in refused:
        with pytest.raises(ValueError, match=message):
            multi_head_projection(**(dict(hidden=hidden, vocabulary=vocabulary) | change))
    values, logsumexp = torch.empty(5, 1), torch.empty(5)
    out = Projection(values, ids[:, :1], logsumexp, None, None)
    with pytest.raises(ValueError, match=r"out.values must be \[R, top_k\]=\[5, 2\], got \[5, 1\]"):
        multi_head_projection(hidden, vocabulary, top_k=2, out=out)
    with pytest.raises(ValueError, match="out must have given and logits exactly where"):
        multi_head_projection(hidden, vocabulary, given=ids, out=out)
