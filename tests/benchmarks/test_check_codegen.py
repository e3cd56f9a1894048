"""check_codegen: what it reads from machine code, and what it refuses; CI runs its matrix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtpkern.kernels._launch import TIERS
from mtpkern.kernels.linear import linear
from mtpkern.kernels.multi_head_projection import ONE_READ_ROWS, multi_head_projection

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PTX = """
    @%p1 ld.global.L1::evict_first.L2::cache_hint.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ], %rd2;
    ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
    cp.async.cg.shared.global [ %r18 + 0 ], [ %rd3 + 0 ], 0x10, %r19;
    cp.async.ca.shared.global.L2::cache_hint [ %r18 + 0 ], [ %rd3 + 0 ], 0x8, %r19, %rd9;
    cp.async.commit_group;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %f1 };
    wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 { %f1 };
    tcgen05.mma.cta_group::1.kind::f16 [ %r1 ], %rd1;
"""


@pytest.fixture
def codegen(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import check_codegen

    return check_codegen


def test_loads_copies_and_multiplications_are_counted(codegen: Any) -> None:
    import offline_compiler

    assert offline_compiler.instructions(PTX) == {
        "wide": 2,
        "narrow": 33,
        "mma": {"mma.sync.m16n8k16": 1, "tcgen05.mma": 1, "wgmma.mma_async.m64n16k16": 1},
    }


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0030*/              @P0  BRA `(.L_x_1) ;
        /*0040*/              @!P1 BRA `(.L_x_0) ;
.L_x_2:
        /*0050*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0060*/                   IADD3 R2, R1, 0x1, RZ ;
        /*0070*/                   BRA `(.L_x_2) ;
"""


def test_the_longest_loop_that_multiplies_is_counted(codegen: Any) -> None:
    from offline_compiler import multiplying_loop

    assert multiplying_loop(SASS) == 4
    assert multiplying_loop(SASS.replace("HMMA", "FFMA")) == 0


UNROLLED = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R4], [R2.64] ;
        /*0020*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0040*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0050*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0060*/                   LDG.E.U16 R1, [R2.64] ;
.L_x_0:
        /*0070*/                   BRA `(.L_x_0) ;
"""


def test_without_a_loop_all_passes_are_counted(codegen: Any) -> None:
    from offline_compiler import multiplying_loop, unrolled_passes

    assert multiplying_loop(UNROLLED) == 0 and unrolled_passes(UNROLLED) == 5
    assert unrolled_passes(UNROLLED.replace("HMMA", "FFMA")) == 0


def test_a_loop_and_its_passes_unrolled_have_one_ceiling(codegen: Any) -> None:
    import bounds

    gpu = bounds.GPUS["sm_90"]
    multiplied = bounds.Matmul(0, 0, 0, passes=0, bytes_of_pass=4096, passes_of_block=16)
    looped = multiplied.issue_ceiling(52, 0, 4, gpu)
    assert looped == multiplied.issue_ceiling(0, 16 * 52, 4, gpu)
    # A multiprocessor issues 4 instructions per cycle, and 4 warps 52 each per 4096 bytes.
    assert looped == pytest.approx(132 * 4096 * 1.755e9 / 52)
    assert multiplied.issue_ceiling(0, 0, 4, gpu) == 0


@pytest.mark.parametrize(("K", "unrolled"), [(2048, True), (8192, False)])
def test_a_short_matmul_has_an_issue_ceiling_like_a_long_one(
    codegen: Any, monkeypatch: pytest.MonkeyPatch, K: int, unrolled: bool
) -> None:
    """The compiler unrolls the projections of a 1B model, with 2,048 inputs."""
    import triton

    monkeypatch.setattr(triton.runtime.driver, "_active", codegen.Device(90))
    x, w = (torch.empty(n, K, dtype=torch.bfloat16, device="meta") for n in (5, 2048))
    with codegen.launches_compiled() as launched:
        linear(x, w)
    ((kernel, binary, given, grid),) = launched
    facts = codegen.measure(binary)
    assert (facts["loop"] == 0) == unrolled and (facts["unrolled"] > 0) == unrolled
    one = codegen.Compiled("sm_90", "1b", "linear", "o", 5, kernel, **facts)
    one = codegen.with_bounds(one, given, grid, binary.metadata.num_warps)
    assert 6 < one.issue_ceiling < 60 and codegen.offences(one) == []


# [B, T] of a step, and the most that a layer's matmuls may request from the L2 over its weights.
@pytest.mark.parametrize(
    ("step", "most"), [((1, 5), 1.25), ((4, 5), 1.5), ((8, 5), 2), ((32, 5), 4)]
)
def test_a_layer_of_8b_requests_little_more_than_its_weights_from_the_l2(
    codegen: Any, step: tuple[int, int], most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bounds
    import triton
    from kernel_cases import OPS
    from model_shapes import MODELS
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(triton.runtime.driver, "_active", codegen.Device(90))
    asked, weights = 0, 0

    def count(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        nonlocal asked, weights
        given = dict(zip(self.arg_names, args, strict=False)) | options
        asked += bounds.l2_bytes(given, grid)
        multiplied = bounds.matmul(given, grid)
        weights += 0 if multiplied is None else multiplied.weight_bytes

    monkeypatch.setattr(JITFunction, "run", count)
    for op in ("qkv_rope_cache", "linear", "gate_up_silu"):
        for case in OPS[op](MODELS["llama-3.1-8b"], *step):
            case.inputs("meta").launch(False)
    assert weights == 2 * (6144 * 4096 + 4096 * 4096 + 3 * 4096 * 14336)
    assert 1 < asked / weights <= most


@pytest.mark.parametrize(("arch", "memory"), [(80, 3.0e12), (90, 4.4e12)])
def test_the_vocabulary_is_read_once_for_as_many_rows_as_one_read_is_faster(
    codegen: Any, monkeypatch: pytest.MonkeyPatch, arch: int, memory: float
) -> None:
    """By the bytes that the launches of an 8B model read from memory and request from the L2, with
    the tiles of mma.sync and with those of wgmma."""
    import bounds
    import triton
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(triton.runtime.driver, "_active", codegen.Device(arch))

    seconds = 0.0

    def count(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        nonlocal seconds
        given = dict(zip(self.arg_names, args, strict=False)) | options
        if multiplied := bounds.matmul(given, grid):
            read = multiplied.weight_bytes / memory
            seconds += max(read, multiplied.l2_bytes / bounds.L2)

    def taken(*row_counts: int) -> float:
        nonlocal seconds
        seconds = 0.0
        for rows in row_counts:
            x = torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta")
            multi_head_projection(x, vocabulary)
        return seconds

    vocabulary = torch.empty(128256, 4096, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(JITFunction, "run", count)
    # Two reads of few rows: of the windows, and of the heads at one row of each sequence.
    twice = taken(8, 32)
    assert taken(ONE_READ_ROWS) < twice < taken(ONE_READ_ROWS + 1)


@pytest.mark.parametrize("rows", [5, 20, 100, 160])
def test_l2_requests_match_the_formula(
    gpu: str, codegen: Any, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loads and stores of a matmul with split inputs, without those of the output."""
    import bounds
    from traffic import recorded_traffic
    from triton.runtime.jit import JITFunction

    N, K = 100, 1100
    x, w = torch.randn(rows, K).bfloat16().to(gpu), torch.randn(N, K).bfloat16().to(gpu)
    expected = 0
    run = JITFunction.run

    def count(self: Any, *args: Any, grid: Any, **options: Any) -> Any:
        nonlocal expected
        given = dict(zip(self.arg_names, args, strict=False)) | options
        expected += bounds.l2_bytes(given, grid)
        return run(self, *args, grid=grid, **options)

    monkeypatch.setattr(JITFunction, "run", count)
    with recorded_traffic() as traffic:
        out = linear(x, w)
    accesses = traffic.read + traffic.written
    asked = sum(len(addresses) * size for addresses, size in accesses)
    assert asked == expected + out.numel() * out.element_size()


def sound(codegen: Any) -> Any:
    label = ("sm_90", "tiny", "linear", "down", 5, "linear", "mtpkern_linear_16", "f00", 3)
    return codegen.Compiled(*label, 64, 0, 65536, 8, 0, {"mma.sync.m16n8k16": 8})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, []),
        ({"stack": 8}, ["spills 8 bytes per thread"]),
        ({"registers": 250}, ["takes 250 registers, at most 168"]),
        ({"shared": 122881}, ["takes 122881 bytes of shared memory, at most 122880"]),
        ({"wide": 0}, ["has no 16-byte loads"]),
        ({"narrow": 50}, ["copies 50 % in less than 16 bytes at a time"]),
        ({"mma": {}}, ["multiplies with nothing"]),
        ({"loop": 90, "issue_ceiling": 3.1, "rows_multiplied": 65}, []),
        (
            {"loop": 656, "issue_ceiling": 2.9, "rows_multiplied": 5},
            ["issues 656 instructions per pass: 2.9 TB/s of weights at most, at least 6.0"],
        ),
        (
            {"unrolled": 9000, "issue_ceiling": 2.9, "rows_multiplied": 5},
            ["issues 9000 instructions in all passes: 2.9 TB/s of weights at most, at least 6.0"],
        ),
        (
            {"rows_multiplied": 5},
            ["has no multiplications to count the issued instructions of"],
        ),
        (
            {"mma": {"mma.sync.m16n8k16": 8, "wgmma.mma_async.m64n16k16": 1}},
            ["multiplies with mma.sync.m16n8k16, wgmma.mma_async.m64n16k16"],
        ),
        ({"kernel": "partial_sums", "mma": {"wgmma.mma_async.m64n16k16": 1}}, []),
        (
            {"kernel": "partial_sums", "mma": {"wgmma.mma_async.m64n16k8": 1}},
            ["multiplies with wgmma.mma_async.m64n16k8"],
        ),
    ],
)
def test_an_offence_is_named(codegen: Any, changed: dict[str, Any], said: list[str]) -> None:
    found = codegen.offences(sound(codegen)._replace(**changed))
    assert found == [("mtpkern_linear_16", what, "sm_90") for what in said]


def test_row_counts_of_one_symbol_must_share_a_binary(codegen: Any) -> None:
    five = sound(codegen)
    assert codegen.two_binaries([five, five._replace(rows=1)]) == []
    assert codegen.two_binaries([five, five._replace(rows=1, binary="f01")]) == [
        ("mtpkern_linear_16", "is 2 binaries, at 5, 1 rows", "sm_90")
    ]


@pytest.mark.parametrize(("requested", "ratio"), [(1500, None), (1530, "1.53")])
def test_a_layer_that_requests_too_much_from_the_l2_is_named(
    codegen: Any, requested: int, ratio: str | None
) -> None:
    each = {"model": "llama-3.1-8b", "rows": 20, "weight_bytes": 1000, "l2_bytes": requested}
    layer = [sound(codegen)._replace(op=op, **each) for op in codegen.LAYER]
    # What adds up the segments has no weights, and no other model has a limit.
    layer[0] = layer[0]._replace(l2_bytes=requested - 10)
    layer.append(layer[0]._replace(weight_bytes=0, l2_bytes=10))
    others = [k._replace(model="llama-3.2-1b", l2_bytes=9000) for k in layer]
    found = [what for _, what, _ in codegen.too_much_l2(layer + others)]
    expected = f"requests {ratio} x its weights from the L2 at 20 rows"
    assert found == ([] if ratio is None else [expected])
    assert codegen.too_much_l2(layer[1:3]) == []  # not the whole layer


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"stack": 8}, "spills 8 bytes"),
        ({"issue_ceiling": 2.9}, "issues "),
        ({"l2_bytes": 3600}, "from the L2 at 20 rows"),
        ({"binary": "f01", "rows": 21}, "is 2 binaries"),
    ],
)
def test_an_offence_of_any_rule_fails_the_check(
    codegen: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, Any],
    said: str,
) -> None:
    each = {"model": "llama-3.1-8b", "rows": 20, "weight_bytes": 1000, "l2_bytes": 1000}
    bounds = {"loop": 90, "issue_ceiling": 9.0, "rows_multiplied": 20}
    layer = [sound(codegen)._replace(op=op, **each, **bounds) for op in codegen.LAYER]
    results = [layer[0]._replace(**changed), *layer]

    class Pool:
        def __init__(self, *_: Any) -> None:
            pass

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def submit(self, *_: Any) -> Any:
            return self

        def result(self) -> Any:
            return results, []

    monkeypatch.setattr(codegen, "ProcessPoolExecutor", Pool)
    arguments = ["--model", "llama-3.1-8b", "--op", "linear", "--target", "sm_90"]
    assert codegen.main(arguments) == (1 if said else 0)
    out = capsys.readouterr().out
    offences = [line for line in out.splitlines() if line.startswith("OFFENCE")]
    assert len(offences) == bool(said) and all(said in line for line in offences)


def test_every_kernel_has_a_ceiling(codegen: Any) -> None:
    assert codegen.kernels() == codegen.CEILINGS.keys()


@pytest.fixture
def compiled_attention(codegen: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Compiles both kernels of an attention for an H100 -> their binaries."""
    import triton

    from mtpkern.kernels.verify_attention import verify_attention

    monkeypatch.setattr(triton.runtime.driver, "_active", codegen.Device(90))

    def compiled(
        D: int, dtype: torch.dtype, columns: int, B: int = 1, T: int = 5, width: int = 4096
    ) -> list[Any]:
        q = torch.empty(B, T, 8, D, dtype=dtype, device="meta")
        pages = torch.empty(9, 64, 2, D, dtype=dtype, device="meta")
        table = torch.empty(B, width, dtype=torch.int32, device="meta")[:, :columns]
        lengths = torch.empty(B, dtype=torch.int64, device="meta")
        with codegen.launches_compiled() as launched:
            verify_attention(q, pages, pages, table, lengths)
        return [binary for _, binary, _, _ in launched]

    return compiled


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_matmuls_in_float32_spill_nothing_in_any_tier(
    codegen: Any, monkeypatch: pytest.MonkeyPatch, arch: int
) -> None:
    """Of a wide matrix and of one whose blocks are narrower, for lack of columns."""
    import triton

    monkeypatch.setattr(triton.runtime.driver, "_active", codegen.Device(arch))
    with codegen.launches_compiled() as launched:
        for rows in TIERS:
            x = torch.empty(rows, 1024, device="meta")
            for N in (16384, 1024):
                linear(x, torch.empty(N, 1024, device="meta"))
            multi_head_projection(x, torch.empty(1024, 1024, device="meta"))
    blocks = {
        (given["ROWS"] + given["TAIL"], given["BLOCK_N"])
        for name, _, given, _ in launched
        if name == "partial_sums"
    }
    assert blocks == {(tier, width) for tier in TIERS[2:] for width in (32, 64)}
    measured = {
        binary.hash: codegen.measure(binary) | {"name": binary.metadata.name}
        for _, binary, _, _ in launched
    }
    assert [facts for facts in measured.values() if facts["stack"]] == []
    assert max(facts["shared"] for facts in measured.values()) <= codegen.FEW_ROWS


@pytest.mark.parametrize(
    ("D", "dtype"), [(256, torch.bfloat16), (64, torch.float32), (128, torch.float32)]
)
def test_attention_spills_nothing_where_heads_or_elements_are_large(
    codegen: Any, compiled_attention: Callable[..., list[Any]], D: int, dtype: torch.dtype
) -> None:
    for binary in compiled_attention(D, dtype, 512):
        facts = codegen.measure(binary)
        assert facts["stack"] == 0
        assert facts["shared"] <= codegen.CEILINGS["verify_attention"].shared


def test_attention_is_one_binary_for_all_contexts_batches_and_windows(
    compiled_attention: Callable[..., list[Any]],
) -> None:
    """But for the loads in flight, of which splits of one granule have none."""
    sizes = [(columns, B, T) for columns in (1, 17, 4096) for B in (1, 3, 8) for T in (1, 5, 64)]
    found = {
        tuple(
            (binary.metadata.num_stages, binary.hash)
            for binary in compiled_attention(16, torch.bfloat16, columns, B, T, width)
        )
        for columns, B, T in sizes
        for width in {4096, columns}
    }
    assert sorted(attention[0] for attention, _ in found) == [2, 5]
    assert len({merge for _, merge in found}) == 1


def test_the_merge_of_splits_has_no_barriers(
    compiled_attention: Callable[..., list[Any]],
) -> None:
    """It would wait at each for the slowest load of a split."""
    attention, merge = (
        binary.asm["ptx"] for binary in compiled_attention(128, torch.bfloat16, 512)
    )
    assert "bar.sync" in attention and "bar.sync" not in merge
