"""A training run that fits a time: what is measured, what is made of it, and how it stops."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training import record_answers, recorder_of_losses

from mtpkern import cli
from mtpkern.train import budget, fit, interrupt, joint, joint_model, muon
from mtpkern.train.budget import Pace, Settings, share_out
from mtpkern.train.fit import Recipe, Trainer
from mtpkern.train.heads.families import new_head

ROOT = Path(__file__).resolve().parents[2]
PACE = Pace((8, 32, 128), (0.08, 0.12, 0.3), 0.1, 134.0, 192, update=0.4, row=1 / 400)
OPEN = Settings("float32", slots=0, rows=0, steps=0, prompts=0, held_out=0)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model, and prompts for it."""
    model, answers = record_answers(tmp_path_factory.mktemp("budget"), 3, (1, 2))
    return model, answers.parent / "prompts.jsonl"


def command(asked: tuple[Path, Path], out: Path, *rest: str) -> list[str]:
    model, prompts = asked
    words = ["train", "--model", str(model), "--prompts", str(prompts), "--out", str(out)]
    return [*words, "--max-new", "12", "--held-out", "4", "--draft-vocab-size", "99", *rest]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (7, 7)])
def test_muon_in_bfloat16_is_torchs(shape: tuple[int, int]):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = (
        muon.Muon([ours], 0.03, dtype=torch.bfloat16, weight_decay=0.01),
        torch.optim.Muon([theirs], 0.03, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator)
        for w, optimizer in zip((ours, theirs), optimizers, strict=True):
            w.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert not torch.equal(ours, start)


def test_muon_in_float32_makes_updates_orthogonal_and_leaves_the_gradient():
    matrix = torch.randn(30, 50, generator=torch.Generator().manual_seed(1))
    before = matrix.clone()
    singular = torch.linalg.svdvals(muon.orthogonalize(matrix, torch.float32))
    assert singular.min() > 0.6 and singular.max() < 1.3
    torch.testing.assert_close(matrix, before, rtol=0, atol=0)


@pytest.mark.parametrize("minutes", [3, 20, 120])
@pytest.mark.parametrize("slower", [1, 10])
def test_a_plan_takes_the_time_that_it_was_given(minutes: float, slower: float):
    step = tuple(seconds * slower for seconds in PACE.step)
    pace = replace(PACE, step=step, row=PACE.row * slower)
    seconds = 60 * minutes * slower
    s = share_out(seconds, pace, OPEN, 10**6, 0)
    took = pace.answering(s.prompts, s.slots) + pace.answering(s.held_out, s.slots)
    took += pace.learning(s.steps, s.rows)
    assert 0.85 * seconds < took < 1.05 * seconds
    passes = s.steps * pace.in_step(s.rows) / (s.prompts * pace.length)
    assert 0.85 * budget.PASSES < passes < 1.15 * budget.PASSES
    assert pace.update <= budget.OPTIMIZER_SHARE * pace.learning(1, s.rows)
    assert pace.answering(s.held_out, s.slots) <= 0.15 * seconds


def test_few_prompts_are_learned_from_ten_times_and_more_are_recommended():
    s = share_out(7200, PACE, OPEN, 100, 0)
    assert (s.prompts, s.held_out) == (90, 10)
    assert 9 < s.steps * PACE.in_step(s.rows) / (s.prompts * PACE.length) <= 10
    assert "more time needs more prompts" in budget.describe(s, PACE, 0, 7200)[-1]
    assert len(budget.describe(share_out(600, PACE, OPEN, 10**6, 0), PACE, 0, 600)) == 2
    short = share_out(5, PACE, OPEN, 100, 0)
    assert (short.prompts, short.steps) == (8, 1)
    assert "longer than the time given" in budget.describe(short, PACE, 0, 5)[-1]


def test_a_machine_on_which_a_second_step_does_not_fit_is_not_asked_for_prompts():
    """It learns from each token once, which is not the limit."""
    slow = replace(PACE, row=1 / 37)
    s = share_out(75, slow, replace(OPEN, rows=1024), 80, 0)
    lines = budget.describe(s, slow, 0, 120)
    assert (s.prompts, s.steps) == (8, 1) and "; 1 step, each token learned from 1." in lines[1]
    assert len(lines) == 2 and "8 prompts" in lines[1]


def test_recorded_answers_are_all_learned_from():
    s = share_out(600, replace(PACE, slots=(), step=()), OPEN, 500, 60_000)
    assert (s.prompts, s.held_out, s.slots) == (500, 0, 0)
    assert s.steps == int(600 / PACE.learning(1, s.rows))
    assert "500 recorded answers of 60000 tokens" in budget.describe(s, PACE, 60_000, 600)[1]


def test_recorded_answers_and_a_time_are_enough(
    asked: tuple[Path, Path], tmp_path: Path, capsys: Any
):
    answers = ["--answers", str(asked[1].parent / "answers"), "--out", str(tmp_path / "heads")]
    words = ["train", "--model", str(asked[0]), *answers, "--draft-vocab-size", "99"]
    assert cli.main([*words, "--minutes", "0.05"]) == 0
    out, err = capsys.readouterr()
    assert "planned: 23 recorded answers of " in err and "rows/s learned from in steps of" in err
    assert re.search(
        r"tokens per step on held-out answers; accepted by position:( \d\.\d\d){4}\n", out
    )


def test_learning_is_measured_on_a_copy_and_for_the_rows_that_there_were(
    asked: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A clock that counts rows: 2 seconds each, and 7 for the optimisers."""
    head, ticks = new_head("mtp", asked[0], K=2, vocab_size=99), [0.0]
    loss, take_step = fit.batch_loss, Trainer.take_step

    def counted(*a: Any) -> Any:
        ticks[0] += 2 * int(a[4]["live"][0].sum())
        return loss(*a)

    def timed(self: Trainer) -> None:
        ticks[0] += 7
        take_step(self)

    monkeypatch.setattr(fit, "batch_loss", counted)
    monkeypatch.setattr(Trainer, "take_step", timed)
    monkeypatch.setattr(budget.time, "perf_counter", lambda: ticks[0])
    data = budget.made_up_answers(tmp_path, 48, (1, 2, 3), 307, 5, 200)
    before = {name: w.clone() for name, w in head.state_dict().items()}
    table = torch.randn(307, 48)
    measured = budget.measure_learning(head, Recipe(steps=0, K=2), data, table, table)
    assert measured == (7, 2)
    for name, w in head.state_dict().items():
        torch.testing.assert_close(w, before[name], rtol=0, atol=0)


def test_a_number_of_steps_means_all_prompts_and_1024_rows():
    s = share_out(0, PACE, replace(OPEN, steps=7), 1000, 0)
    assert (s.steps, s.rows, s.prompts, s.held_out) == (7, 1024, 936, 64)
    given = replace(OPEN, steps=7, rows=50, slots=9, held_out=5)
    assert share_out(0, PACE, given, 1000, 0) == replace(given, prompts=995)


def test_a_small_batch_of_answers_is_not_given_slots_for_a_large_one():
    assert PACE.best_slots(8) == 8 and PACE.best_slots(1000) == 128
    assert PACE.answering(8, 128) == PACE.answering(8, 8)


def test_minutes_become_steps_once_and_a_run_that_goes_on_keeps_them(
    asked: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    """Everything is measured here, on the tiny model."""
    out = tmp_path / "heads"
    settings = out / ".train" / "settings.json"
    began, steps = time.monotonic(), Trainer.take_step

    def stopped(self: Trainer) -> None:
        if settings.exists() and self.step == 3:
            raise KeyboardInterrupt
        steps(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", stopped)
        assert cli.main(command(asked, out, "--minutes", "0.1")) == 130
    err = capsys.readouterr().err
    assert "measured: " in err and " tokens/s" in err and " rows/s" in err
    assert "planned: answers to 20 prompts" in err and "4 held out" in err
    assert "to go on:" in err
    before = json.loads(settings.read_text())
    assert before["steps"] > 3
    monkeypatch.setattr(budget, "measure_answers", None)  # nothing is measured again
    kept = []
    monkeypatch.setattr(fit.Trainer, "resume", lambda self: kept.append(self.recipe) or False)
    assert cli.main(command(asked, out, "--minutes", "0.1")) == 0
    assert (kept[0].steps, kept[0].rows) == (before["steps"], before["rows"])
    assert kept[0].warmup == min(20, -(-before["steps"] // 5))
    assert time.monotonic() - began < 60
    assert "measured: " not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", interrupt.SIGNALS)
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_saves_and_the_command_that_is_printed_goes_on_with_equal_losses(
    asked: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    number: signal.Signals,
    times: int,
):
    """It comes while the optimisers are at work; a second one stops them there."""
    monkeypatch.setattr(budget, "measure_learning", lambda *_: (0.01, 1e-4))
    losses = recorder_of_losses(monkeypatch)
    rest = ("--steps", "9", "--rows", "60")
    assert cli.main(command(asked, tmp_path / "a", *rest)) == 0
    unbroken = losses.copy()
    take_step, handlers = Trainer.take_step, [signal.getsignal(n) for n in interrupt.SIGNALS]
    finished = []

    def disturbed(self: Trainer) -> None:
        if self.step == 4:
            for _ in range(times):
                signal.raise_signal(number)
        take_step(self)
        finished.append(self.step)

    losses.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", disturbed)
        assert cli.main(command(asked, tmp_path / "b", *rest)) == 130
    assert [signal.getsignal(n) for n in interrupt.SIGNALS] == handlers
    assert finished == list(range(6 - times))
    checkpoint = torch.load(tmp_path / "b" / ".train" / "checkpoint.pt", weights_only=True)
    # What was torn is not saved; before it, the beginning was.
    assert checkpoint["step"] == (5 if times == 1 else 0)
    err = capsys.readouterr().err
    printed = err.split("to go on:\n  ")[1].splitlines()[0]
    words = shlex.split(printed)
    assert words[0] == "mtpkern" and cli.main(words[1:]) == 0
    assert losses == unbroken[checkpoint["step"] :]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_process_saves_and_shows_no_traceback(
    asked: tuple[Path, Path], tmp_path: Path, number: int
):
    words = command(asked, tmp_path / "heads", "--steps", "100000", "--rows", "60")
    process = subprocess.Popen(
        [sys.executable, "-m", "mtpkern", *words],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    checkpoint = tmp_path / "heads" / ".train" / "checkpoint.pt"
    try:
        # The first checkpoint is written right before the first step.
        until = time.monotonic() + 120
        while not checkpoint.exists() and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(0.5)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err
    assert torch.load(checkpoint, weights_only=True)["step"] > 0
    assert f"-m mtpkern {shlex.join(words)}\n" in err


CTRL_C_IN_TORCH = """
import os, runpy, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.nn":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "words",
    [
        ["mtpkern", "train", "--prompts", "a.jsonl", "--out", "out"],
        ["mtpkern.train.joint", "--out", "out"],
        ["mtpkern.train.record", "--prompts", "a.jsonl", "--out", "out"],
        ["mtpkern.train.invent", "--count", "1", "--out", "out"],
    ],
    ids=lambda words: words[0],
)
def test_an_interrupt_while_torch_is_imported_is_not_a_traceback(words: list[str], tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"turns": ["the dog"]}\n')
    result = subprocess.run(
        [sys.executable, "-c", CTRL_C_IN_TORCH, *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 130 and result.stdout == ""
    assert result.stderr.count("\n") <= 1 and "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_quiet_is_quiet(asked: tuple[Path, Path], tmp_path: Path, capsys: Any):
    assert cli.main(command(asked, tmp_path / "a", "--steps", "2", "--rows", "60", "--quiet")) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.splitlines()[-1] == str(tmp_path / "a")


def test_minutes_and_steps_exclude_each_other(
    asked: tuple[Path, Path], tmp_path: Path, capsys: Any
):
    assert cli.main(command(asked, tmp_path / "a", "--steps", "2", "--minutes", "1")) == 2
    assert "not allowed with argument" in capsys.readouterr().err
    assert cli.main(command(asked, tmp_path / "a", "--minutes", "0")) == 2
    assert "argument --minutes: must be above 0, got 0" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_what_joint_recommends_works_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    small = joint_model.Sizes(48, 96, 2, 2, heads=3, context=128)
    monkeypatch.setattr(joint_model, "Sizes", lambda: small)
    text = tmp_path / "text"
    text.mkdir()
    for n in range(3):
        (text / f"{n}.py").write_text("def double(x):\n    return x + x\n\n\n" * 40)
    assert (
        joint.main(["--out", str(tmp_path / "a model"), "--text", str(text), "--steps", "3"]) == 0
    )
    shell = capsys.readouterr().out.splitlines()[-1].strip()
    assert shell.startswith("python -m mtpkern generate ")
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(
        ["bash", "-c", shell],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": here, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() and "tokens in" in result.stderr
