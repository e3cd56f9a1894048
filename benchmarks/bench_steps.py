"""What a step costs on random weights of real shapes: every batch and K, beside torch's own step.

    python benchmarks/bench_steps.py --model llama-3.1-8b --context 1024

The cost of a step does not depend on the weights' values, so no checkpoint is needed. A row is one
(batch, K) at one context: the median time of a step and its spread, the bytes that it must read
(weights once, keys and values of the context) over that time, and the ratio to the fastest plain
step of the same batch. The baseline `torch` is a plain step in plain torch under a CUDA graph
(`F.linear`, `scaled_dot_product_attention`), which does not keep the numerics contract. The last
line is one JSON object. On a CPU it runs the definitions, to show that it runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    Finish,
    add_counts,
    add_names,
    environment,
    first_line,
    gpu_environment,
    gpu_first_line,
    gpu_milliseconds,
    print_row,
    run,
)
from dummy_models import medusa_heads, mtp_module, write_config
from model_shapes import MODELS, TINY
from torch import Tensor

from mtpkern.arguments import Parser, at_least
from mtpkern.decode import decode_step
from mtpkern.drafters.base import Drafter, NoDrafter
from mtpkern.drafters.mtp import MtpDrafter
from mtpkern.drafters.ngram import NgramDrafter
from mtpkern.engine import LLM
from mtpkern.graph import GraphPool
from mtpkern.model import Llama
from mtpkern.ops.definitions import DEFINITIONS

HEADER = "| batch | K | drafter | context | ms | spread | GB/s | over the plain step |"


def main(argv: list[str] | None = None) -> int:
    return run(parser(), measure, argv)


def measure(args: argparse.Namespace, finish: Finish) -> int:
    args.batch, args.K = args.batch or [1], args.K or [0, 4]
    args.context = args.context or [1024]
    on_gpu = torch.cuda.is_available()
    facts = gpu_environment() if on_gpu else environment()
    print(gpu_first_line(facts) if on_gpu else first_line(facts), flush=True)
    shapes = {"tiny": TINY} | MODELS
    report: dict[str, Any] = {"schema": 1, "environment": facts, "rows": []}
    models = args.model or (["llama-3.1-8b", "llama-3.2-1b"] if on_gpu else ["tiny"])
    with torch.inference_mode(), tempfile.TemporaryDirectory() as work:
        for name in models:
            directory = write_config(shapes[name], Path(work) / name)
            with args.status.phase(f"timing {name}"):
                print(f"\n{name}\n\n{HEADER}\n|{'---|' * (HEADER.count('|') - 1)}")
                for row in time_model(directory, args):
                    report["rows"].append({"model": name} | row)
                    with args.status.paused():
                        print(table_line(row))
                        print_row(report["rows"][-1])
    return finish(report, 0)


def parser() -> Parser:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    default = "llama-3.1-8b and llama-3.2-1b; without a GPU tiny"
    add_names(parser, "--model", ["tiny", *MODELS], default)
    add_counts(parser, "--batch", "B", "sequences; repeatable (default: 1)")
    add_counts(parser, "-K", "K", "drafts per step; repeatable (default: 0 and 4)", least=0)
    add_counts(parser, "--context", "S", "cached tokens; repeatable (default: 1024)")
    add("--repeat", type=at_least(2), default=20, metavar="N", help="steps per median")
    return parser


def time_model(directory: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of one model: torch's step, then every K and drafter, at each batch and context."""
    most = max(args.context)
    llm = LLM(
        directory,
        load_format="dummy",
        num_speculative_tokens=max(args.K),
        max_batch=max(args.batch),
        max_length=most + 64,
        graph=False,
        ops=None if torch.cuda.is_available() else DEFINITIONS,
        status=args.status,
    )
    parallel = medusa_heads(llm.trunk, max(args.K), llm.ops)
    sequential = mtp_module(llm.trunk, llm.runner.cache, llm.ops)
    drafters: list[tuple[str, int, Drafter]] = [("none", 0, NoDrafter())]
    for k in args.K:
        if k:
            drafters += [
                ("n-gram", k, NgramDrafter(llm.ops)),
                ("medusa", k, parallel),
                ("mtp", k, sequential),
            ]
    for batch in args.batch:
        for context in args.context:
            floor = time_step(floor_step(llm.trunk, batch, context), args.repeat)
            plain = floor[0]
            for name, k, drafter in [("torch", 0, None), *drafters]:
                timed = floor
                if drafter is not None:
                    timed = time_step(own_step(llm, batch, k, context, drafter), args.repeat)
                if k == 0:
                    plain = min(plain, timed[0])
                yield {
                    "batch": batch,
                    "num_speculative_tokens": k,
                    "drafter": name,
                    "context": context,
                    "ms": timed[0],
                    "spread_ms": timed[1],
                    "gbps": bytes_read(llm, batch, context) / timed[0] / 1e6,
                    "over_plain": timed[0] / plain,
                }


def bytes_read(llm: LLM, batch: int, context: int) -> int:
    """What a plain step must read: every weight once, and keys and values of the context."""
    c, trunk = llm.config, llm.trunk
    weights = sum(
        w.data.numel()
        for layer in trunk.layers
        for w in (layer.qkv, layer.o, layer.gate_up, layer.down)
    )
    cached = 2 * c.num_layers * batch * context * c.num_kv_heads * c.head_dim
    return (weights + trunk.lm_head.numel() + cached) * trunk.embedding.element_size()


def own_step(llm: LLM, batch: int, k: int, context: int, drafter: Drafter) -> Callable[[], object]:
    """One step of mtpkern at a context. No sequence is active, so it can be repeated."""
    state = llm.runner.state.view(batch, k)
    pages = -(-(context + 64) // llm.runner.cache.k.shape[2])
    for slot in range(batch):
        # Contents do not matter, so sequences may share pages where the cache has too few.
        first = 1 + slot * pages % max(1, llm.runner.cache.k.shape[1] - pages)
        llm.runner.cache.assign(slot, list(range(first, first + pages)))
    state.cache.lengths.fill_(context)
    # The attention's grid spans the page table, which is cut to this context.
    state = replace(state, cache=state.cache.columns(pages))
    if isinstance(drafter, MtpDrafter):
        drafter.cache.lengths.fill_(context)
    step = lambda: decode_step(state, llm.trunk, drafter, llm.ops, logprobs=True)  # noqa: E731
    return GraphPool().capture(step) if torch.cuda.is_available() else step


def floor_step(trunk: Llama, batch: int, context: int) -> Callable[[], object]:
    """A plain step in plain torch, with the vendor's matmuls and attention."""
    c, like = trunk.config, trunk.embedding
    heads, kv_heads, D = c.num_heads, c.num_kv_heads, c.head_dim
    keys = like.new_zeros(c.num_layers, 2, batch, kv_heads, context + 1, D)
    token = torch.zeros(batch, 1, dtype=torch.int64, device=like.device)
    cos = like.new_ones(D)

    matrices = [
        [w.data for w in (layer.qkv, layer.o, layer.gate_up, layer.down)] for layer in trunk.layers
    ]

    def step() -> Tensor:
        x = F.embedding(token, like)
        for i, (layer, (qkv_w, o_w, gate_up_w, down_w)) in enumerate(
            zip(trunk.layers, matrices, strict=True)
        ):
            normed = F.rms_norm(x, (c.hidden_size,), layer.input_norm, c.rms_norm_eps)
            qkv = F.linear(normed, qkv_w).view(batch, 1, -1, D).transpose(1, 2)
            q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
            q, k = q * cos + q.roll(D // 2, -1) * cos, k * cos + k.roll(D // 2, -1) * cos
            keys[i, 0, :, :, -1:], keys[i, 1, :, :, -1:] = k, v
            attended = F.scaled_dot_product_attention(q, keys[i, 0], keys[i, 1], enable_gqa=True)
            x = x + F.linear(attended.transpose(1, 2).reshape(batch, 1, -1), o_w)
            normed = F.rms_norm(x, (c.hidden_size,), layer.post_attention_norm, c.rms_norm_eps)
            gate, up = F.linear(normed, gate_up_w).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down_w)
        normed = F.rms_norm(x, (c.hidden_size,), trunk.norm, c.rms_norm_eps)
        token.copy_(F.linear(normed, trunk.lm_head)[:, -1:].argmax(-1))
        return token

    return GraphPool().capture(step) if torch.cuda.is_available() else step


def time_step(step: Callable[[], object], repeat: int) -> tuple[float, float]:
    """Milliseconds of a step: the median of `repeat`, and the interquartile range."""
    if torch.cuda.is_available():
        times = gpu_milliseconds(step, repeat)
    else:
        times = []
        for _ in range(repeat + 2):
            started = time.perf_counter()
            step()
            times.append(1000 * (time.perf_counter() - started))
        del times[:2]
    low, median, high = statistics.quantiles(times, n=4)
    return median, high - low


def table_line(row: dict[str, Any]) -> str:
    return (
        f"| {row['batch']} | {row['num_speculative_tokens']} | {row['drafter']} "
        f"| {row['context']} | {row['ms']:.3f} | {row['spread_ms']:.3f} "
        f"| {row['gbps']:.0f} | {row['over_plain']:.3f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
