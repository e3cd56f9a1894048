"""Every kernel on this GPU: whether it is right, then how fast it reads memory.

    python benchmarks/bench_kernels.py --model llama-3.1-8b --op linear

A row is an op at one shape. It is timed and printed as soon as its values are checked, against
float64 with the tests' budget, twice the error of torch in the same dtype. A case that exceeds the
budget or does not run gets no row and no speed: it is printed and reported as red, the others are
still measured, and the exit code is 1.
Times are medians over replays of a CUDA graph whose calls rotate through inputs larger than the L2
cache. GB/s are the bytes of the op's formula (in its file's header) over that time; the peak is the
faster of a copy and a read measured just before. The baseline is torch: cuBLAS,
scaled_dot_product_attention, or the op written out. The ratio is the baseline's time over the
kernel's. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from common import (
    Finish,
    add_counts,
    add_names,
    gpu_environment,
    gpu_first_line,
    gpu_milliseconds,
    print_row,
    run,
)
from kernel_cases import OPS, Call, KernelCase
from model_shapes import MODELS, STEPS
from torch import Tensor
from triton.errors import TritonError

from mtpkern.arguments import Parser, at_least
from mtpkern.errors import UserError
from mtpkern.graph import GraphPool
from mtpkern.kernels._launch import jit, tl

PROBE_BYTES = 2**30
MAX_SETS = 32  # of inputs, for kernels that read very little
HEADER = "| op | case | shape | ms | GB/s | % of peak | baseline ms | ratio | max error |"


def main(argv: list[str] | None = None) -> int:
    return run(parser(), measure, argv)


def measure(args: argparse.Namespace, finish: Finish) -> int:
    if not torch.cuda.is_available():
        raise UserError("a CUDA GPU is needed, and this machine has none")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    facts = gpu_environment()
    print(gpu_first_line(facts), flush=True)
    cases = [
        (model, op, case)
        for model in args.model or MODELS
        for op in args.op or OPS
        for B, T in STEPS
        if args.rows is None or B * T in args.rows
        for case in islice(OPS[op](MODELS[model], B, T), 1 if args.first else None)
    ]
    report: dict[str, Any] = {"schema": 1, "environment": facts, "rows": [], "red": []}
    facts |= {f"{name}_gbps": round(rate, 1) for name, rate in bandwidths(args.repeat).items()}
    peak = max(facts["copy_gbps"], facts["read_gbps"])
    print(f"measured: copy {facts['copy_gbps']} GB/s, read {facts['read_gbps']} GB/s")
    with args.status.phase("checking and timing", len(cases), "cases") as phase:
        for model, op, case in cases:
            row = {"model": model, "op": op, "case": case.name, "shape": case.shape}
            reason = ""
            try:
                error, budget = check(case, args.pdl)
                if error <= budget:
                    row |= time_case(case, args.repeat, args.pdl, peak) | {"max_error": error}
                else:
                    reason = f"error {error:.3g} over {budget:.3g}"
            except (TritonError, RuntimeError) as raised:
                reason = (str(raised).strip().splitlines() or [type(raised).__name__])[-1]
            with args.status.paused():
                if reason:
                    report["red"].append(f"{model} {op} {case.name} {case.shape}: {reason}")
                    print(f"RED: {report['red'][-1]}")
                else:
                    if not report["rows"] or report["rows"][-1]["model"] != model:
                        print(f"\n{model}\n\n{HEADER}\n|{'---|' * (HEADER.count('|') - 1)}")
                    print(table_line(row))
                    print_row(row)
                    report["rows"].append(row)
            phase.advance(note=f"{model} {op} {case.name}")
    return finish(report, 1 if report["red"] else 0)


def parser() -> Parser:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add_names(parser, "--op", OPS)
    add_names(parser, "--model", MODELS)
    add_counts(parser, "--rows", "N", "window rows; repeatable (default: all)")
    add("--first", action="store_true", help="only the first case of each op")
    add("--repeat", type=at_least(1), default=20, metavar="N", help="replays per median")
    add("--pdl", action="store_true", help="programmatic dependent launches (sm_90 and newer)")
    return parser


def check(case: KernelCase, pdl: bool) -> tuple[float, float]:
    """A kernel's largest error, and its budget: twice the error of torch in the same dtype."""
    call = case.inputs("cuda")
    got, truth = tensors(call.launch(pdl)), tensors(call.truth())
    budget = 2 * largest_error(tensors(call.in_dtype()), truth)
    # Sums in float32 in another order differ in the last places, whatever the dtype.
    slack = max(float(t.double().abs().max()) for t in truth) * 2**-17
    return largest_error(got, truth), budget + slack


def tensors(result: object) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)  # type: ignore[arg-type]


def largest_error(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest difference of any element; NaN where only one side has one."""
    worst = 0.0
    for a, b in zip(got, truth, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"shape {list(a.shape)} against {list(b.shape)}")
        difference = (a.double() - b.double()).abs()
        # Equal infinities, as of a masked log-probability, are no difference.
        difference = torch.where(a.double() == b.double(), 0.0, difference)
        worst = max(worst, float(difference.max())) if difference.numel() else worst
        if difference.isnan().any():
            return float("nan")
    return worst


def time_case(case: KernelCase, repeat: int, pdl: bool, peak: float) -> dict[str, float]:
    """Time a kernel and its baseline on the same rotating inputs."""
    calls = rotating(case)
    ms = milliseconds([launch(call, pdl) for call in calls], repeat)
    baseline_ms = milliseconds([call.baseline for call in calls], repeat)
    gbps = case.bytes_moved / ms / 1e6
    return {
        "ms": ms,
        "gbps": gbps,
        "percent_of_peak": 100 * gbps / peak,
        "baseline_ms": baseline_ms,
        "ratio": baseline_ms / ms,
    }


def rotating(case: KernelCase) -> list[Call]:
    """Sets of inputs that are together larger than the L2 cache."""
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 2**26)
    sets = min(MAX_SETS, max(2, -(-4 * cache // case.bytes_moved)))
    return [case.inputs("cuda") for _ in range(sets)]


def launch(call: Call, pdl: bool) -> Callable[[], object]:
    return lambda: call.launch(pdl)


def milliseconds(calls: Sequence[Callable[[], object]], repeat: int) -> float:
    """Median time of one call, with all `calls` one after the other in a CUDA graph."""
    rounds = -(-40 // len(calls))

    def run_all() -> None:
        for call in [*calls] * rounds:
            call()

    times = gpu_milliseconds(GraphPool().capture(run_all), repeat)
    return statistics.median(times) / (rounds * len(calls))


@jit("BLOCK", "STEPS")
def _read_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, STEPS: tl.constexpr, PDL: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    total = tl.zeros([BLOCK], tl.float32)
    for step in tl.static_range(STEPS):
        total += tl.load(x_ptr + begin + step * BLOCK + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


def read(x: Tensor, out: Tensor) -> None:
    """Read float32 x; one sum per block of 16384 goes to out."""
    _read_kernel[(x.numel() // 16384,)](x, out, BLOCK=2048, STEPS=8, num_warps=8, pdl=False)


def bandwidths(repeat: int) -> dict[str, float]:
    """GB/s of a copy, read and written bytes alike, and of reading alone."""
    size = PROBE_BYTES
    x = torch.zeros(size // 4, device="cuda")
    y, sums = torch.empty_like(x), torch.empty(size // 65536, device="cuda")
    return {
        "copy": 2 * size / milliseconds([lambda: y.copy_(x)], repeat) / 1e6,
        "read": size / milliseconds([lambda: read(x, sums)], repeat) / 1e6,
    }


def table_line(row: dict[str, Any]) -> str:
    return (
        f"| {row['op']} | {row['case']} | {row['shape']} | {row['ms']:.4f} "
        f"| {row['gbps']:.0f} | {row['percent_of_peak']:.0f} "
        f"| {row['baseline_ms']:.4f} | {row['ratio']:.2f} | {row['max_error']:.2g} |"
    )


if __name__ == "__main__":
    sys.exit(main())
