"""Tokenizers converted from GGUF metadata produce the ids of the original tokenizers."""

import inspect
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import torch
from gguf_files import SPECIAL, write_gguf
from gguf_tokenizers import TEXTS, byte_level_bpe, byte_level_metadata, sentencepiece_bpe

from mtpkern.checkpoints.directory import load_tensors
from mtpkern.checkpoints.gguf import convert_gguf
from mtpkern.checkpoints.gguf_tokenizer import write_tokenizer
from mtpkern.checkpoints.llama import load_config
from mtpkern.errors import ModelLoadError
from mtpkern.rope import RopeConfig
from mtpkern.tokenizer import Tokenizer

SETTINGS = {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    return byte_level_bpe()


def from_metadata(directory: Path, trained: dict[str, Any], pre: str, **more: Any) -> Tokenizer:
    metadata = byte_level_metadata(trained, pre, **more)
    write_tokenizer(directory, metadata, SETTINGS)
    return Tokenizer.from_directory(directory)


@pytest.mark.parametrize(("pre", "name"), [("qwen2", "Qwen2Tokenizer"), ("gpt-2", "GPT2Tokenizer")])
def test_a_byte_level_bpe_is_the_one_of_transformers(
    pre: str, name: str, trained: dict[str, Any], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    vocabulary = {token: i for i, token in enumerate(trained["tokens"])}
    merges = [tuple(line.split(" ")) for line in trained["merges"]]
    theirs = getattr(transformers, name)(
        vocab=vocabulary, merges=merges, additional_special_tokens=SPECIAL
    )
    ours = from_metadata(tmp_path, trained, pre)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
    kinds = {tuple(from_metadata(tmp_path, trained, kind).encode(TEXTS[0])) for kind in PRE}
    assert len(kinds) == len(PRE)  # the text tells them apart


PRE = ("smollm", "gpt-2", "llama-bpe", "qwen2")


def test_llama_3_cuts_words_as_transformers_does(trained: dict[str, Any], tmp_path: Path) -> None:
    slow = pytest.importorskip("transformers.convert_slow_tokenizer")
    pattern = inspect.signature(slow.TikTokenConverter.__init__).parameters["pattern"].default
    ours = from_metadata(tmp_path, trained, "llama-bpe")
    written = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert written["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": pattern}
    # Its texts begin with BOS by default; those of the others do not.
    assert ours.encode("a")[0] == 1 and from_metadata(tmp_path, trained, "qwen2").encode("a")[0] > 2
    assert from_metadata(tmp_path, trained, "llama-bpe", add_bos_token=False).encode("a")[0] > 2
    # A word in the vocabulary is one token, even without merges that produce it.
    word = {"tokens": [*trained["tokens"], "zebra"], "merges": trained["merges"]}
    assert from_metadata(tmp_path, word, "llama-bpe").encode("zebra") == [
        1,
        len(word["tokens"]) - 1,
    ]
    assert len(from_metadata(tmp_path, word, "qwen2").encode("zebra")) > 1


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}])
def test_sentencepieces_model_is_written_back(options: dict[str, bool], tmp_path: Path) -> None:
    true, metadata = sentencepiece_bpe(tmp_path, **options)
    ids = range(true.GetPieceSize())
    write_tokenizer(tmp_path, metadata, SETTINGS)
    ours = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    for text in [*TEXTS, "a <tool> b", " x", "\u2603"]:
        assert ours.Encode(text) == true.Encode(text), text
        assert ours.Decode(true.Encode(text)) == true.Decode(true.Encode(text))
    assert [ours.GetScore(i) for i in ids] == [true.GetScore(i) for i in ids]
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("the lines") == [true.bos_id(), *true.Encode("the lines")]
    write_tokenizer(tmp_path, metadata | {"tokenizer.ggml.add_bos_token": False}, SETTINGS)
    assert Tokenizer.from_directory(tmp_path).encode("a") == true.Encode("a")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model=bert is not supported; supported: gpt2, llama"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre=tekken is not supported; supported: smollm, gpt-2"),
        ({"add_space_prefix": True}, "add_space_prefix=True is not supported"),
        ({"token_type": [1]}, "token_type has 1 of"),
        ({"merges": ["t \u2603"]}, "tokenizer.ggml.merges has \u2603, which is not a token"),
    ],
)
def test_other_tokenizers_are_refused_by_name(
    more: dict[str, Any], message: str, trained: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        from_metadata(tmp_path, trained, **{"pre": "smollm"} | more)


def llama3_factors(factor: float, head_dim: int, theta: float) -> torch.Tensor:
    """The factors that llama.cpp's converter writes for Llama 3.1, computed from wavelengths."""
    found = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * 3.141592653589793 * theta ** (i / head_dim)
        smooth = (8192 / wavelength - 1) / 3
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192:
            found.append(factor)
        else:
            found.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(found)


def test_factors_of_the_frequencies_are_llama_3s(tmp_path: Path) -> None:
    factors = llama3_factors(8.0, 16, 5e5)
    assert len(factors.unique()) == 3  # one pair is between those that stay and those that do not

    def change(writer: gguf.GGUFWriter) -> None:
        del writer.kv_data[0]["llama.rope.freq_base"]
        writer.add_rope_freq_base(5e5)
        writer.add_tensor("rope_freqs.weight", factors.numpy())

    convert_gguf(write_gguf(tmp_path / "model.gguf", change=change), tmp_path)
    assert "rope_freqs.weight" not in load_tensors(tmp_path)
    rope = load_config(tmp_path).rope
    assert (rope.kind, rope.factor, rope.original_max_position_embeddings) == ("llama3", 8.0, 8192)
    plain, _ = RopeConfig(theta=5e5).inverse_frequencies(16)
    torch.testing.assert_close(rope.inverse_frequencies(16)[0], plain / factors)
    for other in (factors.roll(1), factors[:4], factors * 2):
        factors = other
        with pytest.raises(ModelLoadError, match="rope_freqs.weight holds other factors"):
            convert_gguf(write_gguf(tmp_path / "model.gguf", change=change), tmp_path)
