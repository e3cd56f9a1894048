"""The oracle against `transformers`, and what it promises by itself."""

from pathlib import Path

import pytest
import torch
from llama_layouts import LAYOUTS, write_layout
from torch.testing import assert_close

from mtpkern import reference
from mtpkern.checkpoints.directory import load_tensors
from mtpkern.checkpoints.llama import load_config

PROMPT = [1, 40, 17, 5, 93, 40, 17, 66, 2, 81, 12, 7, 29]
NEW_TOKENS = 64


def load(directory: Path):
    return load_config(directory), load_tensors(directory)


def generate_by_transformers(model, prompt: list[int], max_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_greedy_tokens_are_those_of_transformers(layout, tmp_path):
    model = write_layout(layout, tmp_path)
    config, tensors = load(tmp_path)
    tokens = reference.generate(config, tensors, PROMPT, NEW_TOKENS)
    assert len(tokens) == NEW_TOKENS
    assert tokens == generate_by_transformers(model, PROMPT, NEW_TOKENS)

    ids = torch.tensor(PROMPT + tokens)
    scores = reference.logits(config, tensors, ids)
    with torch.no_grad():
        assert_close(scores, model(ids[None]).logits[0], rtol=0, atol=1e-4)

    # A model that loops, or whose two best tokens are level, would prove little.
    best, second = scores[len(PROMPT) - 1 : -1].topk(2).values.T
    assert len(set(tokens)) > 8
    assert (best - second).min() > 5e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_spellings_of_a_config_say_the_same(layout, tmp_path):
    for spelling in ("rope_scaling", "rope_parameters"):
        write_layout(layout, tmp_path / spelling, spelling=spelling)
    assert load_config(tmp_path / "rope_scaling") == load_config(tmp_path / "rope_parameters")


def test_generation_stops_with_the_end_token_that_transformers_stops_with(tmp_path):
    write_layout("tied", tmp_path / "endless")
    endless = reference.generate(*load(tmp_path / "endless"), PROMPT, NEW_TOKENS)
    end = next(token for i, token in enumerate(endless) if i >= 5 and token not in endless[:i])
    model = write_layout("tied", tmp_path / "ends", eos_token_id=[130, end])
    tokens = reference.generate(*load(tmp_path / "ends"), PROMPT, NEW_TOKENS)
    assert tokens == endless[: endless.index(end) + 1]
    assert tokens == generate_by_transformers(model, PROMPT, NEW_TOKENS)


def test_no_tokens_asked_for_are_no_tokens(tmp_path):
    write_layout("tied", tmp_path)
    assert reference.generate(*load(tmp_path), PROMPT, 0) == []


def test_a_dtype_decides_the_precision(tmp_path):
    write_layout("rope_yarn", tmp_path)
    config, tensors = load(tmp_path)
    truth = reference.logits(config, tensors, PROMPT, dtype=torch.float64)
    errors = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        scores = reference.logits(config, tensors, PROMPT, dtype=dtype)
        assert scores.dtype == dtype
        errors.append((scores.double() - truth).abs().max().item())
    assert errors[0] == 0 < errors[1] < 1e-4 < errors[2] < 0.5
