"""The drafters, each against a slow definition; and none of them changes a token."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_checkpoint
from head_files import (
    E,
    L,
    V,
    published_medusa,
    write_eagle3,
    write_medusa,
    write_mtp,
    write_published,
)
from llama_layouts import write_layout
from safetensors.torch import save_file
from slow_drafters import (
    PROMPT,
    agree,
    eagle3_layer,
    slow_layer,
    slow_mimo_layer,
    trunk_states,
    watch,
)
from torch import Tensor

from mtpkern.checkpoints.directory import load_tensors
from mtpkern.config import SamplingParams
from mtpkern.drafters.base import HEADS, NGRAM, NONE, Drafts, NoDrafter
from mtpkern.drafters.draft_length import MOST_REST, DraftLength, FixedDraftLength
from mtpkern.drafters.mtp import MtpDrafter
from mtpkern.drafters.ngram import CompanionDrafter
from mtpkern.engine import LLM
from mtpkern.errors import ModelLoadError, UserError
from mtpkern.kernels.rms_norm import rms_norm_ref


def check_mtp(heads: Path, trunk: Path, seen: tuple[list[int], list[int], Tensor]) -> None:
    """Compare a sequential head's drafts with its definition, computed again for every draft."""
    known, drafts, logits = seen
    w, settings = load_tensors(heads), json.loads((heads / "config.json").read_text())
    embedding = load_tensors(trunk)["model.embed_tokens.weight"]
    ids = w["draft_vocab"].long() if "draft_vocab" in w else torch.arange(V)
    states = trunk_states(trunk, known[:-1])
    hidden = torch.cat([states[tap - 1] for tap in settings["tap_layers"]], -1)
    if "fc.weight" in w:
        hidden = hidden @ w["fc.weight"].T
    tokens = known[1:]
    for draft, row in zip(drafts, logits, strict=True):
        pair = [
            rms_norm_ref(hidden, w["hidden_layernorm.weight"], 1e-5),
            rms_norm_ref(embedding[tokens], w["token_layernorm.weight"], 1e-5),
        ]
        x = torch.cat(pair, -1) @ w["input_proj.weight"].T
        sizes = (settings["num_attention_heads"], settings["num_key_value_heads"])
        x = slow_layer(x, w, *sizes, settings["head_dim"], settings["rope_theta"])
        out = rms_norm_ref(x[-1:], w["final_layernorm.weight"], 1e-5)
        agree(draft, row, (out @ embedding[ids].T)[0], ids)
        # The next pair has this row's output and its draft.
        hidden, tokens = torch.cat([hidden, out]), [*tokens, draft]


@pytest.mark.slow
@pytest.mark.parametrize("taps", [(3,), (1, 3), (1, 2, 3)])
@pytest.mark.parametrize("ngram", [False, True])
def test_a_sequential_head_drafts_as_its_definition(
    taps: tuple[int, ...], ngram: bool, tmp_path: Path
) -> None:
    """Also after steps in which the n-gram's copy was used and the pairs waited."""
    trunk = tiny_checkpoint(tmp_path / "trunk")
    heads = write_mtp(tmp_path / "heads", taps=taps, reduced=len(taps) != 2)
    llm = LLM(trunk, heads=heads, ngram=ngram, num_speculative_tokens=3, max_length=300)
    recorder = watch(llm)
    assert isinstance(recorder.inner, MtpDrafter)
    prompts = [PROMPT, [30, 31], [50 + i % 9 for i in range(140)]]
    completions = llm.generate(prompts, SamplingParams(max_tokens=40, ignore_eos=True))
    if ngram:
        assert any("ngram" in c.stats.source_steps for c in completions)
        assert any("heads" in c.stats.source_steps for c in completions)
    assert len(recorder.drafted) > 10
    for seen in recorder.seen[:: -(-len(recorder.seen) // 20)]:
        check_mtp(heads, trunk, seen)


@pytest.mark.parametrize("ngram", [False, True])
def test_a_mimo_checkpoint_drafts_with_the_layer_it_includes(ngram: bool, tmp_path: Path) -> None:
    """Prompts of one token and of many: the first pair of each has an embedding of zeros."""
    model = write_layout("mimo", tmp_path)
    llm = LLM(tmp_path, ngram=ngram, num_speculative_tokens=3, max_length=300)
    recorder = watch(llm)
    llm.generate([[9], [5, 6, 7, 8, 9] * 3], SamplingParams(max_tokens=30))
    prefix = "model.mtp_layers.0."
    w = {
        name.removeprefix(prefix): tensor
        for name, tensor in load_tensors(tmp_path).items()
        if name.startswith(prefix)
    }
    embedding, head = (t.weight for t in (model.get_input_embeddings(), model.lm_head))
    assert len(recorder.drafted) > 10
    for known, drafts, logits in recorder.seen[::3]:
        with torch.inference_mode():
            hidden = model.model(torch.tensor([known[:-1]])).last_hidden_state[0]
            tokens = list(known[1:])
            for draft, row in zip(drafts, logits, strict=True):
                x = slow_mimo_layer(hidden, embedding[tokens], w)
                out = rms_norm_ref(x[-1:], w["final_layernorm.weight"], 1e-5)
                agree(draft, row, (out @ head.T)[0])
                hidden, tokens = torch.cat([hidden, out]), [*tokens, draft]


def test_parallel_heads_draft_as_their_definition(tmp_path: Path) -> None:
    trunk = tiny_checkpoint(tmp_path / "trunk")
    heads = write_medusa(tmp_path / "heads")
    llm = LLM(trunk, heads=heads, ngram=False, num_speculative_tokens=3, max_length=300)
    recorder = watch(llm)
    llm.generate([PROMPT, [30, 31]], SamplingParams(max_tokens=30, ignore_eos=True))
    w, embedding = load_tensors(heads), load_tensors(trunk)["model.embed_tokens.weight"]
    assert len(recorder.drafted) > 20
    for known, drafts, logits in recorder.seen[::3]:
        normed = trunk_states(trunk, known[:-1])[-1][-1]
        for h, draft in enumerate(drafts):
            hidden = normed
            for d in range(2):
                block = F.linear(hidden, w[f"{h}.{d}.linear.weight"], w[f"{h}.{d}.linear.bias"])
                hidden = hidden + F.silu(block)
            agree(draft, logits[h], embedding @ hidden)


def test_published_medusa_heads_draft_through_vocabularies_of_their_own(tmp_path: Path) -> None:
    trunk = tiny_checkpoint(tmp_path / "trunk")
    heads = write_published(tmp_path / "heads")
    llm = LLM(trunk, heads=heads, ngram=False, num_speculative_tokens=3, max_length=300)
    recorder = watch(llm)
    llm.generate([PROMPT, [30, 31]], SamplingParams(max_tokens=30, ignore_eos=True))
    w = published_medusa()
    assert len(recorder.drafted) > 20
    for known, drafts, logits in recorder.seen[::3]:
        hidden = trunk_states(trunk, known[:-1])[-1][-1]
        for h, draft in enumerate(drafts):
            x = hidden
            for d in range(2):
                x = x + F.silu(w[f"{h}.{d}.linear.weight"] @ x + w[f"{h}.{d}.linear.bias"])
            agree(draft, logits[h], w[f"{h}.2.weight"] @ x)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["", "norm_before_residual", "norm_before_fc", "embedding"])
@pytest.mark.parametrize("ngram", [False, True])
@pytest.mark.parametrize("reduced", [False, True])
def test_an_eagle3_head_drafts_as_its_definition(
    reduced: bool, ngram: bool, variant: str, tmp_path: Path
) -> None:
    trunk = tiny_checkpoint(tmp_path / "trunk", num_hidden_layers=8)
    heads = write_eagle3(tmp_path / "heads", reduced=reduced)
    config = heads / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {variant or "x": True}))
    more = {"norm_before_fc": {"input_norm.weight": 1 + torch.randn(3 * E) / 5}}
    more["embedding"] = {"embed_tokens.weight": torch.randn(V, E)}
    tensors = dict(load_tensors(heads)) | more.get(variant, {})
    save_file({n: t.clone() for n, t in tensors.items()}, heads / "model.safetensors")
    llm = LLM(trunk, heads=heads, ngram=ngram, num_speculative_tokens=3, max_length=300)
    recorder = watch(llm)
    prompts = [PROMPT, [30], [50 + i % 9 for i in range(140)]]
    llm.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))
    w = load_tensors(heads)
    embedding = load_tensors(trunk)["model.embed_tokens.weight"]
    embedding = w.get("embed_tokens.weight", embedding)
    assert len(recorder.drafted) > (5 if ngram else 20)
    rows = len(w["lm_head.weight"])
    ids = torch.arange(rows) + (w["d2t"] if reduced else 0)
    for known, drafts, logits in recorder.seen[::5]:
        states = trunk_states(trunk, known[:-1])
        hidden = torch.cat([states[layer - 1] for layer in (2, 4, 5)], -1)
        if variant == "norm_before_fc":
            hidden = rms_norm_ref(hidden, w["input_norm.weight"], 1e-5)
        hidden = hidden @ w["fc.weight"].T
        tokens, norm_first = list(known[1:]), variant == "norm_before_residual"
        for draft, row in zip(drafts, logits, strict=True):
            new = eagle3_layer(hidden, embedding[tokens], w, norm_first=norm_first)[-1:]
            hidden = torch.cat([hidden, new])
            last = rms_norm_ref(hidden[-1], w["norm.weight"], 1e-5)
            agree(draft, row, w["lm_head.weight"] @ last, ids)
            tokens.append(draft)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["mtp", "medusa", "published", "eagle3"])
@pytest.mark.parametrize("ngram", [False, True])
def test_heads_never_change_a_token(
    kind: str, ngram: bool, temperature: float, tmp_path: Path
) -> None:
    layers = 8 if kind == "eagle3" else L
    trunk = tiny_checkpoint(tmp_path / "trunk", dtype=torch.bfloat16, num_hidden_layers=layers)
    write: dict[str, Any] = {"mtp": write_mtp, "medusa": write_medusa, "eagle3": write_eagle3}
    heads = write.get(kind, write_published)(tmp_path / "heads")
    params = SamplingParams(60, temperature, seed=3, logprobs=True, ignore_eos=True)
    llm = LLM(trunk, heads=heads, ngram=ngram, num_speculative_tokens=3, max_length=256)
    prompts = [PROMPT, [30, 31], list(range(40, 90))]
    for drafted, prompt in zip(llm.generate(prompts, params), prompts, strict=True):
        plain = llm.generate(prompt, params, speculate=False)[0]
        assert (drafted.token_ids, drafted.logprobs) == (plain.token_ids, plain.logprobs)
        assert plain.stats.steps == 60


class Copies:
    """A drafter that has a copy at every step."""

    def __init__(self, llm: LLM):
        self.llm = llm

    def guess(self, step: Any, count: int) -> Drafts:
        drafts = self.llm.ops.ngram(step.tokens, step.lengths, count, 1)[0]
        return Drafts(drafts, torch.full((drafts.shape[0],), NGRAM), torch.tensor([count]))


def test_a_long_run_of_copies_is_written_before_the_buffer_overflows(tmp_path: Path) -> None:
    """64 pairs may be pending: a text that only repeats itself must not lose any."""
    trunk = tiny_checkpoint(tmp_path / "trunk")
    heads = write_mtp(tmp_path / "heads")
    llm = LLM(trunk, heads=heads, num_speculative_tokens=2, max_length=400)

    recorder = watch(llm)
    llm.drafter.ngram = Copies(llm)  # type: ignore[assignment]
    events = llm.stream(PROMPT, SamplingParams(max_tokens=200, ignore_eos=True))
    for _ in range(150):
        next(events)
    assert not recorder.drafted, "copies alone must not make the heads guess"
    llm.drafter.ngram = NoDrafter()  # type: ignore[assignment]
    assert list(events)[-1].completion
    assert recorder.drafted
    for seen in recorder.seen:
        check_mtp(heads, trunk, seen)


def test_heads_draft_where_copies_are_not_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk, heads = tiny_checkpoint(tmp_path / "trunk"), write_mtp(tmp_path / "heads")
    llm = LLM(trunk, heads=heads, num_speculative_tokens=2, max_length=256)
    prompt, params = [5, 6, 7] * 8, SamplingParams(max_tokens=4, ignore_eos=True)
    drafted = {}
    for wanted in (True, False):
        monkeypatch.setattr(FixedDraftLength, "use_ngram", lambda self, wanted=wanted: wanted)
        recorder = watch(llm)
        llm.drafter.ngram = Copies(llm)  # type: ignore[assignment]
        (answer,) = llm.generate(prompt, params)
        (plain,) = llm.generate(prompt, params, speculate=False)
        assert answer.token_ids == plain.token_ids
        drafted[wanted] = sorted(answer.stats.drafted)
        assert bool(recorder.drafted) is not wanted
    assert "ngram" in drafted[True] and "ngram" not in drafted[False]


def test_heads_that_rested_continue_after_a_gap_of_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier contents of the gap, here NaN, do not change their drafts, nor any token."""
    trunk, heads = tiny_checkpoint(tmp_path / "trunk"), write_mtp(tmp_path / "heads")
    params = SamplingParams(max_tokens=90, ignore_eos=True, logprobs=True)
    steps = itertools.count()

    def active_source(self: DraftLength) -> int:
        return HEADS if next(steps) % 60 not in range(10, 40) else NONE

    monkeypatch.setattr(DraftLength, "active_source", active_source)
    monkeypatch.setattr(DraftLength, "rest", lambda self: ())
    monkeypatch.setattr(DraftLength, "use_heads", lambda self: True)
    monkeypatch.setattr(DraftLength, "heads_may_pay", lambda self: True)
    monkeypatch.setattr(DraftLength, "min_probability", lambda self: 0.0)
    monkeypatch.setattr(
        DraftLength, "choose", lambda self, w: max((len(s.probabilities) for s in w), default=0)
    )
    seen = {}
    for filler in (0.0, 9.0, torch.nan):
        llm = LLM(trunk, heads=heads, ngram=False, max_length=256, max_batch=2)
        plain = llm.generate([PROMPT, PROMPT[:3]], params, speculate=False)
        with torch.inference_mode():
            llm.drafter.drafter.cache.k.fill_(filler)
            llm.drafter.drafter.cache.v.fill_(filler)
        recorder, steps = watch(llm), itertools.count()
        drafted = llm.generate([PROMPT, PROMPT[:3]], params)
        assert [c.token_ids for c in drafted] == [c.token_ids for c in plain]
        assert [c.logprobs for c in drafted] == [c.logprobs for c in plain]
        assert all(logits.isfinite().all() for _, _, logits in recorder.seen)
        seen[filler] = recorder.drafted
    assert len(seen[0.0]) > 40
    assert seen[0.0] == seen[9.0] == seen[torch.nan]


def test_resting_steps_are_neither_chosen_nor_observed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 steps without anything to draft: a call of the chooser for each rest, none per step."""
    trunk, heads = tiny_checkpoint(tmp_path / "trunk"), write_mtp(tmp_path / "heads")
    llm = LLM(trunk, heads=heads, ngram=False, max_length=256)
    params = SamplingParams(max_tokens=100, ignore_eos=True, logprobs=True)
    calls = Counter[str]()
    for owner, name in (
        *((DraftLength, name) for name in ("choose", "observe", "rest", "observe_rest")),
        (FixedDraftLength, "choose"),
        (MtpDrafter, "observe"),
        (MtpDrafter, "guess"),
    ):
        original = getattr(owner, name)

        def counted(*arguments: Any, name: str = name, original: Any = original) -> Any:
            calls[name] += 1
            return original(*arguments)

        monkeypatch.setattr(owner, name, counted)
    (plain,) = llm.generate([PROMPT], params, speculate=False)
    assert not calls
    monkeypatch.setattr(DraftLength, "_steps_to_try", lambda self: 1000)
    (drafted,) = llm.generate([PROMPT], params)
    assert drafted.token_ids == plain.token_ids and drafted.logprobs == plain.logprobs
    assert drafted.stats.steps_by_k == {0: 100}
    rests = -(-100 // MOST_REST)
    assert calls == {"rest": rests, "observe_rest": rests}


@pytest.mark.parametrize("kept", [False, True])
def test_heads_that_cannot_pay_are_not_given_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """Unless the prompts are kept for later runs, which then need to give them nothing."""
    trunk, heads = tiny_checkpoint(tmp_path / "trunk"), write_mtp(tmp_path / "heads")
    llm = LLM(trunk, heads=heads, max_length=256, prefix_caching=kept)
    params = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=True)
    given: list[int] = []
    prefill = MtpDrafter.prefill

    def counted(self: MtpDrafter, sequence: int, features: Tensor, tokens: Tensor) -> None:
        given.append(len(tokens))
        prefill(self, sequence, features, tokens)

    monkeypatch.setattr(MtpDrafter, "prefill", counted)
    (plain,) = llm.generate([PROMPT], params, speculate=False)
    for may_pay in (False, True):
        monkeypatch.setattr(DraftLength, "_could_pay", lambda self, may_pay=may_pay: may_pay)
        (drafted,) = llm.generate([PROMPT], params)
        assert drafted.token_ids == plain.token_ids and drafted.logprobs == plain.logprobs
        assert sum(given) == (len(PROMPT) - 2 if may_pay or kept else 0)


def test_a_sequence_near_its_end_waits_beside_one_with_many_copies(tmp_path: Path) -> None:
    """The head runs as many rows of each sequence as of the one with the most pending pairs."""
    trunk = tiny_checkpoint(tmp_path / "trunk")
    heads = write_mtp(tmp_path / "heads")
    llm = LLM(trunk, heads=heads, num_speculative_tokens=2, max_length=160, max_batch=2)

    class CopiesUnlessLast:
        def guess(self, step: Any, count: int) -> Drafts:
            drafts = llm.ops.ngram(step.tokens, step.lengths, count, 1)[0]
            source = torch.where(step.tokens[:, 0] == 77, 0, NGRAM)
            return Drafts(drafts, source, torch.tensor([count]))

    assert isinstance(llm.drafter, CompanionDrafter)
    llm.drafter.ngram = CopiesUnlessLast()  # type: ignore[assignment]
    prompts = [PROMPT, [i % 50 for i in range(130)], [77, *(i % 50 for i in range(157))]]
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    for drafted, prompt in zip(llm.generate(prompts, params), prompts, strict=True):
        (plain,) = llm.generate(prompt, params, speculate=False)
        assert drafted.token_ids == plain.token_ids


def test_heads_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    trunk = tiny_checkpoint(tmp_path / "trunk")
    heads = write_mtp(tmp_path / "heads")
    config = heads / "config.json"
    good = json.loads(config.read_text())
    for change, message in (
        ({"model_type": "eagle9"}, "model_type eagle9 is not supported; supported: mtpkern_mtp"),
        ({"num_attention_heads": 5}, "self_attn.q_proj.weight must be"),
        ({"tap_layers": [1, 2]}, "tap_layers must ascend to 3"),
        ({"head_dim": None}, "is not complete"),
    ):
        config.write_text(json.dumps(good | change))
        with pytest.raises(ModelLoadError, match=message):
            LLM(trunk, heads=heads)
    config.write_text(json.dumps(good))
    with pytest.raises(UserError, match="no such directory; names: auto, none"):
        LLM(trunk, heads="nowhere")
    medusa = write_medusa(tmp_path / "medusa")
    with pytest.raises(UserError, match="at most 3, the number of heads, got 4"):
        LLM(trunk, heads=medusa, num_speculative_tokens=4)
    assert LLM(trunk, heads=medusa).k == 3
    tensors = load_tensors(heads)
    for changed, message in (
        ({"self_attn.q_proj.bias": torch.ones(40)}, "q_proj.bias has no place in such heads"),
        ({"draft_vocab": tensors["draft_vocab"] + 2}, f"vocabulary of {V} does not have"),
    ):
        save_file(tensors | changed, heads / "model.safetensors")
        with pytest.raises(ModelLoadError, match=message):
            LLM(trunk, heads=heads)


def test_an_eagle3_head_of_another_kind_is_refused(tmp_path: Path) -> None:
    trunk = tiny_checkpoint(tmp_path / "trunk", num_hidden_layers=8)
    heads = write_eagle3(tmp_path / "heads")
    config = heads / "config.json"
    good = json.loads(config.read_text())
    for change, message in (
        ({"vocab_size": V + 1}, f"vocab_size must be {V} to match the model, got {V + 1}"),
        ({"hidden_size": E + 2, "draft_vocab_size": 5}, r"must be \["),
        ({"norm_output": True}, "norm_output=True is not supported in EAGLE-3 heads"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state=False is not"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}}, "layer_ids=.1, 2, 3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type dynamic"),
    ):
        config.write_text(json.dumps(good | change))
        with pytest.raises(ModelLoadError, match=message):
            LLM(trunk, heads=heads)
    eagle = {"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True}
    config.write_text(json.dumps(good | {"eagle_config": eagle}))
    tensors = load_tensors(heads)
    embedding = load_tensors(trunk)["model.embed_tokens.weight"]
    save_file(tensors | {"embed_tokens.weight": embedding.half()}, heads / "model.safetensors")
    LLM(trunk, heads=heads)
    for changed, message in (
        ({"embed_tokens.weight": embedding[:-1].contiguous()}, r"embed_tokens.weight must be \["),
        ({"midlayer.mlp.gate_proj.bias": torch.ones(72)}, "gate_proj.bias has no place"),
        ({"layers.1.mlp.down_proj.weight": torch.ones(2)}, "EAGLE-3 heads of one layer are"),
        ({"lm_head.weight": torch.ones(V // 2, E, dtype=torch.int8)}, "must hold floats"),
    ):
        save_file(tensors | changed, heads / "model.safetensors")
        with pytest.raises(ModelLoadError, match=message):
            LLM(trunk, heads=heads)


def test_an_eagle3_heads_rope_theta_is_found_under_either_name(tmp_path: Path) -> None:
    trunk = tiny_checkpoint(tmp_path / "trunk", num_hidden_layers=8)
    heads = write_eagle3(tmp_path / "heads")
    config = heads / "config.json"
    settings = json.loads(config.read_text())
    drafts = []
    for rope in ({"rope_theta": 500.0}, {"rope_parameters": {"rope_theta": 500.0}}, {}):
        settings.pop("rope_theta", None)
        config.write_text(json.dumps(settings | rope))
        llm = LLM(trunk, heads=heads, ngram=False, num_speculative_tokens=3, max_length=300)
        recorder = watch(llm)
        llm.generate([50 + i % 9 for i in range(140)], SamplingParams(20, ignore_eos=True))
        drafts.append(recorder.drafted)
    assert drafts[0] == drafts[1] != drafts[2]
