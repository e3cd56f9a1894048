"""`mtpkern convert`: published heads and models in other formats -> directories that load.

Pickles are read by torch's weights-only loader, which never runs code from a file. Formats:

    medusa_lm_head.pt   Medusa heads (Cai et al. 2024), also as .safetensors:
                        {h}.{l}.linear.{weight,bias} are head h's blocks, {h}.{l}.weight after the
                        last of them is its own vocabulary matrix
    hydra_lm_head.pt    Hydra heads (Ankner et al. 2024), with config.json: hydra_mlp and
                        hydra_lm_head, and in Hydra++ one decoder layer before them
    pytorch_model.bin   an EAGLE-3 head (Li et al. 2025), with config.json; or a model, in one file
                        or in shards, with config.json and tokenizer
    consolidated.pth    a model of Meta's with multi-token-prediction heads (Gloeckle et al. 2024),
                        with params.json
    *.gguf              a model with its tokenizer, converted to bfloat16; it also loads directly
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mtpkern.checkpoints.directory import load_tensors
from mtpkern.checkpoints.gguf import convert_gguf
from mtpkern.checkpoints.json_files import read_json_object, write_json
from mtpkern.checkpoints.llama import load_config
from mtpkern.checkpoints.meta import convert_meta
from mtpkern.checkpoints.model_weights import load_model
from mtpkern.checkpoints.torch_bin import INDEX_FILE, convert_bin, is_model, read_pickle, shards
from mtpkern.config import resolve_dtype
from mtpkern.drafters.load import check_heads
from mtpkern.drafters.published import is_eagle3, read_medusa
from mtpkern.errors import ModelLoadError, UserError, printable
from mtpkern.outputs import output_directory, writing

MEDUSA_FILE = "medusa_lm_head.pt"
KNOWN_FILES = (
    MEDUSA_FILE,
    "medusa_lm_head.safetensors",
    "hydra_lm_head.pt",
    "pytorch_model.bin",
    "consolidated.pth",
    INDEX_FILE,
)
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".gguf")
FILES = ("*.json", "*.jinja", "model*.safetensors", "tokenizer.model", "merges.txt")


def convert(source: Path, target: Path, *, force: bool = False) -> None:
    """Convert `source`, a file or a directory with one of KNOWN_FILES, into the directory `target`.

    `target` is new or empty, or an earlier conversion that `force` replaces. Raises UserError if
    the format is not known, the result would not load, or `target` cannot be written; nothing is
    left behind then.
    """
    if not source.exists():
        raise UserError(f"{printable(source)}: no such file or directory")
    candidates = [source / name for name in KNOWN_FILES] if source.is_dir() else [source]
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise UserError(
            f"{printable(source)} is neither a file nor a directory with "
            f"{', '.join(KNOWN_FILES[:-1])} or {KNOWN_FILES[-1]}"
        )
    with output_directory(target, FILES, force=force, sources=[source]) as work, writing(target):
        if file.suffix == ".gguf":
            convert_gguf(file, work)
        elif file.name == INDEX_FILE:
            convert_bin(shards(file.parent), work)
        elif file.suffix in SUFFIXES:
            pickled = file.suffix != ".safetensors"
            _write(read_pickle(file) if pickled else load_tensors(file), work, file)
        else:
            raise UserError(f"{printable(file)} has no known suffix; known: {', '.join(SUFFIXES)}")


def _write(tensors: dict[str, Tensor], directory: Path, file: Path) -> None:
    """Write a model's or heads' tensors in a layout that loads, and check that it does."""
    is_meta = "tok_embeddings.weight" in tensors
    if is_meta:
        convert_meta(tensors, directory, file)
    elif is_eagle3(tensors):
        _write_eagle3(tensors, directory, file)
    elif is_model(tensors):
        if file.suffix == ".safetensors":
            raise UserError(f"{printable(file)} is a model in safetensors, which loads as it is")
        files = shards(file.parent)
        convert_bin(files if file in files else [file], directory)
        return
    elif any(name.startswith("hydra_mlp.") for name in tensors):
        _write_hydra(tensors, directory, file)
    else:
        _write_medusa(tensors, directory, file)
    try:
        if is_meta:
            load_model(directory, dtype=resolve_dtype("auto", load_config(directory)))
        if not is_meta or any(name.startswith("extra_heads.") for name in tensors):
            check_heads(directory)
    except ModelLoadError as error:
        # The temporary directory is removed, so the message names the source's instead.
        message = str(error).replace(printable(directory), printable(file.parent))
        raise ModelLoadError(message) from None


def _save(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Write tensors, which may share memory (as do a Medusa head's blocks), as safetensors."""
    copies = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    with writing(directory / "model.safetensors"):
        save_file(copies, directory / "model.safetensors", metadata={"format": "pt"})


def _write_eagle3(tensors: Mapping[str, Tensor], directory: Path, file: Path) -> None:
    """Write the same tensors under the same names, with the same config.json."""
    config = file.with_name("config.json")
    if not config.is_file():
        raise ModelLoadError(f"{printable(file)} is an EAGLE-3 head, which needs its config.json")
    shutil.copyfile(config, directory / "config.json")
    _save(tensors, directory)


def _write_medusa(tensors: Mapping[str, Tensor], directory: Path, file: Path) -> None:
    renamed, settings = read_medusa(tensors, {}, None, file)
    _save(renamed, directory)
    settings = {"model_type": "mtpkern_medusa"} | settings
    write_json(directory / "config.json", settings)


def _write_hydra(tensors: Mapping[str, Tensor], directory: Path, file: Path) -> None:
    """Renumber blocks, which with dropout are 1, 3, ..., and omit tensors of the trunk."""
    config = read_json_object(file.with_name("config.json"))
    if not config.get("grounded_heads") or config.get("hidden_state_offset"):
        raise ModelLoadError(
            f"{printable(file)}: Hydra heads must be grounded, on the final hidden state"
        )
    renamed: dict[str, Tensor] = {}
    depth: dict[str, set[int]] = {}
    for name in tensors:
        if m := re.match(r"hydra_mlp\.(\d+)\.(\d+)\.", name):
            depth.setdefault(m[1], set()).add(int(m[2]))
    for name, tensor in tensors.items():
        if m := re.fullmatch(r"hydra_mlp\.(\d+)\.(\d+)\.(\w+)\.(weight|bias)", name):
            block = sorted(depth[m[1]]).index(int(m[2]))
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
    write_json(directory / "config.json", settings)
