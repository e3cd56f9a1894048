"""The command mtpkern, called in this process on a small random checkpoint."""

import argparse
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_checkpoint, tiny_tensors
from safetensors.torch import load_file, save_file

import mtpkern
from mtpkern import LLM, SamplingParams
from mtpkern.arguments import Parser
from mtpkern.cli import main
from mtpkern.cli.main import build_parser

PROMPT = "the quick brown fox jumps over the lazy dog and then the"
STATS = {
    "new_tokens": int,
    "steps": int,
    "num_speculative_tokens": int,
    "steps_by_num_speculative_tokens": dict,
    "mean_acceptance_length": float,
    "acceptance_by_position": list,
    "cached_tokens": int,
    "prefill_seconds": float,
    "decode_seconds": float,
    "tokens_per_second": float,
    "prefill_tokens_per_second": float,
    "time_to_first_token_seconds": float,
}
SCHEMA = {
    "schema": int,
    "model": str,
    "device": str,
    "dtype": str,
    "weights": str,
    "load_seconds": float,
    "prompt_tokens": int,
    "seed": type(None),
    "text": str,
    "token_ids": list,
    "finish_reason": str,
    "logprobs": list,
    "stats": dict,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def generate(model, capsys):
    """Run `generate` on the small model -> (exit code, stdout, stderr)."""

    def run(*options: str) -> tuple[int, str, str]:
        code = main(["generate", "--model", str(model), "--max-tokens", "40", *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


class Terminal(io.TextIOWrapper):
    """A stdout that says it is a terminal, and keeps what is written."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        return self.buffer.getvalue().decode("utf-8")  # type: ignore[attr-defined]


def assert_types(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    assert {name: type(value) for name, value in found.items()} == expected


def assert_one_line_of_blame(code: int, captured, *words: str) -> None:
    assert code == 2
    assert captured.err.startswith("mtpkern: error: ")
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    for word in words:
        assert word in captured.err


def test_an_answer_that_reached_its_limit_says_so(generate, model):
    _, _, err = generate(PROMPT)
    assert err.splitlines()[0] == "[cut after 40 tokens]"
    _, whole, _ = generate(PROMPT, "--json")
    end = str(json.loads(whole)["token_ids"][20])
    _, _, err = generate(PROMPT, "--stop-token-id", end)
    assert "[cut" not in err


def test_the_json_object_is_the_published_one_and_alone_on_stdout(generate):
    code, out, err = generate(PROMPT, "--json", "--compare")
    assert (code, err) == (0, "")
    found = json.loads(out)
    compare = found.pop("compare")
    assert_types(found, SCHEMA)
    assert_types(found["stats"], STATS)
    assert_types(compare, {"identical": bool, "plain": dict, "speedup": float})
    assert_types(compare["plain"], STATS)
    assert found["schema"] == 1 and found["dtype"] == "float32"
    assert len(found["token_ids"]) == len(found["logprobs"]) == found["stats"]["new_tokens"] == 40
    assert len(found["stats"]["acceptance_by_position"]) == 4
    assert compare["plain"]["num_speculative_tokens"] == 0
    assert compare["plain"]["steps"] == compare["plain"]["new_tokens"]


def test_an_answer_without_a_seed_names_the_one_that_repeats_it(generate):
    sampled = (PROMPT, "--json", "--temperature", "30")
    code, out, _ = generate(*sampled, "--compare")
    first, second = json.loads(out), json.loads(generate(*sampled)[1])
    assert code == 0 and first["compare"]["identical"] is True
    assert first["seed"] != second["seed"] and first["token_ids"] != second["token_ids"]
    again = json.loads(generate(*sampled, "--seed", str(first["seed"]))[1])
    assert (again["seed"], again["token_ids"]) == (first["seed"], first["token_ids"])


@pytest.mark.parametrize("mode", [(), ("--compare",), ("--json",), ("--json", "--compare")])
def test_logits_that_are_no_numbers_are_one_line_and_exit_2(tmp_path, capsys, mode):
    directory = tiny_checkpoint(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, directory / "model.safetensors")
    code = main(["generate", PROMPT, "--model", str(directory), *mode])
    captured = capsys.readouterr()
    assert captured.out.strip() == ""
    assert_one_line_of_blame(code, captured, "logits are not finite")


def test_without_compare_the_json_object_has_null(generate):
    assert json.loads(generate(PROMPT, "--json")[1])["compare"] is None


@pytest.mark.parametrize("sampling", [(), ("--temperature", "0.8", "--seed", "5")])
def test_compare_finds_the_tokens_identical(generate, sampling):
    code, out, err = generate(PROMPT, "--compare", "-K", "3", *sampling)
    assert code == 0
    assert "tokens identical" in err and "DIFFER" not in err
    _, decoding, *_ = err.splitlines()  # after a note that it was cut
    assert "per step" in decoding and decoding.endswith("K = 3")


def test_compare_says_where_the_tokens_differ_and_fails(generate, monkeypatch):
    honest = LLM.generate

    def broken(self, prompts, params=None, *, speculate=True, **chat):
        completions = honest(self, prompts, params, speculate=speculate, **chat)
        if not speculate:
            completions[0].token_ids[2] += 1
        return completions

    monkeypatch.setattr(LLM, "generate", broken)
    code, _, err = generate(PROMPT, "--compare")
    assert code == 1
    assert "TOKENS DIFFER from token 3 on" in err


def test_the_streamed_text_is_the_completions_text(generate, model):
    out = generate(PROMPT, "--raw", "--heads", "none")[1]
    completion = LLM(model).generate(PROMPT, SamplingParams(max_tokens=40))[0]
    assert out == completion.text + "\n"
    assert completion.text


def test_without_drafts_every_token_is_a_step(generate):
    found = json.loads(generate(PROMPT, "--json", "--no-ngram")[1])
    assert found["stats"]["num_speculative_tokens"] == 0
    assert found["stats"]["steps"] == 40


def test_a_stop_string_ends_the_text_before_it(generate):
    text = generate(PROMPT, "--raw")[1].removesuffix("\n")
    stop = text[len(text) // 2 :][:3]
    code, out, _ = generate(PROMPT, "--raw", "--stop", stop)
    assert code == 0
    assert out == text[: text.index(stop)] + "\n"


def test_the_flags_that_stop_an_answer_reach_it(generate):
    ids = json.loads(generate(PROMPT, "--raw", "--json")[1])["token_ids"]
    end = ["--raw", "--json", "--stop-token-id", str(ids[3])]
    short = json.loads(generate(PROMPT, *end)[1])
    assert short["token_ids"] == ids[: ids.index(ids[3]) + 1]
    kept = json.loads(generate(PROMPT, *end, "--include-stop-str-in-output")[1])
    assert kept["text"].startswith(short["text"]) and kept["text"] != short["text"]
    longer = json.loads(generate(PROMPT, *end, "--min-tokens", "9", "--ignore-eos")[1])
    assert len(longer["token_ids"]) > 9 and ids[3] not in longer["token_ids"][:9]


@pytest.mark.parametrize("given", ["-", None])
def test_the_prompt_can_come_from_standard_input(generate, monkeypatch, given):
    expected = generate(PROMPT)[1]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert generate(*([given] if given else []))[1] == expected


def test_the_system_message_reaches_the_model(generate):
    lengths = [
        json.loads(generate(PROMPT, "--json", *more)[1])["prompt_tokens"]
        for more in ((), ("--system", "the dog sleeps"), ("--raw",))
    ]
    assert lengths[1] > lengths[0] > lengths[2]


def test_a_terminal_shows_drafted_tokens_in_colour(generate, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    assert generate(PROMPT, "--raw", "-K", "2")[0] == 0
    found = terminal.text()
    stats = json.loads(generate_json(generate, monkeypatch))["stats"]
    assert any(stats["acceptance_by_position"]), "this model must accept some draft"
    assert "\x1b[32m" in found and found.endswith("\n")
    assert found.rfind("\x1b[0m") > found.rfind("\x1b[32m")


def generate_json(generate, monkeypatch) -> str:
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    generate(PROMPT, "--raw", "-K", "2", "--json")
    return terminal.text()


def test_no_color_is_respected(generate, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    generate(PROMPT, "--raw", "-K", "2")
    assert "\x1b" not in terminal.text()


def test_an_interrupt_is_not_a_traceback(generate, monkeypatch):
    def interrupted(self, *args, **options):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(LLM, "stream", interrupted)
    code, _, err = generate(PROMPT)
    assert (code, err) == (130, "")


@pytest.mark.slow
def test_a_reader_that_goes_away_is_not_a_traceback(model):
    command = [sys.executable, "-m", "mtpkern", "generate", "--quiet", PROMPT]
    command += ["--model", str(model)]
    root = str(Path(mtpkern.__file__).parent.parent)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as gone:
        result = subprocess.run(
            command, stdout=gone, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
        )
    assert (result.returncode, result.stderr) == (141, b"")


def run_in_new_process(program: str) -> None:
    root = str(Path(mtpkern.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, env=environment
    )


def test_help_does_not_wait_for_torch():
    program = (
        "import sys, mtpkern.cli as c\n"
        "assert c.main(['generate', '--help']) == 0 and 'torch' not in sys.modules"
    )
    run_in_new_process(program)


@pytest.mark.parametrize("command", [["generate", ""], ["generate", "x", "-K", "many"], ["train"]])
def test_a_mistake_that_can_be_seen_at_once_does_not_wait_for_torch(command):
    program = (
        "import sys, mtpkern.cli as c\n"
        f"assert c.main({command!r}) == 2 and 'torch' not in sys.modules"
    )
    run_in_new_process(program)


@pytest.mark.slow
def test_generate_imports_neither_gguf_nor_transformers(model):
    program = (
        "import sys, mtpkern.cli as c\n"
        f"assert c.main(['generate', 'the', '--max-tokens', '2', '--model', {str(model)!r}]) == 0\n"
        "assert not {'gguf', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    run_in_new_process(program)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["no-such-command"], "no-such-command"),
        (["generat"], "generat"),
        (["train"], "train"),
        (["generate", "x", "--frob"], "--frob"),
        (["generate", "x", "--max-tokens", "many"], "many"),
        (["generate", ""], "prompt is empty"),
        (["generate", "x", "--max-tokens", "0"], "error: --max-tokens must be an integer in"),
        (["generate", "x", "--top-p", "0"], "error: --top-p must be above 0"),
        (["generate", "x", "--temperature", "nan"], "temperature"),
        (["generate", "x", "--seed", "-1"], "seed"),
        (["generate", "x", "--stop", ""], "stop"),
        (["generate", "x", "--stop-token-id", "307"], "--stop-token-id must be in 0..306"),
        (["generate", "x", "--min-tokens", "300"], "--min-tokens"),
        (["generate", "x", "-K", "17"], "0..16"),
        (["generate", "x", "-K", "-1"], "0..16"),
        (["generate", "x", "-K", "2", "--no-ngram", "--heads", "none"], "nothing to draft with"),
        (["generate", "x", "--heads", "/no/such/heads"], "/no/such/heads"),
        (["generate", "x", "--dtype", "int3"], "int3"),
        (["generate", "x", "--device", "toaster"], "toaster"),
        (["generate", "x", "--raw", "--system", "y"], "--system"),
        (["generate", "the dog " * 600], "the context holds 512"),
        (["generate", "\udcff"], "surrogate"),
        (["generate", "x", "--model", "/no/such/model"], "/no/such/model"),
        (["inspect", "/no/such/model"], "/no/such/model"),
        (["fetch", "no-such-model"], "no-such-model"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(model, capsys, options, words):
    needs_model = options[:1] == ["generate"] and "--model" not in options
    code = main(options + (["--model", str(model)] if needs_model else []))
    captured = capsys.readouterr()
    assert_one_line_of_blame(code, captured, words)
    assert captured.out == ""


def half_a_download(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def an_empty_file(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"")


def a_page_instead_of_weights(directory: Path) -> None:
    (directory / "model.safetensors").write_text("<html>404</html>")


def no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def pickled_weights(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def changed_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def a_missing_tensor(directory: Path) -> None:
    changed_tensors(directory, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


def a_wrong_shape(directory: Path) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    changed_tensors(directory, lambda t: t.update({name: torch.zeros(3, 5)}))


def a_weight_that_is_no_number(directory: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    changed_tensors(directory, lambda t: t[name].view(-1)[7:8].fill_(float("nan")))


def changed_config(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def an_unknown_architecture(directory: Path) -> None:
    changed_config(directory, architectures=["MambaForCausalLM"], model_type="mamba")


def a_config_cut_short(directory: Path) -> None:
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text[: len(text) // 2])


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def the_wrong_tokenizer(directory: Path) -> None:
    """The model of a smaller vocabulary than its tokenizer's."""
    config = json.loads((directory / "config.json").read_text()) | {"vocab_size": 101}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tiny_tensors(config), directory / "model.safetensors")


def no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def a_tokenizer_cut_short(directory: Path) -> None:
    text = (directory / "tokenizer.json").read_text()
    (directory / "tokenizer.json").write_text(text[: len(text) // 2])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (half_a_download, "not a whole safetensors file"),
        (an_empty_file, "not a whole safetensors file"),
        (a_page_instead_of_weights, "not a whole safetensors file"),
        (no_weights, "no model.safetensors"),
        (pickled_weights, "pytorch_model.bin"),
        (a_missing_tensor, "model.layers.1.mlp.up_proj.weight is missing"),
        (a_wrong_shape, "model.layers.2.self_attn.k_proj.weight must be [16, 48]"),
        (a_weight_that_is_no_number, "model.layers.0.mlp.down_proj.weight holds values"),
        (an_unknown_architecture, "MambaForCausalLM"),
        (a_config_cut_short, "not valid JSON"),
        (no_config, "no config.json"),
        (the_wrong_tokenizer, "wrong tokenizer"),
        (no_tokenizer, "tokenizer"),
        (a_tokenizer_cut_short, "tokenizer.json cannot be read"),
    ],
)
def test_a_broken_checkpoint_is_one_line(tmp_path, capsys, damage, words):
    directory = tiny_checkpoint(tmp_path / "model")
    damage(directory)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    code = main(["generate", "x", "--model", str(directory)])
    captured = capsys.readouterr()
    assert_one_line_of_blame(code, captured, words)
    assert captured.out == ""
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("damage", [half_a_download, an_unknown_architecture, the_wrong_tokenizer])
def test_inspect_says_why_a_checkpoint_will_not_run(tmp_path, capsys, damage):
    directory = tiny_checkpoint(tmp_path / "model")
    damage(directory)
    assert_one_line_of_blame(main(["inspect", str(directory)]), capsys.readouterr())


def test_inspect_counts_the_bytes_of_a_step(model, capsys):
    assert main(["inspect", str(model)]) == 0
    rows = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    size = sum(t.nbytes for t in load_file(model / "model.safetensors").values())
    assert f"bytes per step   {size / 1e6:.1f} MB" in main_out(model, capsys)
    assert "yes" in rows["will"] and "steps/s" in rows["roofline"]


def main_out(model: Path, capsys) -> str:
    main(["inspect", str(model)])
    return capsys.readouterr().out


def test_a_step_above_the_roofline_is_not_a_share_of_it(model):
    from mtpkern.cli.inspect import describe_steps

    rows = dict(describe_steps(model, "auto", 10**6, bandwidth=1e12))
    assert rows["plain step"].endswith("% of the roofline, measured")
    rows = dict(describe_steps(model, "auto", 10**6, bandwidth=1.0))
    assert rows["plain step"].endswith(
        "measured; above the roofline, since bandwidth was measured while the machine was busier"
    )


def test_bandwidth_waits_for_a_neighbour_to_pause(monkeypatch):
    from mtpkern.cli import machine

    # Every reading of the clock is 20 ms after the one before, 10 ms once the neighbour pauses.
    steps = iter([0.02] * 20)
    now = 0.0

    def clock():
        nonlocal now
        now += next(steps, 0.01)
        return now

    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=clock))
    size = machine.SMALLEST_BUFFER
    assert machine.measure_read_bandwidth(size) == pytest.approx(size / 0.01)


def test_doctor_names_versions_and_the_device(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__.partition("+")[0] in out and mtpkern.__version__ in out
    assert "mtpkern fetch" in out and "generate         runs on the" in out


def commands() -> dict[str, Parser]:
    """Every command by name, and the whole."""
    parser = build_parser()
    (action,) = parser._subparsers._group_actions
    return {"": parser} | action.choices


def test_without_a_command_help_is_printed_with_examples(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "examples:\n  mtpkern generate" in out and all(name in out for name in commands())


@pytest.mark.parametrize("name", commands())
def test_every_command_has_an_example_and_says_its_defaults(name):
    parser = commands()[name]
    assert "example" in parser.epilog and f"\n  mtpkern {name}" in parser.epilog
    for action in parser._actions:
        if action.option_strings and action.nargs != 0 and not action.required:
            assert action.help, f"{action.option_strings} has no help"
            text = parser.formatter_class(parser.prog)._get_help_string(action)
            assert "default" in text or action.default is argparse.SUPPRESS, action.option_strings


def test_a_default_of_zero_is_shown(capsys):
    main(["generate", "--help"])
    assert "0 is greedy (default: 0.0)" in capsys.readouterr().out


def test_completion_for_shells(capsys, monkeypatch):
    pytest.importorskip("shtab")
    assert main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "chat" in script and "--max-tokens" in script
    assert_one_line_of_blame(main(["--print-completion", "sh"]), capsys.readouterr(), "bash")
    monkeypatch.setitem(sys.modules, "shtab", None)
    code = main(["--print-completion", "bash"])
    assert_one_line_of_blame(code, capsys.readouterr(), "pip install 'mtpkern[completion]'")


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_version_is_the_packages(capsys, flag):
    assert main([flag]) == 0
    assert capsys.readouterr().out == f"mtpkern {mtpkern.__version__}\n"
