"""bench_adaptive: drafts beside plain decoding in turn, with heads and with hostile drafts."""

import argparse
import json
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import tiny_checkpoint
from head_files import write_mtp

from mtpkern.config import SamplingParams
from mtpkern.drafters.draft_length import DraftLength
from mtpkern.engine import LLM
from mtpkern.request import Event
from mtpkern.runner import Batch, Runner, StepInFlight

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
    kinds = ("heads", "hostile", "plain")
    expected = [(kind, batch) for kind in kinds for batch in (1, 1, 1, 1, 3, 1)]
    assert [(row["drafter"], row["batch"]) for row in report["rows"]] == expected
    for row in report["rows"]:
        assert row["identical"] and row["ratio"] > 0
        assert sum(row["share_of_steps_by_k"].values()) == pytest.approx(1)


def test_hostile_drafts_are_never_accepted(
    bench_adaptive: Any, model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted_drafts = []

    def observe(self: DraftLength, k: int, seconds: float, outcomes: list, *drafted: Any) -> None:
        accepted_drafts.extend(accepted for _, accepted in outcomes)

    monkeypatch.setattr(DraftLength, "observe", observe)
    monkeypatch.setattr(DraftLength, "choose", lambda self, windows: self.most)
    monkeypatch.setattr(DraftLength, "rest", lambda self: ())
    llm = LLM(model[1], heads=model[3], max_batch=1)
    bench_adaptive.spoil(llm)
    llm.generate([[5, 6, 7, 8] * 6], SamplingParams(max_tokens=40))
    assert len(accepted_drafts) == 40 and not any(accepted_drafts)


def test_other_tokens_are_red_and_give_no_speed(
    bench_adaptive: Any,
    model: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream_batch = LLM.stream_batch

    def other_with_drafts(
        self: LLM, *arguments: Any, speculate: bool
    ) -> Generator[tuple[int, Event], None, None]:
        for i, event in stream_batch(self, *arguments, speculate=speculate):
            if speculate and event.completion is not None:
                event.completion.token_ids[-1] += 1
            yield i, event

    monkeypatch.setattr(LLM, "stream_batch", other_with_drafts)
    assert bench_adaptive.main([*model, "--alternations", "1"]) == 1
    out = capsys.readouterr().out
    assert "RED: tokens differ in 12 of 18 rows" in out and " ratio " not in out
    assert json.loads(out.splitlines()[-1])["rows"] == []


def test_the_time_of_each_side_is_its_own(
    bench_adaptive: Any, model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock advances by 1 s per step with drafts and by 3 s per plain one. The prompts are read
    in real time, some milliseconds."""
    now, started = [0.0], Runner.start_step
    monkeypatch.setattr(bench_adaptive, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(DraftLength, "choose", lambda self, windows: 0)

    def start_step(self: Runner, batch: Batch, *arguments: Any, **named: Any) -> StepInFlight:
        now[0] += 1.0 if batch.k else 3.0
        return started(self, batch, *arguments, **named)

    monkeypatch.setattr(Runner, "start_step", start_step)
    models = [LLM(model[1], heads=model[3]) for _ in range(2)]
    args = argparse.Namespace(max_tokens=30, alternations=2)
    for prompts in ([[5, 6, 7]], [[5, 6, 7], [8, 9], [10, 11, 12, 13]]):
        row = bench_adaptive.alternate(models, prompts, "heads", args)
        assert row["identical"] and row["ratio"] == pytest.approx(3.0, rel=0.05)
        assert row["plain_tokens_per_second"] == pytest.approx(len(prompts) / 3.0, rel=0.05)
