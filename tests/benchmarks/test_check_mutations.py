"""check_mutations: its faults fit the current kernels, and a crash does not count as a catch."""

import ast
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from check_mutations import FAULTS, ROOT, Fault, judge  # noqa: E402

sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.op}: {fault.what}")
def test_a_fault_can_be_planted_at_one_place(fault: Fault) -> None:
    source = fault.path(ROOT).read_text(encoding="utf-8")
    assert source.count(fault.old) == 1
    ast.parse(source.replace(fault.old, fault.new))
    assert (ROOT / "tests" / "kernels" / f"test_{fault.op}.py").exists()


@pytest.mark.parametrize(
    ("code", "printed", "expected"),
    [
        (0, "1 passed", (False, "SURVIVED")),
        (1, "E   AssertionError\nFAILED tests/test_x.py::test_a[1] - x", (True, "`test_a[1]`")),
        (
            1,
            "E   ttsem.sanitize.KernelFault: kernel `k`, launch 0: `a.py:1: tl.load(p)` reads 3 "
            "element(s) past the end of the tensor passed as `w_ptr`. A GPU\n"
            "FAILED tests/test_x.py::test_a - x",
            (True, "`test_a`: reads 3 element(s) past the end of the tensor passed as `w_ptr`"),
        ),
        (
            1,
            "E   triton.compiler.errors.CompilationError: at 3\nFAILED tests/test_x.py::test_a",
            (False, "does not compile"),
        ),
        (5, "no tests ran", (False, "pytest ended with 5: no tests ran")),
        (-9, "", (False, "pytest ended with -9: nothing printed")),
    ],
)
def test_a_crash_is_not_a_catch(code: int, printed: str, expected: tuple[bool, str]) -> None:
    assert judge(code, printed.splitlines()) == expected
