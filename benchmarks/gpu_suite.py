"""All checks and benchmarks for a GPU, in one command of at most eight minutes.

    python benchmarks/gpu_suite.py --smoke     # the first answers, in at most 90 seconds
    python benchmarks/gpu_suite.py

--smoke: whether drafts change a bit (check_bits.py), one shape of each op, and steps of a 1B model.
The whole suite: the kernel tests, bandwidth and kernels (bench_kernels.py), steps of models with
random weights beside torch's own (bench_steps.py), and decoding with the default model beside
transformers (bench_decode.py). Both first compile their kernels on all cores (compile_ahead.py).

Each part is a process of its own with a time limit. suite.json and suite.md in
benchmarks/results/<gpu>-<date>/, with --smoke <gpu>-<date>-smoke/, are written after every part; a
part that is stopped leaves the rows it has measured so far, and a part that fails leaves its rows
and names what was red. Without a GPU the suite runs at a small
size, to show that it runs; its numbers then say nothing about a kernel's speed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checkout import ROOT
from common import (
    add_names,
    environment,
    first_line,
    gpu_environment,
    gpu_first_line,
    rows_printed,
)

from mtpkern import arguments
from mtpkern.arguments import Parser
from mtpkern.errors import UserError, printable
from mtpkern.outputs import FORCE, run_directory

# Time limits of the whole suite and of --smoke.
SECONDS, SMOKE_SECONDS = 480, 90
BENCHMARKS = ROOT / "benchmarks"
REPORT = "suite.json"


class Part(NamedTuple):
    """One process of the suite: name, command and time limit in seconds."""

    name: str
    command: list[str]
    seconds: int


def main(argv: list[str] | None = None) -> int:
    suite = parser()
    suite.set_defaults(run=measure)
    return arguments.run(suite, argv)


def measure(args: argparse.Namespace) -> int:
    on_gpu = torch.cuda.is_available()
    facts = gpu_environment() if on_gpu else environment()
    print(gpu_first_line(facts) if on_gpu else first_line(facts), flush=True)
    directory = args.output or results(facts["device"], args.smoke)
    with run_directory(directory, [REPORT]):
        if (directory / REPORT).exists() and not args.force:
            raise UserError(
                f"cannot write {printable(directory)}: it holds {REPORT} already; choose another "
                "--output, or replace it with --force"
            )
        return run_parts(args, directory, facts, on_gpu)


def results(device: str, smoke: bool) -> Path:
    """The default directory. --smoke has its own: the suite comes after it, on the same day."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return BENCHMARKS / "results" / f"{name}-{datetime.date.today()}{'-smoke' * smoke}"


def run_parts(
    args: argparse.Namespace, directory: Path, facts: dict[str, Any], on_gpu: bool
) -> int:
    """Run the suite, writing to a directory -> exit code, 1 if a part failed."""
    report: dict[str, Any] = {"schema": 1, "environment": facts, "parts": {}}
    began = time.monotonic()
    for part in parts(on_gpu, args.smoke):
        if args.part and part.name not in args.part:
            continue
        with args.status.phase(part.name):
            report["parts"][part.name] = result = run(part, directory)
        print(f"{part.name}: {result['outcome']}, {result['seconds']:.0f} s", flush=True)
        report["seconds"] = time.monotonic() - began
        # Written after every part, so that nothing is lost if the machine goes away.
        (directory / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        (directory / "suite.md").write_text(markdown(report, on_gpu))
    failed = [n for n, result in report["parts"].items() if result["outcome"] != "passed"]
    print(json.dumps({"schema": 1, "directory": str(directory), "failed": failed}))
    return 1 if failed else 0


def parser() -> Parser:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    known = (parts(on_gpu, smoke) for on_gpu in (True, False) for smoke in (True, False))
    names = sorted({part.name for some in known for part in some})
    parser.add_argument("--smoke", action="store_true", help="first answers, in 90 seconds")
    add_names(parser, "--part", names)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="default: benchmarks/results/<gpu>-<date>[-smoke]",
    )
    parser.add_argument("--force", action="store_true", help=FORCE)
    return parser


def parts(on_gpu: bool, smoke: bool) -> list[Part]:
    """The suite's processes, together within SMOKE_SECONDS or SECONDS; small ones without a GPU."""

    def script(name: str, *arguments: str) -> list[str]:
        return [sys.executable, str(BENCHMARKS / name), *arguments]

    if not on_gpu:
        steps = script("bench_steps.py", "--model", "tiny", "--context", "64", "--repeat", "3")
        bits = script("check_bits.py", "--model", "tiny", "--tokens", "80")
        return [Part("bits", bits, 120), Part("steps", steps, 120)]
    if smoke:
        model = ["--model", "llama-3.2-1b"]
        shapes = [*model, "--rows", "5", "--first"]
        kernels = script("bench_kernels.py", "--pdl", *shapes, "--repeat", "5")
        return [
            Part(
                "compile",
                script("compile_ahead.py", *shapes, "--batch", "1", "--batch", "2", "--batch", "4"),
                25,
            ),
            Part("bits", script("check_bits.py", *model, "--tokens", "2000"), 25),
            Part("kernels", kernels, 20),
            Part("steps", script("bench_steps.py", *model, "--repeat", "10"), 20),
        ]
    tests = ["-m", "pytest", "-q", "-m", "kernel or cuda", "-p", "no:cacheprovider", "-n", "auto"]
    tests += kernel_tests()
    models = ["--model", "llama-3.1-8b", "--model", "llama-3.2-1b"]
    small = ["--model", "smollm2-135m"]
    contexts = ["--context", "1024", "--context", "8192", "--context", "32768"]
    batches = ["--batch", "1", "--batch", "8", "--batch", "32"]
    ahead = script("compile_ahead.py", *small, *models, *batches)
    many = script("bench_steps.py", "--model", "llama-3.1-8b", *batches, "--context", "1024")
    return [
        Part("compile", ahead, 50),
        Part("tests", [sys.executable, *tests], 110),
        Part("kernels", script("bench_kernels.py", "--pdl", *models, "--repeat", "10"), 80),
        Part("steps", script("bench_steps.py", *models, *small, *contexts), 50),
        Part("batches", many, 40),
        Part("decode", script("bench_decode.py", "--limit", "8", "--peers", "--no-sources"), 150),
    ]


def kernel_tests() -> list[str]:
    """The test files that take the fixtures `gpu` or `cuda`. A package that some other test needs
    may be missing on a machine without a network."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    takes = re.compile(r"\b(?:gpu|cuda): str\b")
    return [str(file.relative_to(ROOT)) for file in files if takes.search(file.read_text("utf-8"))]


def run(part: Part, directory: Path) -> dict[str, Any]:
    """Run one part -> its outcome and report; its output goes to a file in `directory`."""
    began = time.monotonic()
    log = directory / f"{part.name}.txt"
    outcome = "passed"
    with log.open("w") as stream:
        # In a group of its own, so that its workers are stopped with it.
        process = subprocess.Popen(
            part.command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(part.seconds)
            if code:
                outcome = f"exit code {code}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {part.seconds} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log.read_text(errors="replace")
    lines = text.splitlines()
    result: dict[str, Any] = {"outcome": outcome, "seconds": time.monotonic() - began}
    if lines and lines[-1].startswith('{"schema": '):
        result["report"] = json.loads(lines[-1])
    else:
        result["last_line"] = lines[-1] if lines else ""
        if rows := rows_printed(text):
            result["report"] = {"rows": rows}
    if red := [line for line in lines if line.startswith("RED: ")]:
        result["red"] = red
    return result


def markdown(report: dict[str, Any], on_gpu: bool) -> str:
    """The report as one page: outcomes, then each part's tables."""
    facts = report["environment"]
    text = [gpu_first_line(facts) if on_gpu else first_line(facts), ""]
    if not on_gpu:
        text += ["Without a GPU: this shows that the suite runs, and no speed of a kernel.", ""]
    text += ["| part | outcome | seconds |", "|---|---|---|"]
    for name, result in report["parts"].items():
        text.append(f"| {name} | {result['outcome']} | {result['seconds']:.0f} |")
    for name, result in report["parts"].items():
        if red := result.get("red"):
            text += ["", f"Red in {name}:", "", *(f"- {line[5:]}" for line in red)]
    for name, result in report["parts"].items():
        rows = result.get("report", {}).get("rows", [])
        if rows:
            text += ["", f"## {name}", "", *table(rows)]
    return "\n".join(text) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as a table, without their nested values, which are in the JSON only."""
    keys = [key for key, value in rows[0].items() if not isinstance(value, dict | list)]

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
    return lines + [f"| {' | '.join(cell(row.get(key, '')) for key in keys)} |" for row in rows]


if __name__ == "__main__":
    sys.exit(main())
