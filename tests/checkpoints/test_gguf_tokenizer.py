"""Tokenizers converted from GGUF metadata produce the ids of the original tokenizers."""

import inspect
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import torch
from gguf_files import write_gguf
from tokenizers import Tokenizer as Library
from tokenizers import pre_tokenizers, trainers
from tokenizers.models import BPE

from mtpkern.checkpoints.directory import load_tensors
from mtpkern.checkpoints.gguf import convert_gguf
from mtpkern.checkpoints.gguf_tokenizer import write_tokenizer
from mtpkern.checkpoints.llama import load_config
from mtpkern.errors import ModelLoadError
from mtpkern.rope import RopeConfig
from mtpkern.tokenizer import Tokenizer

TEXTS = [
    "It's 12345 o'clock, isn't it?  WE'LL see...\n\n  two lines\r\n\tand a tab",
    "caf\u00e9 cafe\u0301 na\u00efve \u00a1hola! \u4f60\u597d 2024\u5e74 \U0001f600",
    "def f(x):\n    return x**2  # 100%\n",
    "a <|im_start|>b<|im_end|>",
    "   ",
    "",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SETTINGS = {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """Tokens and merges of a byte-level BPE, some of which span several words."""
    library = Library(BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator([*TEXTS[:3] * 3, "1234 12 345 123 2024 cafe\u0301"], trainer)
    model = json.loads(library.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {"tokens": tokens, "merges": [" ".join(pair) for pair in model["merges"]]}


def from_metadata(directory: Path, trained: dict[str, Any], pre: str, **more: Any) -> Tokenizer:
    tokens = trained["tokens"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": trained["merges"],
        "tokenizer.ggml.bos_token_id": 1,
    } | {f"tokenizer.ggml.{name}": value for name, value in more.items()}
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
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS[:3] * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "true"),
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        user_defined_symbols=["<tool>"],
        minloglevel=2,
        **options,
    )
    true = sentencepiece.SentencePieceProcessor(str(tmp_path / "true.model"))
    ids = range(true.GetPieceSize())

    def kind(i: int) -> int:
        if true.IsUnknown(i):
            return 2
        if true.IsControl(i):
            return 3
        return 6 if true.IsByte(i) else 4 if true.IdToPiece(i) == "<tool>" else 1

    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [true.IdToPiece(i) for i in ids],
        "tokenizer.ggml.scores": [true.GetScore(i) for i in ids],
        "tokenizer.ggml.token_type": [kind(i) for i in ids],
    }
    if options:
        metadata["tokenizer.ggml.add_space_prefix"] = False
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
