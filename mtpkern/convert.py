"""Published files that are not safetensors -> directories that load: pickled heads, and GGUF.

A pickle is read by torch's weights-only loader, which runs no code of the file's. Known layouts:

    medusa_lm_head.pt   Medusa (Cai et al. 2024), or medusa_lm_head.safetensors:
                        {h}.{l}.linear.{weight,bias} are head h's blocks, {h}.{l}.weight behind the
                        last of them is its own vocabulary matrix
    hydra_lm_head.pt    Hydra (Ankner et al. 2024), beside its config.json: hydra_mlp and
                        hydra_lm_head, and in Hydra++ one layer below them
    pytorch_model.bin   an EAGLE-3 head (Li et al. 2025), beside its config.json; or a whole model,
                        sharded too, beside its config.json and tokenizer
    consolidated.pth    Meta's multi-token-prediction models (Gloeckle et al. 2024), a trunk with
                        its heads, beside params.json
    *.gguf              a whole model, expanded to bfloat16, with its tokenizer; it also loads as
                        it is
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mtpkern.checkpoints.directory import load_tensors
from mtpkern.checkpoints.gguf import convert_gguf
from mtpkern.checkpoints.json_files import read_json_object
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
    """Convert `source`, a file or a directory that holds one, into the directory `target`, which is
    new or empty, or holds an earlier conversion and `force` is given.

    Raises UserError where there is nothing known in it, what is in it would not load, or the target
    is in the way; nothing is left behind then.
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
        elif file.suffix in SUFFIXES:
            pickled = file.suffix != ".safetensors"
            _write(read_pickle(file) if pickled else load_tensors(file), work, file)
        else:
            raise UserError(f"{printable(file)} is not a known kind; known: {', '.join(SUFFIXES)}")


def _write(tensors: dict[str, Tensor], directory: Path, file: Path) -> None:
    """Write a model's or heads' tensors in a layout that loads, and see that they would."""
    model = "tok_embeddings.weight" in tensors
    if model:
        convert_meta(tensors, directory, file)
    elif is_eagle3(tensors):
        _write_eagle3(tensors, directory, file)
    elif is_model(tensors):
        if file.suffix == ".safetensors":
            raise UserError(f"{printable(file)} is a model in safetensors, which loads as it is")
        together = shards(file.parent)
        convert_bin(together if file in together else [file], directory)
        return
    elif any(name.startswith("hydra_mlp.") for name in tensors):
        _write_hydra(tensors, directory, file)
    else:
        _write_medusa(tensors, directory, file)
    try:
        if model:
            load_model(directory, dtype=resolve_dtype("auto", load_config(directory)))
        if not model or any(name.startswith("extra_heads.") for name in tensors):
            check_heads(directory)
    except ModelLoadError as error:
        # The directory goes; its name would tell nobody anything.
        reason = str(error).replace(printable(directory), printable(file.parent))
        raise ModelLoadError(reason) from None


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
    renamed, settings = read_medusa(tensors, {}, None, file)
    _save(renamed, directory)
    settings = {"model_type": "mtpkern_medusa"} | settings
    (directory / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _write_hydra(tensors: Mapping[str, Tensor], directory: Path, file: Path) -> None:
    """Sequentials with dropout number their blocks 1, 3, ...; what the trunk has is left out."""
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
    (directory / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
