"""Weights in other bits than the checkpoint's: near the original model, and the same tokens."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_checkpoint
from safetensors.torch import load_file, save_file

from mtpkern import LLM, SamplingParams, UserError
from mtpkern.checkpoints.quantised import ROUNDED_FORMATS, vocabulary_format
from mtpkern.kernels.cpu.quants import dequantise, quantise
from mtpkern.ops.definitions import DEFINITIONS

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
PROMPTS = [[5, 9, 33, 7, 7, 12], [11, 4], [40 + i % 60 for i in range(70)]]
PARAMS = SamplingParams(max_tokens=40, ignore_eos=True, logprobs=True)


def write_rounded(source: Path, target: Path, format: str) -> Path:
    """The checkpoint whose float32 numbers are those that `source` rounded to a format has."""
    tensors = load_file(tiny_checkpoint(target, **SIZES) / "model.safetensors")
    for name, w in load_file(source / "model.safetensors").items():
        own = vocabulary_format(format) if "embed" in name else format
        tensors[name] = (
            torch.from_numpy(dequantise(quantise(w, own or format))) if w.dim() == 2 else w
        )
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize("format", ROUNDED_FORMATS)
def test_rounded_weights_answer_as_their_dequantised_values(format: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", **SIZES)
    llm = LLM(source, weights=format, num_speculative_tokens=3, max_batch=3, max_length=128)
    assert (llm.weights, llm.dtype) == (format, torch.float16)
    exact = LLM(write_rounded(source, tmp_path / "exact", format), heads="none", max_length=128)
    assert exact.weights == "float32"
    for prompt, drafted, plain in zip(
        PROMPTS,
        llm.generate(PROMPTS, PARAMS),
        llm.generate(PROMPTS, PARAMS, speculate=False),
        strict=True,
    ):
        assert drafted.token_ids == plain.token_ids and drafted.logprobs == plain.logprobs
        (truth,) = exact.generate([prompt], PARAMS)
        # Up to the first token that rounded activations, keys and values change.
        pairs = list(zip(plain.token_ids, truth.token_ids, strict=True))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        assert same >= 1 and plain.logprobs is not None and truth.logprobs is not None
        for a, b in zip(plain.logprobs[:same], truth.logprobs[:same], strict=True):
            assert abs(a - b) < 0.15


def test_heads_beside_quants_have_8_bits_and_cost_no_token(tmp_path: Path) -> None:
    trunk = tiny_checkpoint(tmp_path / "trunk", **SIZES)
    (tmp_path / "heads").mkdir()
    config = {"model_type": "mtpkern_medusa", "num_heads": 3, "num_layers": 1}
    (tmp_path / "heads" / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    tensors = {f"{h}.0.linear.weight": torch.randn(64, 64) / 20 for h in range(3)}
    tensors |= {f"{h}.0.linear.bias": torch.zeros(64) for h in range(3)}
    save_file(tensors, tmp_path / "heads" / "model.safetensors")
    kept = {}
    for weights in ("auto", "q4_1"):
        llm = LLM(
            trunk,
            heads=tmp_path / "heads",
            weights=weights,
            num_speculative_tokens=3,
            max_length=128,
        )
        kept[weights] = llm.drafter.parallel_heads[0][0].format
        drafted, plain = (
            llm.generate(PROMPTS, PARAMS, speculate=speculate) for speculate in (True, False)
        )
        assert [c.token_ids for c in drafted] == [c.token_ids for c in plain]
        assert all("heads" in c.stats.drafted for c in drafted)
    assert kept == {"auto": "fp32", "q4_1": "q8_0"}


def test_weights_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path, **SIZES)
    with pytest.raises(UserError, match="weights must be auto, q4_0"):
        LLM(directory, weights="q3")
    with pytest.raises(UserError, match="weights q4_1 needs device cpu"):
        LLM(directory, weights="q4_1", ops=DEFINITIONS)
    with pytest.raises(UserError, match="multiple of 32"):
        LLM(tiny_checkpoint(tmp_path / "odd"), weights="q4_1")
