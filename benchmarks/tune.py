"""Tile tables for a GPU: measures every legal value and prints the fastest table.

    python benchmarks/tune.py --model llama-3.1-8b --op linear

The functions and constants in KNOBS are tuned, one call at a time: a call, such as the tile depth
for a tier of rows, has one value in all cases of all ops that make it. A value is legal if the
kernels compile with it, fit on the device, and give the same bits as the present value. Times are
those of bench_kernels.py, summed over the cases; a gain of less than 1 % is not worth a change. The
output is for a person to paste into kernels/, with the name of the GPU and the date. Under ttsem,
which has no clock, the times are those of the emulation. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from bench_kernels import launch, milliseconds, rotating, tensors
from common import Finish, add_counts, add_names, run
from kernel_cases import OPS, KernelCase
from model_shapes import MODELS, OTHER_TIERS, STEPS, TINY
from torch import Tensor
from triton.errors import TritonError

from mtpkern.arguments import Parser, at_least
from mtpkern.errors import UserError

KERNELS = "mtpkern.kernels."
SEED = 0
WORTH = 0.99  # of the present time


class Knob(NamedTuple):
    """A function or constant of kernels/<file>.py that decides how a kernel is launched."""

    file: str
    name: str
    values: Callable[[Any], Iterable[Any]]  # present value -> values to try beside it


def around(value: int) -> list[int]:
    return [value // 4, value // 2, 2 * value, 4 * value]


def tiles(present: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Tile depths, each with numbers of pipeline stages."""
    depth, _ = present
    return itertools.product((depth // 2, depth, 2 * depth), range(2, 9))


KNOBS = (
    Knob("_launch", "column_tile", lambda _: (16, 32, 64, 128)),
    Knob("_launch", "depth_tile", tiles),
    Knob("_launch", "few_rows_stages", lambda _: range(3, 9)),
    Knob("verify_attention", "_stages", lambda _: range(1, 10)),
    Knob("verify_attention", "_warps", lambda _: (2, 4, 8)),
    Knob("verify_attention", "FILL", around),
    Knob("ngram", "BLOCK", around),
)
TUNED = ("linear", "gate_up_silu", "qkv_rope_cache", "medusa_blocks", "verify_attention", "ngram")

# An op's name and one of its cases.
Use = tuple[str, KernelCase]
# The arguments of a call, positional and named; those of a constant are ().
Key = tuple[Any, ...]
Results = tuple[Tensor, ...]


class Trial(NamedTuple):
    """One value: its time summed over the cases, or why it is refused."""

    value: Any
    ms: float
    refused: str = ""


def main(argv: list[str] | None = None) -> int:
    return run(parser(), measure, argv)


def parser() -> Parser:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add_names(parser, "--model", ["tiny", *MODELS], "all but tiny")
    add_names(parser, "--op", TUNED)
    add_counts(parser, "--rows", "N", "window rows; repeatable (default: all)")
    add_names(parser, "--knob", [knob.name for knob in KNOBS])
    add("--repeat", type=at_least(1), default=10, metavar="N", help="replays per median")
    add("--pdl", action="store_true", help="programmatic dependent launches (sm_90 and newer)")
    return parser


def measure(args: argparse.Namespace, finish: Finish) -> int:
    if not torch.cuda.is_available():
        raise UserError("a CUDA GPU is needed, and this machine has none")
    shapes, models = {"tiny": TINY} | MODELS, args.model or list(MODELS)
    uses = [
        (op, case)
        for model in models
        for op in args.op or TUNED
        for B, T in (*STEPS, *OTHER_TIERS)
        if args.rows is None or B * T in args.rows
        for case in OPS[op](shapes[model], B, T)
    ]
    device = torch.cuda.get_device_name() if torch.version.cuda else "emulation"
    print(f"# {device}, {datetime.date.today()}, {', '.join(models)}", flush=True)
    rows = []
    for knob in KNOBS:
        if args.knob and knob.name not in args.knob:
            continue
        for key, (present, users) in calls_of(knob, uses, args.pdl).items():
            name = f"{knob.file}.{knob.name}" + (f"({', '.join(map(str, key))})" if key else "")
            with args.status.phase(f"tuning {name}"):
                checked = [(use, results(use[1], args.pdl)) for use in users]
                trials = [
                    try_value(knob, key, value, checked, args.repeat, args.pdl)
                    for value in dict.fromkeys([present, *knob.values(present)])
                ]
            chosen = choose(trials)
            print(table_line(name, trials, chosen), flush=True)
            trials_of = [trial._asdict() for trial in trials]
            rows.append({"call": name, "present": present, "chosen": chosen, "trials": trials_of})
    changed = {row["call"]: row["chosen"] for row in rows if row["chosen"] != row["present"]}
    report = {"schema": 1, "device": device, "models": models}
    return finish(report | {"rows": rows}, 0, report | {"calls": len(rows), "changed": changed})


def calls_of(knob: Knob, uses: Sequence[Use], pdl: bool) -> dict[Key, tuple[Any, list[Use]]]:
    """Each different call of a knob: its present value, and the cases that make it."""
    calls: dict[Key, tuple[Any, list[Use]]] = {}
    for op, case in uses:
        seen: dict[Key, Any] = {}
        present = getattr(sys.modules[KERNELS + knob.file], knob.name)
        if callable(present):
            with turned(knob, seen.setdefault):
                case.inputs("cuda").launch(pdl)
        elif op == knob.file:
            seen[()] = present
        for key, value in seen.items():
            calls.setdefault(key, (value, []))[1].append((op, case))
    return calls


@contextmanager
def turned(knob: Knob, answer: Callable[[Key, Any], Any]) -> Iterator[None]:
    """Make a call of the knob return answer(key, the original value)."""
    original = getattr(sys.modules[KERNELS + knob.file], knob.name)

    def answered(*args: Any, **named: Any) -> Any:
        return answer((*args, *named.items()), original(*args, **named))

    put = answered if callable(original) else answer((), original)
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith(KERNELS) and getattr(module, knob.name, None) is original:
                if callable(original) or name == KERNELS + knob.file:
                    stack.enter_context(patch.object(module, knob.name, put))
        yield


def try_value(
    knob: Knob, key: Key, value: Any, users: Sequence[tuple[Use, Results]], repeat: int, pdl: bool
) -> Trial:
    """Check a value's bits in all cases that use it, then time them all."""

    def answer(called: Key, own: Any) -> Any:
        return value if called == key else own

    try:
        with turned(knob, answer):
            for (op, case), expected in users:
                pairs = zip(results(case, pdl), expected, strict=True)
                if not all(torch.equal(a, b) for a, b in pairs):
                    return Trial(value, math.inf, f"other bits in {op} {case.name} {case.shape}")
            return Trial(value, sum(time_of(case, repeat, pdl) for (_, case), _ in users))
    except (TritonError, RuntimeError) as error:
        return Trial(value, math.inf, (str(error).strip().splitlines() or ["?"])[-1])


def results(case: KernelCase, pdl: bool) -> Results:
    """The outputs of a case, on the same inputs every time; elements not written are NaN."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors
    try:
        return tuple(t.clone() for t in tensors(case.inputs("cuda").launch(pdl)))
    finally:
        torch.use_deterministic_algorithms(False)


def time_of(case: KernelCase, repeat: int, pdl: bool) -> float:
    """Milliseconds of a case on rotating inputs; in emulation, wall time of one launch."""
    if torch.version.cuda is None:
        call, begin = case.inputs("cuda"), time.perf_counter()
        call.launch(pdl)
        return 1e3 * (time.perf_counter() - begin)
    return milliseconds([launch(call, pdl) for call in rotating(case)], repeat)


def choose(trials: Sequence[Trial]) -> Any:
    """The fastest legal value, or the present one (the first) if the gain is not worth it."""
    best = min(trials, key=lambda trial: trial.ms)
    return best.value if best.ms < WORTH * trials[0].ms else trials[0].value


def table_line(name: str, trials: Sequence[Trial], chosen: Any) -> str:
    """`name = value`, with the measurements in comments, the fastest first."""
    legal = sorted((t for t in trials if not t.refused), key=lambda trial: trial.ms)
    was = "as it is" if chosen == trials[0].value else f"was {trials[0].value}"
    lines = [f"{name} = {chosen}  # {was}"]
    lines += [f"#   {trial.value}: {1e3 * trial.ms:.1f} us" for trial in legal]
    return "\n".join([*lines, *(f"#   {t.value}: {t.refused}" for t in trials if t.refused)])


if __name__ == "__main__":
    sys.exit(main())
