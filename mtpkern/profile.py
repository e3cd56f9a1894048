"""The exact command of a profiler for one `mtpkern generate`, printed and run."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mtpkern.errors import UserError
from mtpkern.outputs import reserve

# Nsight sees what lies between cudaProfilerStart and cudaProfilerStop: the answer, without loading.
# Replacing a report is for --force to allow, and is checked before either runs.
COMMANDS = {
    "nsys": "nsys profile --trace=cuda,nvtx,osrt --capture-range=cudaProfilerApi "
    "--capture-range-end=stop --cuda-graph-trace=node --force-overwrite=true --output={output}",
    "ncu": "ncu --profile-from-start off --kernel-name regex:mtpkern_ --launch-count {launches} "
    "--set full --import-source yes --force-overwrite --export {output}",
}
SUFFIXES = {"nsys": ".nsys-rep", "ncu": ".ncu-rep"}  # which the tools add to the report's name
# One kernel is measured many times over, so a step's worth of them is enough.
LAUNCHES = 200


def profiler_command(tool: str, arguments: Sequence[str], output: str) -> list[str]:
    """The command that profiles `mtpkern generate` with these arguments.

    Nsight Compute replays each kernel, which needs them launched one by one: no graph.
    """
    if tool not in COMMANDS:
        raise UserError(f"profile: tool must be one of {', '.join(COMMANDS)}, got {tool}")
    profiler = [part.format(output=output, launches=LAUNCHES) for part in COMMANDS[tool].split()]
    one_by_one = ["--no-graph"] if tool == "ncu" else []
    generate = [sys.executable, "-m", "mtpkern", "generate", "--cuda-profile", *one_by_one]
    return [*profiler, *generate, *arguments]


def run_profiler(tool: str, arguments: Sequence[str], output: str, *, force: bool = False) -> int:
    """Print the command and run it. UserError where the tool is not installed, or where its report
    is there already and is not to be replaced."""
    command = profiler_command(tool, arguments, output)
    print(shlex.join(command), flush=True)
    if shutil.which(tool) is None:
        raise UserError(f"{tool} is not installed here: run the command above where it is")
    report = Path(output if output.endswith(SUFFIXES[tool]) else output + SUFFIXES[tool])
    with reserve(report, force=force):
        return subprocess.run(command, check=False).returncode
