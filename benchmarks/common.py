"""Shared by the benchmarks: running and reporting, a description of the machine, prompts."""

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from checkout import ROOT

import mtpkern
from mtpkern import UserError, arguments
from mtpkern.cli.machine import cpu_model
from mtpkern.errors import printable
from mtpkern.outputs import FORCE, output_file, writing

if TYPE_CHECKING:
    from mtpkern import LLM

PROMPTS = Path(__file__).with_name("prompts.jsonl")


class Finish(Protocol):
    """Write the report to --output-json, print the last line (the report by default) -> `code`."""

    def __call__(
        self, report: dict[str, Any], code: int, line: dict[str, Any] | None = None
    ) -> int: ...


def run(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace, Finish], int],
    argv: list[str] | None,
) -> int:
    """Run a benchmark like the package's own commands -> exit code: 1 if a check failed, 2 for a
    user's mistake. --output-json is checked and locked before anything is measured."""
    parser.add_argument(
        "--output-json", type=Path, metavar="OUT", help="write the whole report to OUT"
    )
    parser.add_argument("--force", action="store_true", help=FORCE)

    def claimed(args: argparse.Namespace) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # So that a long run can be followed in a file.
            sys.stdout.reconfigure(line_buffering=True)
        target = args.output_json
        with output_file(target, force=args.force) if target else nullcontext() as file:

            def finish(
                report: dict[str, Any], code: int, line: dict[str, Any] | None = None
            ) -> int:
                if file is not None:
                    with writing(target):
                        file.write_text(json.dumps(report) + "\n", encoding="utf-8")
                print(json.dumps(report if line is None else line), flush=True)
                return code

            return measure(args, finish)

    parser.set_defaults(run=claimed)
    return arguments.run(parser, argv)


def add_names(
    parser: argparse.ArgumentParser, flag: str, names: Iterable[str], default: str = "all"
) -> None:
    """An option that is given once for each of some names."""
    names = list(names)
    parser.add_argument(
        flag,
        choices=names,
        metavar=flag.strip("-").upper(),
        action="append",
        help=f"one of {', '.join(names)}; repeatable (default: {default})",
    )


def add_counts(
    parser: argparse.ArgumentParser, flag: str, metavar: str, text: str, *, least: int = 1
) -> None:
    """An option that is given once for each of some numbers."""
    kind = arguments.at_least(least)
    parser.add_argument(flag, type=kind, action="append", metavar=metavar, help=text)


def add_prompts(
    parser: argparse.ArgumentParser, *, limit: int | None = None, least_tokens: int = 1
) -> None:
    """The options --prompts, --limit (None: all prompts) and --max-tokens."""
    add = parser.add_argument
    add(
        "--prompts",
        type=Path,
        default=PROMPTS,
        metavar="FILE",
        help="JSONL with `category` and `turns` (default: prompts.jsonl of the benchmarks)",
    )
    every = " (default: all)" if limit is None else ""
    add(
        "--limit",
        type=arguments.at_least(1),
        default=limit,
        metavar="N",
        help=f"prompts, spread over the categories{every}",
    )
    add(
        "--max-tokens",
        type=arguments.at_least(least_tokens),
        default=128,
        metavar="N",
        help="longest answer",
    )


def print_row(row: dict[str, Any]) -> None:
    """Print a row of a report as JSON as soon as it is measured, unless stdout is a terminal: a
    program that reads the output keeps the rows of a run that is stopped."""
    if not sys.stdout.isatty():
        print(json.dumps({"row": row}))


def rows_printed(output: str) -> list[dict[str, Any]]:
    """The rows that `print_row` wrote. The last line of a killed process may be incomplete."""
    whole = output[: output.rfind("\n") + 1].splitlines()
    return [json.loads(line)["row"] for line in whole if line.startswith('{"row": ')]


def environment() -> dict[str, Any]:
    """The machine and the versions that a number was measured with."""
    return {
        "device": "cpu",
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "load": load(),
        "torch": torch.__version__,
        "mtpkern": mtpkern.__version__,
        "commit": commit(),
    }


def first_line(facts: dict[str, Any]) -> str:
    return (
        f"device cpu: {facts['cpu']}, threads: {facts['threads']}; load {averages(facts['load'])}; "
        f"torch {facts['torch']}; mtpkern {facts['mtpkern']}, commit {facts['commit']}"
    )


def gpu_environment() -> dict[str, Any]:
    """The GPU and the versions that a kernel was measured with."""
    import triton

    capability = torch.cuda.get_device_capability()
    return {
        "device": torch.cuda.get_device_name(),
        "capability": f"sm_{capability[0]}{capability[1]}",
        "driver": nvidia_smi("driver_version"),
        "clocks": nvidia_smi("clocks.max.sm,clocks.max.mem"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
    }


def gpu_first_line(facts: dict[str, Any]) -> str:
    return (
        f"device {facts['device']} ({facts['capability']}, clocks up to {facts['clocks']}), "
        f"driver {facts['driver']}; torch {facts['torch']}, triton {facts['triton']}; "
        f"commit {facts['commit']}"
    )


def gpu_milliseconds(step: Callable[[], object], repeat: int) -> list[float]:
    """Times on the GPU of `repeat` steps in a row, after two untimed ones. The host enqueues them
    all before it waits, so that a step's time does not include its launch by the host."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeat + 1)]
    for _ in range(2):
        step()
    for event in events[:-1]:
        event.record()
        step()
    events[-1].record()
    events[-1].synchronize()
    return [begin.elapsed_time(end) for begin, end in zip(events, events[1:], strict=False)]


def nvidia_smi(query: str) -> str:
    return answer("nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader")


def answer(*command: str) -> str:
    """A tool's output; "unknown" if it is missing or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def load() -> list[float]:
    """Load averages over 1, 5 and 15 minutes; empty if the system has none."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else []


def averages(load: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in load) or "unknown"


def commit() -> str:
    """The checkout's commit, marked if files differ from it; "unknown" outside a checkout."""
    git = ("git", "--no-optional-locks", "-C", str(ROOT))
    name = answer(*git, "describe", "--always", "--abbrev=12")
    # `describe --dirty` would lock the index, and leave the lock behind if the process is killed.
    changed = answer(*git, "status", "--porcelain", "--untracked-files=no")
    return name if changed in ("", "unknown") else f"{name}-dirty"


def read_prompts(file: Path, limit: int | None) -> list[dict[str, Any]]:
    """Prompts of a file in Spec-Bench's form (question_id, category, turns); `limit` of them are
    spread over the categories."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{printable(file)} is not UTF-8 text") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row["category"], str) or not isinstance(row["turns"][0], str):
                raise TypeError
        except (ValueError, LookupError, TypeError):
            raise UserError(
                f"{printable(file)}, line {number}: must be a JSON object with `category` and "
                "`turns`, a list of texts"
            ) from None
        rows.append(row)
    return rows if limit is None else spread(rows, limit)


def encode(llm: "LLM", text: str) -> list[int]:
    """Token ids of a prompt, through the model's chat template if it has one."""
    chat = llm.tokenizer is not None and llm.tokenizer.has_chat_template
    return llm.encode([{"role": "user", "content": text}] if chat else text)


def spread(rows: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """At most `limit` rows, spread evenly over and within the categories; always the same ones."""
    by_category: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_category.setdefault(row["category"], []).append(index)
    share = dict.fromkeys(by_category, 0)
    left = min(limit, len(rows))
    while left > 0:
        for category, members in by_category.items():
            if left and share[category] < len(members):
                share[category] += 1
                left -= 1
    chosen = []
    for category, members in by_category.items():
        count = share[category]
        chosen += [members[i * len(members) // count] for i in range(count)]
    return [rows[index] for index in sorted(chosen)]
