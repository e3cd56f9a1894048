"""What a message recommends works: after each refusal here, its advice is followed."""

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_CONFIG, tiny_checkpoint, tiny_tensors
from gguf_files import write_gguf
from head_files import published_medusa
from safetensors.torch import load_file, save_file

from mtpkern import LLM, ModelLoadError, SamplingParams, UserError
from mtpkern.arguments import Parser, as_flags
from mtpkern.checkpoints import resolve
from mtpkern.checkpoints.llama import load_config
from mtpkern.cli import main
from mtpkern.convert import MEDUSA_FILE, convert
from mtpkern.ops.definitions import DEFINITIONS

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("ways"))


@pytest.fixture
def mtpkern(capsys: Any) -> Any:
    """Run a command -> (exit code, stdout, stderr)."""

    def run(*argv: str) -> tuple[int, str, str]:
        code = main(list(argv))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def recommended(message: str, directory: Path) -> list[str]:
    """The command between the backticks, for `directory`, without its program's name."""
    (command,) = re.findall(r"`(mtpkern .+?)`", message)
    words = shlex.split(command)
    assert words[-1] == "NEW_DIRECTORY"
    return [*words[1:-1], str(directory)]


def pickled(directory: Path, shards: int = 1, *, legacy: bool = False, **config: Any) -> Path:
    """A tiny checkpoint as torch.save writes it, its tied LM head under a second name."""
    tiny_checkpoint(directory, **config)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" if shards > 1 else "pytorch_model.bin"
        part = {name: tensors[name] for name in names[i::shards]}
        torch.save(part, directory / file, _use_new_zipfile_serialization=not legacy)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = json.dumps({"weight_map": weight_map})
        (directory / "pytorch_model.bin.index.json").write_text(index)
    return directory


@pytest.mark.parametrize(("shards", "legacy"), [(1, False), (1, True), (3, False)])
def test_a_pickled_model_converts_as_its_refusal_says(
    tmp_path: Path, mtpkern: Any, model: Path, shards: int, legacy: bool
) -> None:
    source = pickled(tmp_path / "a source", shards, legacy=legacy)
    code, _, err = mtpkern("generate", PROMPT, "--model", str(source))
    assert code == 2 and "pickled weights can run code" in err
    assert mtpkern(*recommended(err, tmp_path / "new"))[0] == 0
    assert len(list((tmp_path / "new").glob("*.safetensors"))) == shards
    params = SamplingParams(max_tokens=12, logprobs=True)
    found, expected = (LLM(d).generate(PROMPT, params)[0] for d in (tmp_path / "new", model))
    assert (found.token_ids, found.logprobs) == (expected.token_ids, expected.logprobs)


def test_a_pickled_model_may_be_named_by_its_directory_file_index_or_shard(tmp_path: Path) -> None:
    one, three = pickled(tmp_path / "one"), pickled(tmp_path / "three", 3)
    for number, source in enumerate(
        [
            one,
            one / "pytorch_model.bin",
            three,
            three / "pytorch_model.bin.index.json",
            three / "pytorch_model-00002-of-00003.bin",
        ]
    ):
        convert(source, tmp_path / str(number))
        assert LLM(tmp_path / str(number)).config.num_layers == 3


class Hostile:
    def __reduce__(self) -> Any:
        return open, ("harmed", "w")


def test_a_pickle_that_is_not_a_model_is_refused_and_runs_nothing(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, (change, message) in enumerate(
        [
            ({"model.norm.weight": None}, r"pytorch_model\.bin: .*is not a tensor"),
            ({"model.norm.weight": Hostile()}, "is not a file of weights"),
            ({"model.norm.weight": torch.ones(5)}, r"model\.norm\.weight must be \[48\]"),
            ({"module.surprise": torch.ones(5)}, r"module\.surprise has no place"),
        ]
    ):
        source = pickled(tmp_path / f"source{number}")
        tensors = torch.load(source / "pytorch_model.bin", weights_only=True) | change
        torch.save(tensors, source / "pytorch_model.bin")
        with pytest.raises(ModelLoadError, match=message) as refusal:
            convert(source, tmp_path / "new")
        assert str(source) in str(refusal.value) and ".new." not in str(refusal.value)
        assert not (tmp_path / "new").exists() and not Path("harmed").exists()
    broken = pickled(tmp_path / "three", 3)
    index = broken / "pytorch_model.bin.index.json"
    for weight_map, message in (
        ({"x": "../a.bin"}, "must be a plain file name"),
        ({"x": "gone.bin"}, r"shard gone\.bin is missing"),
        ({}, "has no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelLoadError, match=message):
            convert(broken, tmp_path / "new")
    (tmp_path / "source0" / "config.json").unlink()
    torch.save(tiny_tensors(TINY_CONFIG), tmp_path / "source0" / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"has no config\.json beside its weights"):
        convert(tmp_path / "source0", tmp_path / "new")


def test_a_gguf_given_as_a_model_runs_as_its_refusal_says(
    tmp_path: Path, mtpkern: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a place").mkdir()
    file = write_gguf(tmp_path / "a place" / "small.gguf")
    with pytest.raises(
        ModelLoadError, match="GGUF without a config.json: give the file"
    ) as refusal:
        load_config(file.parent)
    assert str(file) in str(refusal.value)
    for given in (file, file.parent):
        assert mtpkern("generate", "the", "--model", str(given), "--max-tokens", "3")[0] == 0
    write_gguf(file.with_name("other.gguf"))
    code, _, err = mtpkern("generate", "the", "--model", str(file.parent))
    assert code == 2 and "holds 2 GGUFs: give one of them" in err


def test_heads_given_as_a_file_name_the_conversion(
    tmp_path: Path, mtpkern: Any, model: Path
) -> None:
    torch.save(published_medusa(), tmp_path / MEDUSA_FILE)
    code, _, err = mtpkern(
        "generate", PROMPT, "--model", str(model), "--heads", str(tmp_path / MEDUSA_FILE)
    )
    assert code == 2 and "error: --heads" in err
    assert mtpkern(*recommended(err, tmp_path / "heads"))[0] == 0
    assert (tmp_path / "heads" / "model.safetensors").is_file()


def test_a_mistyped_path_is_reported_before_a_hub_is_asked(
    tmp_path: Path, monkeypatch: Any
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(resolve, "_hub_snapshot", lambda name: asked.append(name) or tmp_path)
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint(tmp_path / "models" / "llama-tiny")
    for name, message in (
        ("./foo", "no such directory"),
        ("~/no/such/foo", r"no such directory"),
        ("foo/bar/baz", r"no such directory \(foo does not exist\)"),
        ("models/lama-tiny", "no such directory; did you mean models/llama-tiny?"),
        ("models/other", "not taken as a hub id, since a directory models exists"),
        (str(tmp_path / "model" / "llama-tiny"), "model does not exist.*; did you mean .*/models?"),
        ("org/", "no such directory"),
    ):
        with pytest.raises(UserError, match=message):
            resolve.resolve_model(name)
    assert asked == []
    assert resolve.resolve_model("models/llama-tiny") == Path("models/llama-tiny")
    resolve.resolve_model("organisation/name")
    assert asked == ["organisation/name"]


def test_an_unquoted_prompt_is_shown_quoted(mtpkern: Any, model: Path) -> None:
    code, _, err = mtpkern("generate", "Why", "is", "the", "sky", "blue?", "--model", str(model))
    assert code == 2 and "the prompt is 5 words: quote it" in err
    command = shlex.split(err[err.index("mtpkern generate") :])
    assert command == ["mtpkern", "generate", "Why is the sky blue?"]
    assert mtpkern(*command[1:], "--model", str(model), "--max-tokens", "3")[0] == 0
    code, _, err = mtpkern("generate", "Why", "is", "--frob", "--model", str(model))
    assert code == 2 and "unrecognized arguments: --frob (see mtpkern generate --help)" in err


@pytest.mark.parametrize("prompt", ["5, 6,7", "5 6\t7", "[5, 6, 7]"])
def test_a_model_without_a_tokenizer_takes_and_gives_token_ids(
    tmp_path: Path, mtpkern: Any, prompt: str
) -> None:
    directory = tiny_checkpoint(tmp_path)
    (directory / "tokenizer.json").unlink()
    common = "--model", str(directory), "--max-tokens", "9"
    code, out, err = mtpkern("generate", "the fox", *common)
    assert code == 2 and "has no tokenizer: give token ids, and --token-ids" in err
    code, out, err = mtpkern("generate", prompt, *common, "--token-ids")
    assert code == 0, err
    expected = LLM(directory).generate([5, 6, 7], SamplingParams(max_tokens=9))[0].token_ids
    assert [int(word) for word in out.split()] == expected
    found = json.loads(mtpkern("generate", prompt, *common, "--token-ids", "--json")[1])
    assert found["token_ids"] == expected


def test_token_ids_of_a_model_with_a_tokenizer(mtpkern: Any, model: Path) -> None:
    common = "--model", str(model), "--max-tokens", "9"
    ids = LLM(model).encode(PROMPT)
    by_text = json.loads(mtpkern("generate", PROMPT, "--raw", "--json", *common)[1])
    code, out, _ = mtpkern("generate", " ".join(map(str, ids)), "--token-ids", *common)
    assert code == 0 and [int(word) for word in out.split()] == by_text["token_ids"]
    for prompt, more, message in (
        ("five", (), "--token-ids needs a prompt of integers"),
        ("5 307", (), "a token id must be an integer in 0..306, got 307"),
        ("5", ("--system", "x"), "--system needs a prompt that is text"),
    ):
        code, _, err = mtpkern("generate", prompt, "--token-ids", *common, *more)
        assert code == 2 and message in err


@pytest.mark.parametrize(
    "given",
    [b"the fox\n", b"the fox\r\n", b"\xef\xbb\xbfthe fox", b"\xef\xbb\xbfthe fox\n"],
)
def test_standard_input_loses_its_last_newline_and_its_mark(
    mtpkern: Any, model: Path, monkeypatch: Any, given: bytes
) -> None:
    common = "--model", str(model), "--max-tokens", "3", "--json", "--raw"
    expected = json.loads(mtpkern("generate", "the fox", *common)[1])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
    found = json.loads(mtpkern("generate", "-", *common)[1])
    assert found["prompt_tokens"] == expected["prompt_tokens"]
    assert found["token_ids"] == expected["token_ids"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the fox\n\n")))
    two = json.loads(mtpkern("generate", "-", *common)[1])
    assert two["prompt_tokens"] > expected["prompt_tokens"], "one newline goes, not all of them"


@pytest.mark.slow
def test_a_prompt_that_is_too_long_says_which_context_and_how_to_raise_it(
    tmp_path: Path, mtpkern: Any
) -> None:
    directory = tiny_checkpoint(tmp_path, max_position_embeddings=20000)
    ids = " ".join(["5"] * 9000)
    common = "generate", ids, "--token-ids", "--max-tokens", "1", "--model", str(directory)
    code, _, err = mtpkern(*common)
    assert code == 2
    assert "the prompt has 9000 tokens; the context holds 8192 by default" in err
    assert "the model takes 20000: raise --max-length" in err
    assert mtpkern(*common, "--max-length", "9001")[0] == 0
    code, _, err = mtpkern(*common, "--max-length", "20001")
    assert code == 2 and "error: --max-length must be an integer in 2..20000, got 20001" in err
    code, _, err = mtpkern(*common, "--max-length", "8000")
    assert "the context holds 8000, of which" in err


def test_no_drafts_at_synthetic_rates_is_plain_decoding(mtpkern: Any, model: Path) -> None:
    common = "generate", PROMPT, "--model", str(model), "--max-tokens", "5", "--json"
    plain = json.loads(mtpkern(*common, "-K", "0")[1])
    code, out, err = mtpkern(*common, "-K", "0", "--synthetic-acceptance", "0.5,0.5")
    assert code == 0, err
    assert json.loads(out)["token_ids"] == plain["token_ids"]
    for rates, message in (
        ("", "argument --synthetic-acceptance: must be one rate or more"),
        ("1.5", "error: --synthetic-acceptance must be a number in 0..1, got 1.5"),
        ("nan", "got nan"),
    ):
        code, _, err = mtpkern(*common, "--synthetic-acceptance", rates)
        assert code == 2 and message in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heads", ""], "error: --heads is empty: give a name or a path"),
        (["--model", ""], "error: --model is empty: give a name or a path"),
        (["--model", "x" * 300], "error: --model is too long"),
        (["--model", "/no/such"], "error: --model /no/such: no such directory"),
        (["-K", "17"], "error: --num-speculative-tokens must be an integer in 0..16, got 17"),
        (["--device", "tpu"], "error: --device must be auto, cpu or cuda, got 'tpu'"),
        (["--dtype", "int3"], "error: --dtype must be auto, float32, bfloat16 or float16"),
        (["--load-format", "x"], "error: --load-format must be auto or dummy"),
        (["--top-k", "-1"], "error: --top-k must be"),
        (["--seed", "-1"], "error: --seed must be"),
        (["--max-length", "1"], "error: --max-length must be"),
        (["-K", "2", "--no-ngram", "--heads", "none"], "error: --num-speculative-tokens is 2"),
    ],
)
def test_the_command_line_names_flags(
    mtpkern: Any, model: Path, options: list[str], message: str
) -> None:
    code, out, err = mtpkern("generate", "x", "--model", str(model), *options)
    assert (code, out) == (2, "") and message in err


def test_python_names_arguments_where_the_command_line_names_flags() -> None:
    parser = Parser()
    for flags in (("--max-length",), ("-K", "--num-speculative-tokens"), ("--device",)):
        parser.add_argument(*flags)
    for message, shown in (
        ("device must be cpu", "--device must be cpu"),
        ("no such device", "no such device"),
        ("for device=cuda only", "for --device=cuda only"),
        ("lower max_length or num_speculative_tokens", None),
        (
            "/models/max_length/config.json: max_length-x",
            "/models/max_length/config.json: max_length-x",
        ),
    ):
        flags = "lower --max-length or --num-speculative-tokens"
        assert as_flags(message, parser) == (shown or flags)


def test_one_of_a_thing_is_singular(mtpkern: Any, model: Path) -> None:
    err = mtpkern("generate", PROMPT, "--model", str(model), "--max-tokens", "1")[2]
    assert "1 token in 1 step," in err
    err = mtpkern("generate", PROMPT, "--model", str(model), "--max-tokens", "2", "-K", "0")[2]
    assert "2 tokens in 2 steps," in err


def test_the_fewest_cache_tokens_that_a_refusal_names_are_enough(model: Path) -> None:
    with pytest.raises(UserError) as refusal:
        LLM(model, cache_tokens=1)
    (least,) = re.findall(r"cache_tokens must be at least (\d+)", str(refusal.value))
    assert LLM(model, cache_tokens=int(least)).generate(PROMPT, SamplingParams(max_tokens=2))


def test_logits_that_overflow_in_another_dtype_do_not_on_a_cpu(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"].fill_(6e4)
    save_file(tensors, directory / "model.safetensors")
    params = SamplingParams(max_tokens=2, logprobs=True)
    with pytest.raises(UserError, match="another dtype may help"):
        LLM(directory, max_length=64, dtype="float16", ops=DEFINITIONS).generate(PROMPT, params)
    assert LLM(directory, max_length=64, dtype="float16").generate(PROMPT, params)


def test_threads_may_change_under_a_model(model: Path) -> None:
    threads, llm, params = torch.get_num_threads(), LLM(model), SamplingParams(max_tokens=20)
    expected = llm.generate(PROMPT, params)[0]
    torch.set_num_threads(threads + 1)
    try:
        for other in (llm, LLM(model)):
            assert other.generate(PROMPT, params)[0].token_ids == expected.token_ids
    finally:
        torch.set_num_threads(threads)


def test_a_file_of_weights_given_as_a_model_says_to_give_its_directory(model: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        with pytest.raises(UserError, match="give the directory that holds"):
            LLM(model / name)
    assert LLM(model)


def test_a_hub_id_without_the_hubs_package_says_what_to_install(monkeypatch: Any) -> None:
    monkeypatch.setattr(resolve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mtpkern\[hub\]'"):
        LLM("organisation/name")
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    assert '"hub": [' in setup


def test_a_chat_template_that_is_missing_leaves_plain_text(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path)
    (directory / "tokenizer_config.json").unlink()
    llm, params = LLM(directory), SamplingParams(max_tokens=2)
    with pytest.raises(UserError, match="no chat template; give it plain text"):
        llm.chat([{"role": "user", "content": PROMPT}], params)
    assert llm.generate(PROMPT, params)


def test_generate_says_that_a_model_has_no_chat_template(mtpkern: Any, tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path)
    (directory / "tokenizer_config.json").unlink()
    words = ["generate", PROMPT, "--model", str(directory), "--max-tokens", "2"]
    note = "this model has no chat template: it continues the prompt as text"
    code, _, err = mtpkern(*words)
    assert code == 0 and err.splitlines()[0] == note
    for option in ("--raw", "--quiet"):
        assert note not in mtpkern(*words, option)[2]
