"""A step on this CPU beside the time that reading its weights takes.

    python benchmarks/bench_cpu.py --threads 1 --threads 2

Weights are random, in the default model's shapes and formats (SmolLM2-135M: 4 bits, vocabulary 8),
or those of a GGUF (`--gguf FILE`, Llama layout). The check runs first: windows of several rows on
several threads must give the bits of single rows on one thread; red means no number and exit 1.

The limit is the weights' bytes over the machine's read bandwidth, the fastest of five reads of
512 MB by the same threads. Steps, matmuls and reads alternate, and each figure is the fastest of
its repetitions, since on a shared machine a median depends on the other processes. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Finish, add_counts, environment, first_line, run
from cpu_trunk import Trunk, random_trunk, read_gguf

from mtpkern.arguments import Parser, at_least
from mtpkern.cache import rotary_tables
from mtpkern.kernels.cpu._compile import Kernels, default_cache, host_target
from mtpkern.kernels.cpu._threads import Helpers
from mtpkern.kernels.cpu.layers import ModelCache, add_layers
from mtpkern.kernels.cpu.program import Program
from mtpkern.kernels.cpu.quants import Array, quantise
from mtpkern.kernels.cpu.weights import on_cache_line, pack
from mtpkern.threads import physical_cores

PROBE_BYTES, PROBE_READS = 2**29, 5
ROWS = (1, 2, 5, 8)
MATMULS = {"qkv": (960, 576), "gate_up": (3072, 576), "down": (576, 1536)}


def main(argv: list[str] | None = None) -> int:
    return run(parser(), measure_all, argv)


def measure_all(args: argparse.Namespace, finish: Finish) -> int:
    compiled: list[str] = []
    begin = time.perf_counter()
    kernels = Kernels(directory=default_cache(), on_compile=compiled.append)
    facts = environment() | {"form": host_target().form, "kv_cache": "float16"}
    trunk, shape = read_gguf(args.gguf) if args.gguf else random_trunk()
    kernels.entry("run_program")
    facts |= {"compiled": compiled, "start_seconds": round(time.perf_counter() - begin, 2)}
    print(first_line(facts), f"tile {facts['form']}", flush=True)
    report: dict[str, Any] = {"schema": 1, "environment": facts, "rows": []}
    if red := check(trunk, shape, kernels):
        print("\n".join([*red, "no speed is reported"]))
        return finish(report | {"red": red}, 1)
    print(
        "| threads | what | rows | ms | GB/s | limit ms | x limit |\n|---|---|---|---|---|---|---|"
    )
    for threads in args.threads or [1, physical_cores()]:
        helpers = Helpers(threads)
        cases = steps(trunk, shape, kernels, helpers, args.context)
        cases |= matmuls(kernels, helpers, args.format)
        report["rows"] += measure(cases, kernels, helpers, args.repeat, args.seconds)
        helpers.close()
    return finish(report, 0)


def parser() -> Parser:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--gguf", type=Path, metavar="FILE", help="the model (default: random weights)")
    add_counts(parser, "--threads", "N", "CPU threads; repeatable (default: 1 and all cores)")
    add_counts(parser, "--context", "N", "committed tokens; repeatable (default: 200)")
    add(
        "--format",
        action="append",
        metavar="FORMAT",
        help="of single matmuls; repeatable (default: q4_1, q8_0, bf16)",
    )
    add(
        "--repeat",
        type=at_least(1),
        default=30,
        metavar="N",
        help="repetitions per figure",
    )
    add(
        "--seconds",
        type=float,
        default=60,
        metavar="S",
        help="stop repeating after this long per thread count",
    )
    return parser


class Step(NamedTuple):
    """A whole step over one sequence, and its logits if they are kept."""

    program: Program
    logits: Array | None


def make_step(
    trunk: Trunk,
    shape: dict[str, int],
    kernels: Kernels,
    helpers: Helpers,
    capacity: int,
    keep_logits: bool = False,
) -> Step:
    """A step over one sequence in one page of `capacity` slots."""
    D = shape["D"]
    k, v = (
        torch.randn(shape["layers"], 1, capacity, shape["kv_heads"], D).to(torch.float16)
        for _ in range(2)
    )
    cos, sin = rotary_tables(1 / 100000 ** (torch.arange(0, D, 2) / D), 1.0, capacity)
    program = Program(kernels, helpers, max_rows=max(ROWS))
    x = program.buffer(trunk.embedding.in_features)
    program.embed(trunk.embedding, x)
    x = add_layers(program, x, trunk.layers, ModelCache(k, v, cos, sin, trunk.heads))
    logits = program.buffer(trunk.vocabulary.out_features) if keep_logits else None
    program.project(x, trunk.vocabulary, norm=trunk.norm, logits=logits)
    return Step(program, logits)


def check(trunk: Trunk, shape: dict[str, int], kernels: Kernels) -> list[str]:
    """Compare 40 tokens in windows of all widths, on 1 and 2 threads -> the differences found."""
    ids = np.random.default_rng(0).integers(0, shape["V"], 40)
    expected: Array | None = None
    wrong = []
    for threads in (1, 2):
        helpers = Helpers(threads)
        for rows in ROWS:
            step = make_step(trunk, shape, kernels, helpers, 256, keep_logits=True)
            logits = []
            for start in range(0, len(ids), rows):
                step.program.ids[:rows], step.program.lengths[0] = ids[start : start + rows], start
                step.program.run(rows)
                assert step.logits is not None
                logits.append(step.logits[:rows].copy())
            found = np.concatenate(logits)
            expected = found if expected is None else expected
            if found.tobytes() != expected.tobytes() or not np.isfinite(found).all():
                wrong.append(f"RED: {threads} threads, windows of {rows} rows: other bits")
        helpers.close()
    return wrong


class TimedCall(NamedTuple):
    """What is timed: a step, or a group of matmuls, on `rows` rows."""

    what: str
    rows: int
    bytes: int  # of weights
    call: Callable[[], object]


def steps(
    trunk: Trunk,
    shape: dict[str, int],
    kernels: Kernels,
    helpers: Helpers,
    contexts: list[int] | None,
) -> dict[str, TimedCall]:
    weights = [
        w for layer in trunk.layers for w in (*layer.qkv, layer.o, layer.gate_up, layer.down)
    ]
    size = sum(w.data.nbytes for w in (*weights, trunk.vocabulary))
    cases = {}
    for context in contexts or [200]:
        capacity = -(-(context + max(ROWS)) // 64) * 64
        step = make_step(trunk, shape, kernels, helpers, capacity)
        step.program.lengths[0] = context
        for rows in ROWS:
            name = f"step, context {context}"
            cases[f"{name}, {rows}"] = TimedCall(name, rows, size, repeatable(step.program, rows))
    return cases


def matmuls(kernels: Kernels, helpers: Helpers, formats: list[str] | None) -> dict[str, TimedCall]:
    """Single shapes, each with enough copies of the weights to exceed the caches."""
    cases = {}
    for format in formats or ["q4_1", "q8_0", "bf16"]:
        for name, (N, K) in MATMULS.items():
            w = pack(quantise(torch.randn(N, K), format))
            count = max(1, 2**26 // w.data.nbytes)
            program = Program(kernels, helpers, max_rows=max(ROWS))
            x, out = program.buffer(K), program.buffer(N)
            x[:] = 1
            for _ in range(count):
                copy = on_cache_line(w.data.shape)
                copy[:] = w.data
                program.linear(x, w._replace(data=copy), out)
            for rows in (1, 5, 8):
                what = f"{count} x {format} {name} {N} x {K}"
                size = count * w.data.nbytes
                cases[f"{what}, {rows}"] = TimedCall(what, rows, size, repeatable(program, rows))
    return cases


def repeatable(program: Program, rows: int) -> Callable[[], object]:
    return lambda: program.run(rows)


def measure(
    cases: dict[str, TimedCall], kernels: Kernels, helpers: Helpers, repeat: int, seconds: float
) -> list[dict[str, Any]]:
    """Rows with the fastest of all repetitions; reads and cases alternate."""
    reader = Program(kernels, helpers, max_rows=1)
    reader.read(np.ones(PROBE_BYTES, np.uint8))
    best = dict.fromkeys(cases, float("inf"))
    reads: list[float] = []
    end = time.perf_counter() + seconds
    for turn in range(repeat):
        if turn < PROBE_READS:
            reads.append(timed(repeatable(reader, 1)))
        for name, case in cases.items():
            best[name] = min(best[name], timed(case.call))
        if turn + 1 >= PROBE_READS and time.perf_counter() > end:
            break
    bandwidth = PROBE_BYTES / min(reads)
    rows = []
    for name, (what, count, size, _) in cases.items():
        ms, limit = 1e3 * best[name], 1e3 * size / bandwidth
        row = {
            "threads": helpers.threads,
            "what": what,
            "rows": count,
            "ms": ms,
            "gbps": size / ms / 1e6,
            "read_gbps": bandwidth / 1e9,
            "limit_ms": limit,
            "ratio": ms / limit,
        }
        print(
            f"| {helpers.threads} | {what} | {count} | {ms:.2f} | {row['gbps']:.1f} of "
            f"{bandwidth / 1e9:.1f} | {limit:.2f} | {row['ratio']:.2f} |",
            flush=True,
        )
        rows.append(row)
    return rows


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
