"""Everything there is to say about a GPU, in one command of at most eight minutes.

    python benchmarks/gpu_suite.py

It runs the kernel tests, measures bandwidth and kernels (bench_kernels.py), steps of made-up models
beside torch's own (bench_steps.py), and end-to-end decoding of the default model beside
transformers (bench_decode.py), each a process of its own under a limit of its own. It writes
suite.json and suite.md to benchmarks/results/<gpu>-<date>/. Without a GPU it runs small, to show
that it runs; a number of a CPU then stands for itself alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checkout import ROOT
from common import environment, first_line, gpu_environment, gpu_first_line

from mtpkern import command
from mtpkern.command import Parser
from mtpkern.errors import UserError, printable
from mtpkern.outputs import FORCE, run_directory

BENCHMARKS = ROOT / "benchmarks"
REPORT = "suite.json"


class Part(NamedTuple):
    """One process of the suite: its name, its command, and how long it may take."""

    name: str
    command: list[str]
    seconds: int


def main(argv: list[str] | None = None) -> int:
    suite = parser()
    suite.set_defaults(run=measure)
    return command.run(suite, argv)


def measure(args: argparse.Namespace) -> int:
    on_gpu = torch.cuda.is_available()
    facts = gpu_environment() if on_gpu else environment()
    print(gpu_first_line(facts) if on_gpu else first_line(facts), flush=True)
    name = re.sub(r"[^a-z0-9]+", "-", str(facts["device"]).lower()).strip("-")
    directory = args.output or BENCHMARKS / "results" / f"{name}-{datetime.date.today()}"
    with run_directory(directory, [REPORT]):
        if (directory / REPORT).exists() and not args.force:
            raise UserError(
                f"cannot write {printable(directory)}: it holds {REPORT} already; choose another "
                "--output, or replace it with --force"
            )
        return run_parts(args, directory, facts, on_gpu)


def run_parts(
    args: argparse.Namespace, directory: Path, facts: dict[str, Any], on_gpu: bool
) -> int:
    """Run the suite into a directory; exit code 1 where a part failed."""
    report: dict[str, Any] = {"schema": 1, "environment": facts, "parts": {}}
    began = time.monotonic()
    for part in parts(on_gpu):
        if args.part and part.name not in args.part:
            continue
        with args.status.phase(part.name):
            report["parts"][part.name] = result = run(part, directory)
        print(f"{part.name}: {result['outcome']}, {result['seconds']:.0f} s", flush=True)
        # What is known so far is kept: the machine may be taken away.
        (directory / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        (directory / "suite.md").write_text(markdown(report, on_gpu))
    report["seconds"] = time.monotonic() - began
    failed = [n for n, result in report["parts"].items() if result["outcome"] != "passed"]
    print(json.dumps({"schema": 1, "directory": str(directory), "failed": failed}))
    return 1 if failed else 0


def parser() -> Parser:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    names = sorted({part.name for on_gpu in (True, False) for part in parts(on_gpu)})
    parser.add_argument("--part", choices=names, action="append", help="default: all")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: benchmarks/results/")
    parser.add_argument("--force", action="store_true", help=FORCE)
    return parser


def parts(on_gpu: bool) -> list[Part]:
    """The suite's processes; small ones where there is no GPU."""

    def script(name: str, *arguments: str) -> list[str]:
        return [sys.executable, str(BENCHMARKS / name), *arguments]

    if not on_gpu:
        steps = script("bench_steps.py", "--model", "tiny", "--context", "64", "--repeat", "3")
        return [Part("steps", steps, 120)]
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "kernel or cuda", "-p", "no:cacheprovider"]
    models = ["--model", "llama-3.1-8b", "--model", "llama-3.2-1b"]
    small = ["--model", "smollm2-135m"]
    contexts = ["--context", "1024", "--context", "8192", "--context", "32768"]
    batches = ["--batch", "1", "--batch", "8", "--batch", "32", "--context", "1024"]
    return [
        Part("tests", tests, 150),
        Part("kernels", script("bench_kernels.py", "--pdl", *models, "--repeat", "10"), 150),
        Part("steps", script("bench_steps.py", *small, *models, *contexts), 100),
        Part("batches", script("bench_steps.py", "--model", "llama-3.1-8b", *batches), 60),
        Part("decode", script("bench_decode.py", "--limit", "8", "--peers", "--no-sources"), 60),
    ]


def run(part: Part, directory: Path) -> dict[str, Any]:
    """Run one part; its output goes to a file, and its last line, where it is JSON, is kept."""
    began = time.monotonic()
    log = directory / f"{part.name}.txt"
    outcome = "passed"
    with log.open("w") as stream:
        try:
            code = subprocess.run(
                part.command,
                cwd=ROOT,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=part.seconds,
            ).returncode
            if code:
                outcome = f"exit code {code}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {part.seconds} s"
    lines = log.read_text(errors="replace").splitlines()
    result: dict[str, Any] = {"outcome": outcome, "seconds": time.monotonic() - began}
    if lines and lines[-1].startswith("{"):
        result["report"] = json.loads(lines[-1])
    else:
        result["last_line"] = lines[-1] if lines else ""
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
        rows = result.get("report", {}).get("rows", [])
        if rows:
            text += ["", f"## {name}", "", *table(rows)]
    return "\n".join(text) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows of plain values as a table; what is nested stays in the JSON."""
    keys = [key for key, value in rows[0].items() if not isinstance(value, dict | list)]

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
    return lines + [f"| {' | '.join(cell(row.get(key, '')) for key in keys)} |" for row in rows]


if __name__ == "__main__":
    sys.exit(main())
