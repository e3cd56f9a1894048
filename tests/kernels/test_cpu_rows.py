"""CPU kernels for rows: norm, activation, rotation, attention and the vocabulary, against the
definitions in float32, and bit for bit against themselves."""

import numpy as np
import pytest
import torch
from cpu_machine import as_floats, floats, helpers, kernels, program, random_quants, same_bits
from paged import Paged, fill, make_paged

from mtpkern.kernels.cpu._compile import Kernels
from mtpkern.kernels.cpu._layout import SPLIT
from mtpkern.kernels.cpu.program import LayerCache, Norm, Program
from mtpkern.kernels.cpu.weights import interleaved, pack
from mtpkern.kernels.gate_up_silu import gate_up_silu_ref
from mtpkern.kernels.linear import linear_ref
from mtpkern.kernels.qkv_rope_cache import qkv_rope_cache_ref
from mtpkern.kernels.rms_norm import rms_norm_ref
from mtpkern.kernels.verify_attention import verify_attention_ref

ROWS, GROUP, HK, D, E = 5, 3, 2, 32, 64
LENGTHS = [0, 1, 63, 2 * SPLIT - 3]


def normal(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(out: np.ndarray, truth: torch.Tensor, parts: float = 2e-6) -> None:
    """Within some units in the last place of the largest number."""
    error = (torch.from_numpy(out) - truth).abs().max()
    assert error <= parts * truth.abs().max(), float(error / truth.abs().max())


@pytest.mark.parametrize("columns", [8, 24, 64, 576])
def test_a_norm_is_the_definition(columns):
    x, w = normal(ROWS, columns), 1 + normal(columns) / 10
    p = program(ROWS)
    source, out = p.buffer(columns), p.buffer(columns)
    source[:] = x
    p.norm(source, Norm(w.numpy(), 1e-5), out)
    p.run(ROWS)
    close(out, rms_norm_ref(x, w, 1e-5), 5e-7)


def gated(x: torch.Tensor, gate_up: torch.Tensor, bias: torch.Tensor | None, eps: float):
    F = gate_up.shape[0] // 2
    p = program(len(x))
    source, out = p.buffer(x.shape[1]), p.buffer(F)
    source[:] = x
    w = pack(floats(gate_up), bias, interleaved(F))
    p.gate_up_silu(source, w, out, norm=Norm(np.ones(x.shape[1], np.float32), eps))
    p.run(len(x))
    return out


@pytest.mark.parametrize("biased", [False, True])
def test_gate_and_up_are_the_definition(biased):
    x, w = normal(ROWS, E), normal(2 * 200, E, seed=4)
    bias = normal(400, seed=5) if biased else None
    truth = gate_up_silu_ref(x, torch.ones(E), 1e-5, w, bias)
    close(gated(x, w, bias, 1e-5), truth)


def test_silu_reaches_its_ends():
    """Gates from -120 to 120, one at a time, times an up of 1."""
    gates = torch.linspace(-120, 120, 4000).view(-1, 8)
    x = torch.ones(1, 8)
    out = []
    for some in gates:
        out.append(gated(x, torch.cat([torch.diag(some), torch.eye(8)]), None, 0.0)[0])
    truth = torch.nn.functional.silu(gates.double())
    error = (torch.from_numpy(np.stack(out)).double() - truth).abs()
    # Below -88.7 the exponential overflows and what is left is 0, as in torch.
    assert (error <= 6e-7 * truth.abs() + 3e-37).all()


def make_program(paged: Paged, batch: int, rows: int, threads: int = 1) -> Program:
    p = program(batch * rows, threads=threads, max_batch=batch)
    p.page_table = paged.page_table.numpy()
    return p


def paged_for(dtype: torch.dtype, page_size: int = 64) -> Paged:
    paged = make_paged(len(LENGTHS), 512 // page_size, page_size, HK, D, dtype)
    fill(paged, LENGTHS)
    return paged


@pytest.mark.parametrize("cuts", [[], [HK * GROUP], [HK * GROUP, HK * GROUP + HK]])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_q_k_and_v_are_the_definition(dtype, normed, cuts):
    heads = HK * GROUP + 2 * HK
    x, w = normal(len(LENGTHS) * ROWS, E), normal(heads * D, E, seed=4)
    bias, norm_w = normal(heads * D, seed=5), 1 + normal(E, seed=6) / 10
    head_norms = [1 + normal(D, seed=seed) / 10 if normed else None for seed in (7, 8)]
    truth, ours = paged_for(torch.float32), paged_for(dtype)
    q = qkv_rope_cache_ref(
        x,
        norm_w,
        1e-5,
        w,
        truth.k[0],
        truth.v[0],
        *truth.placed(LENGTHS, ROWS),
        bias=bias,
        q_norm=head_norms[0],
        k_norm=head_norms[1],
    )
    p = make_program(ours, len(LENGTHS), ROWS)
    source, out = p.buffer(E), p.buffer(heads * D)
    source[:] = x
    arrays = [None if n is None else n.numpy() for n in head_norms]
    pages = LayerCache(ours.k[0], ours.v[0], ours.cos, ours.sin, HK * GROUP, 0, *arrays)
    rows = [D * cut for cut in cuts]
    pairs = zip(w.tensor_split(rows), bias.tensor_split(rows), strict=True)
    parts = [pack(floats(part), b) for part, b in pairs]
    p.qkv_rope_cache(source, parts, out, pages, norm=Norm(norm_w.numpy(), 1e-5))
    p.lengths[:] = LENGTHS
    p.run(ROWS, len(LENGTHS))
    close(out[:, : HK * GROUP * D], q.reshape(len(x), -1))
    for b, length in enumerate(LENGTHS):
        for position in range(length, length + ROWS):
            at = truth.slot(b, position)
            for mine, theirs in ((ours.k, truth.k), (ours.v, truth.v)):
                rounding = torch.finfo(dtype).eps
                torch.testing.assert_close(
                    mine[0][at].float(), theirs[0][at], atol=1e-5, rtol=rounding
                )


def attended(
    paged: Paged, q: torch.Tensor, lengths: list[int], window: int = 0, threads: int = 1
) -> np.ndarray:
    batch, rows, heads, head_dim = q.shape
    p = make_program(paged, batch, rows, threads)
    source, out = p.buffer(heads * head_dim), p.buffer(heads * head_dim)
    source[:] = q.reshape(batch * rows, -1)
    p.attend(source, out, LayerCache(paged.k[0], paged.v[0], paged.cos, paged.sin, heads, window))
    p.lengths[:] = lengths
    p.run(rows, batch)
    return out.reshape(batch, rows, heads, head_dim)


@pytest.mark.parametrize("window", [0, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_is_the_definition(dtype, window):
    """The definition reads a cache of float32 with the same, already rounded, numbers."""
    paged = paged_for(dtype)
    fill(paged, [length + ROWS for length in LENGTHS])
    q = normal(len(LENGTHS), ROWS, HK * GROUP, D)
    out = attended(paged, q, LENGTHS, window)
    wide = paged._replace(k=paged.k.float(), v=paged.v.float())
    pages = wide.k[0], wide.v[0], wide.page_table
    truth = verify_attention_ref(q, *pages, torch.tensor(LENGTHS), window=window)
    close(out, truth)


@pytest.mark.parametrize("window", [0, 100])
def test_a_row_attends_with_the_same_bits_in_any_window_batch_and_thread(window):
    paged = paged_for(torch.float16)
    fill(paged, [length + 8 for length in LENGTHS])
    q = normal(len(LENGTHS), 8, HK * GROUP, D)
    whole = attended(paged, q, LENGTHS, window)
    assert np.isfinite(whole).all()
    for threads in (2, 3):
        assert same_bits(attended(paged, q, LENGTHS, window, threads), whole)
    for b, length in enumerate(LENGTHS):
        one = paged._replace(page_table=paged.page_table[b : b + 1])
        for first, rows in ((0, 1), (1, 2), (3, 5), (7, 1)):
            part = attended(one, q[b : b + 1, first : first + rows], [length + first], window)
            assert same_bits(part[0], np.ascontiguousarray(whole[b, first : first + rows]))


@pytest.mark.parametrize("head_dim, group", [(64, 1), (80, 3), (128, 4)])
def test_heads_of_any_size_attend_to_many_splits_with_any_number_of_threads(head_dim, group):
    """Registers hold 32 or 64 columns of two rows or one; splits are shared out by their number."""
    length, rows = 8 * SPLIT - 3, 5
    paged = make_paged(1, (length + rows) // 64 + 1, 64, HK, head_dim, torch.float16)
    fill(paged, [length + rows])
    q = normal(1, rows, HK * group, head_dim)
    whole = attended(paged, q, [length])
    wide = paged.k[0].float(), paged.v[0].float(), paged.page_table
    close(whole, verify_attention_ref(q, *wide, torch.tensor([length])))
    for threads in (2, 3, 5):
        assert same_bits(attended(paged, q, [length], threads=threads), whole)
        for t in range(rows):
            one = attended(paged, q[:, t : t + 1], [length + t], threads=threads)
            assert same_bits(one[0], np.ascontiguousarray(whole[:, t]))


def test_what_a_row_does_not_see_has_no_effect_on_it():
    """Slots past the window, and before a sliding one, hold NaN or infinity."""
    paged = paged_for(torch.float32)
    fill(paged, [length + ROWS for length in LENGTHS])
    q = normal(len(LENGTHS), ROWS, HK * GROUP, D)
    window = 40
    expected = attended(paged, q, LENGTHS, window)
    for b, length in enumerate(LENGTHS):
        unseen = [*range(0, length - window + 1), *range(length + ROWS, 512)]
        for position in unseen:
            paged.k[0][paged.slot(b, position)] = float("inf")
            paged.v[0][paged.slot(b, position)] = float("nan")
    assert np.isfinite(expected).all()
    assert same_bits(attended(paged, q, LENGTHS, window), expected)


def test_a_nan_in_a_key_reaches_the_rows_that_see_it():
    paged = paged_for(torch.float32)
    fill(paged, [length + ROWS for length in LENGTHS])
    paged.k[0][paged.slot(3, LENGTHS[3] + 2)] = float("nan")
    out = attended(paged, normal(len(LENGTHS), ROWS, HK * GROUP, D), LENGTHS)
    assert np.isfinite(out[:3]).all() and np.isfinite(out[3, :2]).all()
    assert np.isnan(out[3, 2:]).all()


def projected(x, w, rows=None, threads=1, logits=True, compiled: Kernels | None = None):
    p = Program(compiled or kernels(), helpers(threads), max_rows=len(x))
    source = p.buffer(x.shape[1])
    source[:] = x
    out = p.buffer(w.out_features) if logits else None
    best = p.project(source, w, norm=Norm(np.ones(x.shape[1], np.float32), 1e-5), logits=out)
    p.run(rows or len(x))
    return best, out


def test_a_vocabulary_is_the_definition():
    x, w = normal(ROWS, E), normal(1111, E, seed=4)
    best, logits = projected(x, pack(floats(w)))
    truth = linear_ref(rms_norm_ref(x, torch.ones(E), 1e-5), w)
    close(logits[:, :1111], truth)
    own = torch.from_numpy(logits[:, :1111]).double()
    assert np.array_equal(best[:, 0], own.argmax(-1))
    assert np.array_equal(as_floats(best[:, 1]), logits.max(-1, initial=-np.inf, where=True))
    torch.testing.assert_close(
        torch.from_numpy(as_floats(best[:, 2])), own.logsumexp(-1).float(), rtol=0, atol=4e-6
    )


def test_ties_go_to_the_lowest_column_and_nan_is_the_largest():
    w = torch.zeros(700, E)
    w[[690, 300, 301, 77]] = 1.0  # in three chunks, two in one
    x = torch.ones(2, E)
    best, _ = projected(x, pack(floats(w)))
    assert best[:, 0].tolist() == [77, 77]
    w[[500, 600]] = torch.nan
    best, _ = projected(x, pack(floats(w)))
    assert best[:, 0].tolist() == [500, 500]
    assert np.isnan(as_floats(best[:, 1])).all() and np.isnan(as_floats(best[:, 2])).all()
    # Every logit negative: the padding after column 700 must not win.
    best, _ = projected(x, pack(floats(torch.full((701, E), -1.0))))
    assert best[:, 0].tolist() == [0, 0] and (as_floats(best[:, 1]) < 0).all()


def test_a_row_projects_with_the_same_bits_in_any_number_and_with_its_logits_or_without():
    x, w = normal(9, E), pack(random_quants("q8_0", 1111, E))
    best, logits = projected(x, w)
    for threads in (1, 2):
        assert same_bits(projected(x, w, threads=threads, logits=False)[0], best)
    for first, rows in ((0, 1), (2, 5)):
        some, its = projected(x[first : first + rows], w)
        assert same_bits(some, np.ascontiguousarray(best[first : first + rows]))
        assert same_bits(its, np.ascontiguousarray(logits[first : first + rows]))
