"""The first run on a machine: whatever compiles the CPU's kernels says so meanwhile."""

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tiny_checkpoint

from mtpkern import cli, device, status
from mtpkern.ops.cpu import CpuOps
from mtpkern.train import invent, record


class SlowToCompile(CpuOps):
    def __init__(self) -> None:
        time.sleep(0.3)
        super().__init__()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "generate": (cli.main, "generate --model MODEL --max-tokens 2 the-fox"),
    "chat": (cli.main, "chat --model MODEL --max-tokens 2"),
    "doctor": (cli.main, "doctor"),
    "inspect": (cli.main, "inspect MODEL"),
    "train": (
        cli.main,
        "train --model MODEL --prompts PROMPTS --out OUT --steps 1 -K 1 --draft-vocab-size 64",
    ),
    "record": (record.main, "--model MODEL --prompts PROMPTS --out OUT --max-new 3"),
    "invent": (invent.main, "--model MODEL --count 4 --max-new 3 --out OUT"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_compiling_is_not_silent(
    name: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(device, "CpuOps", SlowToCompile)
    monkeypatch.setattr(status, "SHOWN_AFTER", 0.05)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the fox\n")))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"turns": [f"the dog {n}"]}) + "\n" for n in range(4)))
    places = {"MODEL": model, "PROMPTS": prompts, "OUT": tmp_path / "out"}
    main, words = COMMANDS[name]
    main([str(places.get(word, word)) for word in words.split()])
    assert "compiling kernels for this CPU, which happens once ...\n" in capsys.readouterr().err
