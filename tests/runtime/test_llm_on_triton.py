"""The whole runtime on the kernels: LLM on a GPU, or on one that ttsem emulates on a CPU."""

from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_checkpoint
from head_files import write_eagle3, write_hydra, write_layers, write_medusa, write_mtp
from llama_layouts import write_layout

from mtpkern import device, warmup
from mtpkern.config import SamplingParams
from mtpkern.drafters.base import HEADS, DraftInput, Drafts
from mtpkern.drafters.graph_draft_length import GraphDraftLength
from mtpkern.drafters.ngram import NgramDrafter
from mtpkern.engine import LLM
from mtpkern.errors import UserError
from mtpkern.ops import gpu as gpu_ops
from mtpkern.ops.definitions import DEFINITIONS
from mtpkern.ops.gpu import TRITON

PROMPTS = [[5, 9, 33, 7, 7, 12, 9, 33, 7], [11], [40 + i % 60 for i in range(70)]]
# Tokens are compared with those of the definitions, so the model must have no near-ties.
# As few tokens and layers as show what each test is about: ttsem takes a second for a layer's step.
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=True)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4}
    return tiny_checkpoint(tmp_path / "trunk", max_position_embeddings=256, **sizes)


@pytest.fixture(autouse=True)
def pinnable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ttsem all memory is the host's."""
    if torch.version.cuda is None:
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)


def load(directory: Path, device: str, **options: Any) -> LLM:
    settings: dict[str, Any] = {"max_length": 128, "max_batch": 2}
    if torch.version.cuda is None:
        # ttsem supports neither graphs nor dependent launches.
        settings |= {"graph": False, "ops": TRITON if device == "cuda" else DEFINITIONS}
    return LLM(directory, device=device, **settings | options)


@pytest.mark.parametrize("heads", ["mtp", "medusa"])
def test_the_kernels_generate_as_the_definitions_with_and_without_drafts(
    gpu: str, directory: Path, tmp_path: Path, heads: str
) -> None:
    """Three prompts over two slots: ragged, one admitted while another is under way. Heads draft
    with the n-gram search beside them, and alone."""
    if heads == "mtp":
        options = {"heads": write_mtp(tmp_path / "heads", taps=(1, 2)), "ngram": True}
    else:
        options = {"heads": write_medusa(tmp_path / "heads"), "ngram": False}
    options["num_speculative_tokens"] = 3
    expected = load(directory, "cpu", **options).generate(PROMPTS, GREEDY)
    llm = load(directory, gpu, **options)
    plain, accepted = llm.generate(PROMPTS, GREEDY, speculate=False), 0
    for drafted, undrafted, theirs in zip(
        llm.generate(PROMPTS, GREEDY), plain, expected, strict=True
    ):
        assert drafted.token_ids == undrafted.token_ids == theirs.token_ids
        assert drafted.logprobs == undrafted.logprobs, "with and without drafts bit for bit"
        torch.testing.assert_close(
            torch.tensor(drafted.logprobs), torch.tensor(theirs.logprobs), atol=1e-4, rtol=1e-4
        )
        assert undrafted.stats.steps == GREEDY.max_tokens
        assert drafted.stats.accepted == theirs.stats.accepted
        accepted += sum(map(sum, drafted.stats.accepted.values()))
    assert accepted > 2
    assert len(llm.scheduler.pool.free) == llm.runner.cache.k.shape[1] - 1, "every page came back"


def test_parallel_heads_may_read_the_vocabulary_a_second_time(
    gpu: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences of four rows and four heads: drafts come from a pass of their own."""
    heads = write_medusa(tmp_path / "heads")
    options = {"heads": heads, "ngram": False, "num_speculative_tokens": 3}
    expected = load(directory, "cpu", **options).generate(PROMPTS[:2], GREEDY)
    monkeypatch.setattr(gpu_ops, "ONE_READ_ROWS", 0)
    for mine, theirs in zip(
        load(directory, gpu, **options).generate(PROMPTS[:2], GREEDY), expected, strict=True
    ):
        assert mine.token_ids == theirs.token_ids
        assert mine.stats.accepted == theirs.stats.accepted


def test_an_eagle3_head_on_the_kernels(gpu: str, tmp_path: Path) -> None:
    """It taps three layers, attends with two halves side by side, and has ids of its own."""
    trunk = tiny_checkpoint(tmp_path / "trunk", num_hidden_layers=8, max_position_embeddings=256)
    heads = write_eagle3(tmp_path / "heads")
    options = {"heads": heads, "ngram": False, "num_speculative_tokens": 2, "max_batch": 1}
    params = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=True)
    (expected,) = load(trunk, "cpu", **options).generate(PROMPTS[0], params)
    llm = load(trunk, gpu, **options)
    (drafted,), (plain,) = (llm.generate(PROMPTS[0], params, speculate=s) for s in (True, False))
    assert drafted.token_ids == plain.token_ids == expected.token_ids
    assert drafted.logprobs == plain.logprobs
    assert drafted.stats.accepted == expected.stats.accepted


@pytest.mark.parametrize("kind", ["layers", "hydra"])
def test_published_heads_on_the_kernels(gpu: str, tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"ngram": False, "num_speculative_tokens": 2, "max_batch": 1}
    if kind == "layers":
        trunk = write_layers(tmp_path / "trunk")
    else:
        trunk = tiny_checkpoint(tmp_path / "trunk", max_position_embeddings=256)
        options["heads"] = write_hydra(tmp_path / "heads")
    params = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=True)
    (expected,) = load(trunk, "cpu", **options).generate(PROMPTS[0], params)
    (drafted,) = load(trunk, gpu, **options).generate(PROMPTS[0], params)
    assert drafted.token_ids == expected.token_ids
    assert drafted.stats.accepted == expected.stats.accepted


@pytest.mark.parametrize("family", ["mistral_window_7", "qwen3", "qwen2"])
def test_every_trunk_has_the_same_tokens_on_the_kernels_as_on_the_definitions(
    gpu: str, tmp_path: Path, family: str
) -> None:
    write_layout(family, tmp_path)
    options = {"num_speculative_tokens": 3, "dtype": "float32", "max_batch": 1}
    (expected,) = load(tmp_path, "cpu", **options).generate(PROMPTS[2], GREEDY)
    llm = load(tmp_path, gpu, **options)
    (drafted,), (plain,) = (llm.generate(PROMPTS[2], GREEDY, speculate=s) for s in (True, False))
    assert drafted.token_ids == plain.token_ids == expected.token_ids
    assert drafted.logprobs == plain.logprobs


def test_logits_that_are_not_finite_are_an_error_at_the_same_token(
    gpu: str, tmp_path: Path
) -> None:
    """A token's embedding is NaN: chosen, it ends the answer; drafted and rejected, it does not."""
    trunk = tiny_checkpoint(
        tmp_path, num_hidden_layers=1, tie_word_embeddings=False, max_position_embeddings=256
    )
    llm = load(trunk, gpu, num_speculative_tokens=3, max_batch=1)
    (whole,) = llm.generate(PROMPTS[1], GREEDY, speculate=False)
    answer = whole.token_ids
    at = next(i for i in range(4, GREEDY.max_tokens) if answer[i] not in PROMPTS[1] + answer[:i])

    class Hostile(NgramDrafter):
        def guess(self, step: DraftInput, count: int) -> Drafts:
            tokens = torch.full((len(step.lengths), count), answer[at], device=gpu)
            return Drafts(tokens, HEADS, count)

    llm.drafter = Hostile(llm.ops)
    with torch.inference_mode():
        llm.trunk.embedding[answer[at]] = torch.nan
    for speculate in (True, False):
        found, params = [], replace(GREEDY, logprobs=speculate)
        with pytest.raises(UserError, match="logits are not finite"):
            for event in llm.stream(PROMPTS[1], params, speculate=speculate):
                found.append(event.token_id)
        assert found == answer[: at + 1]
    (short,) = llm.generate(PROMPTS[1], replace(GREEDY, max_tokens=at + 1))
    assert short.token_ids == answer[: at + 1]
    assert short.logprobs == whole.logprobs[: at + 1]


def test_what_needs_the_host_inside_a_step_is_refused(gpu: str, directory: Path) -> None:
    llm = load(directory, gpu)
    with pytest.raises(UserError, match="temperature above 0 needs device cpu"):
        llm.generate(PROMPTS[0], SamplingParams(max_tokens=2, temperature=0.5))


def test_a_chosen_number_of_drafts_changes_no_token(
    gpu: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K goes up and down from step to step: windows of stale drafts, and steps without any."""
    llm = load(directory, gpu, max_batch=1)
    assert not llm.runner.graphs or {k for _, k, _ in llm.runner.graphs} >= {0, 1, 4}
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=True)
    (plain,) = llm.generate(PROMPTS[0], params, speculate=False)
    llm.runner.graph_seconds, order = {(1, k): 1.0 for k in (0, 1, 4)}, cycle((4, 1, 0, 4, 0, 0, 1))
    monkeypatch.setattr(GraphDraftLength, "choose", lambda self, windows: next(order))
    (completion,) = llm.generate(PROMPTS[0], params)
    assert completion.token_ids == plain.token_ids
    assert completion.logprobs == plain.logprobs
    assert set(completion.stats.steps_by_k) == {0, 1, 4}


def test_every_shape_is_captured_beforehand_and_leaves_no_trace(
    gpu: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = load(directory, gpu).generate(PROMPTS[0], GREEDY, speculate=False)
    if torch.version.cuda is None:

        class RunsOnce:
            def capture(self, step: Any) -> Any:
                step()
                return step

        monkeypatch.setattr(warmup, "GraphPool", RunsOnce)
        monkeypatch.setattr(warmup, "measure", lambda replay: float(bool(replay())) + 1.0)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        # Each look finds 3 MiB less than the one before.
        free = iter(range(1 << 30, 0, -(3 << 20)))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(free), 1 << 30))
    with monkeypatch.context() as low:
        low.setattr(device, "GPU", replace(device.GPU, graph_memory=(1 << 20) - 1))
        with pytest.raises(UserError, match=r"4 graphs take \d+ MiB, more than 0 MiB: lower"):
            load(directory, gpu, graph=True, max_batch=1)
    llm = load(directory, gpu, graph=True)
    shapes = {(b, k) for b in (1, 2) for k in (0, 1, 2, 4)}
    assert {(b, k) for b, k, _ in llm.runner.graphs} == set(llm.runner.graph_seconds) == shapes
    # A word that is already in the ring must not be mistaken for one of a later step.
    assert llm.runner.clock >= int((llm.runner.ring.words >> 32).max()) > 0
    (completion,) = llm.generate(PROMPTS[0], GREEDY)
    assert completion.token_ids == expected.token_ids
    assert completion.logprobs == expected.logprobs
