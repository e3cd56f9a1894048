"""Published files that are not safetensors -> directories that load: pickled heads, and GGUF.

A pickle is read by torch's weights-only loader, which runs no code of the file's. Known layouts:

    medusa_lm_head.pt   Medusa (Cai et al. 2024): {h}.{l}.linear.{weight,bias} are head h's blocks,
                        {h}.{l}.weight behind the last of them is its own vocabulary matrix
    hydra_lm_head.pt    Hydra (Ankner et al. 2024), beside its config.json: hydra_mlp and
                        hydra_lm_head, and in Hydra++ one layer below them
    pytorch_model.bin   an EAGLE-3 head (Li et al. 2025), beside its config.json; or a whole model,
                        sharded too, beside its config.json and tokenizer
    consolidated.pth    Meta's multi-token-prediction models (Gloeckle et al. 2024), a trunk with
                        its heads, beside params.json
    *.gguf              a whole Llama of SmolLM's kind, dequantised to bfloat16, with its tokenizer
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mtpkern.bin_checkpoint import INDEX_FILE, convert_bin, is_model, read_pickle, shards
from mtpkern.config import read_json_object
from mtpkern.errors import ModelLoadError, UserError, counted, printable
from mtpkern.gguf_checkpoint import convert_gguf
from mtpkern.meta_checkpoint import convert_meta
from mtpkern.outputs import output_directory, writing

MEDUSA_FILE = "medusa_lm_head.pt"
KNOWN_FILES = (
    MEDUSA_FILE,
    "hydra_lm_head.pt",
    "pytorch_model.bin",
    "consolidated.pth",
    INDEX_FILE,
)
SUFFIXES = (".pt", ".pth", ".bin", ".gguf")
FILES = ("*.json", "*.jinja", "model*.safetensors", "tokenizer.model", "merges.txt")
_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
_OWN = re.compile(r"(\d+)\.(\d+)\.weight")


def convert(source: Path, target: Path, *, force: bool = False) -> None:
    """Convert `source`, a file or a directory that holds one, into the directory `target`, which is
    new or empty, or holds an earlier conversion and `force` is given.

    Raises UserError where there is nothing known in it or the target is in the way; nothing is left
    behind then.
    """
    known = [source / name for name in KNOWN_FILES] if source.is_dir() else [source]
    file = next((path for path in known if path.is_file()), None)
    if file is None:
        raise UserError(
            f"{printable(source)} is no file, and no directory with {', '.join(KNOWN_FILES[:-1])} "
            f"or {KNOWN_FILES[-1]}"
        )
    with output_directory(target, FILES, force=force, sources=[source]) as work, writing(target):
        if file.suffix == ".gguf":
            convert_gguf(file, work)
        elif file.name == INDEX_FILE:
            convert_bin(shards(file.parent), work)
        elif file.suffix in (".pt", ".pth", ".bin"):
            tensors = read_pickle(file)
            if "midlayer.hidden_norm.weight" in tensors:
                _write_eagle3(tensors, work, file)
            elif "tok_embeddings.weight" in tensors:
                convert_meta(tensors, work, file)
            elif is_model(tensors):
                together = shards(file.parent)
                convert_bin(together if file in together else [file], work)
            elif any(name.startswith("hydra_mlp.") for name in tensors):
                _write_hydra(tensors, work, file)
            else:
                _write_medusa(tensors, work, file)
        else:
            raise UserError(f"{printable(file)} is not a known kind; known: {', '.join(SUFFIXES)}")


def _save(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Write tensors, each with memory of its own: Medusa's blocks of one head may be one tensor."""
    own = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    with writing(directory / "model.safetensors"):
        save_file(own, directory / "model.safetensors", metadata={"format": "pt"})


def _write_eagle3(tensors: Mapping[str, Tensor], directory: Path, file: Path) -> None:
    """The same tensors under the same names, beside the same config.json."""
    config = file.with_name("config.json")
    if not config.is_file():
        raise ModelLoadError(f"{printable(file)} is an EAGLE-3 head, which needs its config.json")
    shutil.copyfile(config, directory / "config.json")
    _save(tensors, directory)


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
            f"{printable(file)}: {counted(heads, 'Medusa head')} of "
            f"{counted(depth, 'block')} are not all there"
        )
    renamed = {
        (f"{m[1]}.vocabulary.weight" if (m := _OWN.fullmatch(name)) else name): tensor
        for name, tensor in tensors.items()
    }
    settings: dict[str, Any] = {
        "model_type": "mtpkern_medusa",
        "num_heads": heads,
        "num_layers": depth,
        "own_vocabulary": bool(own),
    }
    _save(renamed, directory)
    (directory / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _write_hydra(tensors: Mapping[str, Tensor], directory: Path, file: Path) -> None:
    """Sequentials with dropout number their blocks 1, 3, ...; what the trunk has is left out."""
    config = read_json_object(file.with_name("config.json"))
    if not config.get("grounded_heads") or config.get("hidden_state_offset"):
        raise ModelLoadError(
            f"{printable(file)}: Hydra heads must be grounded, on the final hidden state"
        )
    renamed: dict[str, Tensor] = {}
    depth: dict[str, list[int]] = {}
    for name in tensors:
        if m := re.fullmatch(r"hydra_mlp\.(\d+)\.(\d+)\.linear\.weight", name):
            depth.setdefault(m[1], []).append(int(m[2]))
    for name, tensor in tensors.items():
        if m := re.fullmatch(r"hydra_mlp\.(\d+)\.(\d+)\.(\w+)\.(weight|bias)", name):
            block = sorted(depth.get(m[1], [])).index(int(m[2]))
            part = "residual" if m[3] == "res_connection" else f"{block}.{m[3]}"
            renamed[f"{m[1]}.{part}.{m[4]}"] = tensor
        elif m := re.fullmatch(r"hydra_lm_head\.(\d+)\.(?:1\.)?(weight|bias)", name):
            renamed[f"{m[1]}.vocabulary.{m[2]}"] = tensor
        elif m := re.fullmatch(r"prefix_embeding_layer\.(?:layers\.0\.)?(.+)", name):
            if not re.match(r"embed_tokens|.*rotary_emb", m[1]):
                renamed[f"prefix.{m[1]}"] = tensor
        elif not name.startswith("input_embed_fn."):
            raise ModelLoadError(
                f"{printable(file)}: {printable(name)} has no place in Hydra heads"
            )
    settings = {
        "model_type": "mtpkern_hydra",
        "num_heads": len(depth),
        "num_layers": max(map(len, depth.values())),
        "prefix": any(name.startswith("prefix.") for name in renamed),
    }
    _save(renamed, directory)
    (directory / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
