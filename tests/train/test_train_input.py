"""The trainer's inputs: what it refuses, where it continues, and what it counts."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_checkpoint
from head_files import write_medusa
from safetensors.torch import load_file, save_file
from training import RECIPE, random_head, record_answers, small_plan

from mtpkern import cli, status
from mtpkern.checkpoints.directory import load_tensors
from mtpkern.checkpoints.json_files import read_json_object
from mtpkern.drafters.load import PRETRAINED
from mtpkern.errors import UserError
from mtpkern.kernels.ngram import ngram_ref
from mtpkern.status import SILENT, Status
from mtpkern.tokenizer import Tokenizer
from mtpkern.train import budget, distill, fit, frozen, invent, joint, prompts, record, rounds, run
from mtpkern.train.acceptance import Tally, lookup, loop_free_length
from mtpkern.train.dataset import Dataset, DatasetWriter, read_index
from mtpkern.train.fit import Trainer
from mtpkern.train.heads.families import export_head, load_head, new_head
from mtpkern.train.plan import Plan
from mtpkern.train.teacher import Teacher

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def learning_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "measure_learning", lambda *_: (0.01, 1e-4))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model, and its answers to the prompts beside them."""
    return record_answers(tmp_path_factory.mktemp("train"), 3, (1, 2))


@pytest.fixture
def asked(recorded: tuple[Path, Path]) -> Path:
    return recorded[1].parent / "prompts.jsonl"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


def killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def kill_at(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Interrupt the run at a method's so manieth call."""
    method, calls = getattr(owner, name), 0

    def counted(*a: Any, **b: Any) -> Any:
        nonlocal calls
        calls += 1
        return killed() if calls == call else method(*a, **b)

    patch.setattr(owner, name, counted)


def test_a_recording_is_not_taken_for_another_one(
    recorded: tuple[Path, Path], asked: Path, tmp_path: Path, capsys: Any
):
    out = tmp_path / "answers"
    rest = ["--prompts", str(asked), "--out", str(out), "--slots", "5"]
    first = ["--model", str(recorded[0]), *rest, "--max-new", "6"]
    assert record.main([*first, "--limit", "3"]) == 0
    before = contents(out)
    other = str(tiny_checkpoint(tmp_path / "other", seed=9, tie_word_embeddings=False))
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(asked.read_text().splitlines(keepends=True)[1:]))
    for change, message in (
        ([*first[:-1], "7"], "--max-new 6, now 7): the same options continue it"),
        ([*first, "--seed", "1"], "seed 0, now 1"),
        ([*first, "--temperature", "0"], "temperature 0.6, now 0.0"),
        ([*first, "--families", "layers"], "taps [1, 2, 3], now [2, 3]"),
        ([*first, "--prompts", str(fewer)], "prompts "),
        (["--model", other, *first[2:]], "fingerprint "),
    ):
        capsys.readouterr()
        assert record.main(change) == 2
        line = capsys.readouterr().err.splitlines()[-1]  # status lines may precede it
        assert f"{out} is of another run (" in line and message in line
        assert contents(out) == before
    assert record.main([*first, "--out", str(fewer)]) == 2
    assert f"{fewer}: it is a file; give the name of a directory" in capsys.readouterr().err
    # Answers of before this was noted are read, and not added to.
    (out / "layout.json").write_text('{"hidden_size": 48, "taps": [1, 2, 3]}')
    assert record.main(first) == 2
    assert len(Dataset([out], (1, 3), hidden_size=48, fingerprint="any")) == 3


def test_answers_of_another_model_are_not_learned_from(recorded: tuple[Path, Path], tmp_path: Path):
    other = tiny_checkpoint(tmp_path / "other", seed=9, tie_word_embeddings=False)
    plan = Plan(tmp_path / "heads", str(other), answers=(recorded[1],))
    with pytest.raises(UserError, match="answers holds answers of another model: fingerprint"):
        run.train(plan, RECIPE)
    assert not plan.out.exists()


def test_a_run_goes_on_with_the_same_options_only(
    recorded: tuple[Path, Path], asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = replace(RECIPE, steps=6)
    plan = small_plan(recorded[0], tmp_path / "heads", asked)
    with monkeypatch.context() as patch:
        kill_at(patch, Trainer, "update", 2)
        with pytest.raises(KeyboardInterrupt):
            run.train(plan, recipe)
    before = contents(plan.out)
    other = tiny_checkpoint(tmp_path / "other", seed=9, tie_word_embeddings=False)
    for changed, again, message in (
        (plan, replace(recipe, lr=0.005), r"lr 0.03, now 0.005\): the same options continue it"),
        (plan, replace(recipe, steps=7), "steps 6, now 7"),
        (replace(plan, family="layers"), recipe, "family mtp, now layers"),
        (replace(plan, max_new=19), recipe, "max_new 20, now 19"),
        (replace(plan, model=str(other)), recipe, "fingerprint"),
    ):
        with pytest.raises(UserError, match=message):
            run.train(changed, again)
        assert contents(plan.out) == before
    run.train(replace(plan, slots=5, device="cpu"), recipe)


def test_training_loses_nothing_of_what_is_there(
    recorded: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The model's own directory, a project, other heads: refused before the model is opened."""
    model = tmp_path / "model"
    shutil.copytree(recorded[0], model)
    project, heads = tmp_path / "project", tmp_path / "heads"
    project.mkdir()
    (project / "README.md").write_text("mine")
    write_medusa(heads)
    (tmp_path / "other").mkdir()
    shutil.copy(model / "config.json", tmp_path / "other")
    before = contents(tmp_path)
    command = ["train", "--model", str(model), "--answers", str(recorded[1]), "--out"]
    monkeypatch.setattr(frozen, "resolve_model", killed)
    for out, words in (
        (model, "it is what this command reads"),
        (tmp_path, "what this command reads; choose another place"),
        (recorded[1], "it is what this command reads"),
        (project, "it holds README.md, which this command did not write"),
        (heads, "it holds config.json, model.safetensors, which this command did not write"),
        (tmp_path / "other", "it holds config.json, which this command did not write"),
    ):
        for force in ([], ["--force"]):
            assert cli.main([*command, str(out), *force]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and words in error
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command, "model", "--force"]) == 2
    # A directory's name is not an argument's.
    assert "cannot write model: it is what this command reads" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_finished_heads_are_recognised_and_replaced_by_force_alone(
    recorded: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    plan = Plan(tmp_path / "heads", str(recorded[0]), answers=(recorded[1],), draft_vocab_size=64)
    recipe = replace(RECIPE, steps=2)
    result = run.train(plan, recipe)
    before = contents(tmp_path)
    steps = []
    monkeypatch.setattr(Trainer, "update", counting(Trainer.update, steps))
    assert run.train(plan, recipe) == result
    assert "holds the heads of this very run already" in capsys.readouterr().out
    with pytest.raises(UserError, match="heads of another run .lr 0.03, now 0.02.*--force"):
        run.train(plan, replace(recipe, lr=0.02))
    assert contents(tmp_path) == before and not steps
    # Interrupted while they are replaced, they are kept; the same command continues.
    other, forced = replace(recipe, lr=0.02), replace(plan, force=True)
    with monkeypatch.context() as patch:
        patch.setattr(fit, "SAVE_SECONDS", 0)
        kill_at(patch, Trainer, "update", 2)
        with pytest.raises(KeyboardInterrupt):
            run.train(forced, other)
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    with pytest.raises(UserError, match="is of another run .lr 0.02, now 0.03"):
        run.train(plan, recipe)
    steps.clear()
    run.train(forced, other)
    assert len(steps) == 1 and not (plan.out / ".train").exists()
    # Another run's remains are replaced as well.
    with monkeypatch.context() as patch:
        kill_at(patch, Trainer, "update", 2)
        with pytest.raises(KeyboardInterrupt):
            run.train(forced, recipe)
    run.train(forced, replace(recipe, lr=0.01))
    assert '"lr": 0.01' in (plan.out / "README.md").read_text()


def counting(method: Any, calls: list[Any]) -> Any:
    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return method(*arguments)

    return counted


def test_a_recording_is_replaced_by_force_alone(
    recorded: tuple[Path, Path], asked: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "answers"
    command = ["--model", str(recorded[0]), "--prompts", str(asked), "--out", str(out)]
    command += ["--slots", "5", "--max-new", "5", "--limit", "2"]
    assert record.main(command) == record.main([*command, "--force"]) == 0
    before = contents(out)
    assert record.main([*command, "--seed", "1"]) == 2 and contents(out) == before
    (out / "notes.txt").write_text("mine")
    assert record.main([*command, "--seed", "1", "--force"]) == 2
    assert "it holds notes.txt too" in capsys.readouterr().err
    assert contents(out) == before | {str(out / "notes.txt"): b"mine"}
    (out / "notes.txt").unlink()
    assert record.main([*command, "--seed", "1", "--force"]) == 0
    assert read_json_object(out / "layout.json")["seed"] == 1 and len(Dataset([out], (1, 3))) == 2


def test_answers_begun_again_are_those_of_an_unbroken_recording(
    recorded: tuple[Path, Path], asked: Path, tmp_path: Path
):
    model = recorded[0]
    teacher = Teacher(model, 120, taps=(1, 2))
    jobs = distill.read_prompts([asked], Tokenizer.from_directory(model), 0, 512)
    setting: dict[str, Any] = {"slots": 6, "max_new": 30, "temperature": 1.3, "seed": 5}
    found = []
    for name, call in (("whole", 0), ("broken", 17)):
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, DatasetWriter, "add", call)
            try:
                distill.record(teacher, jobs, tmp_path / name, **setting)
            except KeyboardInterrupt:
                pass
        distill.record(teacher, jobs, tmp_path / name, **setting)
        data = Dataset([tmp_path / name], (1, 2, 3))
        assert len(data) == len(jobs) == 24
        found.append([data.read(i, "tokens").tolist() for i in range(len(data))])
    assert found[0] == found[1]


@pytest.mark.parametrize("choose", [distill.greedy, distill.nucleus(0.6, 0.95, 0)])
def test_an_answer_of_logits_that_are_no_numbers_is_not_recorded(
    tmp_path: Path, choose: distill.Choice
):
    """One logit overflows to both infinities, whose sum is NaN."""
    model = tiny_checkpoint(tmp_path, tie_word_embeddings=False)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][9] = torch.tensor([3e38, -3e38]).repeat(24)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    teacher = Teacher(model, 64)
    kept: list[int] = []
    jobs = [distill.Job([5, 7], "a", 0), distill.Job([5, 9, 7], "a", 1)]
    with pytest.raises(UserError, match="logits are NaN or infinite: there is nothing"):
        sink = lambda job, *_: kept.append(job.number)  # noqa: E731
        distill.generate(
            teacher, jobs, sink, slots=2, max_new=4, choose=choose, phase=SILENT.phase("answers")
        )
    assert not kept


def test_a_temperature_near_0_records_the_likeliest_token():
    logits, ids = torch.tensor([[90.0, 89.5, 88.0]]), torch.tensor([[7, 3, 5]])
    choose = distill.nucleus(1e-39, 0.95, 3)
    assert choose(logits, ids, [distill.Job([1], "a", 0, tokens=[0])]).tolist() == [7]


def test_noise_is_keyed_and_samples_the_distribution():
    logits, ids = torch.tensor([[2.0, 1.0, 0.0, -9.0]]), torch.tensor([[7, 3, 5, 2]])
    jobs = [distill.Job([1], "a", n, tokens=[0] * n) for n in range(4000)]
    choose = distill.nucleus(0.8, 0.95, 3)
    chosen = choose(logits.expand(4000, -1), ids.expand(4000, -1), jobs)
    backwards = choose(logits.expand(4000, -1), ids.expand(4000, -1), jobs[::-1])
    assert backwards.flip(0).equal(chosen)
    # The last of the four is outside the nucleus of 0.95.
    shares = torch.bincount(chosen, minlength=8)[[7, 3, 5, 2]] / 4000
    torch.testing.assert_close(shares[:3], (logits[0, :3] / 0.8).softmax(-1), rtol=0, atol=0.03)
    assert shares[3] == 0


def test_a_model_without_a_chat_template_is_asked_in_plain_text(tmp_path: Path):
    tiny_checkpoint(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text('{"turns": ["the dog sleeps"]}')
    tokenizer = Tokenizer.from_directory(tmp_path)
    (job,) = distill.read_prompts([tmp_path / "prompts.jsonl"], tokenizer, 0, 512)
    assert job.prompt == tokenizer.encode("the dog sleeps") and job.category == "all"


def test_prompts_are_objects_with_turns(tmp_path: Path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"turns": ["a\u2028b", "c"], "category": "x"}\n\n{"turns": ["d"]}\n', "utf-8")
    assert prompts.read_turns(file) == [("x", "a\u2028b"), ("all", "d")]
    for line in ("{", "[]", "3", "{}", '{"turns": []}', '{"turns": [1]}', '{"turns": "text"}'):
        file.write_text(f'{{"turns": ["a"]}}\n{line}\n')
        with pytest.raises(UserError, match="line 2: must be a JSON object with `turns`"):
            prompts.read_turns(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--held-out", "0"], "argument --held-out: must be 1 or more, got 0"),
        (["--round-prompts", "0"], "argument --round-prompts: must be 1 or more"),
        (["--slots", "0"], "argument --slots: must be 1 or more"),
        (["-K", "0"], "must be 1 or more, got 0"),
        (["--steps", "x"], "argument --steps: must be an integer, got 'x'"),
        (["--lr", "nan"], "argument --lr: must be 0.0 or more, got nan"),
        (["--device", "tpu"], "--device must be auto, cpu or cuda, got 'tpu'"),
        (["--family", "ngram"], "argument --family: invalid choice"),
        (["--prompts", "nowhere.jsonl"], "cannot read prompts nowhere.jsonl"),
        (["--answers", "nowhere"], "nowhere/layout.json: No such file"),
        (["--init", "nowhere"], "heads nowhere: no such directory; names:"),
        (["--init", "smollm2-135m-instruct"], "was trained on other weights"),
    ],
)
def test_a_mistake_is_one_line(
    recorded: tuple[Path, Path],
    asked: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    arguments: list[str],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    data = [] if arguments[0] == "--answers" else ["--prompts", str(asked)]
    command = ["train", "--model", str(recorded[0]), *data, "--out", "heads", *arguments]
    assert cli.main(command) == 2
    line = capsys.readouterr().err.splitlines()[-1]  # status lines may precede it
    assert line.startswith("mtpkern: error: ") and message in line
    assert not (tmp_path / "heads").exists()


@pytest.mark.parametrize("context", [300, 2000])
def test_a_slot_is_as_long_as_the_longest_prompt_and_answer_or_the_context(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, context: int
):
    model = tiny_checkpoint(tmp_path / "model", max_position_embeddings=context)
    capacities = []

    def watched(teacher: Teacher, jobs: list[distill.Job], *_: Any, **__: Any) -> None:
        assert len(jobs) == 4
        capacities.append(teacher.capacity)
        killed()

    monkeypatch.setattr(rounds, "record", watched)
    plan = replace(small_plan(model, tmp_path / "heads", asked), max_new=800)
    with pytest.raises(KeyboardInterrupt):
        run.train(plan, RECIPE, status=Status())
    tokenizer = Tokenizer.from_directory(model)
    longest = max(len(job.prompt) for job in distill.read_prompts([asked], tokenizer, 0, context))
    assert capacities == [min(longest + 800, context)]
    said = f"an answer ends there, the one to the longest prompt after {300 - longest} of 800"
    assert capsys.readouterr().err.count(said) == (context == 300)


def test_answers_end_with_the_context(asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """45 positions, not a multiple of what attention reads at a time."""
    model = tiny_checkpoint(tmp_path / "model", max_position_embeddings=45, eos_token_id=None)
    monkeypatch.setattr(distill.Job, "is_looping", lambda self: False)
    command = ["--model", str(model), "--prompts", str(asked), "--out", str(tmp_path / "answers")]
    assert record.main(command) == 0
    rows = read_index(tmp_path / "answers")
    assert rows and max(row["length"] for row in rows) == 45


def test_heads_that_cannot_be_gone_on_from_are_refused(recorded: tuple[Path, Path], tmp_path: Path):
    model, answers = recorded
    plan = Plan(tmp_path / "out", str(model), answers=(answers,), init=write_medusa(tmp_path / "m"))
    with pytest.raises(UserError, match="m holds no heads as `mtpkern train` writes them"):
        run.train(plan, RECIPE)
    few = new_head("hydra", model, K=2, vocab_size=9)
    export_head(few, tmp_path / "few", load_tensors(model)["lm_head.weight"])
    with pytest.raises(UserError, match="few drafts 2 tokens, and K is 3"):
        run.train(replace(plan, init=tmp_path / "few"), RECIPE)
    (tmp_path / "few" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="few holds no heads"):
        run.train(replace(plan, init=tmp_path / "few"), RECIPE)


def test_the_heads_that_ship_can_be_gone_on_from():
    """Their configuration has a key that no new one has."""
    head = load_head(PRETRAINED / "smollm2-135m-instruct")
    assert head.config.tap_layers == (10, 20, 30)


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (record.main, ["--prompts", "nowhere", "--out", "x"], "cannot read prompts nowhere"),
        (record.main, ["--out", "x"], "the following arguments are required: --prompts"),
        (invent.main, ["--count", "1", "--out", "x", "--device", "tpu"], "device must be auto"),
        (invent.main, ["--count", "1", "--out", "/dev/null/x"], "x: Not a directory"),
        (prompts.main, ["--out", "x", "--roots", "no"], "no English prose under no"),
        (prompts.main, ["--out", "x", "--counts", "[]"], "must be a JSON object of complete"),
        (joint.main, ["--out", "x", "--text", "no"], "too little Python under no to learn from"),
    ],
)
def test_mistakes_of_the_other_commands_are_one_line_too(
    recorded: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    main: Any,
    arguments: list[str],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(recorded[0])] if main in (record.main, invent.main) else []
    assert main([*model, *arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]  # status lines may precede it
    assert line.startswith("python -m mtpkern.train.") and message in line


def test_the_other_commands_show_what_they_do_and_stop_cleanly(
    recorded: tuple[Path, Path],
    asked: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
):
    phases: list[status.Phase] = []
    begin = status.Phase.__init__

    def kept(self: status.Phase, *a: Any) -> None:
        begin(self, *a)
        phases.append(self)

    monkeypatch.setattr(status.Phase, "__init__", kept)
    # Reading the whole standard library takes long.
    monkeypatch.setattr(prompts, "functions", lambda root: iter(["def f(x):"]))
    model = ["--model", str(recorded[0]), "--max-new", "9"]
    texts = tmp_path / "texts"
    texts.mkdir()
    words = "This is a page of the manual, and it tells a reader to look at the list of files. "
    (texts / "a.txt").write_text("\n\n".join(f"{chr(97 + n)} {words * 4}" for n in range(20)))
    loading = ["loading the model", "measuring how fast it goes"]
    commands: list[tuple[Any, list[str], list[str], tuple[Any, str]]] = [
        (
            record.main,
            [*model, "--prompts", str(asked)],
            ["reading prompts", *loading, "answers: 24/24 answers"],
            (Teacher, "step"),
        ),
        (
            invent.main,
            [*model, "--count", "20"],
            [*loading, "prompts: 20/20 tried"],
            (Teacher, "step"),
        ),
        (
            prompts.main,
            ["--roots", str(texts)],
            ["reading texts: 20 paragraphs", "prompts: "],
            (prompts, "is_english"),
        ),
    ]
    for number, (main, words_of, shown, (owner, name)) in enumerate(commands):
        command = [*words_of, "--out", str(tmp_path / f"out{number}")]
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            assert main(command) == 130
        assert "Traceback" not in capsys.readouterr().err
        phases.clear()
        assert main(command) == 0
        lines = [phase.line("") for phase in phases]
        for text in shown:
            assert any(line.startswith(text) for line in lines), (text, lines)


def test_a_round_without_a_step_is_looked_at_with_the_next(
    recorded: tuple[Path, Path], asked: Path, tmp_path: Path
):
    """20 prompts in five rounds, and three steps."""
    plan = replace(small_plan(recorded[0], tmp_path / "heads", asked), round_prompts=4)
    run.train(plan, replace(RECIPE, steps=3))
    card = (plan.out / "README.md").read_text()
    assert "| answers | 20 of the model's own" in card and "held-out answers, greedy, K" in card


def test_held_out_answers_are_not_learned_from(
    recorded: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, answers = recorded
    monkeypatch.setattr(rounds, "is_held_out", lambda data, index: index < 4)
    looked_at, expected_tokens = [], run.expected_tokens

    def watched(data: Dataset, V: int) -> Any:
        looked_at.extend(row["number"] for _, row in data.sequences)
        return expected_tokens(data, V)

    monkeypatch.setattr(run, "expected_tokens", watched)
    plan = Plan(tmp_path / "a", str(model), answers=(answers,), draft_vocab_size=90)
    run.train(plan, replace(RECIPE, steps=4))
    assert looked_at == list(range(4, 24))
    data = Dataset([answers], (1, 2, 3))
    card = (plan.out / "README.md").read_text()
    tokens = sum(data.answer_length(i) for i in range(4, 24))
    assert f"| answers | 20 of the model's own, {tokens} tokens |" in card
    assert "held-out answers, as they were recorded, K" in card
    further = replace(plan, out=tmp_path / "b", init=tmp_path / "a")
    run.train(further, replace(RECIPE, steps=2))
    card = (further.out / "README.md").read_text()
    assert "| started from | a; in the end, the mean with it |" in card


def test_a_killed_run_keeps_its_time(
    recorded: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fit, "SAVE_SECONDS", 0)
    plan = Plan(tmp_path / "a", str(recorded[0]), answers=(recorded[1],), draft_vocab_size=90)
    kill_at(monkeypatch, Trainer, "update", 4)
    with pytest.raises(KeyboardInterrupt):
        run.train(plan, replace(RECIPE, steps=30))
    state = torch.load(plan.out / ".train" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 3 and state["notes"]["seconds"] > 0


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    recorded: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loss, calls = fit.batch_loss, []

    def broken_at_four(*a: Any) -> Any:
        calls.append(1)
        total, parts = loss(*a)
        return (total * torch.nan if len(calls) == 4 else total), parts

    monkeypatch.setattr(fit, "batch_loss", broken_at_four)
    monkeypatch.setattr(fit, "SAVE_SECONDS", 0)
    plan = Plan(tmp_path / "a", str(recorded[0]), answers=(recorded[1],), draft_vocab_size=90)
    with pytest.raises(UserError, match="loss of step 4 is NaN or infinite: lower --lr"):
        run.train(plan, replace(RECIPE, steps=30))
    assert torch.load(plan.out / ".train" / "checkpoint.pt", weights_only=True)["step"] == 3


def test_replayed_copies_are_those_of_the_ngram_drafter():
    generator = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(50):
        tokens = torch.randint(3, (1, 30), generator=generator)
        for end in (5, 17, 29):
            drafts, match = ngram_ref(tokens, torch.tensor([end + 1]), 5)
            expected = drafts[0].tolist() if match else []
            assert lookup(tokens[0].tolist(), end, 5) == expected
            found += bool(match)
    assert found > 50


def test_loop_free_steps_are_counted_as_the_benchmark_counts_them(monkeypatch: Any):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from bench_decode import loop_free

    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        start = torch.randint(100, (12,), generator=generator).tolist()
        answer = start + start[3:] * 3
        # What the head drafts is right or wrong by chance; two drafts per step.
        right = (torch.rand(len(answer) + 2, 2, generator=generator) < 0.6).tolist()
        padded = [*answer, -1, -1]
        drafts = [
            [padded[i + k] if right[i][k] else -2 for k in (0, 1)] for i in range(len(answer))
        ]
        drafted: list[bool] = []
        while len(drafted) < len(answer):
            n = (right[len(drafted)] + [False]).index(False)
            drafted += ([True] * n + [False])[: len(answer) - len(drafted)]
        tally = Tally(2)
        tokens = [0, 1, *answer]
        end = loop_free_length(tokens, 2)
        assert end == 2 + 12
        tally.replay(tokens, 2, end, drafts, hybrid=False)
        assert (tally.tokens, tally.steps) == loop_free(answer, drafted)


@pytest.mark.filterwarnings("ignore:.*no-op")
def test_notes_of_a_checkpoint_stay_on_the_cpu(tmp_path: Path):
    """A run on another device adds tensors of the CPU to them."""
    first = Trainer(random_head(), RECIPE, tmp_path / "checkpoint.pt")
    first.notes["expected"] = torch.ones(3)
    first.save()
    second = Trainer(random_head().to("meta"), RECIPE, tmp_path / "checkpoint.pt")
    assert second.resume() and second.head.draft_vocab.is_meta
    assert second.notes["expected"].tolist() == [1, 1, 1]


def test_installed_packages_are_no_part_of_the_standard_library(tmp_path: Path):
    source = 'def double(x):\n    """Twice the number, or the text two times over and over."""\n'
    source += "    y = x + x\n    return y\n"
    for place in (".", "site-packages/other", "dist-packages"):
        (tmp_path / "site-packages" / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / "site-packages" / place / "code.py").write_text(source)
    root = tmp_path / "site-packages"
    assert prompts.python_files(root) == [root / "code.py"]
    assert len(list(prompts.functions(root))) == 1
