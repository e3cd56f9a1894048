"""CPU weights and the matmul tile: against float64 and exact integers, and bit for bit."""

import gguf
import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from cpu_machine import (
    ROUNDABLE,
    activations,
    as_rounded,
    kernels,
    portable_kernels,
    program,
    random_quants,
    same_bits,
    tile,
)

from mtpkern.kernels.cpu._compile import Target, target_machine
from mtpkern.kernels.cpu._formats import FLOATS, FORMATS
from mtpkern.kernels.cpu._tile import form_of, tile_ir
from mtpkern.kernels.cpu.program import Norm
from mtpkern.kernels.cpu.quants import (
    K_QUANTS,
    dequantise,
    from_gguf,
    of_integers,
    quantise,
)
from mtpkern.kernels.cpu.weights import interleaved, pack, take_outputs
from mtpkern.kernels.linear import linear_ref
from mtpkern.kernels.rms_norm import rms_norm_ref

# Outputs that fill no whole block, K of one group, of several, and of more than one q6_k block.
SHAPES = [(8, 32), (13, 96), (40, 512)]
GGUF_FORMATS = ("q4_0", "q4_1", "q8_0", "q6_k", "q4_k", "fp16", "fp32", "bf16")
GGUF_NAMES = {"fp16": "F16", "fp32": "F32", "bf16": "BF16"}


def shapes(format: str) -> list[tuple[int, int]]:
    return [(N, K) for N, K in SHAPES if format != "q6_k" or K % 16 == 0]


def rows(count: int, K: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, K)).astype(np.float32)


def gguf_rows(format: str, N: int, K: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows as a GGUF holds them, and what the gguf package says they are."""
    kind = gguf.GGMLQuantizationType[GGUF_NAMES.get(format, format.upper())]
    if format in K_QUANTS:
        size, begin, count = {"q6_k": (210, 208, 1), "q4_k": (144, 0, 2)}[format]
        rng = np.random.default_rng(0)
        blocks = rng.integers(0, 256, (N, K // 256, size), dtype=np.uint8)
        halves = rng.random((N, K // 256, count)).astype(np.float16)
        blocks[:, :, begin : begin + 2 * count] = halves.view(np.uint8)
        data = blocks.reshape(N, -1)
    else:
        data = gguf.quantize(rows(N, K), kind)
    return data, gguf.dequantize(data, kind)


@pytest.mark.parametrize("format", GGUF_FORMATS)
def test_gguf_blocks_keep_their_values(format):
    data, values = gguf_rows(format, 13, 512)
    assert np.array_equal(dequantise(from_gguf(data, format)), values.astype(np.float32))


@pytest.mark.parametrize("format", [name for name in ROUNDABLE if name not in FLOATS])
def test_rounding_errs_by_half_a_step(format):
    w = torch.randn(24, 96, generator=torch.Generator().manual_seed(1))
    quants = quantise(w, format)
    span = w.view(24, -1, 32).abs().amax(-1)
    if format == "q8":
        span = w.abs().amax(-1, keepdim=True).expand(-1, 3)
    steps = {"q4_0": 8, "q4_1": 7, "q8_0": 127, "q8": 127}[format]
    # q4_0's grid is not symmetric: a number opposite the largest may miss a whole step.
    share = {"q4_0": 1.0, "q4_1": 0.5}.get(format, 0.5)
    error = (torch.from_numpy(dequantise(quants)) - w).abs().view(24, -1, 32).amax(-1)
    assert (error <= span / steps * (share + 0.02)).all()


@pytest.mark.parametrize("format", FORMATS)
def test_packed_rows_come_back_as_they_were(format):
    quants = random_quants(format, 13, 512)
    p = program(13)
    out = p.buffer(512)
    p.embed(pack(quants), out)
    p.ids[:] = np.arange(13)
    p.run(13)
    np.testing.assert_allclose(out, dequantise(quants), rtol=2e-7)


@pytest.mark.parametrize("format", FORMATS)
def test_a_tile_is_the_product_of_its_own_roundings(format):
    for N, K in shapes(format):
        quants, x = random_quants(format, N, K), rows(11, K)
        prepared, stats = activations(format, x)
        out = tile(kernels(), pack(quants), prepared, stats)
        exact = prepared.astype(np.float64)
        if format not in FLOATS:
            exact = (exact.reshape(11, -1, 32) * stats[..., :1]).reshape(11, K)
        w = dequantise(quants).astype(np.float64)
        budget = 2**-23 * (K // 16 + 8) * (np.abs(exact) @ np.abs(w).T)
        assert (np.abs(out[:, :N] - exact @ w.T) <= budget).all()
        assert (out[:, N:] == 0).all()


@pytest.mark.parametrize("format", FORMATS)
def test_linear_is_the_definition_within_the_rounding_of_activations(format):
    N, K = 40, 512
    quants, x = random_quants(format, N, K), torch.from_numpy(rows(5, K))
    bias, residual = torch.randn(N), torch.randn(5, N)
    norm_w = 1 + torch.randn(K) / 10
    p = program(5)
    source, out, added = p.buffer(K), p.buffer(N), p.buffer(N)
    source[:], added[:] = x, residual
    p.linear(source, pack(quants, bias), out, norm=Norm(norm_w.numpy(), 1e-5), residual=added)
    p.run(5)
    w = torch.from_numpy(dequantise(quants))
    normed = rms_norm_ref(x, norm_w, 1e-5)
    truth = linear_ref(normed, w, bias, residual=residual)
    # Half a unit of 1/127 of the group's largest activation, or the order of a float32 sum.
    step = normed.abs().view(5, -1, 32).amax(-1) / 127 if format not in FLOATS else 0
    budget = (step / 2).repeat_interleave(32, 1) @ w.abs().T if format not in FLOATS else 0
    assert ((torch.from_numpy(out) - truth).abs() <= budget + 1e-4 * truth.abs().max()).all()


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_keeps_its_bits_among_any_rows_blocks_and_threads(format):
    N, K = 40, 512
    w, x = pack(random_quants(format, N, K)), rows(21, K)
    prepared, stats = activations(format, x)
    whole = tile(kernels(), w, prepared, stats)
    for first, count in ((0, 1), (3, 2), (4, 5), (5, 8), (2, 19)):
        part = slice(first, first + count)
        some = stats if format in FLOATS else np.ascontiguousarray(stats[part])
        assert same_bits(tile(kernels(), w, prepared[part], some), whole[part])
        assert same_bits(tile(kernels(), w, prepared[part], some, blocks=2), whole[part])
    for threads in (1, 2, 3):
        p = program(21, threads=threads)
        source, out = p.buffer(K), p.buffer(N)
        source[:] = x
        p.linear(source, w, out)
        p.run(21)
        assert same_bits(out, whole)


@pytest.mark.parametrize("format", FORMATS)
def test_every_form_of_the_tile_gives_the_same_bits(format):
    w, x = pack(random_quants(format, 16, 512)), rows(9, 512)
    prepared, stats = activations(format, x)
    expected = tile(kernels(), w, prepared, stats)
    assert same_bits(tile(portable_kernels(), w, prepared, stats), expected)


@pytest.mark.parametrize("compiled", [kernels, portable_kernels])
@pytest.mark.parametrize("format", [name for name in FORMATS if name not in FLOATS])
def test_extreme_integers_do_not_saturate(format, compiled):
    """All weights and activations at their ends, scales of 1: the sum is an integer."""
    low, high = {"q4_0": (0, 15), "q4_1": (0, 15), "q6_k": (0, 63), "q4_k": (0, 15)}.get(
        format, (-128, 127)
    )
    N = K = 64
    q = np.where(np.arange(N)[:, None] % 4 < 2, low, high) * np.ones((1, K), int)
    q[1::2, ::2] = high  # pairs of opposite ends
    ones = np.ones((N, K // 32), np.float16)
    scales = {
        "q4_1": (ones, -8 * ones),
        "q8": (np.ones(N, np.float32),),
        "q6_k": (ones[:, :1], np.full((N, K // 16), -128, np.int8)),
        "q4_k": (ones[:, :1], ones[:, :1], *np.full((2, N, K // 32), 63, np.uint8)),
    }.get(format, (ones,))
    w = pack(of_integers(format, q, scales))
    x = np.full((3, K), 127.0, np.float32)
    x[1], x[2, ::2] = -127.0, -127.0
    out = tile(compiled(), w, *as_rounded(x))
    offset = {"q4_0": 8, "q4_1": 8, "q6_k": 32, "q4_k": 1}.get(format, 0)
    exact = x.astype(np.int64) @ (q - offset).T
    assert np.array_equal(out[:, :N], exact * {"q6_k": -128, "q4_k": 63}.get(format, 1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format", FORMATS)
def test_a_number_that_is_not_finite_makes_its_row_nan_and_no_other(format, bad):
    w = pack(random_quants(format, 16, 96) if format != "q6_k" else random_quants(format, 16, 256))
    p = program(3)
    source, out = p.buffer(w.in_features), p.buffer(16)
    source[:] = rows(3, w.in_features)
    source[1, 41] = bad
    p.linear(source, w, out)
    p.run(3)
    assert np.isnan(out[1]).all() if format not in FLOATS else not np.isfinite(out[1]).any()
    assert np.isfinite(out[[0, 2]]).all()


def test_a_group_too_small_to_divide_by_counts_as_zero():
    w = pack(random_quants("q8_0", 16, 64))
    p = program(3)
    source, out = p.buffer(64), p.buffer(16)
    source[:] = rows(3, 64)
    source[0, :32] = 1e-38
    source[0, ::2] *= -1
    source[1], source[2] = source[0], source[0]
    source[1, :32] = 0
    source[2, 32:] = 0
    p.linear(source, w, out)
    p.run(3)
    assert np.isfinite(out).all() and same_bits(out[0], out[1])
    assert (out[2] == 0).all()


def test_gate_and_up_interleave_by_eight():
    order = interleaved(24)
    assert order[:8].tolist() == list(range(8))
    assert order[8:16].tolist() == list(range(24, 32))
    assert sorted(order.tolist()) == list(range(48))


INSTRUCTIONS = [
    ("x86_64-unknown-linux-gnu", "sapphirerapids", "x86_64", "vnni", "vpdpbusd"),
    ("x86_64-pc-windows-msvc", "alderlake", "x86_64", "vnni", "vpdpbusd"),
    ("x86_64-unknown-linux-gnu", "haswell", "x86_64", "avx2", "vpmaddubsw"),
    ("aarch64-unknown-linux-gnu", "neoverse-n1", "aarch64", "neon", "sdot"),
    ("arm64-apple-darwin", "apple-m1", "arm64", "neon", "sdot"),
]


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in FLOATS])
@pytest.mark.parametrize(("triple", "cpu", "arch", "form", "instruction"), INSTRUCTIONS)
def test_a_form_compiles_to_its_instruction(triple, cpu, arch, form, instruction, format):
    module = llvm.parse_assembly(tile_ir(format, form))
    module.verify()
    text = target_machine(Target(triple, cpu, "", form)).emit_assembly(module)
    # 8 per group and row, of 1 to 8 rows: 4 lanes take two on NEON.
    assert text.count(instruction) >= 8 * 36
    assert "vpdpbusds" not in text


def test_the_form_follows_the_features():
    assert form_of({"avx2", "fma", "avxvnni"}, "x86_64") == "vnni"
    assert form_of({"avx2", "avx512vnni", "avx512vl"}, "amd64") == "vnni"
    assert form_of({"avx2", "avx512vnni"}, "x86_64") == "avx2"
    assert form_of({"dotprod"}, "arm64") == "neon"
    assert form_of(set(), "aarch64") == "portable"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantise(torch.ones(8, 33), "q4_0"), "multiple of 32"),
        (lambda: quantise(torch.full((8, 32), torch.nan), "q8_0"), "finite"),
        (lambda: quantise(torch.ones(8, 32), "q6_k"), "q6_k"),
        (lambda: quantise(torch.ones(8, 32), "q4_k"), "q4_k"),
        (lambda: from_gguf(np.zeros((2, 19), np.uint8), "q4_0"), "q4_0 rows"),
        (lambda: from_gguf(np.zeros((2, 18), np.uint8), "q8"), "format"),
        (lambda: pack(random_quants("q8_0", 8, 32), torch.ones(9)), "bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("format", FORMATS)
def test_outputs_taken_from_packed_weights_are_those_of_the_matrix(format):
    quants = random_quants(format, 21, 512)
    rows = np.array([20, 0, 7, 7, 13])
    taken, expected = take_outputs(pack(quants), rows), pack(quants.take(rows))
    assert taken[2:] == expected[2:] and same_bits(taken.data, expected.data)
