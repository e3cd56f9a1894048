"""What a step should cost on a GPU, predicted from its launches and the bytes that they read.

    python benchmarks/predict_steps.py --model llama-3.1-8b --context 1024

The step runs on tensors without data (torch's meta device), which counts every kernel and every
torch operator that it would launch, and the weights that those would read; keys and values are
counted by formula. A matmul takes as long as the slowest of four bounds (`bounds.py`): memory, L2,
instructions issued (from its machine code for an H100) and tensor cores. Attention takes as long as
reading its keys and values from memory. Every launch adds a microsecond. The rates are assumptions
and are printed with the result; nothing here is a measurement. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from bounds import DRAM, GPUS, ISSUED, L2, MMA, l2_bytes, matmul
from common import Finish, add_counts, add_names, run
from dummy_models import medusa_heads, meta_state, mtp_module, write_config
from model_shapes import MODELS, TINY, ModelShape
from offline_compiler import Device, issued, launches_compiled, op_name
from torch.utils._python_dispatch import TorchDispatchMode

from mtpkern.arguments import Parser, at_least
from mtpkern.decode import decode_step
from mtpkern.drafters.base import Drafter, NoDrafter
from mtpkern.drafters.ngram import NgramDrafter
from mtpkern.ops.gpu import TRITON

# Operators of torch that launch nothing.
VIEWS = {
    *("view", "_unsafe_view", "reshape", "select", "slice", "unsqueeze", "expand", "transpose"),
    *("t", "alias", "split_with_sizes", "permute", "detach"),
    *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"),
}
LAUNCH = 1e-6  # seconds
HEADER = (
    "| model | batch | K | drafter | kernels | other launches | GB | ms | over K = 0 "
    "| over bytes / bandwidth | bound by |"
)


class Trace(TorchDispatchMode):
    """The launches of a step, and the bytes of weights that its kernels would read."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self.weight_bytes = 0
        self.cached_slots_bytes = 0  # of one cached token per sequence, over all launches
        # Matmuls and the sums of their segments: name, function, arguments, grid, options.
        self.matmuls: list[tuple[str, Any, tuple[Any, ...], Any, dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.others[name] += 1
        return func(*args, **(kwargs or {}))

    def launch(self, name: str, given: dict[str, Any]) -> None:
        """Count a kernel; `given` has its arguments by the names of its signature."""
        self.kernels[name] += 1
        if "w_ptr" in given and name != "rms_norm":
            w = given["w_ptr"]
            self.weight_bytes += w.numel() * w.element_size()
        if name == "verify_attention":
            k = given["k_ptr"]
            slot = 2 * k.shape[-2] * k.shape[-1] * k.element_size()
            self.cached_slots_bytes += slot * len(given["lengths_ptr"])


@contextmanager
def traced() -> Iterator[Trace]:
    """Count launches instead of making them. Tensors have no data: reading a value fails."""
    trace = Trace()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False)) | options
        name = op_name(self.fn.__name__)
        trace.launch(name, given)
        if l2_bytes(given, grid):
            trace.matmuls.append((name, self, args, grid, options))

    with patch.object(triton.runtime.jit.JITFunction, "run", run), trace:
        yield trace


def main(argv: list[str] | None = None) -> int:
    return run(parser(), measure, argv)


def measure(args: argparse.Namespace, finish: Finish) -> int:
    print(
        f"assumed of an H100: {DRAM / 1e12} TB/s from memory and {L2 / 1e12} from the L2, "
        f"{ISSUED:.0%} of issue slots used, {MMA / 1e12:.0f} TFLOP/s, {LAUNCH * 1e6} us for every "
        f"launch; context {args.context}; predicted, not measured"
    )
    shapes: dict[str, ModelShape] = {"tiny": TINY} | MODELS
    rows: list[dict[str, Any]] = []
    with torch.inference_mode(), tempfile.TemporaryDirectory() as work:
        for name in args.model or MODELS:
            directory = write_config(shapes[name], Path(work) / name)
            with args.status.phase(f"counting {name}"):
                for batch in args.batch or [1]:
                    rows += predict(name, directory, batch, args)
    print(f"\n{HEADER}\n|{'---|' * (HEADER.count('|') - 1)}")
    for row in rows:
        print(
            f"| {row['model']} | {row['batch']} | {row['num_speculative_tokens']} "
            f"| {row['drafter']} | {row['kernels']} | {row['other_launches']} "
            f"| {row['bytes'] / 1e9:.3f} | {row['predicted_ms']:.3f} | {row['over_plain']:.3f} "
            f"| {row['over_bytes']:.3f} | {row['bounds']} |"
        )
    assumed = {"dram": DRAM, "l2": L2, "issued": ISSUED, "mma": MMA, "launch": LAUNCH}
    assumed["context"] = args.context
    return finish({"schema": 1, "assumed": assumed, "rows": rows}, 0)


def parser() -> Parser:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add_names(parser, "--model", ["tiny", *MODELS], "all but tiny")
    add_counts(parser, "--batch", "B", "sequences; repeatable (default: 1)")
    add("-K", dest="k", type=at_least(0), default=4, metavar="K", help="drafts per step")
    add("--context", type=at_least(1), default=1024, metavar="S", help="cached tokens")
    return parser


def predict(
    name: str, directory: Path, batch: int, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Rows of one model and batch: plain, and each kind of drafter at K."""
    trunk, state = meta_state(directory, batch, args.k)
    drafters: list[tuple[str, int, Drafter]] = [("none", 0, NoDrafter())]
    if args.k:
        drafters += [
            ("n-gram", args.k, NgramDrafter(TRITON)),
            ("medusa", args.k, medusa_heads(trunk, args.k, TRITON)),
            ("mtp", args.k, mtp_module(trunk, state.cache, TRITON)),
        ]
    plain = 0.0
    for kind, k, drafter in drafters:
        with traced() as trace:
            decode_step(state.view(batch, k), trunk, drafter, TRITON, logprobs=True)
        kernels, others = trace.kernels.total(), trace.others.total()
        read = trace.weight_bytes + trace.cached_slots_bytes * args.context
        seconds, bounds = matmul_seconds(trace)
        seconds += trace.cached_slots_bytes * args.context / DRAM + (kernels + others) * LAUNCH
        ms = 1e3 * seconds
        plain = plain or ms
        yield {
            "model": name,
            "batch": batch,
            "num_speculative_tokens": k,
            "drafter": kind,
            "kernels": kernels,
            "other_launches": others,
            "bytes": read,
            "predicted_ms": ms,
            "over_plain": ms / plain,
            "over_bytes": seconds * DRAM / read,
            "bounds": bounds,
        }


def matmul_seconds(trace: Trace) -> tuple[float, str]:
    """The time of all matmuls of a step on an H100, and the bound that decides for each kernel."""
    seconds, deciding = 0.0, dict[str, str]()
    for name, function, args, grid, options in trace.matmuls:
        given = dict(zip(function.arg_names, args, strict=False)) | options
        times = {"L2": l2_bytes(given, grid) / L2}
        multiplied = matmul(given, grid)
        if multiplied is not None:
            counts = _issued(function, args, options)
            ceiling = multiplied.issue_ceiling(
                **counts, warps=options["num_warps"], gpu=GPUS["sm_90"]
            )
            loaded = multiplied.passes * multiplied.bytes_of_pass
            times["memory"] = multiplied.weight_bytes / DRAM
            times["issue"] = loaded / ceiling / ISSUED
            times["tensor cores"] = multiplied.flops / MMA
        bound = max(times, key=lambda one: times[one])
        seconds += times[bound]
        deciding[name] = bound
    return seconds, ", ".join(f"{name}: {bound}" for name, bound in deciding.items())


_counted: dict[tuple[object, ...], dict[str, int]] = {}


def _issued(function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, int]:
    """Instructions of a matmul's passes on sm_90 (see `issued`), compiled once per shape."""
    key = (function.fn.__name__, *sorted(item for item in options.items()))
    if key not in _counted:
        triton.runtime.driver.set_active(Device(90))
        with launches_compiled() as launched:
            function.run(*args, grid=(1,), warmup=False, **options)
        _counted[key] = issued(launched[0][1].asm["cubin"])
    return _counted[key]


if __name__ == "__main__":
    sys.exit(main())
