"""The suite for a GPU runs where there is none, small, and says so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SUITE = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_suite.py"


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None and torch.cuda.is_available(), reason="a GPU")
def test_the_suite_runs_without_a_gpu_and_claims_no_speed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SUITE), "--output", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["failed"] == []
    report = json.loads((tmp_path / "suite.json").read_text())
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


def test_a_part_that_fails_or_hangs_is_reported(tmp_path: Path, monkeypatch: object) -> None:
    sys.path.insert(0, str(SUITE.parent))
    try:
        import gpu_suite
    finally:
        sys.path.remove(str(SUITE.parent))
    fails = gpu_suite.Part("fails", [sys.executable, "-c", "print('why'); raise SystemExit(3)"], 20)
    hangs = gpu_suite.Part("hangs", [sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert gpu_suite.run(fails, tmp_path)["outcome"] == "exit code 3"
    assert gpu_suite.run(fails, tmp_path)["last_line"] == "why"
    assert gpu_suite.run(hangs, tmp_path)["outcome"] == "stopped after 1 s"
