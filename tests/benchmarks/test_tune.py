"""tune: the fastest value that keeps the bits is chosen, over all cases that use it."""

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with one short context."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import kernel_cases.layers
    import tune

    monkeypatch.setattr(kernel_cases.layers, "CONTEXTS", (128,))
    return tune


def test_the_fastest_value_that_keeps_the_bits_is_chosen(tune: ModuleType) -> None:
    present, illegal = tune.Trial(4, 1.0), tune.Trial(2, math.inf, "other bits")
    assert tune.choose([present, illegal, tune.Trial(8, 0.9), tune.Trial(16, 0.95)]) == 8
    assert tune.choose([present, illegal, tune.Trial(8, 0.995)]) == 4
    assert tune.choose([present, present._replace(value=8)]) == 4


def test_a_missing_gpu_is_reported_in_one_line(
    tune: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "GPU" in captured.err


def tuned(tune: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert tune.main(["--model", "tiny", "--rows", "5", *arguments]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    calls = [line.split(" = ")[0] for line in table if not line.startswith("#")]
    report = json.loads(last)
    assert len(calls) == len(set(calls)) == report["calls"] > 0
    assert set(report["changed"]) <= set(calls)
    return report | {"table": calls}


def test_the_attention_and_the_search_are_tuned_in_emulation(
    tune: ModuleType, gpu: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tuned(tune, capsys, "--op", "verify_attention", "--op", "ngram")
    assert report["table"] == [
        "verify_attention._stages(8192, 1)",
        "verify_attention._warps(16, 2)",
        "verify_attention.FILL",
        "ngram.BLOCK",
    ]


def test_a_call_of_a_table_is_tuned_once_for_all_cases_that_make_it(
    tune: ModuleType, gpu: str
) -> None:
    knob = next(knob for knob in tune.KNOBS if knob.name == "few_rows_stages")
    tried: list[Any] = []
    uses = [("linear", case) for case in tune.OPS["linear"](tune.TINY, 1, 5)]
    ((key, (present, users)),) = tune.calls_of(knob, uses, False).items()
    assert [case.name for _, case in users] == ["o", "down"]

    def answer(called: Any, own: Any) -> Any:
        tried.append((called, own))
        return own

    with tune.turned(knob, answer):
        users[0][1].inputs("cuda").launch(False)
    assert set(tried) == {(key, present)}


def test_a_value_with_other_bits_is_refused(tune: ModuleType, gpu: str) -> None:
    """Granules of 32 keys are as accurate as those of 128, but round differently."""
    knob = tune.Knob("_split_kv", "KEYS", lambda _: (32,))
    uses = [("verify_attention", case) for case in tune.OPS["verify_attention"](tune.TINY, 1, 5)]
    checked = [(use, tune.results(use[1], False)) for use in uses]
    assert not tune.try_value(knob, (), 128, checked, 1, False).refused
    trial = tune.try_value(knob, (), 32, checked, 1, False)
    assert "other bits in verify_attention 128 keys" in trial.refused and trial.ms == math.inf


def test_the_cases_have_every_tier_of_rows(tune: ModuleType) -> None:
    """A tier without a case would never be tuned."""
    from mtpkern.kernels._launch import TIERS, row_tier

    steps = (*tune.STEPS, *tune.OTHER_TIERS)
    assert {row_tier(B * T) for B, T in steps} == set(TIERS)
