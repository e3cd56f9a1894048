"""Training a head, in miniature: a random model, its own answers, a few optimiser steps."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_CONFIG, tiny_checkpoint
from llama_layouts import write_layout
from safetensors.torch import load_file
from slow_drafters import Recorder, eagle3_layer, slow_layer, trunk_states
from torch import Tensor
from training import (
    HK,
    HQ,
    RECIPE,
    D,
    E,
    random_head,
    randomised,
    record_answers,
    recorder_of_losses,
    small_plan,
)

from mtpkern import cli
from mtpkern.checkpoints.directory import load_tensors
from mtpkern.checkpoints.hf_config import read_hf_config
from mtpkern.checkpoints.llama import fingerprint, layer_parts, load_config
from mtpkern.config import SamplingParams
from mtpkern.engine import LLM
from mtpkern.errors import ModelLoadError, UserError
from mtpkern.kernels.rms_norm import rms_norm_ref
from mtpkern.reference import logits as reference_logits
from mtpkern.rope import RopeConfig
from mtpkern.train import (
    FAMILIES,
    budget,
    distill,
    fit,
    invent,
    joint_model,
    prompts,
    record,
    rounds,
    run,
)
from mtpkern.train.acceptance import Tally, lookup, loop_free_length
from mtpkern.train.dataset import Dataset, DatasetWriter, read_index
from mtpkern.train.heads.families import export_head, load_head, new_head
from mtpkern.train.heads.layers import LayersConfig, LayersHead, ModulesHead
from mtpkern.train.heads.mtp import Eagle3Config, Eagle3Head, HeadConfig, MtpHead
from mtpkern.train.heads.parallel import ParallelConfig, ParallelHeads
from mtpkern.train.losses import DraftLoss, draft_targets
from mtpkern.train.plan import Plan
from mtpkern.train.teacher import Teacher


@pytest.fixture(autouse=True)
def learning_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are counted here; test_train_budget.py measures them."""
    monkeypatch.setattr(budget, "measure_learning", lambda *_: (0.01, 1e-4))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model, and its answers to a few prompts."""
    return record_answers(tmp_path_factory.mktemp("train"), 3, (1, 2))


@pytest.fixture(scope="module")
def recorded_deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of enough layers for EAGLE-3."""
    return record_answers(tmp_path_factory.mktemp("deep"), 7, (2, 3, 4))


def drafted_plainly(
    head: MtpHead, features: Tensor, tokens: Tensor, start: int, embedding: Tensor, K: int
) -> list[Tensor]:
    """The chain that begins after the pairs 0..start, a row at a time, as decoding drafts it."""
    w = {k.replace("/", "."): v.detach() for k, v in head.weights.items()}
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean() + 1e-5).sqrt() * w[name]

    def rotate(x: Tensor, position: int) -> Tensor:
        angle = position * 10000.0 ** -(torch.arange(0, D, 2) / D)
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def row(hidden: Tensor, token: int, position: int) -> Tensor:
        embedded = norm(embedding[token], "token_layernorm")
        x = w["input_proj"] @ torch.cat([norm(hidden, "hidden_layernorm"), embedded])
        y = norm(x, "input_layernorm")
        keys.append(rotate((w["self_attn.k_proj"] @ y).view(HK, D), position))
        values.append((w["self_attn.v_proj"] @ y).view(HK, D))
        q = rotate((w["self_attn.q_proj"] @ y).view(HQ, D), position)
        heads = []
        for h in range(HQ):
            group = h // (HQ // HK)
            scores = torch.stack([k[group] @ q[h] for k in keys]) / D**0.5
            heads.append(scores.softmax(0) @ torch.stack([v[group] for v in values]))
        x = x + w["self_attn.o_proj"] @ torch.cat(heads)
        y = norm(x, "post_attention_layernorm")
        y = F.silu(w["mlp.gate_proj"] @ y) * (w["mlp.up_proj"] @ y)
        return norm(x + w["mlp.down_proj"] @ y, "final_layernorm")

    for j in range(start + 1):
        out = [row(w["fc"] @ features[j], int(tokens[j + 1]), j)]
    for k in range(1, K):
        out.append(row(out[-1], int(tokens[start + k + 1]), start + k))
    return out


def test_chains_equal_drafting_a_row_at_a_time():
    head, embedding = random_head(), torch.randn(307, E)
    tokens, features = torch.randint(0, 307, (2, 17)), torch.randn(2, 13, 3 * E)
    starts = torch.tensor([[4, 5, 11], [0, 7, 12]])
    with torch.no_grad():
        states = head(features, tokens, starts, embedding, 4)
    for b in range(2):
        for i, start in enumerate(starts[b].tolist()):
            plain = drafted_plainly(head, features[b], tokens[b], start, embedding, 4)
            for k in range(4):
                torch.testing.assert_close(states[k][b, i], plain[k], rtol=1e-4, atol=1e-4)


def test_eagle3_chains_equal_drafting_by_the_definition():
    """eagle3_layer is written from the paper, over all pairs again for every draft."""
    sizes: tuple[Any, ...] = (E, (2, 4, 5), 4, 2, 12, 72, 500.0, 1e-5, 64, "tiny")
    head = randomised(Eagle3Head(Eagle3Config(*sizes)))
    head.spread.uniform_(0.5, 2)
    w, embedding = head.tensors(), torch.randn(307, E)
    tokens, features = torch.randint(0, 307, (2, 17)), torch.randn(2, 13, 3 * E)
    starts = torch.tensor([[4, 5, 11], [0, 7, 12]])
    with torch.no_grad():
        states = head(features, tokens, starts, embedding, 4)
    for b in range(2):
        for i, start in enumerate(starts[b].tolist()):
            hidden = features[b, : start + 1] @ w["fc.weight"].T
            for k in range(4):
                known = embedding[tokens[b, 1 : start + 2 + k]]
                hidden = torch.cat([hidden, eagle3_layer(hidden, known, w)[-1:]])
                expected = rms_norm_ref(hidden[-1], w["norm.weight"], 1e-5)
                torch.testing.assert_close(states[k][b, i], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["layers", "modules"])
def test_layers_of_their_own_draft_as_their_definition_from_each_start(family: str):
    """slow_layer, over the rows up to the start alone."""
    head, embedding = randomised(untrained_head(family)), torch.randn(307, E)
    w, sizes = head.tensors(), (HQ, HK, D, 10000.0)
    tokens, features = torch.randint(0, 307, (2, 17)), torch.randn(2, 13, E)
    starts = torch.tensor([[4, 5, 11], [0, 7, 12]])
    with torch.no_grad():
        states = head(features, tokens, starts, embedding, 3)
        some = head(features, tokens, starts, embedding, 3, torch.tensor([0, 2]))
    for b in range(2):
        for i, start in enumerate(starts[b].tolist()):
            hidden = features[b, : start + 1]
            for k in range(3):
                own = {n.removeprefix(f"{k}."): t for n, t in w.items() if n[:2] == f"{k}."}
                if family == "layers":
                    x = slow_layer(hidden, own, *sizes)
                    expected = rms_norm_ref(x, own["norm.weight"], 1e-5)
                else:
                    token = embedding[tokens[b, k + 1 : k + start + 2]]
                    pair = [
                        rms_norm_ref(hidden, own["hidden_layernorm.weight"], 1e-5),
                        rms_norm_ref(token, own["token_layernorm.weight"], 1e-5),
                    ]
                    x = slow_layer(torch.cat(pair, -1) @ own["input_proj.weight"].T, own, *sizes)
                    hidden = expected = rms_norm_ref(x, own["final_layernorm.weight"], 1e-5)
                torch.testing.assert_close(states[k][b, i], expected[-1], rtol=1e-4, atol=1e-4)
    for k in range(3):
        torch.testing.assert_close(some[k], states[k][:, [0, 2]] if k else states[0])
    with pytest.raises(ValueError, match="K must be at most num_heads=3, got 4"):
        head(features, tokens, starts, embedding, 4)


@pytest.mark.parametrize("name", ["all_biases_tied", "rope_llama3", "rope_yarn", "qwen3", "qwen2"])
def test_layers_begin_as_the_models_last_one(name: str, tmp_path: Path):
    """As transformers has it, whatever a layer has beside Llama's; also when written and read."""
    model = write_layout(name, tmp_path / "model")
    tokens, starts = torch.randint(0, 131, (2, 70)), torch.tensor([[0, 5, 40], [3, 66, 67]])
    with torch.no_grad():
        states = model.model(tokens, output_hidden_states=True).hidden_states
    head = new_head("layers", tmp_path / "model", K=2, vocab_size=50)
    # bf16 on disk must change nothing.
    for w in head.parameters():
        w.data.copy_(w.bfloat16())
    export_head(head, tmp_path / "heads", model.lm_head.weight)
    again = load_head(tmp_path / "heads")
    assert again.config == head.config
    for each in (head, again):
        with torch.no_grad():
            drafted = each(states[-2][:, :68], tokens, starts, tokens, 2)
        for state in drafted:
            # Half as sure.
            expected = states[-1].gather(1, starts[..., None].expand_as(state)) / 2
            torch.testing.assert_close(state, expected, rtol=0.05, atol=0.025)
        torch.testing.assert_close(drafted[0], drafted[1])


def test_a_model_of_too_few_layers_is_refused(tmp_path: Path):
    model = tiny_checkpoint(tmp_path / "model")
    with pytest.raises(
        UserError, match=r"eagle3 heads take states after layers \(2, 1, 0\): 3 are"
    ):
        new_head("eagle3", model, K=2, vocab_size=50)


def untrained_head(family: str) -> Any:
    if family == "layers":
        shapes = {
            n: s for part in layer_parts(read_hf_config(TINY_CONFIG)).values() for n, s in part
        }
        shapes["norm.weight"] = (E,)
        tensors = {f"{h}.{n}": torch.ones(s) for n, s in shapes.items() for h in range(3)}
        rope = RopeConfig(theta=10000.0)
        return LayersHead(LayersConfig(E, (2,), 3, D, rope, 1e-5, 64, "tiny", ""), tensors)
    if family in ("medusa", "hydra"):
        return ParallelHeads(ParallelConfig(E, (3,), 3, 64, "tiny", "", f"mtpkern_{family}"))
    sizes: tuple[Any, ...] = (E, (1, 2, 3), HQ, HK, D, 112, 10000.0, 1e-5, 64, "tiny")
    if family == "eagle3":
        return Eagle3Head(Eagle3Config(*sizes))
    if family == "modules":
        return ModulesHead(replace(HeadConfig(*sizes), tap_layers=(3,), num_heads=3))
    return MtpHead(HeadConfig(*sizes))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_runs_where_its_tensors_are(family: str):
    """On the meta device, which no tensor of another device may meet, and no value leaves."""
    on: dict[str, Any] = {"device": "meta"}
    with torch.device("meta"):
        head = untrained_head(family)
    width = len(head.config.tap_layers) * E
    embedding, features = torch.randn(307, E, **on), torch.randn(2, 13, width, **on)
    tokens = torch.zeros(2, 18, dtype=torch.int64, **on)
    starts, keep = tokens[:, :4], torch.arange(2, **on)
    states = head(features, tokens, starts, embedding, 3, keep)
    assert [state.shape for state in states] == [(2, 4, E), (2, 2, E), (2, 2, E)]
    logits, to_draft = torch.zeros(8, 64, **on), torch.zeros(307, dtype=torch.int64, **on)
    into, weights = draft_targets(logits.long(), logits, logits[:, 0].long(), to_draft, 0.2)
    table = embedding[:64]
    loss = DraftLoss.apply(states[0].view(8, E), table, into, weights)
    loss.backward()
    assert any(w.grad is not None for w in head.parameters())


def test_chains_that_stop_early_change_nothing():
    head, embedding = random_head(), torch.randn(307, E)
    tokens, features = torch.randint(0, 307, (1, 17)), torch.randn(1, 13, 3 * E)
    starts = torch.tensor([[4, 5, 11]])
    with torch.no_grad():
        full = head(features, tokens, starts, embedding, 3)
        part = head(features, tokens, starts, embedding, 3, torch.tensor([0, 2]))
    torch.testing.assert_close(part[0], full[0])
    torch.testing.assert_close(part[2], full[2][:, [0, 2]])


def test_loss_gradient_equals_that_of_the_definition():
    hidden = (torch.randn(300, E) / 3).requires_grad_()
    table, ids = torch.randn(64, E), torch.randint(0, 64, (300, 5))
    weights = torch.rand(300, 5)
    weights = weights / weights.sum(1, keepdim=True)
    weights[7] = 0
    loss = DraftLoss.apply(hidden, table, ids, weights)
    (gradient,) = torch.autograd.grad(loss, hidden)
    plain = -(weights * (hidden @ table.T).log_softmax(-1).gather(1, ids)).sum()
    (expected,) = torch.autograd.grad(plain, hidden)
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_targets_keep_to_the_draft_vocabulary():
    to_draft = torch.tensor([-1, 0, 1, -1, 2])
    ids = torch.tensor([[1, 0, 4], [0, 3, 0], [0, 3, 0]])
    logits = torch.tensor([[1.0, 9.0, 1.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    labels = torch.tensor([1, 2, 3])
    into, weights = draft_targets(ids, logits, labels, to_draft, hard=0.2)
    assert into[0].tolist() == [0, 0, 2, 0]
    torch.testing.assert_close(weights[0], torch.tensor([0.4, 0.0, 0.4, 0.2]))
    # Only the label is known, then nothing at all.
    assert weights[1].tolist() == [0, 0, 0, 1] and into[1, 3] == 1
    assert weights[2].tolist() == [0, 0, 0, 0]


@pytest.mark.slow
def test_recorded_answers_are_the_models_own(recorded: tuple[Path, Path]):
    model, answers = recorded
    config, tensors = load_config(model), load_tensors(model)
    data = Dataset([answers], (1, 2, 3))
    assert len(data) == 24
    for index in range(0, 24, 5):
        tokens, prompt = data.read(index, "tokens"), data.sequences[index][1]["prompt"]
        scores = reference_logits(config, tensors, tokens)[prompt - 1 : -1]
        chosen = scores.gather(1, tokens[prompt:, None])[:, 0]
        # bf16 may prefer another of two near equals.
        assert ((scores.amax(-1) - chosen) < 0.05 * scores.std()).all()
        features = data.read(index, "features")[prompt - 1 : -1, -E:].float()
        own = (features @ tensors["lm_head.weight"].T).topk(5).values
        recorded_logits = data.read(index, "top_logits")[prompt - 1 : -1, :5].float()
        torch.testing.assert_close(own, recorded_logits, rtol=0.02, atol=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", ["qwen3_biases", "mistral_window_7", "mlp_biases", "rope_llama3", "grouped_ratio_3"]
)
def test_answers_of_every_layout_are_the_models_own(layout: str, tmp_path: Path) -> None:
    write_layout(layout, tmp_path / "model", num_hidden_layers=3)
    config, tensors = load_config(tmp_path / "model"), load_tensors(tmp_path / "model")
    teacher = Teacher(tmp_path / "model", 64, taps=(2, 3))
    generator = torch.Generator().manual_seed(1)
    jobs = [
        distill.Job(torch.randint(97, (n,), generator=generator).tolist(), "a", n)
        for n in (2, 9, 17, 23)
    ]
    distill.record(teacher, jobs, tmp_path / "answers", slots=8, max_new=30)
    data = Dataset([tmp_path / "answers"], (2, 3))
    for index, (_, row) in enumerate(data.sequences):
        tokens, rows = data.read(index, "tokens"), slice(row["prompt"] - 1, -1)
        scores = reference_logits(config, tensors, tokens)[rows]
        ids = data.read(index, "top_ids")[rows, 0].long()
        chosen = scores.gather(1, ids[:, None])[:, 0]
        # bf16 may prefer another of two near equals, now and then.
        assert (scores.amax(-1) - chosen).mean() < 0.05 * scores.std()


def test_an_interrupted_recording_goes_on_after_its_last_whole_sequence(tmp_path: Path):
    def add(writer: DatasetWriter, first: int) -> None:
        features = torch.full((3, 3 * E), float(first)).bfloat16()
        tops = torch.zeros(3, 64)
        writer.add([first, first + 1, first + 2], 2, "a", features, tops, tops)

    add(DatasetWriter(tmp_path, E, (1, 2, 3)), 10)
    with (tmp_path / "features.bin").open("ab") as file:
        file.write(b"half a row")
    writer = DatasetWriter(tmp_path, E, (1, 2, 3))
    add(writer, 20)
    data = Dataset([tmp_path], (1, 2, 3))
    assert (writer.sequences, writer.rows) == (2, 6)
    assert data.read(1, "tokens").tolist() == [20, 21, 22]
    assert data.read(1, "features").float().unique().tolist() == [20.0]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_learn_and_draft_in_the_engine_what_they_drafted_in_training(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    optimizer: str,
) -> None:
    deep = family == "eagle3"
    model, answers = request.getfixturevalue("recorded_deep" if deep else "recorded")
    losses = recorder_of_losses(monkeypatch)
    out = tmp_path / "heads"
    plan = Plan(out, str(model), answers=(answers,), family=family, draft_vocab_size=200)
    monkeypatch.setattr(rounds, "is_held_out", lambda data, index: index % 4 == 0)
    result = run.train(plan, replace(RECIPE, optimizer=optimizer))
    # Three layers are left above what EAGLE-3 sees, and random ones tell little beforehand.
    bound = 0.96 if deep else 0.95
    assert len(losses) == 30 and sum(losses[-5:]) < bound * sum(losses[:5])
    assert result["head"]["overall"]["mean_acceptance_length"] >= 1
    stored = load_file(out / "model.safetensors")
    if family != "medusa":
        rows = stored["d2t"] + torch.arange(200) if deep else stored["draft_vocab"]
        ids = rows.tolist()
        assert len(ids) == 200 and ids == sorted(set(ids))
    card = (out / "README.md").read_text()
    assert "18 of the model's own" in card and "| hybrid, loop-free | overall |" in card

    config = json.loads((out / "config.json").read_text())
    assert config["base_model_fingerprint"] == fingerprint(model)
    head = load_head(out)
    export_head(head, tmp_path / "again", load_tensors(model)["lm_head.weight"])
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config
    again = load_file(tmp_path / "again" / "model.safetensors")
    torch.testing.assert_close(again, stored, rtol=0, atol=0)
    llm = LLM(model, heads=out, ngram=False, num_speculative_tokens=3, dtype="float32")
    recorder = Recorder(llm.drafter)
    llm.drafter = recorder
    llm.generate([[5, 9, 33, 7, 40], [11, 80]], SamplingParams(max_tokens=20, ignore_eos=True))
    table = load_tensors(model)["lm_head.weight"][head.draft_vocab.long()]
    if deep:
        # A published head brings rows of its own: the model's, as bf16 has them.
        assert stored["t2d"].nonzero()[:, 0].tolist() == ids
        torch.testing.assert_close(stored["lm_head.weight"], table.bfloat16(), rtol=0, atol=0)
        table = stored["lm_head.weight"].float()
    embedding = load_tensors(model)["model.embed_tokens.weight"]
    assert len(recorder.drafted) > 20
    for known, drafts in recorder.drafted[::5]:
        states = trunk_states(model, known[:-1])
        features = torch.cat([states[tap - 1] for tap in head.config.tap_layers], -1)
        tokens, starts = torch.tensor([known + drafts]), torch.tensor([[len(known) - 2]])
        with torch.no_grad():
            states = head(features[None], tokens, starts, embedding, len(drafts))
        chosen = [int(head.draft_vocab[(table @ state[0, 0]).argmax()]) for state in states]
        assert chosen == drafts


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    words = ["the quick fox", "a dog and the sun", "jumps over", "sleeps lazy in brown dog"]
    rows = [{"category": "a", "turns": [f"{w} {i}"]} for i in range(9) for w in words]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mtp", "layers", "modules"])
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    recorded: tuple[Path, Path],
    tmp_path: Path,
    prompts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    """Killed while it learns, in the middle of a round; every loss is that of an unbroken run."""
    model, recipe = recorded[0], replace(RECIPE, steps=12)
    losses = recorder_of_losses(monkeypatch)
    plan = replace(small_plan(model, tmp_path / "a", prompts_file), family=family)
    run.train(plan, recipe)
    unbroken = losses.copy()
    assert len(unbroken) == 12
    monkeypatch.setattr(fit, "SAVE_SECONDS", 0)
    losses.clear()
    update, calls = fit.Trainer.update, 0

    def broken(self: fit.Trainer, loss: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        update(self, loss)

    with monkeypatch.context() as patch:
        patch.setattr(fit.Trainer, "update", broken)
        with pytest.raises(KeyboardInterrupt):
            run.train(replace(plan, out=tmp_path / "b"), recipe)
    before = len(losses)  # of whole rounds
    run.train(replace(plan, out=tmp_path / "b"), recipe)
    assert losses[:before] == unbroken[:before] and losses[before:] == unbroken[7:]
    first, second = (load_head(tmp_path / name).state_dict() for name in "ab")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0)


def test_a_run_killed_while_it_answers_answers_no_prompt_twice(
    recorded: tuple[Path, Path],
    tmp_path: Path,
    prompts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = small_plan(recorded[0], tmp_path / "heads", prompts_file)
    add, calls = DatasetWriter.add, 0

    def broken(*a: Any, **b: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        add(*a, **b)

    with monkeypatch.context() as patch:
        patch.setattr(DatasetWriter, "add", broken)
        with pytest.raises(KeyboardInterrupt):
            run.train(plan, replace(RECIPE, steps=8))
    evaluate, kept, numbers = run.evaluate, [], set()
    work = plan.out / ".train"

    def watched(*a: Any) -> Any:
        kept.append(sorted(path.name for path in work.iterdir() if path.is_dir()))
        rows = [row["number"] for name in kept[-1] for row in read_index(work / name)]
        assert len(rows) == len(set(rows))
        numbers.update(rows)
        return evaluate(*a)

    monkeypatch.setattr(run, "evaluate", watched)
    run.train(plan, replace(RECIPE, steps=8))
    # No more than the last two rounds' answers are ever there, and in the end none.
    assert kept[0] == ["held-out", "round-0000"]
    assert kept[3] == ["held-out", "round-0002", "round-0003"]
    assert numbers == set(range(36)) and not work.exists()
    assert "32 of the model's own" in (plan.out / "README.md").read_text()


def test_what_cannot_be_trained_on_is_refused(
    recorded: tuple[Path, Path], tmp_path: Path, prompts_file: Path
) -> None:
    model, answers = recorded
    with pytest.raises(UserError, match="one of prompts and recorded answers is needed"):
        run.train(Plan(tmp_path / "x", str(model)), RECIPE)
    few = replace(small_plan(model, tmp_path / "x", prompts_file), held_out=50)
    with pytest.raises(UserError, match="too few usable prompts: 36, of which 50 to be"):
        run.train(few, RECIPE)
    heads = tmp_path / "heads"
    run.train(Plan(heads, str(model), answers=(answers,), draft_vocab_size=99), RECIPE)
    other = tiny_checkpoint(tmp_path / "other", seed=4, tie_word_embeddings=False)
    with pytest.raises(UserError, match="heads was trained on other weights"):
        run.train(Plan(tmp_path / "y", str(other), answers=(answers,), init=heads), RECIPE)
    with pytest.raises(ModelLoadError, match="was trained on other weights than those of"):
        LLM(other, heads=heads)


@pytest.mark.slow
def test_the_command_trains_heads_that_generate_takes(
    recorded: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    model, answers = recorded
    heads = str(tmp_path / "heads")
    train = ["train", "--model", str(model), "--answers", str(answers), "--out", heads]
    assert cli.main([*train, "--steps", "3", "--draft-vocab-size", "64"]) == 0
    out, err = capsys.readouterr()
    assert "step 3: " in out and "tokens per step on held-out answers" in out
    assert "step 3/3: loss" in err and "measured: " in err and "planned: 2" in err
    assert cli.main(["generate", "--model", str(model), "--heads", heads, "the dog"]) == 0
    assert cli.main(["train", "--out", heads]) == 2
    assert "one of prompts and recorded answers" in capsys.readouterr().err


@pytest.mark.slow
def test_several_families_learn_from_the_same_recorded_answers(
    recorded: tuple[Path, Path], tmp_path: Path, prompts_file: Path, capsys: Any
) -> None:
    command = ["--model", str(recorded[0]), "--prompts", str(prompts_file), "--max-new", "12"]
    command += ["--slots", "9", "--out", str(tmp_path / "answers")]
    assert record.main([*command, "--families", "eagle3"]) == 2
    assert "3 are too few" in capsys.readouterr().err
    record.main([*command, "--limit", "20", "--families", "mtp-1", "layers"])
    # The same command continues, here with more.
    record.main([*command, "--families", "mtp-1", "layers"])
    assert len(read_index(tmp_path / "answers")) == 36
    plan = Plan(tmp_path / "x", str(recorded[0]), answers=(tmp_path / "answers",))
    for family in ("layers", "mtp-1"):
        some = replace(plan, family=family, draft_vocab_size=64, out=tmp_path / family)
        run.train(some, replace(RECIPE, steps=4))
    record.main([*command[:-1], str(tmp_path / "one"), "--limit", "1"])
    # A run that continues from heads keeps their draft vocabulary.
    vocabulary = load_head(tmp_path / "layers").draft_vocab
    further = replace(plan, out=tmp_path / "z", init=tmp_path / "layers", answers=(recorded[1],))
    run.train(replace(further, family="layers"), replace(RECIPE, steps=2))
    torch.testing.assert_close(load_head(tmp_path / "z").draft_vocab, vocabulary)
    one = replace(plan, out=tmp_path / "y", answers=(tmp_path / "one",))
    with pytest.raises(UserError, match="too few recorded answers: 1"):
        run.train(one, RECIPE)
    with pytest.raises(UserError, match=r"states after layers \[2, 3\], and these .* \[1\] too"):
        run.train(replace(plan, out=tmp_path / "y"), RECIPE)


def test_features_over_their_spread_give_the_same_drafts():
    head, embedding = random_head(), torch.randn(307, E)
    tokens, features = torch.randint(0, 307, (1, 17)), torch.randn(1, 13, 3 * E)
    with torch.no_grad():
        before = head(features, tokens, torch.tensor([[4, 11]]), embedding, 2)
        head.rescale(torch.rand(3 * E) + 0.1)
        after = head(features, tokens, torch.tensor([[4, 11]]), embedding, 2)
    assert (head.spread != 1).all()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_heads_that_went_on_end_midway(
    recorded: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, answers = recorded
    plan = Plan(tmp_path / "a", str(model), answers=(answers,), draft_vocab_size=90)
    run.train(plan, replace(RECIPE, steps=3))
    average, ended = run._average_with_start, {}

    def watched(head: Any, start: Any) -> None:
        ended.update({name: tensor.clone() for name, tensor in head.tensors().items()})
        average(head, start)

    monkeypatch.setattr(run, "_average_with_start", watched)
    run.train(replace(plan, out=tmp_path / "b", init=tmp_path / "a"), replace(RECIPE, steps=5))
    begun, out = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert "fc.weight" in out
    for name in out:
        mean = (begun[name].float() + ended[name]) / 2
        torch.testing.assert_close(out[name].float(), mean, rtol=0.01, atol=0.005)
        assert name == "draft_vocab" or not torch.equal(out[name], begun[name])


def test_lookup_copies_the_latest_match_and_sees_nothing_ahead():
    tokens = [1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3, 9, 9, 9]
    assert lookup(tokens, 10, 4) == [5, 1, 2, 3]
    assert lookup(tokens, 6, 2) == [4, 1]
    assert lookup(tokens, 7, 4) == []
    # A copy that reaches the known tokens' end continues periodically.
    assert lookup([7, 7, 7, 7, 0], 3, 4) == [7, 7, 7, 7]


def test_a_replay_counts_what_decoding_would_do():
    tokens = [0, 1, 2, 3, 4, 5, 6, 7]
    right = [[9, 9], [3, 4], [4, 5], [5, 6], [6, 7], [7, 0], [0, 0]]
    tally = Tally(2)
    tally.replay(tokens, 2, 8, right, hybrid=False)
    # 2 after wrong drafts, then 3 4 5 from two right ones, then 6 7 cut short by the end.
    assert (tally.tokens, tally.steps) == (6, 3)
    assert tally.summary()["mean_acceptance_length"] == 2.0
    tally.replay(tokens, 2, 8, [[2, 3], *right[1:]], hybrid=False)
    assert (tally.tokens, tally.steps) == (12, 5)
    # A step that crosses the cut does not count.
    cut = Tally(2)
    cut.replay(tokens, 2, 7, right, hybrid=False)
    assert (cut.tokens, cut.steps) == (4, 2)
    assert loop_free_length([5] + [1, 2] * 8, 1) == 3


def test_invented_prompts_begin_inside_the_users_turn(recorded: tuple[Path, Path]):
    tokenizer = distill.Tokenizer.from_directory(str(recorded[0]))
    head, jobs = invent.invented_jobs(tokenizer, {"qa": ["the dog"], "free": [""]}, 3)
    prompts = [job.prompt for job in jobs]
    whole = tokenizer.apply_chat_template([{"role": "user", "content": "the dog"}], False)
    assert len(prompts) == 3 and prompts[0] == prompts[2] == whole[: len(prompts[0])]
    assert prompts[1] == prompts[0][:head] and len(prompts[0]) > head


def test_prose_is_found_and_markup_is_not(tmp_path: Path):
    text = "This is a page of the manual, and it tells a reader to look at the list of files. "
    (tmp_path / "tool.1").write_text(f".TH TOOL 1\n.SH NAME\n{text * 4}\n.PP\n\\fBshort\\fR\n")
    (tmp_path / "numbers.txt").write_text("1 2 3 " * 100)
    assert list(prompts.prose([tmp_path])) == [(text * 4).strip()]
    (tmp_path / "code.py").write_text(
        'def double(x):\n    """Twice the number, or the text two times over."""\n'
        "    y = x + x\n    return y\n"
    )
    (stub,) = prompts.functions(tmp_path)
    assert stub.startswith("def double") and "return" not in stub


@pytest.mark.slow
def test_a_model_trained_with_its_heads_answers_with_them(tmp_path: Path) -> None:
    """On a text that repeats itself every 24 bytes, which a tiny model learns in seconds."""
    torch.manual_seed(0)
    text = torch.randint(97, 123, (24,), dtype=torch.uint8).repeat(200)
    model = joint_model.JointLlama(joint_model.Sizes(64, 128, 3, 4, heads=3, context=64))
    losses = joint_model.learn(model, text, 120, 8, 1e-2)
    assert losses[-1] < 0.3 * losses[0]
    model.save(tmp_path / "tiny")
    llm = LLM(tmp_path / "tiny", ngram=False, num_speculative_tokens=2)
    params = SamplingParams(max_tokens=60, logprobs=True)
    (drafted,), (plain,) = (
        llm.generate(text[:40].tolist(), params, speculate=s) for s in (True, False)
    )
    assert (drafted.token_ids, drafted.logprobs) == (plain.token_ids, plain.logprobs)
    assert drafted.stats.mean_acceptance_length > 2.5
    # The checkpoint is the model that was trained.
    whole = torch.tensor([text[:40].tolist() + plain.token_ids])
    with torch.no_grad():
        scores = model(whole)[0][0, 39:-1].log_softmax(-1)
    expected = scores.gather(1, torch.tensor(plain.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(plain.logprobs), expected, rtol=1e-3, atol=1e-4)
