"""Compiles what the other benchmarks launch into Triton's cache on disk, on all cores.

    python benchmarks/compile_ahead.py --model llama-3.1-8b --batch 1 --batch 8

A kernel takes about a second to compile on one core, and a benchmark needs hundreds, one after the
other. Here the launchers run on tensors without data to find out which binaries they need, and each
binary is compiled once, in a pool of processes. --arch compiles for a GPU that is not there.
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
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from common import Finish, add_counts, add_names, run
from dummy_models import medusa_heads, meta_state, mtp_module, write_config
from kernel_cases import OPS
from model_shapes import MODELS, STEPS, TINY
from offline_compiler import Device
from triton.runtime.jit import JITFunction

from mtpkern.arguments import Parser, at_least
from mtpkern.decode import decode_step
from mtpkern.drafters.base import Drafter, NoDrafter
from mtpkern.drafters.ngram import NgramDrafter
from mtpkern.errors import UserError
from mtpkern.ops.gpu import GpuOps

SHAPES = {"tiny": TINY} | MODELS


class Job(NamedTuple):
    """Launches to compile: the cases of one op at one shape, or the steps of one batch and K."""

    model: str
    op: str  # "" for a step
    batch: int
    rows: int  # per sequence: K + 1
    first: bool  # one case only


# Called for each launch: (kernel, arguments, options).
Launch = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]


def main(argv: list[str] | None = None) -> int:
    return run(parser(), compile_all, argv)


def parser() -> Parser:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add_names(parser, "--model", SHAPES, "all but tiny")
    add_names(parser, "--op", OPS)
    add_counts(parser, "--rows", "N", "window rows of ops; repeatable (default: all)")
    add("--first", action="store_true", help="only the first case of each op")
    add_counts(parser, "--batch", "B", "batch of steps; repeatable (default: no steps)")
    add_counts(parser, "-K", "K", "drafts of steps; repeatable (default: 0 and 4)", least=0)
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
    """The first launch of each binary that the jobs need: the job, and the launch's number."""
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
    """Run a job's launchers on tensors without data; call `on_launch` for every kernel."""

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        on_launch(self, args, options)

    with (
        torch.inference_mode(),
        patch.object(JITFunction, "run", run),
        tempfile.TemporaryDirectory() as work,
    ):
        if job.op:
            for case in OPS[job.op](SHAPES[job.model], job.batch, job.rows):
                # Prefill launches rope_cache without.
                for dependent in {pdl, False} if job.op == "rope_cache" else {pdl}:
                    case.inputs("meta").launch(dependent)
                if job.first:
                    break
            return
        k, ops = job.rows - 1, GpuOps(pdl)
        # All layers launch the same kernels: one is enough.
        directory = write_config(SHAPES[job.model]._replace(L=1), Path(work) / "model")
        trunk, state = meta_state(directory, job.batch, k, ops)
        drafters: list[Drafter] = [NoDrafter()]
        if k:
            heads = medusa_heads(trunk, k, ops), mtp_module(trunk, state.cache, ops)
            drafters = [NgramDrafter(ops), *heads]
        for drafter in drafters:
            decode_step(state, trunk, drafter, ops, logprobs=True)


if __name__ == "__main__":
    sys.exit(main())
