"""What training is given, and what it finds where it goes on: taken as meant, or refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_checkpoint
from test_heads import write_eagle3, write_medusa

from mtpkern import cli
from mtpkern.checkpoint import fingerprint
from mtpkern.config import UserError
from mtpkern.tokenizer import Tokenizer
from mtpkern.train import distill, fit, run
from mtpkern.train.dataset import Dataset, DatasetWriter
from mtpkern.train.fit import Recipe
from mtpkern.train.run import Plan

RECIPE = Recipe(steps=3, rows=60, K=2, lr=0.01)
WORDS = ["the quick fox", "a dog and the sun", "jumps over", "sleeps lazy in brown dog"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("a") / "model", seed=3)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Rows with `turns` alone, and a blank line."""
    rows = [json.dumps({"turns": [f"{words} {i}"]}) for i in range(5) for words in WORDS]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(rows) + "\n")
    return path


@pytest.fixture
def plan(model: Path, tmp_path: Path, prompts: Path) -> Plan:
    small: dict[str, Any] = {"draft_vocab_size": 60, "round_prompts": 8, "held_out": 4}
    out = tmp_path / "heads"
    return Plan(out, str(model), prompts=(prompts,), max_new=12, slots=6, **small)


def answer(model: Path, prompts: Path, out: Path, *, limit: int = 20, **options: Any) -> None:
    trunk = distill.Trunk(model, 6, 96, taps=(1, 2))
    tokenizer = Tokenizer.from_directory(model)
    jobs = distill.read_prompts([prompts], tokenizer, 80, options.get("seed", 0))
    distill.record(trunk, jobs[:limit], out, max_new=12, log=lambda _: None, **options)


def test_prompts_need_turns_alone(plan: Plan) -> None:
    run.train(plan, RECIPE)
    card = (plan.out / "README.md").read_text()
    assert "| head | all |" in card and "Replayed on held-out answers, greedy" in card


def test_a_model_without_a_chat_template_is_given_plain_text(plan: Plan, tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    (base / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_directory(base)
    assert not tokenizer.has_chat_template
    (job, *_) = distill.read_prompts(plan.prompts, tokenizer, 80, 0)
    assert tokenizer.decode(job.prompt) in {f"{words} {i}" for words in WORDS for i in range(5)}
    run.train(replace(plan, model=str(base)), RECIPE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", r"no object with `turns`: \{\}"),
        ("[1]", "no object with `turns`"),
        ('{"turns": []}', "no object with `turns`"),
        ("no json", "no object with `turns`: no json"),
        (None, "No such file"),
    ],
)
def test_a_file_of_no_prompts_is_refused(
    plan: Plan, prompts: Path, text: str | None, message: str
) -> None:
    prompts.unlink() if text is None else prompts.write_text(text)
    with pytest.raises(UserError, match=message):
        run.train(plan, RECIPE)


@pytest.mark.parametrize(
    "option",
    ["steps", "rows", "num-speculative-tokens", "held-out", "round-prompts", "slots", "max-new"]
    + ["draft-vocab-size", "lr"],
)
def test_nonsense_is_refused_in_a_line(plan: Plan, capsys: Any, option: str) -> None:
    command = ["train", "--prompts", str(plan.prompts[0]), "--out", str(plan.out)]
    assert cli.main([*command, "--model", str(plan.model), f"--{option}", "0"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "or more, got 0" in said or "above 0, got 0" in said
    assert not plan.out.exists()


def test_a_long_answer_leaves_room_for_its_prompt(plan: Plan) -> None:
    run.train(replace(plan, max_new=900, round_prompts=32), RECIPE)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nothing", "No such file"),
        ("published", "holds no heads that `mtpkern train` wrote"),
        ("converted", "holds no heads that `mtpkern train` wrote"),
        ("few", "K must be at most 2, the number of heads in"),
    ],
)
def test_heads_that_training_cannot_go_on_from_are_refused(
    plan: Plan, tmp_path: Path, kind: str, message: str
) -> None:
    heads, recipe = tmp_path / kind, RECIPE
    if kind == "published":
        write_eagle3(heads)
    elif kind == "converted":
        write_medusa(heads)
    elif kind == "few":
        run.train(replace(plan, out=heads, family="hydra"), RECIPE)
        recipe = replace(RECIPE, K=3)
    with pytest.raises(UserError, match=message):
        run.train(replace(plan, init=heads), recipe)


def test_a_recording_of_other_answers_is_left_alone(
    model: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers"
    answer(model, prompts, out, limit=6)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = tiny_checkpoint(tmp_path / "other", seed=9)
    for directory, options, message in (
        (other, {}, "was begun with model="),
        (model, {"seed": 1}, "was begun with seed=0, not 1"),
        (model, {"temperature": 0.5}, "was begun with temperature=0.0, not 0.5"),
    ):
        with pytest.raises(UserError, match=message):
            answer(directory, prompts, out, **options)
    with pytest.raises(UserError, match=r"was begun with taps=\[1, 2, 3\], not \[2, 3\]"):
        DatasetWriter(out, 48, (2, 3), model=fingerprint(model))
    lines = prompts.read_text().splitlines()
    prompts.write_text("\n".join(reversed(lines)))
    with pytest.raises(UserError, match="holds answers to other prompts"):
        answer(model, prompts, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    # More of the same prompts go behind those that are there.
    prompts.write_text("\n".join(lines))
    answer(model, prompts, out, limit=9)
    assert len(Dataset([out], (1, 2))) == 9
    with pytest.raises(UserError, match="holds the answers of another model"):
        run.train(Plan(tmp_path / "x", str(other), answers=(out,)), RECIPE)


def test_what_another_run_left_is_refused(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fit.Trainer, "update", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run.train(plan, RECIPE)
    other = tiny_checkpoint(tmp_path / "other", seed=9)
    for another, recipe, message in (
        (plan, replace(RECIPE, lr=0.02), r"\.train was begun with lr=0.01, not 0.02: name another"),
        (replace(plan, family="mtp-1"), RECIPE, "was begun with family=mtp, not mtp-1"),
        (replace(plan, model=str(other)), RECIPE, "was begun with model="),
    ):
        with pytest.raises(UserError, match=message):
            run.train(another, recipe)
    run.train(replace(plan, slots=3), RECIPE)


def test_a_recording_that_was_killed_draws_what_it_would_have_drawn(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(model, prompts, tmp_path / "whole", temperature=9.0)
    add, calls = DatasetWriter.add, 0

    def broken(*a: Any, **b: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 13:
            raise KeyboardInterrupt
        add(*a, **b)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DatasetWriter, "add", broken)
        answer(model, prompts, tmp_path / "halves", temperature=9.0)
    answer(model, prompts, tmp_path / "halves", temperature=9.0)
    whole, halves = (Dataset([tmp_path / name], (1, 2)) for name in ("whole", "halves"))
    assert len(whole) == len(halves) == 20
    for index in range(20):
        assert torch.equal(whole.read(index, "tokens"), halves.read(index, "tokens"))


def test_a_command_of_the_trainer_complains_in_a_line(tmp_path: Path) -> None:
    command = ["-m", "mtpkern.train.record", "--prompts", "nowhere", "--out", str(tmp_path / "x")]
    model = tiny_checkpoint(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, *command, "--model", str(model)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "error: nowhere: No such file or directory\n")
