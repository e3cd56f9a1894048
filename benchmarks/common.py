"""What the benchmarks share: how they run and report, the machine in words, and prompts."""

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from checkout import ROOT

import mtpkern
from mtpkern import UserError, arguments
from mtpkern.cli.machine import cpu_model
from mtpkern.errors import printable
from mtpkern.outputs import FORCE, output_file, writing


class Finish(Protocol):
    """Writes a report where --output-json says, prints the last line -> the exit code given."""

    def __call__(
        self, report: dict[str, Any], code: int, line: dict[str, Any] | None = None
    ) -> int: ...


def run(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace, Finish], int],
    argv: list[str] | None,
) -> int:
    """Run a benchmark as the package's own commands are run -> exit code: 1 is a check that failed,
    2 a user's mistake. --output-json is claimed before anything is measured; the last line of
    output is one JSON object, the report itself if nothing else is given."""
    parser.add_argument("--output-json", type=Path, metavar="OUT", help="write the report there")
    parser.add_argument("--force", action="store_true", help=FORCE)

    def claimed(args: argparse.Namespace) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)  # a long run is followed in a file, too
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


def print_row(row: dict[str, Any]) -> None:
    """Print a row of a report as it is measured, for a program that follows the output: what was
    measured before a run is stopped is not lost. A terminal shows the table alone."""
    if not sys.stdout.isatty():
        print(json.dumps({"row": row}))


def rows_printed(output: str) -> list[dict[str, Any]]:
    """What `print_row` wrote; of a process that was killed the last line may be half a line."""
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
    average = " ".join(f"{value:.2f}" for value in facts["load"])
    return (
        f"device cpu: {facts['cpu']}, {facts['threads']} threads; load {average}; "
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


def nvidia_smi(query: str) -> str:
    return answer("nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader")


def answer(*command: str) -> str:
    """What a tool prints; "unknown" where it is missing or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def load() -> list[float]:
    """Load averages over 1, 5 and 15 minutes; empty where the system has none."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else []


def commit() -> str:
    """The checkout's commit, marked where files differ from it; "unknown" outside of one."""
    return answer("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12")


def read_prompts(file: Path, limit: int | None) -> list[dict[str, Any]]:
    """Prompts of a file in Spec-Bench's form (question_id, category, turns), spread if limited."""
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


def spread(rows: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """At most `limit` rows, evenly over the categories and evenly within each; always the same."""
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
