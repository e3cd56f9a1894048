"""The CPU's operations: as defined, whatever the shapes, and the same bits for any cut of rows."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_checkpoint
from ending_steps import make
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import make_paged

from mtpkern.cache import KVCache
from mtpkern.kernels.advance import Progress, advance_ref
from mtpkern.kernels.gate_up_silu import gate_up_silu_ref
from mtpkern.kernels.linear import linear_ref
from mtpkern.kernels.ngram import ngram_ref
from mtpkern.kernels.qkv_rope_cache import qkv_rope_cache_ref
from mtpkern.kernels.rms_norm import rms_norm_ref
from mtpkern.kernels.sample import SamplingRows
from mtpkern.kernels.verify_attention import verify_attention_ref
from mtpkern.model import Llama
from mtpkern.ops.base import Ops
from mtpkern.ops.cpu import CpuOps
from mtpkern.ops.cpu_programs import MAX_ROWS
from mtpkern.ops.cpu_step import StepEnd

EPS = 1e-5
MANY = 2 * MAX_ROWS + 3


@pytest.fixture(scope="module")
def ops() -> Ops:
    return CpuOps()


def normal(*shape: int) -> torch.Tensor:
    seed = hash(shape) % 2**31
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


def bits_hold(call: Any, x: torch.Tensor) -> torch.Tensor:
    """Rows alone, all at once and in between have the same bits -> those of all."""
    whole = call(x)
    for width in (1, 7, MAX_ROWS):
        parts = torch.cat([call(some) for some in x[: 2 * width].split(width)])
        assert torch.equal(parts, whole[: 2 * width])
    return whole


@pytest.mark.parametrize("K, N", [(64, 96), (51, 13), (8, 1), (33, 260)])
def test_linear(ops: Ops, K: int, N: int) -> None:
    w, bias, x = normal(N, K), normal(N), normal(MANY, K)
    packed = ops.pack(w, bias)
    close(bits_hold(lambda rows: ops.linear(rows, packed), x), linear_ref(x, w, bias))
    residual = normal(MANY, N)
    found = ops.linear(x, packed, residual=residual)
    close(found, linear_ref(x, w, bias, residual=residual))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_an_embedding_and_their_norms(ops: Ops, dtype: torch.dtype) -> None:
    w, norm = normal(40, 51).to(dtype), 1 + normal(51) / 10
    ids = torch.arange(MANY) % 40
    packed, out = ops.pack_embedding(w), torch.zeros(MANY, 60)
    assert torch.equal(ops.embed(packed, ids), w.float()[ids])
    found = ops.rms_norm(packed, norm, EPS, ids=ids, out=out[:, :51])
    close(found, rms_norm_ref(w.float()[ids], norm, EPS))
    assert torch.equal(out[:, :51], found) and not out[:, 51:].any()


@pytest.mark.parametrize("E, F", [(64, 96), (51, 37)])
def test_gate_up_and_down(ops: Ops, E: int, F: int) -> None:
    w, bias, norm = normal(2 * F, E) / E**0.5, normal(2 * F), 1 + normal(E) / 10
    down, x = normal(E, F) / F**0.5, normal(MANY, E)
    packed, narrow = ops.pack_gate_up(w, bias), ops.pack(down)
    found = bits_hold(lambda rows: ops.linear(ops.gate_up_silu(rows, norm, EPS, packed), narrow), x)
    expected = linear_ref(gate_up_silu_ref(x, norm, EPS, w, bias), down)
    close(found, expected)


@pytest.mark.parametrize("D", [6, 10, 16, 20, 64])
@pytest.mark.parametrize("norms", [False, True])
def test_attention_with_heads_of_any_size(ops: Ops, D: int, norms: bool) -> None:
    batch, T, heads, kv_heads, E = 3, 5, 4, 2, 51
    paged, padded = (
        make_paged(batch, 2, 64, kv_heads, size, torch.float32) for size in (D, ops.padded_dim(D))
    )
    for cache in (paged, padded):  # what is committed before the window
        cache.k.zero_(), cache.v.zero_()
    half, wide = D // 2, ops.padded_dim(D) // 2
    for mine, theirs, filler in ((padded.cos, paged.cos, 1.0), (padded.sin, paged.sin, 0.0)):
        mine.fill_(filler)
        mine[:, :half], mine[:, wide : wide + half] = theirs[:, :half], theirs[:, half:]
    w, norm = normal((heads + 2 * kv_heads) * D, E) / E**0.5, 1 + normal(E) / 10
    o, x = normal(E, heads * D) / E**0.5, normal(batch * T, E)
    options = {"q_norm": 1 + normal(D) / 10, "k_norm": 1 + normal(1, D)[0] / 10} if norms else {}
    lengths = torch.tensor([0, 70, 9])
    placed = paged.placed(lengths.tolist(), T)
    pages = (paged.k[0], paged.v[0])
    q = qkv_rope_cache_ref(x, norm, EPS, w, *pages, *placed, **options).view(batch, T, heads, D)
    attended = verify_attention_ref(q, *pages, paged.page_table, lengths)
    expected = linear_ref(attended.reshape(batch * T, -1), o)

    qkv, narrow = ops.pack_qkv(w, None, D), ops.pack_o(o, None, D)
    cache = KVCache(
        padded.k, padded.v, padded.page_table, lengths, padded.cos, padded.sin, ops.padded_dim
    )
    sizes: Any = SimpleNamespace(num_heads=heads, head_dim=D, sliding_window=0)
    mine = ops.plan(cache, T, sizes)
    pages = (padded.k[0], padded.v[0])
    q = ops.qkv_rope_cache(x, norm, EPS, qkv, *pages, mine, **options)
    attended = ops.verify_attention(q, *pages, padded.page_table, mine)
    found = ops.linear(attended.view(batch * T, -1), narrow)
    close(found, expected)


@pytest.mark.parametrize("E", [48, 51])
def test_tapped_states_are_side_by_side_and_change_nothing(E: int, tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path, hidden_size=E, head_dim=10)
    ops = CpuOps()
    model = Llama.load(directory, dtype=torch.float32, ops=ops)
    found = {}
    window = torch.tensor([[5, 9, 33, 7], [1, 2, 3, 4]])
    for taps in ((), (3,), (1, 2), (1, 2, 3)):
        cache = KVCache.empty(
            layers=3,
            pages=2,
            page_size=64,
            page_table=torch.tensor([[1], [2]], dtype=torch.int32),
            kv_heads=2,
            head_dim=10,
            inverse_frequencies=1 / 10000 ** (torch.arange(0, 10, 2) / 10),
            rope_scaling=1.0,
            dtype=torch.float32,
            padded_dim=ops.padded_dim,
        )
        for _ in range(2):  # the second run must not depend on the first
            features, projected = ops.forward(model, window, cache, taps, None)
        largest = projected.largest((2, 4)).clone()
        hidden, tapped = ops.layers(model, window, cache, [t for t in taps if t < 3])
        normed = ops.rms_norm(hidden, model.norm, model.config.rms_norm_eps)
        expected = [*tapped, normed] if 3 in taps or not taps else tapped
        assert torch.equal(features, torch.cat(expected, 1).view(2, 4, -1))
        found[taps] = largest
    assert all(torch.equal(largest, found[()]) for largest in found.values())


def greedy(batch: int) -> SamplingRows:
    zeros = torch.zeros(batch)
    return SamplingRows(zeros, zeros.long(), zeros + 1, zeros, zeros.long())


def test_the_vocabulary_keeps_logits_and_their_sums(ops: Ops) -> None:
    E, V = 48, 333
    w, norm, x = normal(V, E), 1 + normal(E) / 10, normal(MANY, E)
    normed, projected = ops.project(x, norm, EPS, ops.pack(w), None)
    close(normed, rms_norm_ref(x, norm, EPS))
    logits = normed @ w.T
    shape, lengths = (MANY, 1), torch.zeros(MANY, dtype=torch.int64)
    target = projected.target(shape, lengths, greedy(MANY))
    assert torch.equal(target[:, 0], logits.argmax(-1))
    torch.testing.assert_close(projected.largest(shape)[:, 0], logits.amax(-1))
    expected = logits.log_softmax(-1).gather(1, target)
    torch.testing.assert_close(projected.logprobs(target), expected, atol=1e-5, rtol=1e-5)
    warm = greedy(MANY)._replace(temperature=torch.ones(MANY))
    assert not torch.equal(projected.target(shape, lengths, warm), target)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_whose_logits_are_not_finite_has_no_largest(ops: Ops, value: float) -> None:
    x, w = normal(3, 48), normal(333, 48)
    x[1, 7] = value
    _, projected = ops.project(x, torch.ones(48), EPS, ops.pack(w), None)
    assert projected.largest((3, 1)).isfinite()[:, 0].tolist() == [True, False, True]


def test_a_draft_comes_from_the_vocabularys_own_ids(ops: Ops) -> None:
    x, w, ids = normal(5, 48), normal(60, 48), torch.arange(60) * 3 + 1
    lengths = torch.zeros(5, dtype=torch.int64)
    token, probability = ops.choose(x, ops.pack(w), ids, lengths, 0, greedy(5))
    logits = x @ w.T
    assert torch.equal(token, ids[logits.argmax(-1)])
    torch.testing.assert_close(probability, logits.softmax(-1).amax(-1))


@pytest.mark.parametrize("rows", [1, 2, 5, 17])
@pytest.mark.parametrize("with_logprobs", [False, True])
def test_a_step_ends_as_defined(rows: int, with_logprobs: bool) -> None:
    for batch, seed in ((1, 0), (7, 1), (33, 2), (33, 3)):
        window, target, largest, progress = make(batch, rows, seed)
        logprobs = -torch.rand(batch, rows) if with_logprobs else None
        mine, own = window.clone(), Progress(*(t.clone() for t in progress))
        found = StepEnd().advance(mine, target, largest, logprobs, own)
        expected = advance_ref(window, target, largest, logprobs, progress)
        named = zip(Progress._fields, own, progress, strict=True)
        for name, a, b in (("accepted", found[0], expected[0]), ("window", mine, window), *named):
            assert torch.equal(a, b), name
        assert torch.equal(found[1], expected[1])


# Ids whose bytes may be found across two neighbours.
BYTES = st.sampled_from([0, 1, 256, 257, 65536, 2**24 + 1])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(BYTES, min_size=1, max_size=40), min_size=1, max_size=3),
    st.integers(0, 6),
    st.integers(1, 4),
)
def test_copies_are_those_of_the_definition(texts: list[list[int]], drafts: int, size: int) -> None:
    tokens = torch.tensor([(text * 48)[:48] for text in texts])
    known = torch.tensor([len(text) for text in texts])
    copied, found = StepEnd().ngram(tokens, known - 1, drafts, size)
    expected = ngram_ref(tokens, known, drafts, size)
    assert torch.equal(copied, expected[0])
    assert torch.equal(expected[1], torch.as_tensor(found).expand(len(texts)))
    assert isinstance(found, bool) == (len(set(expected[1].tolist())) == 1)
