"""convert: pickled heads become a directory that loads, and a hostile file is an error."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_checkpoint
from head_files import published_hydra, published_medusa, write_eagle3
from safetensors.torch import load_file

from mtpkern import cli
from mtpkern.convert import MEDUSA_FILE, convert
from mtpkern.drafters.load import open_heads
from mtpkern.engine import LLM
from mtpkern.errors import ModelLoadError, UserError


def test_heads_and_depth_are_counted_and_the_config_ignored(tmp_path: Path) -> None:
    source = tmp_path / "published"
    source.mkdir()
    (source / "config.json").write_text('{"medusa_num_heads": 2, "medusa_num_layers": 1}')
    torch.save(published_medusa(heads=5, depth=1), source / MEDUSA_FILE)
    convert(source, tmp_path / "heads")
    tensors = load_file(tmp_path / "heads" / "model.safetensors")
    for name, tensor in published_medusa(heads=5, depth=1).items():
        assert torch.equal(tensors[name.replace(".1.weight", ".vocabulary.weight")], tensor)
    assert len(tensors) == 15
    text = (tmp_path / "heads" / "config.json").read_text()
    assert '"num_heads": 5' in text and '"num_layers": 1' in text


def test_blocks_that_are_one_tensor_convert(tmp_path: Path) -> None:
    """Medusa builds a head's blocks as [block] * layers: one tensor under several names."""
    tensors = published_medusa(heads=2, depth=2)
    for name in list(tensors):
        if ".1.linear" in name:
            tensors[name] = tensors[name.replace(".1.", ".0.")]
    torch.save(tensors, tmp_path / MEDUSA_FILE)
    convert(tmp_path / MEDUSA_FILE, tmp_path / "heads")
    written = load_file(tmp_path / "heads" / "model.safetensors")
    assert torch.equal(written["1.1.linear.weight"], tensors["1.0.linear.weight"])


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("echo harmed > harmed",)


def test_what_is_not_a_file_of_heads_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    good = published_medusa()
    missing = {name: tensor for name, tensor in good.items() if name != "1.0.linear.weight"}
    missing.pop("1.0.linear.bias")
    cases: list[tuple[Any, str]] = [
        ({"0.0.linear.weight": Hostile()}, "is not a file of weights"),
        ([torch.ones(2)], "must hold tensors by name"),
        ({"0.0.linear.weight": 3}, "is not a tensor"),
        (good | {"surprise": torch.ones(2)}, "surprise has no place in them"),
        (missing, "3 Medusa heads of 2 blocks are not all there"),
    ]
    for content, message in cases:
        torch.save(content, "bad.pt")
        with pytest.raises(ModelLoadError, match=message):
            convert(Path("bad.pt"), Path("heads"))
    Path("bad.pt").write_bytes(b"no pickle")
    with pytest.raises(ModelLoadError, match="is not a file of weights"):
        convert(Path("bad.pt"), Path("heads"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pt"]


def damages(tensors: dict[str, Any], config: dict[str, Any]) -> Any:
    """Heads that are malformed, each in one way."""
    for name in tensors:
        tensor = tensors[name]
        yield f"without {name}", {n: t for n, t in tensors.items() if n != name}, config
        if tensor.is_floating_point():
            yield f"{name} of integers", tensors | {name: tensor.to(torch.int32)}, config
            yield f"{name} with NaN", tensors | {name: tensor * float("nan")}, config
        if tensor.dim():
            yield f"{name} cut", tensors | {name: tensor[:-1].clone()}, config
        if tensor.dim() == 2:
            yield f"{name} turned", tensors | {name: tensor.T.clone()}, config
    yield "a stranger", tensors | {"stranger.weight": torch.ones(3)}, config
    for key in config:
        yield f"without {key}", tensors, {k: v for k, v in config.items() if k != key}
        for value in (3, True, "x", None, [1]):
            yield f"{key}={value}", tensors, config | {key: value}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eagle3", "medusa", "hydra", "hydra with a layer"])
def test_what_converts_loads(kind: str, tmp_path: Path) -> None:
    """Heads that would not load are not converted, whatever is wrong with them."""
    layers = 8 if kind == "eagle3" else 3
    trunk = LLM(tiny_checkpoint(tmp_path / "trunk", num_hidden_layers=layers), heads="none")
    source, name = tmp_path / "source", "medusa_lm_head.pt"
    config: dict[str, Any] = {"medusa_num_heads": 3}
    if kind == "eagle3":
        write_eagle3(tmp_path / "good")
        name, good = "pytorch_model.bin", tmp_path / "good-published"
        tensors = torch.load(good / name)
        config = json.loads((good / "config.json").read_text())
        config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}
    elif kind == "medusa":
        tensors = published_medusa(heads=2)
    else:
        name, config = "hydra_lm_head.pt", {"grounded_heads": True}
        tensors = published_hydra(heads=2, prefix="layer" in kind)
    source.mkdir()
    loaded, refused = 0, 0
    cases = [("as published", tensors, config), *damages(tensors, config)]
    for number, (what, some, settings) in enumerate(cases):
        torch.save(some, source / name)
        (source / "config.json").write_text(json.dumps(settings))
        target = tmp_path / f"heads{number}"
        try:
            convert(source, target)
        except UserError as error:
            assert not target.exists() and number and ".heads" not in str(error), what
            refused += 1
            continue
        # Heads with the sizes of another model are valid themselves.
        try:
            open_heads(target, trunk.config)
        except ModelLoadError as error:
            assert "to match the model" in str(error) or "for a model of" in str(error), what
        loaded += 1
        shutil.rmtree(target)
    assert loaded and refused > len(tensors)


def test_the_command_names_what_it_made_and_what_it_cannot(tmp_path: Path, capsys: Any) -> None:
    torch.save(published_medusa(), tmp_path / "x.pt")
    target = str(tmp_path / "heads")
    assert cli.main(["convert", str(tmp_path / "x.pt"), target]) == 0
    assert capsys.readouterr().out.strip() == target
    assert cli.main(["convert", str(tmp_path / "x.pt"), target]) == 2
    assert "holds config.json, model.safetensors already" in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path), str(tmp_path / "other")]) == 2
    assert f"neither a file nor a directory with {MEDUSA_FILE}, " in capsys.readouterr().err
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(UserError, match="has no known suffix"):
        convert(tmp_path / "x.zip", tmp_path / "other")
