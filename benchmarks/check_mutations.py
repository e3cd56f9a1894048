"""Mutation testing of the kernels: each fault in faults.toml, planted alone, must fail a test.

    python benchmarks/check_mutations.py                 # all, about an hour
    python benchmarks/check_mutations.py --only linear   # those of linear, or described with it

Works on temporary copies of the checkout, on a CPU, through ttsem. The tests of each op first run
without a fault and must pass. Then, for each fault, the tests of its op run until one fails. The
exit code is 1 if a fault survives its tests or does not compile (a compiler is not a test).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from common import Finish, run

from mtpkern.arguments import Parser, at_least

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("faults.toml")


class Fault(NamedTuple):
    """One change to kernels/<file>.py: `old`, which occurs there exactly once, becomes `new`.

    A test in tests/kernels/test_<op>.py must fail. `file` is `op` if it is empty.
    """

    op: str
    what: str
    old: str
    new: str
    file: str = ""

    def path(self, place: Path) -> Path:
        return place / "kernels" / f"{self.file or self.op}.py"


FAULTS = [Fault(**fault) for fault in tomllib.loads(TABLE.read_text("utf-8"))["fault"]]


class Verdict(NamedTuple):
    """The outcome for one fault. `by` names the test that caught it, or says why none did."""

    fault: Fault
    caught: bool
    by: str
    seconds: float


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--only", metavar="TEXT", help="faults with TEXT in op, file or description; default: all")
    add(
        "--jobs",
        type=at_least(1),
        default=1,
        metavar="N",
        help="faults tried in parallel",
    )
    return run(parser, measure, argv)


def measure(args: argparse.Namespace, finish: Finish) -> int:
    only = args.only or ""
    faults = [f for f in FAULTS if only in f.op + f.file or only in f.what]
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(args.jobs) as pool:
        ops = dict.fromkeys(fault.op for fault in faults)
        with args.status.phase("testing without faults", len(ops), "ops") as phase:
            for op in ops:
                result = run_tests(checkout(Path(work) / f"sound_{op}"), op)
                if result.returncode:
                    with args.status.paused():
                        print(result.stdout[-3000:], result.stderr[-1000:], sep="\n")
                        print(f"tests/kernels/test_{op}.py fails without any fault")
                    return 1
                phase.advance()
        print("| op | fault | caught by | seconds |\n|---|---|---|---|", flush=True)
        places = [Path(work) / str(i) for i in range(len(faults))]
        verdicts = []
        with args.status.phase("planting faults", len(faults)) as phase:
            for verdict in pool.map(plant, faults, places):
                fault, caught, by, seconds = verdict
                by = by if caught else f"**{by}**"
                with args.status.paused():
                    print(f"| {fault.op} | {fault.what} | {by} | {seconds:.0f} |", flush=True)
                verdicts.append(verdict)
                phase.advance()
    survivors = [verdict.fault.what for verdict in verdicts if not verdict.caught]
    report = {"schema": 1, "faults": len(faults), "caught": len(faults) - len(survivors)}
    rows = [v.fault._asdict() | v._asdict() | {"fault": v.fault.what} for v in verdicts]
    line = report | {"survivors": survivors}
    return finish(report | {"rows": rows}, 1 if survivors else 0, line)


def plant(fault: Fault, place: Path) -> Verdict:
    """Copy the checkout to `place`, plant the fault there and run the tests of its op."""
    file = fault.path(checkout(place))
    source = file.read_text(encoding="utf-8")
    if source.count(fault.old) != 1:
        times = source.count(fault.old)
        return Verdict(fault, False, f"the text to replace occurs {times} times", 0.0)
    file.write_text(source.replace(fault.old, fault.new), encoding="utf-8")
    begin = time.monotonic()
    result = run_tests(place, fault.op)
    caught, by = judge(result.returncode, result.stdout.splitlines())
    shutil.rmtree(place)
    return Verdict(fault, caught, by, time.monotonic() - begin)


def checkout(place: Path) -> Path:
    """Copy the files that the tests need to `place`."""
    place.mkdir()
    without = shutil.ignore_patterns("__pycache__", "*.safetensors", ".*")
    for folder in ("kernels", "mtpkern", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, place / folder, ignore=without)
    shutil.copy(ROOT / "pyproject.toml", place)
    return place


def run_tests(place: Path, op: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ttsem.sanitize", "pytest", "-q", "-x", "-m", "kernel"]
    # A cache of its own: a kernel compiled elsewhere would show the source lines of that file.
    environment = os.environ | {
        "PYTHONPATH": str(place),
        "TRITON_CACHE_DIR": str(place.parent / "triton"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*command, f"tests/kernels/test_{op}.py"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
    )


def judge(code: int, lines: Iterable[str]) -> tuple[bool, str]:
    """From pytest's exit code and output -> whether a test caught the fault, and which one."""
    lines = list(lines)
    if code == 0:
        return False, "SURVIVED"
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if code != 1 or not failed:
        return False, f"pytest ended with {code}: {lines[-1] if lines else 'nothing printed'}"
    name = failed[0].split(" - ")[0].split("::")[-1]
    errors = [line.removeprefix("E ").strip() for line in lines if line.startswith("E  ")]
    if any("CompilationError" in error or "Unjudged" in error for error in errors):
        return False, "does not compile"
    stray = r"(?:reads|writes) \d+ element\(s\).*?`\w+`"
    race = r"program instances .*? both touch"
    fault = re.search(rf"KernelFault: .*?({stray}|{race})", "\n".join(errors))
    return True, f"`{name}`" + (f": {fault[1]}" if fault else "")


if __name__ == "__main__":
    sys.exit(main())
