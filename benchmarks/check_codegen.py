"""Checks the machine code of every kernel, compiled for every supported GPU on any machine.

    python benchmarks/check_codegen.py                                  # the whole matrix
    python benchmarks/check_codegen.py --model smollm2-135m             # what CI runs
    python benchmarks/check_codegen.py --write-table  # writes results/codegen-triton-*.md

The launchers run on tensors without data, with Triton's launch replaced by its compilation, so what
is compiled is what a GPU would run: the same tiles and the same specialisation. A kernel passes if
it spills nothing, stays under its ceilings of registers and shared memory, copies 16 bytes at a
time, and multiplies with mma.sync m16n8k16, or on sm_90 with wgmma (reasons in `offences`).
Otherwise its offences are listed and the exit code is 1.
"""

import argparse
import ast
import re
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton
from bounds import GPUS, l2_bytes, matmul
from checkout import ROOT
from common import Finish, add_names, run
from kernel_cases import OPS
from model_shapes import MODELS, OTHER_TIERS, STEPS
from offline_compiler import Device, first_cause, launches_compiled, measure, op_name
from triton.errors import TritonError

from mtpkern.arguments import Parser, at_least
from mtpkern.outputs import output_file, writing

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100")
TABLE = ROOT / "benchmarks" / "results" / f"codegen-triton-{triton.__version__}.md"
# Dependent launches overlap only if blocks of two kernels fit on one multiprocessor, of which sm_90
# has 227 KB. FEW_ROWS is for matmuls with one block per multiprocessor.
MAX_SHARED, FEW_ROWS = 100 * 1024, 120 * 1024
# Adds sixteen products at a time, as mma.sync m16n8k16 does.
WGMMA = r"wgmma\.mma_async\.m64n\d+k16"
# TB/s of weights on an H100 with all issue slots used: for up to 64 rows, and for more.
MIN_ISSUE_CEILING = (6.0, 3.0)
# What the matmuls of a layer of an 8B model may request from the L2 over their weights, by rows.
MAX_L2 = {20: 1.5, 40: 2.0, 160: 4.0}
LAYER = ("qkv_rope_cache", "linear", "gate_up_silu")  # the ops of those matmuls


class Ceiling(NamedTuple):
    """What a kernel may use at most, and what its code must contain."""

    registers: int
    multiplies: bool = False  # with mma.sync m16n8k16
    wide: bool = True  # some loads or asynchronous copies of 16 bytes
    narrow: int = 15  # at most this % of the copied bytes in smaller copies
    shared: int = MAX_SHARED
    wgmma: bool = False  # on sm_90, where its sums have the bits of mma.sync
    stack: int = 0


# One line per kernel, by the name of its function without `_` and `_kernel`.
CEILINGS = {
    "rms_norm": Ceiling(registers=64),
    "qkv_rope_cache": Ceiling(registers=192, multiplies=True, shared=FEW_ROWS),
    "qkv_rope_cache_end": Ceiling(registers=128),
    "head_norm_rope": Ceiling(registers=64, wide=False),
    "rope_cache": Ceiling(registers=96),
    "linear": Ceiling(registers=168, multiplies=True, shared=FEW_ROWS),
    "linear_end": Ceiling(registers=64),
    # A multiprocessor of sm_90 has 227 KB, for one block or for two.
    "partial_sums": Ceiling(registers=255, multiplies=True, shared=160 * 1024, wgmma=True),
    "gate_up_silu": Ceiling(registers=192, multiplies=True, shared=FEW_ROWS),
    "gate_up_silu_end": Ceiling(registers=64),
    # Triton 3.6 copies a page number once for each piece of the page; 3.9 spills 30 registers where
    # heads have 128 numbers.
    "verify_attention": Ceiling(255, multiplies=True, narrow=30, shared=156 * 1024, stack=120),
    "merge_splits": Ceiling(registers=72, wide=False),  # 72 on sm_89 with Triton 3.6
    "medusa_blocks": Ceiling(registers=216, multiplies=True, shared=FEW_ROWS),
    "medusa_blocks_end": Ceiling(registers=64),
    "vocabulary_tiles": Ceiling(registers=255, multiplies=True, shared=108 * 1024, wgmma=True),
    "vocabulary_merge": Ceiling(registers=96, multiplies=True),
    "accept": Ceiling(registers=32, wide=False),
    "advance": Ceiling(registers=64, wide=False),
    "compact_path": Ceiling(registers=128),
    "commit": Ceiling(registers=32, wide=False),
    "sample": Ceiling(registers=96),
    "latest_match": Ceiling(registers=64, wide=False),
    "ngram": Ceiling(registers=64, wide=False),
    "window_slots": Ceiling(registers=64, wide=False),
}


# A symbol, what it does, and the GPU.
Offence = tuple[str, str, str]


class Compiled(NamedTuple):
    """One kernel, compiled for one launch on one GPU."""

    target: str
    model: str
    op: str
    case: str
    rows: int
    kernel: str
    symbol: str
    binary: str  # Triton's hash of source, specialisation and target
    stages: int  # loads in flight plus one, which changes no bit
    registers: int
    stack: int  # bytes per thread: spilled registers, or an array not held in registers
    shared: int
    wide: int  # loads and asynchronous copies of 16 bytes or more
    narrow: int  # % of the bytes of all asynchronous copies in copies of less than 16
    mma: dict[str, int]
    loop: int = 0  # instructions per pass of the multiplying loop
    unrolled: int = 0  # instructions of all passes, if the compiler has unrolled the loop
    issue_ceiling: float = 0.0  # TB/s of weights with every issue slot used
    rows_multiplied: int = 0
    l2_over_weights: float = 0.0  # bytes requested from the L2 over the weights' bytes
    l2_bytes: int = 0  # requested from the L2 by a matmul, or by the sum of its segments
    weight_bytes: int = 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add_names(parser, "--model", MODELS)
    add_names(parser, "--op", OPS)
    add(
        "--target",
        choices=TARGETS,
        nargs="+",
        default=TARGETS,
        metavar="GPU",
        help="of " + ", ".join(TARGETS) + " (default: all)",
    )
    add("--jobs", type=at_least(1), default=2, metavar="N", help="targets compiled in parallel")
    add("--write-table", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    return run(parser, compile_all, argv)


def compile_all(args: argparse.Namespace, finish: Finish) -> int:
    if not args.write_table:
        return judge(args, finish, None)
    with output_file(TABLE, force=True) as file:
        return judge(args, finish, file)


def judge(args: argparse.Namespace, finish: Finish, table_file: Path | None) -> int:
    """Compile everything, list the offences, write the table to `table_file` unless it is None."""
    models, ops = args.model or list(MODELS), args.op or list(OPS)
    with (
        args.status.phase("compiling", len(args.target), "targets") as phase,
        ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool,
    ):
        jobs = [pool.submit(compile_target, target, models, ops) for target in args.target]
        results = []
        for job in jobs:
            results.append(job.result())
            phase.advance()
    compiled = [kernel for kernels, _ in results for kernel in kernels]
    wrong = [line for _, failures in results for line in failures]
    wrong += [line for kernel in compiled for line in offences(kernel)]
    wrong += two_binaries(compiled)
    wrong += too_much_l2(compiled)
    wrong += [(name, "has no line in CEILINGS", "") for name in kernels() - CEILINGS.keys()]
    if not (args.model or args.op):
        launched = {kernel.kernel for kernel in compiled}
        wrong += [(name, "is launched by no case", "") for name in kernels() - launched]
    found = together(wrong)
    text = table(compiled)
    if table_file is not None:
        with writing(TABLE):
            table_file.write_text(text, encoding="utf-8")
    print(text)
    print("\n".join(f"OFFENCE {line}" for line in found) or "no offences")
    report = {
        "schema": 1,
        "triton": triton.__version__,
        "kernels": [kernel._asdict() for kernel in compiled],
        "offences": found,
    }
    binaries = len({kernel.binary for kernel in compiled})
    line = {"schema": 1, "binaries": binaries, "offences": len(found)}
    return finish(report, 1 if found else 0, line)


def compile_target(
    target: str, models: list[str], ops: list[str]
) -> tuple[list[Compiled], list[Offence]]:
    """Compile every case's launches for one GPU -> (kernels, failures to compile)."""
    arch = int(target.removeprefix("sm_"))
    triton.runtime.driver.set_active(Device(arch))
    compiled, failures = [], []
    measured: dict[str, dict[str, Any]] = {}
    for model in models:
        for op in ops:
            for B, T in (*STEPS, *OTHER_TIERS):
                for case in OPS[op](MODELS[model], B, T):
                    with launches_compiled() as launched:
                        try:
                            case.inputs("meta").launch(arch >= 90)
                        except (TritonError, RuntimeError) as error:
                            what = f"does not compile: {first_cause(error)}"
                            failures.append((f"{op} ({case.name}, {B * T} rows)", what, target))
                    for kernel, binary, given, grid in launched:
                        if binary.hash not in measured:
                            measured[binary.hash] = measure(binary)
                        facts = measured[binary.hash]
                        label = (target, model, op, case.name, B * T, kernel)
                        one = Compiled(*label, **facts)
                        compiled.append(with_bounds(one, given, grid, binary.metadata.num_warps))
    return compiled, failures


def with_bounds(one: Compiled, given: dict[str, Any], grid: Any, warps: int) -> Compiled:
    one = one._replace(l2_bytes=l2_bytes(given, grid))
    multiplied = matmul(given, grid)
    if multiplied is None:
        return one
    ceiling = multiplied.issue_ceiling(one.loop, one.unrolled, warps, GPUS[one.target])
    return one._replace(
        issue_ceiling=round(ceiling / 1e12, 2),
        rows_multiplied=given["R"],
        l2_over_weights=round(one.l2_bytes / multiplied.weight_bytes, 2),
        weight_bytes=multiplied.weight_bytes,
    )


def offences(kernel: Compiled) -> list[Offence]:
    """The rules that a kernel breaks.

    Other tensor-core instructions may round differently, and Triton chooses among them by the
    shape of a tile: a row keeps its bits because one kind is used everywhere, and on sm_90 another
    that was measured to give the same bits. Many narrow copies
    mean that the compiler lost the alignment of a weight or of the cache; a few are page numbers or
    the weights of a norm.
    """
    ceiling = CEILINGS.get(kernel.kernel, Ceiling(255))
    wrong = []
    if kernel.stack > ceiling.stack:
        wrong.append(f"spills {kernel.stack} bytes per thread")
    if kernel.registers > ceiling.registers:
        wrong.append(f"takes {kernel.registers} registers, at most {ceiling.registers}")
    if kernel.shared > ceiling.shared:
        wrong.append(f"takes {kernel.shared} bytes of shared memory, at most {ceiling.shared}")
    if ceiling.wide and not kernel.wide:
        wrong.append("has no 16-byte loads")
    if ceiling.wide and kernel.narrow > ceiling.narrow:
        wrong.append(f"copies {kernel.narrow} % in less than 16 bytes at a time")
    allowed = {"mma.sync.m16n8k16"}
    if ceiling.wgmma and kernel.target == "sm_90":
        allowed |= {kind for kind in kernel.mma if re.fullmatch(WGMMA, kind)}
    if bool(kernel.mma) != ceiling.multiplies or not set(kernel.mma) <= allowed:
        wrong.append(f"multiplies with {', '.join(kernel.mma) or 'nothing'}")
    least = MIN_ISSUE_CEILING[kernel.rows_multiplied > 64]
    if 0 < kernel.issue_ceiling < least and kernel.target == "sm_90":
        passes = f"{kernel.loop} instructions per pass"
        if kernel.unrolled:
            passes = f"{kernel.unrolled} instructions in all passes"
        wrong.append(
            f"issues {passes}: {kernel.issue_ceiling} TB/s of weights at most, at least {least}"
        )
    if kernel.rows_multiplied and not kernel.issue_ceiling:
        wrong.append("has no multiplications to count the issued instructions of")
    return [(kernel.symbol, what, kernel.target) for what in wrong]


def two_binaries(compiled: list[Compiled]) -> list[Offence]:
    """Symbols with several binaries: the row counts would differ in code, and perhaps in bits."""
    binaries: dict[tuple[str, str, str, str, int], dict[str, int]] = {}
    for k in compiled:
        seen = binaries.setdefault((k.symbol, k.target, k.model, k.case, k.stages), {})
        seen.setdefault(k.binary, k.rows)
    return [
        (symbol, f"is {len(seen)} binaries, at {', '.join(map(str, seen.values()))} rows", target)
        for (symbol, target, *_), seen in binaries.items()
        if len(seen) > 1
    ]


def l2_of_layers(compiled: list[Compiled], model: str) -> dict[int, float]:
    """What the matmuls of a model's layer request from the L2 over their weights, by rows. Empty
    unless all of them are compiled; grids are the same on every GPU."""
    of_layer = [k for k in compiled if k.model == model and k.op in LAYER]
    of_layer = [k for k in of_layer if k.target == of_layer[0].target]
    if {k.op for k in of_layer} != set(LAYER):
        return {}
    asked, weights = Counter[int](), Counter[int]()
    for k in of_layer:
        asked[k.rows] += k.l2_bytes
        weights[k.rows] += k.weight_bytes
    return {rows: asked[rows] / weights[rows] for rows in sorted(asked)}


def too_much_l2(compiled: list[Compiled]) -> list[Offence]:
    return [
        ("a layer", f"requests {ratio:.2f} x its weights from the L2 at {rows} rows", "")
        for rows, ratio in l2_of_layers(compiled, "llama-3.1-8b").items()
        if ratio > MAX_L2.get(rows, float("inf"))
    ]


def together(wrong: list[Offence]) -> list[str]:
    """One line for each offence of a symbol, with the GPUs that show it."""
    targets: dict[tuple[str, str], dict[str, None]] = {}
    for symbol, what, target in wrong:
        targets.setdefault((symbol, what), {})[target] = None
    lines = [(symbol, what, " ".join(where)) for (symbol, what), where in targets.items()]
    return sorted(
        f"{symbol} {what}" + (f" ({where})" if where else "") for symbol, what, where in lines
    )


def kernels() -> set[str]:
    """The names of all kernels of kernels/."""
    return {
        op_name(node.name)
        for file in ROOT.glob("kernels/*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }


def table(compiled: list[Compiled]) -> str:
    """Markdown: one line per kernel and model, one column per GPU."""
    targets = list(dict.fromkeys(kernel.target for kernel in compiled))
    some = "" if set(targets) == set(TARGETS) else f"--target {' '.join(targets)} "
    lines = [
        "# What the kernels compile to",
        "",
        f"Triton {triton.__version__}, {date.today()}, by `python benchmarks/check_codegen.py "
        f"{some}--write-table`. Cells: registers per thread / KB of shared memory per block / "
        "16-byte loads and copies in the code / tensor-core instructions in the code; for "
        "matmuls / the issue ceiling, TB/s of weights with every issue slot used / bytes requested "
        "from the L2 over the weights' bytes.",
        "",
        "Issue ceilings count a warp's instructions in a pass of the loop that multiplies; without "
        "a loop, from the first load to the last multiplication, over all passes. They are at "
        + ", ".join(f"{GPUS[target].clock / 1e9} GHz ({target})" for target in targets)
        + f". Limits: no kernel may spill; on sm_90 a matmul's issue ceiling is at least "
        f"{MIN_ISSUE_CEILING[0]} TB/s for up to 64 rows and {MIN_ISSUE_CEILING[1]} for more; the "
        "matmuls of a layer of llama-3.1-8b request from the L2 at most "
        + ", ".join(f"{most} x their weights at {rows} rows" for rows, most in MAX_L2.items())
        + ".",
    ]
    for model in dict.fromkeys(kernel.model for kernel in compiled):
        lines += ["", f"## {model}", ""]
        lines += [
            "| kernel | rows | " + " | ".join(targets) + " |",
            "|---|---|" + "---|" * len(targets),
        ]
        kernels = [kernel for kernel in compiled if kernel.model == model]
        for symbol in dict.fromkeys(kernel.symbol for kernel in kernels):
            same = [kernel for kernel in kernels if kernel.symbol == symbol]
            rows = ", ".join(map(str, sorted({k.rows for k in same})))
            cells = [
                ", ".join(dict.fromkeys(cell(k) for k in same if k.target == target))
                for target in targets
            ]
            lines.append(f"| `{symbol.removeprefix('mtpkern_')}` | {rows} | {' | '.join(cells)} |")
        ratios = l2_of_layers(compiled, model)
        if ratios:
            listed = ", ".join(f"{ratio:.2f} at {rows}" for rows, ratio in ratios.items())
            lines += ["", f"L2 requests of a layer's matmuls over their weights: {listed} rows."]
    return "\n".join(lines) + "\n"


def cell(kernel: Compiled) -> str:
    shared = f"{kernel.shared / 1024:.1f}".removesuffix(".0")
    spilled = f" / {kernel.stack} SPILLED" if kernel.stack else ""
    mma = sum(kernel.mma.values())
    bounds = ""
    if kernel.rows_multiplied:
        bounds = f" / {kernel.issue_ceiling} / {kernel.l2_over_weights}"
    return f"{kernel.registers} / {shared} / {kernel.wide} / {mma}{bounds}{spilled}"


if __name__ == "__main__":
    sys.exit(main())
