"""Greedy drafts in one compiled call are those of one operation after the other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_checkpoint
from head_files import write_eagle3, write_mtp

from mtpkern.config import SamplingParams
from mtpkern.drafters import base
from mtpkern.drafters.base import Drafts
from mtpkern.drafters.draft_length import DraftLength
from mtpkern.engine import LLM
from mtpkern.kernels.cpu.program import Program
from mtpkern.ops.cpu import CpuOps

K = 4
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15], [16] * 40]
HEADS: dict[str, Any] = {
    "mtp": write_mtp,
    "one tap": lambda directory: write_mtp(directory, taps=(3,)),
    "whole vocabulary": lambda directory: write_mtp(directory, reduced=False),
    "eagle3": write_eagle3,
}


class OneByOne(CpuOps):
    def draft_chain(self, *_: Any) -> None:
        return None


class Recorder:
    """Keeps the calls of a drafter: how many it drafted, the tokens, their probabilities."""

    def __init__(self, inner: Any, drafted: list[Drafts]):
        self.inner, self.drafted = inner, drafted

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def guess(self, step: Any, count: int) -> Drafts:
        drafts = self.inner.guess(step, count)
        estimates = drafts.probabilities
        kept = None if estimates is None else estimates.clone()
        self.drafted.append(drafts._replace(tokens=drafts.tokens.clone(), probabilities=kept))
        return drafts


def decode(
    trunk: Path, heads: Path, ops: CpuOps, batch: int, weights: str = "auto", **params: Any
) -> Any:
    """-> (token ids of each answer, all drafts)"""
    llm = LLM(
        trunk,
        heads=heads,
        ops=ops,
        weights=weights,
        ngram=False,
        num_speculative_tokens=K,
        max_batch=batch,
        max_length=256,
    )
    drafted: list[Drafts] = []
    llm.drafter = Recorder(llm.drafter, drafted)
    answers = llm.generate(PROMPTS, SamplingParams(max_tokens=24, ignore_eos=True, **params))
    return [answer.token_ids for answer in answers], drafted


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_chain_drafts_what_single_operations_draft(
    heads: str, batch: int, tmp_path: Path
) -> None:
    trunk = tiny_checkpoint(tmp_path / "trunk", num_hidden_layers=8 if heads == "eagle3" else 3)
    head = HEADS[heads](tmp_path / "heads")
    tokens, drafted = decode(trunk, head, CpuOps(), batch)
    expected_tokens, expected = decode(trunk, head, OneByOne(), batch)
    assert tokens == expected_tokens and len(drafted) == len(expected) > 4
    for mine, theirs in zip(drafted, expected, strict=True):
        assert torch.equal(mine.tokens, theirs.tokens)
        assert mine.num_proposed == theirs.num_proposed
        torch.testing.assert_close(mine.probabilities, theirs.probabilities, rtol=1e-5, atol=0)


@pytest.mark.parametrize("reduced", [True, False])
def test_beside_a_quantised_trunk_the_heads_have_4_bits(reduced: bool, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
    trunk = tiny_checkpoint(tmp_path / "trunk", **sizes)
    head = write_mtp(tmp_path / "heads", hidden=64, reduced=reduced)
    llm = LLM(trunk, heads=head, weights="q8_0", max_length=256)
    module = llm.drafter.drafter.weights
    packed = module.fc, module.input_proj, module.layer.gate_up, *module.layer.qkv
    assert {w.format for w in packed} == {"q4_0"}
    # The trunk's whole vocabulary is shared; a part of it is rounded again.
    assert module.vocabulary.format == ("q4_0" if reduced else "q8_0")
    assert module.layer.down.format == "fp32"  # 72 inputs are not whole groups
    tokens, drafted = decode(trunk, head, CpuOps(), 3, weights="q8_0")
    expected_tokens, expected = decode(trunk, head, OneByOne(), 3, weights="q8_0")
    assert tokens == expected_tokens and len(drafted) > 4
    for mine, theirs in zip(drafted, expected, strict=True):
        assert torch.equal(mine.tokens, theirs.tokens)
        assert mine.num_proposed == theirs.num_proposed
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    plain = LLM(trunk, heads="none", ngram=False, weights="q8_0", max_length=256)
    assert [answer.token_ids for answer in plain.generate(PROMPTS, params)] == tokens


def test_a_chain_ends_where_its_drafts_are_hardly_ever_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is on all drafts so far together, and holds if every sequence is below it."""
    trunk, head = tiny_checkpoint(tmp_path / "trunk"), write_mtp(tmp_path / "heads")
    lengths = set()
    for limit in (0.0, 0.3, 0.6, 1.0):
        monkeypatch.setattr("mtpkern.drafters.draft_length.MIN_PROBABILITY", limit)
        _, drafted = decode(trunk, head, CpuOps(), 3)
        _, expected = decode(trunk, head, OneByOne(), 3)
        found = [drafts.num_proposed for drafts in drafted]
        assert found == [drafts.num_proposed for drafts in expected]
        lengths |= set(found)
    assert lengths == {1, 2, 3, K}


def test_sampled_drafts_go_through_single_operations(tmp_path: Path) -> None:
    trunk, head = tiny_checkpoint(tmp_path / "trunk"), write_mtp(tmp_path / "heads")
    params = {"temperature": 0.8, "seed": 3}
    tokens, drafted = decode(trunk, head, CpuOps(), 1, **params)
    expected_tokens, expected = decode(trunk, head, OneByOne(), 1, **params)
    assert tokens == expected_tokens
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(drafted, expected, strict=True))


def test_no_answer_waits_for_a_program_of_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every size of a step, with drafts and at rest, is prepared at load, and timed."""
    heads = write_mtp(tmp_path / "heads")
    llm = LLM(tiny_checkpoint(tmp_path / "trunk"), heads=heads, max_batch=1)
    chooser = llm.scheduler.draft_length
    assert chooser is not None
    assert all(chooser.seconds(rows) > 0 for rows in range(1, 6))
    assert all(chooser.drafting(drafts) > 0 for drafts in range(1, 5))

    def force(k: int) -> None:
        source = base.HEADS if k else base.NONE
        monkeypatch.setattr(DraftLength, "rest", lambda self: () if k else [source] * 3)
        monkeypatch.setattr(DraftLength, "choose", lambda self, proposals: k)
        monkeypatch.setattr(DraftLength, "use_heads", lambda self: k > 0)
        monkeypatch.setattr(DraftLength, "active_source", lambda self: source)

    def refuse(self: Program) -> None:
        raise AssertionError("a program was made")

    monkeypatch.setattr(DraftLength, "heads_may_pay", lambda self: True)
    force(4)
    stream = llm.stream([5, 6, 7], SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)  # a prompt's own programs are made when it is read
    monkeypatch.setattr(Program, "_seal", refuse)
    for k in (4, 3, 2, 1, 0, 4):
        force(k)
        for _ in range(12):
            next(stream)
    stream.close()
