"""mtpkern profile: the exact command that profiles one `mtpkern generate`, printed and run."""

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtpkern.errors import UserError
from mtpkern.outputs import FORCE, reserve

# Nsight records from cudaProfilerStart to cudaProfilerStop: the answer, without loading. Both tools
# are told to replace a report because `reserve` checks --force before either runs.
COMMANDS = {
    "nsys": "nsys profile --trace=cuda,nvtx,osrt --capture-range=cudaProfilerApi "
    "--capture-range-end=stop --cuda-graph-trace=node --force-overwrite=true --output={output}",
    "ncu": "ncu --profile-from-start off --kernel-name regex:mtpkern_ --launch-count {launches} "
    "--set full --import-source yes --force-overwrite --export {output}",
}
SUFFIXES = {"nsys": ".nsys-rep", "ncu": ".ncu-rep"}  # which the tools add to the report's name
# Nsight Compute runs each kernel many times, so it gets about one step's worth of them.
LAUNCHES = 200
_PROMPT = "Why is the sky blue?"


def add_command(commands: Any) -> None:
    command = commands.add_parser(
        "profile",
        help="profile an answer with Nsight",
        description="Print the command that profiles `mtpkern generate ARGUMENTS`, and run it if "
        "the profiler is installed here. Needs an NVIDIA GPU.",
        epilog=f'example:\n  mtpkern profile nsys "{_PROMPT}" --max-tokens 32',
    )
    command.add_argument(
        "-o", "--output", default="mtpkern", metavar="REPORT", help="the report's path"
    )
    command.add_argument("--force", action="store_true", help=FORCE)
    command.add_argument("tool", choices=tuple(COMMANDS), help="Nsight Systems or Nsight Compute")
    command.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="ARGUMENTS",
        help=f'of mtpkern generate (default: "{_PROMPT}")',
    )
    command.set_defaults(run=_profile)


def _profile(args: argparse.Namespace) -> int:
    return run_profiler(args.tool, args.arguments or [_PROMPT], args.output, force=args.force)


def profiler_command(tool: str, arguments: Sequence[str], output: str) -> list[str]:
    """The command that profiles `mtpkern generate` with these arguments.

    Nsight Compute replays each kernel, so it needs separate launches: no CUDA graph.
    """
    profiler = [part.format(output=output, launches=LAUNCHES) for part in COMMANDS[tool].split()]
    no_graph = ["--no-graph"] if tool == "ncu" else []
    generate = [sys.executable, "-m", "mtpkern", "generate", "--cuda-profile", *no_graph]
    return [*profiler, *generate, *arguments]


def run_profiler(tool: str, arguments: Sequence[str], output: str, *, force: bool = False) -> int:
    """Print the command and run it -> its exit code.

    Raises UserError if the tool is not installed, or the report exists and `force` is not given.
    """
    command = profiler_command(tool, arguments, output)
    print(shlex.join(command), flush=True)
    if shutil.which(tool) is None:
        raise UserError(f"{tool} is not installed here: run the command above where it is")
    report = Path(output if output.endswith(SUFFIXES[tool]) else output + SUFFIXES[tool])
    with reserve(report, force=force):
        return subprocess.run(command, check=False).returncode
