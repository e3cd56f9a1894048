"""bench_quality: perplexity and divergence are those of their definitions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_checkpoint
from gguf_files import write_gguf

from mtpkern import LLM, SamplingParams, reference
from mtpkern.checkpoints.directory import load_tensors
from mtpkern.checkpoints.llama import load_config
from mtpkern.tokenizer import Tokenizer

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CONTEXT = 256  # of the small models
TEXT = "the thing that the other then gathers, " * 40


@pytest.fixture
def bench_quality(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_quality

    return bench_quality


def rows(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    return found


def test_the_bits_that_run_are_compared_with_float32(
    bench_quality: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}
    model = tiny_checkpoint(tmp_path / "model", max_position_embeddings=CONTEXT, **sizes)
    text = tmp_path / "text"
    text.write_text(TEXT)
    count = CONTEXT + 130
    command = ["--model", str(model), "--text", str(text), "--tokens", str(count)]
    command += ["--weights", "q8_0"]
    assert bench_quality.main(command) == 0
    exact, own = rows(capsys)
    # The first token of a window has nothing before it, and the last nothing after it.
    assert exact["positions"] == own["positions"] == count - 2
    assert (exact["mean_kl"], exact["same_top"]) == (0.0, 1.0)
    assert 0 < own["mean_kl"] < 0.1 and own["same_top"] > 0.5

    config, tensors = load_config(model), load_tensors(model)
    ids, total = Tokenizer.from_directory(model).encode(TEXT)[:count], 0.0
    for window in (ids[:CONTEXT], ids[CONTEXT:]):
        logprobs = reference.logits(config, tensors, window).double().log_softmax(-1)
        total -= float(logprobs[torch.arange(len(window) - 1), window[1:]].sum())
    expected = float(torch.tensor(total / (count - 2), dtype=torch.float64).exp())
    assert exact["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_logprobs_are_those_that_generation_reports(bench_quality: Any, tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "model.gguf")
    with LLM(model, heads="none", ngram=False) as llm:
        prompt = llm.tokenizer.encode(TEXT)[:150]
        (answer,) = llm.generate([prompt], SamplingParams(max_tokens=40, logprobs=True))
        window = [*prompt, *answer.token_ids]
        found = torch.cat(list(bench_quality.logprobs(llm, window)))
    first = len(prompt) - 1
    for at, (token, logprob) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
        assert float(found[first + at, token]) == pytest.approx(logprob, abs=1e-5)


def test_what_llama_leaves_out_counts_as_one_token(bench_quality: Any) -> None:
    exact = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    ids = torch.tensor([2, 0])
    whole = bench_quality.lumped(exact[ids]).exp()
    assert whole.tolist() == pytest.approx([0.15, 0.5, 0.35])
    other = torch.tensor([0.25, 0.25]).log()
    quality = bench_quality.Quality()
    quality.add(bench_quality.lumped(exact[ids])[None], bench_quality.lumped(other)[None])
    p, q = whole, torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    assert float(quality.divergence()) == pytest.approx(float((p * (p / q).log()).sum()))


def test_a_text_that_is_too_short_is_refused(
    bench_quality: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text("the")
    model = str(write_gguf(tmp_path / "model.gguf"))
    assert bench_quality.main(["--model", model, "--text", str(text), "--tokens", "50"]) == 2
    assert "fewer than --tokens 50" in capsys.readouterr().err
