"""Published files that are not safetensors -> directories that load: pickled heads, and GGUF.

A pickle is read by torch's weights-only loader, which runs no code of the file's. Known layouts:

    medusa_lm_head.pt   Medusa (Cai et al. 2024): {h}.{l}.linear.{weight,bias} are head h's blocks,
                        {h}.{l}.weight behind the last of them is its own vocabulary matrix
    pytorch_model.bin   an EAGLE-3 head (Li et al. 2025), beside its config.json
    *.gguf              a whole Llama of SmolLM's kind, dequantised to bfloat16, with its tokenizer
"""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mtpkern.config import ModelLoadError, UserError, printable
from mtpkern.gguf_checkpoint import convert_gguf

MEDUSA_FILE = "medusa_lm_head.pt"
PICKLED_FILE = "pytorch_model.bin"
_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
_OWN = re.compile(r"(\d+)\.(\d+)\.weight")


def convert(source: Path, target: Path) -> None:
    """Convert `source`, a file or a directory that holds one, into the new directory `target`.

    Raises UserError where there is nothing known in it or the target is in the way; nothing is left
    behind then.
    """
    if target.exists():
        raise UserError(f"{printable(target)} exists already")
    known = [source / MEDUSA_FILE, source / PICKLED_FILE] if source.is_dir() else [source]
    file = next((path for path in known if path.is_file()), None)
    if file is None:
        raise UserError(
            f"{printable(source)} is no file, and no directory with {MEDUSA_FILE} or {PICKLED_FILE}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        if file.suffix == ".gguf":
            convert_gguf(file, work)
        elif file.suffix in (".pt", ".pth", ".bin"):
            tensors = _read_pickle(file)
            if "midlayer.hidden_norm.weight" in tensors:
                _write_eagle3(tensors, work, file)
            else:
                _write_medusa(tensors, work, file)
        else:
            raise UserError(f"{printable(file)} is not a known kind; known: .pt, .pth, .bin, .gguf")
        work.chmod(0o755)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """The named tensors of a pickle that holds nothing else."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken or hostile file makes the loader raise
        reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise ModelLoadError(f"{printable(file)} is not a file of weights: {reason}") from None
    if not isinstance(content, Mapping) or not content:
        raise ModelLoadError(f"{printable(file)} must hold tensors by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ModelLoadError(f"{printable(file)}: {printable(name)} is not a tensor")
    return dict(content)


def _write_eagle3(tensors: Mapping[str, Tensor], directory: Path, file: Path) -> None:
    """The same tensors under the same names, beside the same config.json."""
    config = file.with_name("config.json")
    if not config.is_file():
        raise ModelLoadError(f"{printable(file)} is an EAGLE-3 head, which needs its config.json")
    shutil.copyfile(config, directory / "config.json")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})


def _write_medusa(tensors: Mapping[str, Tensor], directory: Path, file: Path) -> None:
    """Heads and depth are counted: published configs are known to say something else."""
    blocks = {(int(m[1]), int(m[2])) for name in tensors if (m := _BLOCK.fullmatch(name))}
    own = {int(m[1]): int(m[2]) for name in tensors if (m := _OWN.fullmatch(name))}
    strange = [n for n in tensors if not _BLOCK.fullmatch(n) and not _OWN.fullmatch(n)]
    if strange or not blocks:
        what = f"{printable(strange[0])} has no place in them" if strange else "no blocks"
        raise ModelLoadError(f"{printable(file)} holds no Medusa heads: {what}")
    heads, depth = 1 + max(h for h, _ in blocks), 1 + max(d for _, d in blocks)
    if len(blocks) != heads * depth or (own and own != dict.fromkeys(range(heads), depth)):
        raise ModelLoadError(
            f"{printable(file)}: {heads} Medusa heads of {depth} blocks are not all there"
        )
    renamed = {
        (f"{m[1]}.vocabulary.weight" if (m := _OWN.fullmatch(name)) else name): tensor.contiguous()
        for name, tensor in tensors.items()
    }
    settings: dict[str, Any] = {
        "model_type": "mtpkern_medusa",
        "num_heads": heads,
        "num_layers": depth,
        "own_vocabulary": bool(own),
    }
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
