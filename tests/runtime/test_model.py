"""The runtime against `transformers`: every layout's logits and greedy tokens, in float32."""

from pathlib import Path

import pytest
import torch
from llama_layouts import LAYOUTS, write_layout

from mtpkern.config import SamplingParams
from mtpkern.engine import LLM
from mtpkern.model import Llama
from mtpkern.ops.cpu_step import CpuLogits

PROMPT = [5, 9, 33, 7, 61, 12, 80, 2, 44]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_equals_transformers(name: str, tmp_path: Path) -> None:
    theirs = write_layout(name, tmp_path)
    llm = LLM(tmp_path, num_speculative_tokens=3, dtype="float32", max_length=256)
    ours = llm.generate(PROMPT, SamplingParams(max_tokens=64))[0].token_ids
    expected = theirs.generate(torch.tensor([PROMPT]), max_new_tokens=64, do_sample=False)
    assert ours == expected[0, len(PROMPT) :].tolist()

    tokens = torch.tensor([PROMPT + ours])
    with torch.inference_mode():
        logits = _logits(llm.trunk, tokens, llm)
        torch.testing.assert_close(logits, theirs(tokens).logits[0], atol=1e-4, rtol=0)


def _logits(trunk: Llama, tokens: torch.Tensor, llm: LLM) -> torch.Tensor:
    """Logits of a whole sequence through the step's own ops, in windows of five."""
    cache = llm.runner.cache.rows(0, 1)
    cache.reset(0)
    rows = []
    for window in tokens.split(5, dim=1):
        hidden, _ = llm.ops.layers(trunk, window, cache)
        config = trunk.config
        eps = config.rms_norm_eps
        _, projected = llm.ops.project(hidden, trunk.norm, eps, trunk.vocabulary, None)
        assert isinstance(projected, CpuLogits)
        rows.append(projected.logits.clone())
        cache.lengths.add_(window.shape[1])
    return torch.cat(rows)
