"""gpu_suite: it runs without a GPU, at a small size, and keeps within its time limits on one."""

import ast
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

SUITE = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_suite.py"


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None and torch.cuda.is_available(), reason="a GPU")
def test_the_suite_runs_without_a_gpu_and_claims_no_speed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SUITE), "--output", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["failed"] == []
    report = json.loads((tmp_path / "suite.json").read_text())
    assert report["parts"]["bits"]["report"]["identical"]
    rows = report["parts"]["steps"]["report"]["rows"]
    assert [(row["drafter"], row["num_speculative_tokens"]) for row in rows] == [
        ("torch", 0),
        ("none", 0),
        ("n-gram", 4),
        ("medusa", 4),
        ("mtp", 4),
    ]
    assert all(row["ms"] > 0 and row["gbps"] > 0 for row in rows)
    page = (tmp_path / "suite.md").read_text()
    assert "Without a GPU" in page and "| medusa |" in page


@pytest.fixture
def gpu_suite(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(SUITE.parent))
    import gpu_suite

    return gpu_suite


def test_a_part_that_fails_or_hangs_is_reported(gpu_suite: Any, tmp_path: Path) -> None:
    fails = gpu_suite.Part("fails", [sys.executable, "-c", "print('why'); raise SystemExit(3)"], 20)
    hangs = gpu_suite.Part("hangs", [sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert gpu_suite.run(fails, tmp_path)["outcome"] == "exit code 3"
    assert gpu_suite.run(fails, tmp_path)["last_line"] == "why"
    assert gpu_suite.run(hangs, tmp_path)["outcome"] == "stopped after 1 s"


def test_a_part_that_is_stopped_leaves_its_rows_and_no_process(
    gpu_suite: Any, tmp_path: Path
) -> None:
    code = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid)
print('{"row": {"ms": 1.5}}')
print('{"row": {"ms": 2', end="", flush=True)
time.sleep(60)
"""
    result = gpu_suite.run(gpu_suite.Part("stopped", [sys.executable, "-c", code], 3), tmp_path)
    assert result["outcome"] == "stopped after 3 s"
    assert result["report"]["rows"] == [{"ms": 1.5}]
    child = int((tmp_path / "stopped.txt").read_text().splitlines()[0])
    deadline = time.monotonic() + 20
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)
    report = {"environment": gpu_suite.environment(), "parts": {"stopped": result}}
    assert "| 1.5 |" in gpu_suite.markdown(report, on_gpu=False)


def test_a_part_with_a_red_row_keeps_the_others_and_names_it(
    gpu_suite: Any, tmp_path: Path
) -> None:
    code = """
print('{"row": {"op": "linear", "ms": 1.5}}')
print("RED: tiny ngram: error 1 over 0.5")
print('{"schema": 1, "rows": [{"op": "linear", "ms": 1.5}], "red": ["tiny ngram: ..."]}')
raise SystemExit(1)
"""
    result = gpu_suite.run(gpu_suite.Part("kernels", [sys.executable, "-c", code], 20), tmp_path)
    assert result["outcome"] == "exit code 1"
    assert result["report"]["rows"] == [{"op": "linear", "ms": 1.5}]
    assert result["red"] == ["RED: tiny ngram: error 1 over 0.5"]
    report = {"environment": gpu_suite.environment(), "parts": {"kernels": result}}
    page = gpu_suite.markdown(report, on_gpu=False)
    assert "| linear | 1.5 |" in page and "- tiny ngram: error 1 over 0.5" in page


def _runs(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_the_suite_does_not_write_where_smoke_has_written(gpu_suite: Any) -> None:
    device = "NVIDIA H100 80GB HBM3"
    smoke, whole = (gpu_suite.results(device, smoke) for smoke in (True, False))
    assert smoke != whole and whole.name.startswith("nvidia-h100-80gb-hbm3-")


def test_the_tests_on_a_gpu_are_those_that_need_one_and_no_optional_package(
    gpu_suite: Any,
) -> None:
    """One file that cannot be imported would make the whole part fail."""
    (part,) = (part for part in gpu_suite.parts(True, False) if part.name == "tests")
    tests = SUITE.parents[1] / "tests"
    chosen = {tests.parent / word for word in part.command if word.startswith("tests/")}
    for file in tests.rglob("test_*.py"):
        arguments = {
            arg.arg
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef)
            and (node.name.startswith("test_") or node.decorator_list)
            for arg in node.args.args
        }
        assert (file in chosen) >= bool(arguments & {"gpu", "cuda"}), file
    for file in chosen:
        assert "gguf" not in file.read_text(encoding="utf-8"), file


# Seconds per kernel on one core, and the cores of a machine with such a GPU.
COMPILING, CORES = 2.0, 16


@pytest.mark.parametrize("smoke", [True, False])
def test_the_suite_stays_within_its_minutes_on_a_cold_cache(
    gpu_suite: Any, smoke: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    import compile_ahead

    parts = gpu_suite.parts(True, smoke)
    assert sum(part.seconds for part in parts) <= (90 if smoke else 480)
    ahead = parts[0]
    assert ahead.name == "compile"
    assert compile_ahead.main([*ahead.command[2:], "--arch", "90", "--count"]) == 0
    binaries = json.loads(capsys.readouterr().out.splitlines()[-1])["binaries"]
    assert binaries > 20
    start = 10.0  # of the processes
    assert start + binaries * COMPILING / CORES <= ahead.seconds


def test_what_is_compiled_ahead_is_what_is_launched(
    gpu_suite: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tensors without data need the same binaries as tensors on a GPU."""
    import bench_steps
    import check_bits
    import compile_ahead
    import kernel_cases
    import model_shapes
    from pretend_gpu import pretend_gpu

    tiny = ["--model", "tiny"]
    batches = ["--batch", "1", "--batch", "2", "--batch", "4"]
    jobs = compile_ahead.jobs_of(compile_ahead.parser().parse_args([*tiny, *batches]))
    ahead: set[Any] = set()
    with pretend_gpu() as gpu:
        for job in jobs:
            compile_ahead.launch(job, True, lambda *launch: ahead.add(gpu.binary(*launch)))
        for op in kernel_cases.OPS:
            for B, T in model_shapes.STEPS:
                for case in kernel_cases.OPS[op](model_shapes.TINY, B, T):
                    case.inputs("cuda").launch(True)
        assert set(gpu.binaries) <= ahead, "ops"
        assert bench_steps.main([*tiny, "--context", "64", "--repeat", "2"]) == 0
        assert set(gpu.binaries) <= ahead, "steps"
        assert check_bits.main([*tiny, "--tokens", "16"]) == 0
        capsys.readouterr()
        assert set(gpu.binaries) <= ahead, "prompts and answers"
