"""The report of bench_decode, as on a CPU and as on a GPU."""

from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

OVERALL: dict[str, Any] = {
    "category": "overall",
    "prompts": 8,
    "mean_acceptance_length": 2.34,
    "mean_acceptance_length_loop_free": 2.11,
    "acceptance_by_position": [0.61, 0.34],
    "tokens_per_second": 2647.1,
    "plain_tokens_per_second": 1783.6,
    "speedup": 1.48,
    "identical_prompts": 8,
    "sources": {},
    "alone": {},
}


def printed(
    report: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_decode

    bench_decode.print_report({"rows": [], "overall": OVERALL} | report)
    return capsys.readouterr().out


def test_a_gpu_has_no_load_and_two_ways_of_transformers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {"plain": 1785.3, "transformers": 42.7, "transformers_compiled": 595.1}
    peers = {f"{name}_tokens_per_second": rate for name, rate in rates.items()} | {"ratio": 3.0}
    text = printed({"environment": {"device": "H"}, "peers": peers}, monkeypatch, capsys)
    assert "transformers 42.7 tok/s, transformers compiled 595.1 tok/s; plain" in text
    assert text.rstrip().endswith("decoding here 1785.3: 3.00 times as fast")


def test_a_cpu_says_what_else_ran(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"load": [1.5, 1.0, 0.5], "load_after": [2.0, 1.0, 0.5]}
    text = printed({"environment": facts}, monkeypatch, capsys)
    assert "load before 1.50 1.00 0.50, after 2.00 1.00 0.50" in text
    assert "transformers" not in text
