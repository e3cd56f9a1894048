"""bench_heads: its rows agree with decoding, and drafts that change tokens are red."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_checkpoint
from head_files import write_medusa, write_mtp

from mtpkern.config import SamplingParams
from mtpkern.engine import LLM

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench_heads(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_heads

    return bench_heads


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    rows = [{"question_id": i, "category": "ab"[i % 2], "turns": ["the dog"]} for i in range(3)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_checkpoint(tmp_path / "model")
    heads = [write_mtp(tmp_path / "mtp"), write_medusa(tmp_path / "medusa")]
    found = ["--model", str(model), "--prompts", str(prompts), "-K", "3", "--max-tokens", "12"]
    return [*found, *(word for path in heads for word in ("--heads", str(path)))]


@pytest.mark.slow
def test_rows_agree_with_decoding(bench_heads: Any, arguments: list[str], capsys: Any) -> None:
    more = ["--temperature", "0", "--temperature", "0.9", "--timed", "1"]
    assert bench_heads.main([*arguments, *more]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    named = {(row["heads"], row["temperature"]): row for row in report["rows"]}
    assert len(named) == 10
    # Speed is measured for greedy decoding only.
    assert all(row.get("speedup", 1) > 0 for row in report["rows"])
    assert {row["temperature"] for row in report["rows"] if "speedup" in row} == {0}
    llm = LLM(arguments[1], heads=arguments[-1], ngram=False, num_speculative_tokens=3)
    (answer,) = llm.generate([{"role": "user", "content": "the dog"}], SamplingParams(12))
    row = named["medusa", 0.0]
    assert row["mean_acceptance_length"] == answer.stats.mean_acceptance_length
    assert set(row["categories"]) == {"a", "b"} and row["megabytes"] > 0


def test_other_tokens_are_red(
    bench_heads: Any, arguments: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = LLM.generate

    def wrong(self: LLM, *a: Any, **b: Any) -> Any:
        answers = generate(self, *a, **b)
        if self.k:
            answers[-1].token_ids[-1] += 1
        return answers

    monkeypatch.setattr(LLM, "generate", wrong)
    assert bench_heads.main(arguments) == 1
    assert "RED: with n-gram at temperature 0.0 the tokens differ" in capsys.readouterr().out


def test_a_plot_is_drawn(bench_heads: Any, arguments: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot.png"
    assert bench_heads.main([*arguments, "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
