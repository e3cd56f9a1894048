"""The first run on a machine: whatever compiles the CPU's kernels says so meanwhile, and does it
after all that a user may have mistaken is checked."""

import io
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import refusing, tiny_checkpoint
from head_files import write_medusa
from safetensors.torch import load_file, save_file

from mtpkern import cli, device, status
from mtpkern.checkpoints import resolve
from mtpkern.kernels.cpu._compile import Kernels
from mtpkern.model import Llama
from mtpkern.ops.cpu import CpuOps
from mtpkern.train import invent, record


class SlowToCompile(CpuOps):
    def compile(self) -> None:
        time.sleep(0.3)
        super().compile()


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


# Options of generate and chat -> a part of the message. The first need no model to be refused.
WITHOUT_A_MODEL = {
    "--model MODEl": "no such directory",
    "--model nothing": "neither a directory",
    "--model MODEL/config.json": "is a file",
    "--heads nothing": "no such directory",
    "-K 17": "0..16",
    "--dtype float17": "float17",
    "--weights q3": "q3",
    "--device tpu": "tpu",
    "--threads 0": "--threads",
    "--threads 9999": "1..1024",
    "--temperature -1": "--temperature",
    "--stop-token-id -1": "--stop-token-id",
    "--max-tokens 0": "--max-tokens",
}
OF_A_MODEL = {
    "--model EMPTY": "no config.json",
    "--model DAMAGED": "model.norm.weight is missing",
    "--model MODEL --heads MODEL": "not supported",
    "--model WIDE --heads SHORT": "must be [",
    "--model MODEL --heads SHORT -K 4": "at most 1, the number of heads",
    "--model MODEL --heads none --no-ngram -K 2": "nothing to draft with",
    "--model MODEL --max-length 100000": "2..512",
    "--model MODEL --max-length 1": "2..512",
}
MISTAKES = {
    **{f"generate the-fox {options}": text for options, text in WITHOUT_A_MODEL.items()},
    **{f"chat {options}": text for options, text in WITHOUT_A_MODEL.items()},
    **{f"generate the-fox {options}": text for options, text in OF_A_MODEL.items()},
    **{f"chat {options}": text for options, text in OF_A_MODEL.items()},
    "generate the-fox --tools MISSING": "No such file",
    "generate the-fox --token-ids": "integers",
    "generate 5 --token-ids --system s": "--system",
    "generate the-fox --raw --system s": "--raw has none",
    "generate the-fox --load-format none": "--load-format",
    "generate the-fox --synthetic-acceptance 2": "0..1",
    "generate the-fox --model MODEL --max-length 2": "the prompt has",
    "generate 99999 --model MODEL --token-ids": "99999",
    "generate the-fox --model MODEL --device cpu --cuda-profile": "needs device cuda",
    "generate the-fox --model BARE --system s": "this model has none",
    "chat --model BARE": "has no chat template",
    "inspect MISSING": "no such directory",
    "inspect DAMAGED": "model.norm.weight is missing",
    "inspect MODEL --dtype float17": "float17",
    "convert MISSING OUT": "no such file or directory",
    "train --model MODEl --prompts PROMPTS --out OUT": "no such directory",
    "train --prompts MISSING --out OUT": "No such file",
    "train --prompts CONFIG --out OUT": "`turns`",
    "train --prompts PROMPTS --out MODEL": "cannot write",
    "train --prompts PROMPTS --out CONFIG": "cannot write",
    "train --prompts PROMPTS --init nothing --out OUT": "no such directory",
    "train --prompts PROMPTS --out OUT --device tpu": "tpu",
    "train --prompts PROMPTS --out OUT --threads 9999": "1..1024",
    "train --model MODEL --answers MISSING --out OUT": "MISSING",
    "train --model MODEL --prompts PROMPTS --out OUT --held-out 99": "too few usable prompts",
    "record --prompts MISSING --out OUT": "No such file",
    "record --model MODEl --prompts PROMPTS --out OUT": "no such directory",
    "record --prompts PROMPTS --out MODEL": "cannot write",
    "invent --model MODEl --count 1 --out OUT": "no such directory",
    "invent --count 1 --out MODEL": "cannot write",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("places")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    shutil.copytree(model, root / "damaged")
    save_file(tensors, root / "damaged/model.safetensors")
    shutil.copytree(model, root / "bare")
    (root / "bare/tokenizer_config.json").unlink()
    (root / "empty").mkdir()
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"turns": [f"the dog {n}"]}) + "\n" for n in range(4)))
    return {
        "MODEL": model,
        "MODEl": model.with_name("model-0"),
        "MODEL/config.json": model / "config.json",
        "CONFIG": model / "config.json",
        "EMPTY": root / "empty",
        "DAMAGED": root / "damaged",
        "BARE": root / "bare",
        "WIDE": tiny_checkpoint(root / "wide", hidden_size=96),
        "SHORT": write_medusa(root / "short", heads=1),
        "MISSING": root / "MISSING",
        "PROMPTS": prompts,
        "OUT": root / "out",
    }


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_named_before_anything_is_compiled_loaded_or_fetched(
    words: str,
    places: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    begun: list[str] = []
    monkeypatch.setattr(CpuOps, "compile", refusing(begun, "compiled"))
    monkeypatch.setattr(Kernels, "_emit_tile", refusing(begun, "compiled a tile"))
    monkeypatch.setattr(Kernels, "_emit_entry", refusing(begun, "compiled a function"))
    monkeypatch.setattr(Llama, "load", refusing(begun, "loaded"))
    monkeypatch.setattr(resolve, "fetch_default_model", refusing(begun, "fetched"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the fox\n")))
    command, *rest = words.split()
    mains = {"record": record.main, "invent": invent.main}
    arguments = [str(places.get(word, word)) for word in rest]
    main = mains.get(command, cli.main)
    assert main(arguments if command in mains else [command, *arguments]) == 2
    assert begun == []
    assert MISTAKES[words] in capsys.readouterr().err
