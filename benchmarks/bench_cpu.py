"""A step on this CPU against the time that reading its weights takes.

    python benchmarks/bench_cpu.py --threads 1 --threads 2

Weights are random, of the default model's shapes and formats (SmolLM2-135M: 4 bits, vocabulary 8),
or a GGUF's own (`--gguf FILE`, Llama layout). The check runs first: windows of several rows on
several threads must give the bits of single rows on one thread; red means no number and exit 1.

The limit is the weights' bytes over the machine's read bandwidth, the best of five reads of 512 MB
by the same threads. Steps, matmuls and reads alternate, and each figure is the fastest of its
repetitions: on a shared machine the median says more about its neighbours. The last line is one
JSON object.
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
from common import Finish, environment, first_line, run

from mtpkern.arguments import Parser, at_least
from mtpkern.cache import rotary_tables
from mtpkern.errors import UserError, printable
from mtpkern.kernels.cpu._compile import Kernels, default_cache, host_target
from mtpkern.kernels.cpu._threads import Helpers
from mtpkern.kernels.cpu.layers import ModelCache, PackedLayer, add_layers
from mtpkern.kernels.cpu.program import Norm, Program
from mtpkern.kernels.cpu.quants import Array, Quants, from_gguf, joined, quantise
from mtpkern.kernels.cpu.weights import Weights, interleaved, on_cache_line, pack
from mtpkern.threads import physical_cores

PROBE_BYTES, PROBE_READS = 2**29, 5
ROWS = (1, 2, 5, 8)
MATMULS = {"qkv": (960, 576), "gate_up": (3072, 576), "down": (576, 1536)}
SMOLLM = {"E": 576, "F": 1536, "heads": 9, "kv_heads": 3, "D": 64, "layers": 30, "V": 49152}


class Trunk(NamedTuple):
    """A model's weights, packed."""

    embedding: Weights  # [V, E]
    layers: list[PackedLayer]
    norm: Norm
    vocabulary: Weights  # [V, E]; the embedding itself where they are tied
    heads: int  # query heads


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
    add("--gguf", type=Path, metavar="FILE", help="weights; default: random ones")
    add(
        "--threads", type=at_least(1), action="append", metavar="N", help="default: 1 and all cores"
    )
    add(
        "--context",
        type=at_least(1),
        action="append",
        metavar="N",
        help="committed tokens; default: 200",
    )
    add("--format", action="append", help="of single matmuls; default: q4_1, q8_0 and bf16")
    add(
        "--repeat",
        type=at_least(1),
        default=30,
        metavar="N",
        help="repetitions a minimum is taken of",
    )
    add("--seconds", type=float, default=60, help="stop repeating after this long per thread count")
    return parser


def random_trunk() -> tuple[Trunk, dict[str, int]]:
    generator = torch.Generator().manual_seed(0)

    def weights(N: int, K: int, format: str, order: Array | None = None) -> Weights:
        w = torch.randn(N, K, generator=generator) / K**0.5
        return pack(quantise(w, format), order=order)

    s = SMOLLM
    norm = Norm(np.ones(s["E"], np.float32), 1e-5)
    made = [
        PackedLayer(
            norm,
            weights((s["heads"] + 2 * s["kv_heads"]) * s["D"], s["E"], "q4_1"),
            weights(s["E"], s["heads"] * s["D"], "q4_1"),
            norm,
            weights(2 * s["F"], s["E"], "q4_1", interleaved(s["F"])),
            weights(s["E"], s["F"], "q4_1"),
        )
        for _ in range(s["layers"])
    ]
    vocabulary = weights(s["V"], s["E"], "q8_0")
    return Trunk(vocabulary, made, norm, vocabulary, s["heads"]), s


def read_gguf(file: Path) -> tuple[Trunk, dict[str, int]]:
    """A GGUF of the Llama layout, its matrices in their own bits."""
    import gguf

    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError) as error:
        raise UserError(f"{printable(file)} is not a GGUF: {printable(error)}") from None
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = fields["llama.attention.head_count"]
    kv_heads = fields["llama.attention.head_count_kv"]
    eps = float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}")
    names = {"F16": "fp16", "F32": "fp32"}

    def quants(name: str) -> Quants:
        tensor = tensors[f"{name}.weight"]
        kind = tensor.tensor_type.name
        return from_gguf(np.asarray(tensor.data), names.get(kind, kind.lower()))

    def norm(name: str) -> Norm:
        return Norm(np.ascontiguousarray(tensors[f"{name}.weight"].data, np.float32), eps)

    def halves_apart(w: Quants, count: int) -> Quants:
        rows = np.arange(len(w.q)).reshape(count, -1, 2)
        return w.take(rows.swapaxes(1, 2).reshape(-1))

    made = []
    for index in range(fields["llama.block_count"]):
        at = f"blk.{index}."
        q, k = quants(at + "attn_q"), quants(at + "attn_k")
        qkv = joined(halves_apart(q, heads), halves_apart(k, kv_heads), quants(at + "attn_v"))
        gate_up = joined(quants(at + "ffn_gate"), quants(at + "ffn_up"))
        made.append(
            PackedLayer(
                norm(at + "attn_norm"),
                pack(qkv),
                pack(quants(at + "attn_output")),
                norm(at + "ffn_norm"),
                pack(gate_up, order=interleaved(len(gate_up.q) // 2)),
                pack(quants(at + "ffn_down")),
            )
        )
    embedding = pack(quants("token_embd"))
    vocabulary = pack(quants("output")) if "output.weight" in tensors else embedding
    shape = {
        "kv_heads": kv_heads,
        "D": embedding.in_features // heads,
        "layers": len(made),
        "V": vocabulary.out_features,
    }
    return Trunk(embedding, made, norm("output_norm"), vocabulary, heads), shape


class Step(NamedTuple):
    """A whole step over one sequence, and its logits where they are kept."""

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
        torch.zeros(shape["layers"], 1, capacity, shape["kv_heads"], D, dtype=torch.float16)
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
    """What is wrong: 40 tokens in windows of all widths, on 1 and 2 threads, bit for bit."""
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


Case = tuple[str, int, int, Callable[[], object]]  # what, rows, bytes, call


def steps(
    trunk: Trunk,
    shape: dict[str, int],
    kernels: Kernels,
    helpers: Helpers,
    contexts: list[int] | None,
) -> dict[str, Case]:
    weights = [w for layer in trunk.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    size = sum(w.data.nbytes for w in (*weights, trunk.vocabulary))
    cases = {}
    for context in contexts or [200]:
        capacity = -(-(context + max(ROWS)) // 64) * 64
        step = make_step(trunk, shape, kernels, helpers, capacity)
        step.program.lengths[0] = context
        for rows in ROWS:
            name = f"step, context {context}"
            cases[f"{name}, {rows}"] = (name, rows, size, repeatable(step.program, rows))
    return cases


def matmuls(kernels: Kernels, helpers: Helpers, formats: list[str] | None) -> dict[str, Case]:
    """Single shapes, each over as many copies as exceed the caches."""
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
                cases[f"{what}, {rows}"] = (what, rows, size, repeatable(program, rows))
    return cases


def repeatable(program: Program, rows: int) -> Callable[[], object]:
    return lambda: program.run(rows)


def measure(
    cases: dict[str, Case], kernels: Kernels, helpers: Helpers, repeat: int, seconds: float
) -> list[dict[str, Any]]:
    """The fastest of all repetitions, which go round over reads and cases."""
    reader = Program(kernels, helpers, max_rows=1)
    reader.read(np.ones(PROBE_BYTES, np.uint8))
    best = dict.fromkeys(cases, float("inf"))
    reads: list[float] = []
    end = time.perf_counter() + seconds
    for turn in range(repeat):
        if turn < PROBE_READS:
            reads.append(timed(repeatable(reader, 1)))
        for name, (_, _, _, call) in cases.items():
            best[name] = min(best[name], timed(call))
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
