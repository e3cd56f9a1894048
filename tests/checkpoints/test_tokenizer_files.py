"""The files that define a tokenizer, compared with transformers on the same files."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import tiny_checkpoint, write_tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtpkern import LLM
from mtpkern.checkpoints.llama import load_config
from mtpkern.checkpoints.tokenizer_files import has_tokenizer
from mtpkern.cli.inspect import describe_checkpoint
from mtpkern.errors import ModelLoadError, UserError
from mtpkern.tokenizer import Tokenizer

NAMES = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1 and 2 of tokenizer.json
OTHERS = ("<tool>", "<pad>")
SIZE = 300
TEXTS = (
    "the dog sleeps",
    "the <|im_start|>quick fox<|im_end|> <tool> jumps<pad> over <|endoftext|>x",
    "a  b 1234 caf\u00e9 e\u0301 don't\n\n x",
)
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)

flags = st.fixed_dictionaries(
    {name: st.booleans() for name in ("lstrip", "rstrip", "normalized", "special")}
)
token = st.sampled_from((*NAMES, *OTHERS))
named = st.dictionaries(st.sampled_from(("bos_token", "eos_token", "unk_token")), token)


@st.composite
def added(draw: Any, first: int) -> dict[str, Any]:
    """Tokens added after the vocabulary, by id, in any order."""
    order = draw(st.lists(st.sampled_from(OTHERS), unique=True))
    return {
        str(first + i): draw(flags) | {"content": content, "single_word": False}
        for i, content in enumerate(order)
    }


@st.composite
def descriptions(draw: Any, first: int = SIZE) -> dict[str, dict[str, Any]]:
    """Contents of the files that accompany a vocabulary."""
    config: dict[str, Any] = draw(named) | {"clean_up_tokenization_spaces": False}
    for name in ("add_bos_token", "add_eos_token"):
        if draw(st.booleans()):
            config[name] = draw(st.booleans())
    if draw(st.booleans()):
        config["eos_token"] = draw(flags) | {
            "content": draw(token),
            "single_word": False,
            "__type": "AddedToken",
        }
    if draw(st.booleans()):
        config["extra_special_tokens"] = draw(
            st.sampled_from([["<tool>"], {"tool_token": "<tool>"}, []])
        )
    if draw(st.booleans()):
        config["added_tokens_decoder"] = draw(added(first))
    files = {"tokenizer_config.json": config}
    if draw(st.booleans()):
        files["special_tokens_map.json"] = draw(named)
    if draw(st.booleans()):
        table = draw(added(first))
        files["added_tokens.json"] = {t["content"]: int(i) for i, t in table.items()}
    return files


def write(directory: Path, files: dict[str, dict[str, Any]]) -> None:
    for name in FILES:
        (directory / name).unlink(missing_ok=True)
    write_tiny_tokenizer(directory)
    (directory / "tokenizer_config.json").unlink()
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))


def assert_equal(directory: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = Tokenizer.from_directory(directory)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)


EXAMPLES = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@EXAMPLES
@given(files=descriptions())
def test_tables_beside_tokenizer_json(files: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    files["tokenizer_config.json"]["tokenizer_class"] = "PreTrainedTokenizerFast"
    write(tmp_path, files)
    assert_equal(tmp_path)


def split_vocabulary(directory: Path) -> int:
    """Split tokenizer.json into vocab.json and merges.txt, without special tokens."""
    content = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").unlink()
    vocabulary = content["model"]["vocab"]
    plain = [text for text in sorted(vocabulary, key=vocabulary.get) if text not in NAMES]
    (directory / "vocab.json").write_text(json.dumps({text: i for i, text in enumerate(plain)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in content["model"]["merges"])]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n")
    return len(plain)


@EXAMPLES
@given(
    files=descriptions(SIZE - 3),
    name=st.sampled_from(("Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer")),
    space=st.booleans(),
)
def test_a_vocabulary_and_its_merges(
    files: dict[str, dict[str, Any]], name: str, space: bool, tmp_path: Path
) -> None:
    files["tokenizer_config.json"] |= {"tokenizer_class": name, "add_prefix_space": space}
    write(tmp_path, files)
    assert split_vocabulary(tmp_path) == SIZE - 3
    assert_equal(tmp_path)


def test_a_model_with_a_vocabulary_and_merges_answers(tmp_path: Path) -> None:
    """As the slow tokenizer of a fine-tuned Qwen saves it."""
    tiny_checkpoint(tmp_path)
    text = "the <|im_start|>dog"
    split_vocabulary(tmp_path)
    table = {str(297 + i): {"content": text, "special": True} for i, text in enumerate(NAMES)}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": table}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert has_tokenizer(tmp_path)
    ids = LLM(tmp_path, max_length=64).encode(text)
    assert ids == transformers.AutoTokenizer.from_pretrained(tmp_path).encode(text)
    assert 298 in ids


def test_ids_below_the_vocabularys_are_the_tables(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    before = Tokenizer.from_directory(tmp_path).encode("the <|im_start|>dog")
    content = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    split_vocabulary(tmp_path)
    plain = {text: i for text, i in content.items() if text not in NAMES}
    (tmp_path / "vocab.json").write_text(json.dumps(plain))
    table = {str(i): {"content": text, "special": True} for i, text in enumerate(NAMES)}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": table}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_directory(tmp_path).encode("the <|im_start|>dog") == before


@pytest.mark.parametrize("name", ["LlamaTokenizer", "BertTokenizer", None])
def test_a_vocabulary_of_a_class_that_is_not_known_is_refused(
    name: str | None, tmp_path: Path
) -> None:
    write_tiny_tokenizer(tmp_path)
    split_vocabulary(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    with pytest.raises(ModelLoadError, match=f"tokenizer_class {name}.*Qwen2Tokenizer"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "<|im_end|>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"305": {"content": "<tool>"}}}),
        ("added_tokens.json", {"<tool>": 299}),
    ],
)
def test_two_ids_for_one_token_are_both_named(
    file: str, content: dict[str, Any], tmp_path: Path
) -> None:
    write_tiny_tokenizer(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ModelLoadError, match=rf"{file} gives .* the id \d+, and tokenizer.json"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {"added_tokens_decoder": {"300": "<tool>"}},
        {"added_tokens_decoder": {"x": {"content": "<tool>"}}},
        {"added_tokens_decoder": {"300": {"content": ""}}},
        {"extra_special_tokens": [7]},
        {"extra_special_tokens": "<tool>"},
    ],
)
def test_a_malformed_table_is_one_clear_line(content: dict[str, Any], tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(ModelLoadError, match=r"tokenizer_config.json: ") as refusal:
        Tokenizer.from_directory(tmp_path)
    assert "\n" not in str(refusal.value)


def test_added_tokens_beyond_the_models_vocabulary_are_refused_in_a_prompt_only(
    tmp_path: Path,
) -> None:
    tiny_checkpoint(tmp_path, vocab_size=SIZE)
    config = {"pad_token": "<pad>", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_directory(tmp_path).vocab_size == SIZE + 1
    llm = LLM(tmp_path, max_length=64)
    assert llm.encode("the dog")
    with pytest.raises(UserError, match=r"token ids must be in 0..299"):
        llm.encode("the <pad>")
    assert dict(describe_checkpoint(tmp_path))["tokenizer"].startswith("301 tokens")


def test_a_token_of_every_prompt_beyond_the_models_vocabulary_is_refused_at_load(
    tmp_path: Path,
) -> None:
    tiny_checkpoint(tmp_path, vocab_size=SIZE - 3)
    split_vocabulary(tmp_path)
    config = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": "<s>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_directory(tmp_path)
    with pytest.raises(ModelLoadError, match="adds token .* to every prompt"):
        tokenizer.check_against(load_config(tmp_path))
