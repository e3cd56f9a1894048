"""Compile what the other benchmarks launch, on all cores, into Triton's cache on disk.

    python benchmarks/compile_ahead.py --model llama-3.1-8b --batch 1 --batch 8

A kernel compiles in a second or so on one core, and a benchmark meets hundreds of them one after
the other. Here the launchers run on tensors without data, which says which binaries they need, and
each binary is compiled once, in a pool of processes. --arch compiles for a GPU that is not there.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from bench_steps import TINY, medusa_heads, mtp_module, write_config
from check_codegen import Device
from common import Finish, run
from kernel_cases import MODELS, OPS, STEPS
from predict_steps import meta_state
from triton.runtime.jit import JITFunction

from mtpkern.arguments import Parser, at_least
from mtpkern.decode import decode_step
from mtpkern.drafters.base import NoDrafter
from mtpkern.drafters.ngram import NgramDrafter
from mtpkern.errors import UserError
from mtpkern.ops.gpu import with_pdl

SHAPES = {"tiny": TINY} | MODELS


class Job(NamedTuple):
    """Launches to compile: the cases of one op at one shape, or the steps of one batch and K."""

    model: str
    op: str  # "" for a step
    batch: int
    rows: int  # of a sequence: K + 1
    first: bool  # one case only


# What is done for a launch: (kernel, arguments, options).
Launch = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]


def main(argv: list[str] | None = None) -> int:
    return run(parser(), compile_all, argv)


def parser() -> Parser:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", choices=SHAPES, action="append", help="default: all but tiny")
    add("--op", choices=OPS, action="append", help="default: all")
    add("--rows", type=at_least(1), action="append", metavar="N", help="of ops; default: all")
    add("--first", action="store_true", help="only the first case of each op")
    add("--batch", type=at_least(1), action="append", metavar="B", help="of steps; default: none")
    add("-K", type=at_least(0), action="append", metavar="K", help="of steps; default: 0 and 4")
    add("--arch", type=int, metavar="90", help="compute capability (default: this GPU's)")
    add("--jobs", type=at_least(1), default=os.cpu_count(), metavar="N", help="processes")
    add("--count", action="store_true", help="count the binaries and compile none")
    return parser


def compile_all(args: argparse.Namespace, finish: Finish) -> int:
    arch = args.arch
    if arch is None:
        if not torch.cuda.is_available():
            raise UserError("--arch is needed: this machine has no GPU")
        major, minor = torch.cuda.get_device_capability()
        arch = 10 * major + minor
    needed = binaries(jobs_of(args), arch)
    report: dict[str, Any] = {"schema": 1, "arch": arch, "binaries": len(needed), "failed": []}
    if args.count:
        return finish(report, 0)
    with (
        args.status.phase("compiling", len(needed), "kernels") as phase,
        ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool,
    ):
        tasks = {pool.submit(compile_one, arch, *place): place for place in needed}
        for task in as_completed(tasks):
            job, _ = tasks[task]
            if error := task.exception():
                report["failed"].append(f"{job}: {error}")
            phase.advance(note=f"{job.model} {job.op or 'step'}")
    return finish(report, 1 if report["failed"] else 0)


def jobs_of(args: argparse.Namespace) -> list[Job]:
    models = args.model or list(MODELS)
    ops = [
        Job(model, op, B, T, args.first)
        for model in models
        for op in args.op or OPS
        for B, T in STEPS
        if args.rows is None or B * T in args.rows
    ]
    steps = [
        Job(model, "", batch, k + 1, False)
        for model in models
        for batch in args.batch or []
        for k in args.K or [0, 4]
    ]
    return ops + steps


def binaries(jobs: list[Job], arch: int) -> list[tuple[Job, int]]:
    """Where each binary that the jobs need is launched first: the job, and the launch's number."""
    triton.runtime.driver.set_active(Device(arch))
    first: dict[tuple[str, str], tuple[Job, int]] = {}
    for job in jobs:
        number = 0

        def note(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            nonlocal number
            *_, binder = kernel.device_caches[arch]
            _, specialization, rest = binder(*args, **options)
            key = f"{specialization} {rest}"
            first.setdefault((kernel.__name__, key), (job, number))  # noqa: B023
            number += 1

        launch(job, arch >= 90, note)
    return list(first.values())


def compile_one(arch: int, job: Job, wanted: int) -> None:
    """Compile launch number `wanted` of a job."""
    triton.runtime.driver.set_active(Device(arch))
    number, compile_launch = 0, JITFunction.run

    def choose(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        nonlocal number
        if number == wanted:
            compile_launch(kernel, *args, grid=(1,), warmup=True, **options)
        number += 1

    launch(job, arch >= 90, choose)


def launch(job: Job, pdl: bool, on_launch: Launch) -> None:
    """Run a job's launchers on tensors without data, with `on_launch` for every kernel."""

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        on_launch(self, args, options)

    with (
        torch.inference_mode(),
        patch.object(JITFunction, "run", run),
        tempfile.TemporaryDirectory() as work,
    ):
        if job.op:
            for case in OPS[job.op](SHAPES[job.model], job.batch, job.rows):
                case.inputs("meta").launch(pdl)
                if job.first:
                    break
            return
        k, ops = job.rows - 1, with_pdl(pdl)
        # One layer launches what all of them do.
        directory = write_config(SHAPES[job.model]._replace(L=1), Path(work) / "model")
        trunk, state = meta_state(directory, job.batch, k, ops)
        llm: Any = SimpleNamespace(trunk=trunk, config=trunk.config, ops=ops, _cache=state.cache)
        drafters = [NgramDrafter(ops), medusa_heads(llm, k), mtp_module(llm)] if k else []
        for drafter in drafters or [NoDrafter()]:
            decode_step(state, trunk, drafter, ops, logprobs=True)


if __name__ == "__main__":
    sys.exit(main())
