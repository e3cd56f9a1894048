"""Every command with every mistake that a user can make: one line on stderr, exit code 2.

Faults are real (devices, closed streams, directories in the place of files, names that are too
long, files that may not be read, a file size limit in the place of a full disk), and commands are
called in this process.
"""

import importlib.util
import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from head_files import published_medusa, write_medusa
from training import record_answers

from mtpkern import arguments, cli
from mtpkern.cli.main import build_parser
from mtpkern.tokenizer import Tokenizer
from mtpkern.train import invent, joint, joint_model, prompts, record

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LONG = "n" * 300
REPORT = {"schema": 1, "rows": ["more bytes than the limit"]}
TRAIN = ["--steps", "1", "--draft-vocab-size", "64", "-K", "1"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny model of four kinds of file, and what each command reads."""
    root = tmp_path_factory.mktemp("faults")
    model, answers = record_answers(root, 3, (1, 2))
    bench = root / "bench.jsonl"
    row = {"question_id": "1", "category": "a", "turns": ["the dog"]}
    bench.write_text(json.dumps(row) + "\n")
    torch.save(published_medusa(), root / "medusa.pt")
    (root / "text").mkdir()
    (root / "text" / "a.txt").write_text(
        "The dog is lazy and the fox is quick, a thing of the sun and to the moon. " * 4
    )
    for n in range(3):
        (root / "text" / f"{n}.py").write_text("x = 1  # one of many lines\n" * 90)
    return SimpleNamespace(
        model=str(model),
        answers=str(answers),
        prompts=str(root / "prompts.jsonl"),
        bench=str(bench),
        heads=str(write_medusa(root / "heads")),
        medusa=str(root / "medusa.pt"),
        text=str(root / "text"),
        root=root,
    )


def benchmark(name: str) -> Callable[..., int]:
    def main(arguments: list[str], brief: bool = False) -> int:
        """Run a benchmark, or, in brief, report without having measured."""
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(BENCHMARKS))
            module = importlib.import_module(name)
            if brief:
                others = {"check_codegen": "compile_all", "compile_ahead": "compile_all"}
                others |= {"bench_cpu": "measure_all", "check_bits": "check"}
                measure = others.get(name, "measure")
                patch.setattr(module, measure, lambda args, finish: finish(REPORT, 0))
            code: int = module.main(arguments)
        return code

    return main


def _joint(arguments: list[str]) -> int:
    """Tiny, and its answers at the end made up: to decode them is another test's concern."""

    def generate(prompts: list[list[int]], *_: Any, **__: Any) -> list[Any]:
        stats = SimpleNamespace(new_tokens=2, steps=1)
        return [SimpleNamespace(token_ids=[65, 66], stats=stats) for _ in prompts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtpkern.LLM", lambda *_, **__: SimpleNamespace(generate=generate))
        patch.setattr(joint_model, "Sizes", lambda: sizes(32, 64, 2, 2, heads=2, context=101))
        return joint.main(arguments)


sizes = joint_model.Sizes


def _prompts(arguments: list[str]) -> int:
    """With little code to read in place of the standard library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts.sysconfig, "get_paths", lambda: {"stdlib": arguments[1]})
        return prompts.main(arguments)


def _invent(arguments: list[str]) -> int:
    """With words in place of what a random model writes, none of which would be kept."""

    def write(teacher: Any, jobs: Any, sink: Any, **_: Any) -> None:
        for job in jobs:
            words = Tokenizer.from_directory(Path(arguments[1])).encode("the quick fox jumps over")
            job.tokens = [*job.prompt, *words, *teacher.config.eos_token_ids]
            sink(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtpkern.train.distill.generate", write)
        return invent.main(arguments)


def _chat(arguments: list[str]) -> int:
    """With a message on standard input."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the dog\n")))
        return cli.main(arguments)


# Command -> what runs it, and its arguments from `files` and a place to write to.
COMMANDS: dict[str, tuple[Callable[..., int], Callable[[Any, str], list[str]]]] = {
    "generate": (
        cli.main,
        lambda f, out: ["generate", "the", "--model", f.model, "--max-tokens", "2"],
    ),
    "chat": (_chat, lambda f, out: ["chat", "--model", f.model, "--max-tokens", "2"]),
    "inspect": (cli.main, lambda f, out: ["inspect", f.model]),
    "fetch": (cli.main, lambda f, out: ["fetch", f.model]),
    "fetch --list": (cli.main, lambda f, out: ["fetch", "--list"]),
    "doctor": (cli.main, lambda f, out: ["doctor"]),
    "convert": (cli.main, lambda f, out: ["convert", f.medusa, out]),
    "train": (
        cli.main,
        lambda f, out: ["train", "--model", f.model, "--answers", f.answers, "--out", out, *TRAIN],
    ),
    "profile": (cli.main, lambda f, out: ["profile", "-o", out, "nsys", "the"]),
    "record": (
        record.main,
        lambda f, out: (
            ["--model", f.model, "--prompts", f.prompts, "--out", out, "--limit", "1"]
            + ["--max-new", "2", "--slots", "1"]
        ),
    ),
    "invent": (
        _invent,
        lambda f, out: (
            ["--model", f.model, "--count", "1", "--out", out, "--max-new", "2", "--slots", "1"]
        ),
    ),
    "prompts": (
        _prompts,
        lambda f, out: (
            ["--roots", f.text, "--out", out, "--counts"]
            + ['{"complete": 0, "translation": 0, "summarization": 9, "extraction": 0, "rag": 0}']
        ),
    ),
    "joint": (
        _joint,
        lambda f, out: ["--text", f.text, "--steps", "1", "--batch", "1", "--out", out],
    ),
    "bench_decode": (
        benchmark("bench_decode"),
        lambda f, out: (
            ["--model", f.model, "--prompts", f.bench, "--max-tokens", "2", "-K", "1"]
            + ["--no-sources", "--output-json", out]
        ),
    ),
    "bench_heads": (
        benchmark("bench_heads"),
        lambda f, out: (
            ["--model", f.model, "--prompts", f.bench, "--max-tokens", "2", "-K", "1"]
            + ["--heads", f.heads, "--output-json", out]
        ),
    ),
    "bench_heads --plot": (
        benchmark("bench_heads"),
        lambda f, out: (
            ["--model", f.model, "--prompts", f.bench, "--max-tokens", "2", "-K", "1"]
            + ["--heads", f.heads, "--plot", f"{out}.png"]
        ),
    ),
    "bench_adaptive": (
        benchmark("bench_adaptive"),
        lambda f, out: (
            ["--model", f.model, "--prompts", f.bench, "--max-tokens", "2", "--heads", f.heads]
            + ["--alternations", "1", "--output-json", out]
        ),
    ),
    "bench_cpu": (benchmark("bench_cpu"), lambda f, out: ["--output-json", out]),
    "bench_peers": (
        benchmark("bench_peers"),
        lambda f, out: ["--model", f.model, "--prompts", f.bench, "--output-json", out],
    ),
    "bench_steps": (
        benchmark("bench_steps"),
        lambda f, out: (
            ["--model", "tiny", "--context", "16", "--repeat", "2", "-K", "0"]
            + ["--output-json", out]
        ),
    ),
    "predict_steps": (
        benchmark("predict_steps"),
        lambda f, out: ["--model", "tiny", "--context", "16", "--output-json", out],
    ),
    "check_mutations": (
        benchmark("check_mutations"),
        lambda f, out: ["--only", "no such fault", "--output-json", out],
    ),
    "check_codegen": (
        benchmark("check_codegen"),
        lambda f, out: ["--op", "rms_norm", "--model", "smollm2-135m", "--output-json", out],
    ),
    "bench_kernels": (benchmark("bench_kernels"), lambda f, out: ["--output-json", out]),
    "tune": (benchmark("tune"), lambda f, out: ["--output-json", out]),
    "compile_ahead": (
        benchmark("compile_ahead"),
        lambda f, out: (
            ["--op", "rms_norm", "--model", "tiny", "--arch", "90", "--count"]
            + ["--output-json", out]
        ),
    ),
    "bench_quality": (
        benchmark("bench_quality"),
        lambda f, out: (
            ["--model", f.model, "--text", f"{f.text}/a.txt", "--tokens", "10"]
            + ["--output-json", out]
        ),
    ),
    "check_bits": (
        benchmark("check_bits"),
        lambda f, out: ["--model", "tiny", "--tokens", "40", "-K", "2", "--output-json", out],
    ),
    "record_terminal": (
        benchmark("record_terminal"),
        lambda f, out: ["--out", out, "--", sys.executable, "-c", "pass"],
    ),
    "gpu_suite": (
        benchmark("gpu_suite"),
        lambda f, out: ["--part", "steps", "--output", out],
    ),
}
# Commands that print nothing, and those that have nothing to run on here.
SILENT = {"record", "invent", "prompts", "record_terminal"}
# codegen and bench_cpu run for minutes, gpu_suite's test runs bench_steps, and bench_peers needs
# another engine.
NO_FURTHER = {"check_codegen", "bench_kernels", "bench_steps", "bench_cpu", "bench_peers", "tune"}
TRITON = {"bench_kernels", "bench_steps", "predict_steps", "check_codegen", "tune", "compile_ahead"}
if importlib.util.find_spec("triton") is None:
    for absent in TRITON:
        del COMMANDS[absent]
# Benchmarks that report by `finish`, which need not measure to do so.
BRIEF = {path.stem for path in BENCHMARKS.glob("*.py")} & COMMANDS.keys()
BRIEF -= {"gpu_suite", "record_terminal"}
DIRECTORIES = {"convert", "train", "record", "joint", "gpu_suite"}
WRITERS = [
    name
    for name in COMMANDS
    if name not in {"generate", "chat", "inspect", "fetch", "fetch --list", "doctor", "profile"}
]


@pytest.fixture
def run(
    files: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Run a command into a place -> its exit code and what it said on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.environ["PATH"])

    def call(name: str, out: str = "out", brief: bool = False) -> tuple[int, str]:
        main, arguments = COMMANDS[name]
        capsys.readouterr()
        code = main(arguments(files, out), **({"brief": True} if brief and name in BRIEF else {}))
        return code, capsys.readouterr().err

    yield call
    for name in [n for n in sys.modules if (BENCHMARKS / f"{n}.py").exists()]:
        del sys.modules[name]


def assert_one_line(result: tuple[int, str], *words: str) -> None:
    code, error = result
    lines = [line for line in error.splitlines() if ": error: " in line]
    assert (code, len(lines)) == (2, 1), error
    assert "Traceback" not in error and error.endswith(lines[0] + "\n")
    for word in words:
        assert word in lines[0]


def test_every_command_is_walked() -> None:
    for path in BENCHMARKS.glob("*.py"):
        if "\ndef main(" in path.read_text():
            assert path.stem in COMMANDS.keys() | TRITON
    training = Path(prompts.__file__).parent
    for path in training.glob("*.py"):
        if "\ndef main(" in path.read_text():
            assert path.stem in COMMANDS
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    commands = next(a for a in build_parser()._actions if a.choices).choices
    assert set(commands) <= set(COMMANDS)


# cli.main has one parser for all of its commands.
MAINS = ["generate", *(n for n in COMMANDS if COMMANDS[n][0] not in (cli.main, _chat))]


@pytest.mark.parametrize("name", MAINS)
def test_a_value_of_the_wrong_type_is_named_in_words(
    name: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not with the name of the Python function that converts it."""
    parsers: list[arguments.Parser] = []
    create = arguments.Parser.__init__

    def record_parser(self: arguments.Parser, *a: Any, **b: Any) -> None:
        create(self, *a, **b)
        parsers.append(self)

    monkeypatch.setattr(arguments.Parser, "__init__", record_parser)
    main, given = COMMANDS[name]
    monkeypatch.setitem(COMMANDS, name, (main, lambda f, out: [*given(f, out)[:2], "--help"]))
    assert run(name) == (0, "")
    typed = [
        (parser, action)
        for parser in parsers
        for action in parser._actions
        if action.type not in (None, Path) and action.option_strings
    ]
    wrong = ("x", "", "1,x", "{", "[1]", '{"rag": []}', "[" * 100_000)
    for parser, action in typed:
        for text in wrong:
            with pytest.raises(arguments.UsageError) as raised:
                parser.parse_known_args([f"{action.option_strings[-1]}={text}"])
            message = str(raised.value)
            assert message.startswith(f"argument {'/'.join(action.option_strings)}: ")
            assert " must be " in message and "invalid" not in message and len(message) < 400
    assert parsers


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in COMMANDS if n not in NO_FURTHER])
def test_without_a_fault_the_commands_end_well(name: str, run: Any) -> None:
    code, error = run(name)
    if name == "profile":
        assert code == 2 and "nsys is not installed" in error
    else:
        assert code == 0, error


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in COMMANDS if n not in SILENT])
@pytest.mark.parametrize("buffering", [-1, 0])
def test_a_full_standard_output(
    name: str, buffering: int, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "wb", buffering=buffering) as full:
        stream = io.TextIOWrapper(full, write_through=not buffering)
        monkeypatch.setattr(sys, "stdout", stream)
        result = run(name, brief=True)
        assert_one_line(result, "cannot write standard output: No space left on device")
        monkeypatch.undo()
        stream.close()  # as the interpreter does at its end


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["train", "--help"]])
def test_help_that_cannot_be_printed(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Without a buffer, where argparse would pass over the error."""
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full, write_through=True))
        result = cli.main(command), capsys.readouterr().err
    assert_one_line(result, "cannot write standard output: No space left on device")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_closed_standard_output(name: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert_one_line(run(name), "standard output is closed")


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("out", ["file/out", LONG, "new/" + LONG, "taken"])
def test_a_place_that_cannot_be_written(name: str, out: str, run: Any, tmp_path: Path) -> None:
    """Found before the work, and nothing is left: not a directory on the way, not a lock."""
    (tmp_path / "file").write_text("mine")
    if name == "bench_heads --plot" and out == "taken":
        (tmp_path / "taken.png").mkdir()
    elif name in DIRECTORIES:
        (tmp_path / "taken").write_text("mine")
    else:
        (tmp_path / "taken").mkdir()
    before = sorted(tmp_path.rglob("*"))
    started = []

    def work(*a: Any, **b: Any) -> Any:
        started.append(a)
        raise AssertionError("the work began")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtpkern.engine.LLM.__init__", work)
        patch.setattr("mtpkern.train.teacher.Teacher.__init__", work)
        patch.setattr(joint_model, "learn", work)
        assert_one_line(run(name, out), "out" if out == "file/out" else "")
    assert sorted(tmp_path.rglob("*")) == before and not started


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_full(name: str, run: Any, tmp_path: Path) -> None:
    """A limit on the size of files, which is found while the result is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        result = run(name, brief=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_line(result, "File too large")
    assert "out" in result[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in WRITERS if n not in DIRECTORIES])
def test_a_full_device_as_a_result(name: str, run: Any, tmp_path: Path) -> None:
    if name == "bench_heads --plot":
        (tmp_path / "full.png").symlink_to("/dev/full")
    result = run(name, "full" if "plot" in name else "/dev/full", brief=True)
    assert_one_line(result, "full", "No space left on device")


READ = {"generate": "model", "inspect": "model", "fetch": "model", "train": "answers"}
READ |= {"convert": "medusa", "record": "prompts", "invent": "model", "joint": "text"}
READ |= {
    "chat": "model",
    "bench_adaptive": "bench",
    "bench_decode": "bench",
    "bench_heads": "bench",
}


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        (name, fault)
        for name in READ
        for fault in ("a directory", "through a file", "too long", "not allowed")
        if (name, fault) != ("fetch", "a directory")  # which fetch gives back as it is
    ],
)
def test_what_cannot_be_read(
    name: str, fault: str, run: Any, files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's name is a directory, or goes through a file, and so on."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    bad = {"a directory": "empty", "through a file": "file/x", "too long": LONG}.get(fault)
    if bad is None:
        secret = tmp_path / "secret"
        secret.mkdir()
        bad = str(secret / Path(getattr(files, READ[name])).name)
        os.symlink(getattr(files, READ[name]), bad)
        (tmp_path / "work").mkdir(mode=0o777)
        os.chmod(tmp_path / "work", 0o777)
        os.chmod(secret, 0)
        monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(files, READ[name], bad)
    with unprivileged(tmp_path, files.root) if fault == "not allowed" else Nothing():
        result = run(name)
    os.chmod(tmp_path, 0o700)
    assert_one_line(result)


class Nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


class unprivileged(Nothing):
    """As a user who owns nothing, where this process is the superuser's."""

    def __init__(self, *roots: Path) -> None:
        self.roots = roots

    def __enter__(self) -> None:
        if os.geteuid() == 0:
            for root in self.roots:
                for path in (root, *root.parents[:-2]):
                    path.chmod(path.stat().st_mode | 0o055)
            os.seteuid(65534)

    def __exit__(self, *_: object) -> None:
        os.seteuid(os.getuid())


def test_a_prompt_is_not_read_from_a_closed_or_broken_standard_input(
    run: Any, files: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    command = ["generate", "--model", files.model]
    monkeypatch.setattr(sys, "stdin", None)
    for more in ([], ["-"]):
        assert_one_line((cli.main([*command, *more]), capsys.readouterr().err), "standard input")
    with open(tmp_path / "written", "w") as written:
        monkeypatch.setattr(sys, "stdin", written)
        assert_one_line((cli.main(command), capsys.readouterr().err), "standard input")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("doctor >/dev/full", 2, "cannot write standard output: No space left"),
        ("doctor >&-", 2, "standard output is closed"),
        ("--version >/dev/full", 2, "cannot write standard output: No space left"),
        ("train --help >/dev/full", 2, "cannot write standard output: No space left"),
        ("generate <&-", 2, "standard input is closed"),
        ("fetch --list <&-", 0, ""),
        ("fetch --list 2>&-", 0, ""),
        ("generate 2>/dev/full <&-", 2, ""),
    ],
)
def test_streams_of_a_shell(command: str, code: int, words: str, tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("PYTHONUNBUFFERED", None)
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m mtpkern {command}"],
        env=environment,
        cwd=BENCHMARKS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code and "Traceback" not in done.stderr
    assert words in done.stderr and len(done.stderr.splitlines()) == bool(words)
