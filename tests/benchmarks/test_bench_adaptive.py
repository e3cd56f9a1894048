"""bench_adaptive: drafts against plain decoding in turn, with heads and with hostile drafts."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_checkpoint
from head_files import write_mtp

from mtpkern.config import SamplingParams
from mtpkern.drafters.draft_length import DraftLength
from mtpkern.engine import LLM
from mtpkern.request import Completion

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench_adaptive(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_adaptive

    return bench_adaptive


@pytest.fixture
def model(tmp_path: Path) -> list[str]:
    trunk, heads = tiny_checkpoint(tmp_path / "trunk"), write_mtp(tmp_path / "heads")
    return ["--model", str(trunk), "--heads", str(heads), "--limit", "4", "--max-tokens", "20"]


@pytest.mark.slow
def test_the_report_has_a_row_for_each_prompt_and_three_together(
    bench_adaptive: Any, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_adaptive.main([*model, "--alternations", "2"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["batch"] for row in report["rows"]] == 2 * [1, 1, 1, 1, 3, 1]
    for row in report["rows"]:
        assert row["identical"] and row["ratio"] > 0
        assert sum(row["share_of_steps_by_k"].values()) == pytest.approx(1)


def test_hostile_drafts_never_stand(
    bench_adaptive: Any, model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stood = []

    def observe(self: DraftLength, k: int, seconds: float, outcomes: list, count: int) -> None:
        stood.extend(accepted for _, accepted in outcomes)

    monkeypatch.setattr(DraftLength, "observe", observe)
    monkeypatch.setattr(DraftLength, "choose", lambda self, windows: self.most)
    llm = LLM(model[1], heads=model[3], max_batch=1)
    bench_adaptive.spoil(llm)
    llm.generate([[5, 6, 7, 8] * 6], SamplingParams(max_tokens=40))
    assert len(stood) == 40 and not any(stood)


def test_other_tokens_are_red_and_give_no_speed(
    bench_adaptive: Any,
    model: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generate = LLM.generate

    def other_with_drafts(self: LLM, *arguments: Any, speculate: bool) -> list[Completion]:
        completions = generate(self, *arguments, speculate=speculate)
        if speculate:
            completions[-1].token_ids[-1] += 1
        return completions

    monkeypatch.setattr(LLM, "generate", other_with_drafts)
    assert bench_adaptive.main([*model, "--alternations", "1"]) == 1
    out = capsys.readouterr().out
    assert "RED: tokens differ in 12 of 12 rows" in out and " ratio " not in out
    assert json.loads(out.splitlines()[-1])["rows"] == []
