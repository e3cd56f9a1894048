"""Acceptance at given rates is at those rates, and its output is labelled as made up."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_CONFIG, tiny_checkpoint

from mtpkern import cli
from mtpkern.config import SamplingParams
from mtpkern.drafters.synthetic import PERIOD, draw_counts
from mtpkern.engine import LLM
from mtpkern.errors import UserError


@pytest.mark.parametrize("rates", [[1.0, 1.0, 0.0], [0.8, 0.6, 0.4], [0.0, 1.0, 1.0]])
def test_drafts_are_accepted_at_the_given_rates(rates: list[float], tmp_path: Path) -> None:
    llm = LLM(
        tiny_checkpoint(tmp_path, eos_token_id=None),
        num_speculative_tokens=3,
        max_batch=2,
        synthetic_acceptance=rates,
    )
    params = SamplingParams(max_tokens=400)
    expected, reached = 1.0, 1.0
    for rate in rates:
        reached *= rate
        expected += reached
    for completion in llm.generate([[5, 6, 7]] * 2, params):
        length = completion.stats.mean_acceptance_length
        assert length == pytest.approx(expected, abs=0.02 if 0.0 in rates else 0.35)
    assert llm.generate([5, 6, 7], params, speculate=False)[0].stats.steps == 400


def test_counts_are_drawn_by_position() -> None:
    counts = draw_counts([0.9, 0.5])
    assert counts.shape == (PERIOD,) and counts.dtype == torch.int64
    assert (counts >= 1).float().mean().item() == pytest.approx(0.9, abs=0.05)
    assert (counts == 2).float().mean().item() == pytest.approx(0.45, abs=0.05)
    for rates in ([], [1.5], [-0.1]):
        with pytest.raises(UserError, match="acceptance rates must be one or more within"):
            draw_counts(rates)


def test_made_up_weights_need_a_config_alone_and_are_labelled(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG | {"torch_dtype": "bfloat16"}))
    arguments = ["generate", "-", "--model", str(tmp_path), "--load-format", "dummy"]
    llm = LLM(tmp_path, load_format="dummy", max_length=64)
    assert len(llm.generate([1, 2, 3], SamplingParams(max_tokens=5))[0].token_ids) <= 5
    with pytest.raises(UserError, match="load_format must be auto or dummy, got 'gguf'"):
        LLM(tmp_path, load_format="gguf")
    assert cli.main([*arguments[:1], "x", *arguments[2:]]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_the_command_line_labels_the_text_as_meaningless(tmp_path: Path, capsys: Any) -> None:
    model = str(tiny_checkpoint(tmp_path))
    arguments = ["generate", "the dog", "--model", model, "--max-tokens", "20", "--raw"]
    made_up = [*arguments, "-K", "2", "--synthetic-acceptance", "1,0.5"]
    assert cli.main(made_up) == 0
    assert "the speed is meaningful, the text is not" in capsys.readouterr().err
    assert cli.main([*made_up, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["synthetic_acceptance"] == [1.0, 0.5]
    assert cli.main([*arguments, "--synthetic-acceptance", "1,x"]) == 2
    assert cli.main([*arguments, "--cuda-profile"]) == 2
    assert "needs device cuda" in capsys.readouterr().err
