"""convert: pickled heads become a directory that loads, and a hostile file becomes an error."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_heads import published_medusa

from mtpkern import cli
from mtpkern.config import ModelLoadError, UserError
from mtpkern.convert import MEDUSA_FILE, convert


def test_heads_and_depth_are_counted_whatever_the_config_says(tmp_path: Path) -> None:
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
    """Medusa makes a head's blocks as [block] * layers: one tensor under several names."""
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


def test_the_command_names_what_it_made_and_what_it_cannot(tmp_path: Path, capsys: Any) -> None:
    torch.save(published_medusa(), tmp_path / "x.pt")
    target = str(tmp_path / "heads")
    assert cli.main(["convert", str(tmp_path / "x.pt"), target]) == 0
    assert capsys.readouterr().out.strip() == target
    assert cli.main(["convert", str(tmp_path / "x.pt"), target]) == 2
    assert "holds config.json, model.safetensors already" in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path), str(tmp_path / "other")]) == 2
    assert f"no directory with {MEDUSA_FILE}, " in capsys.readouterr().err
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(UserError, match="is not a known kind"):
        convert(tmp_path / "x.zip", tmp_path / "other")
