"""The kinds of heads that can be trained: created for a model, written to a directory, read back.

mtp      one MTP module on the states of three layers, shared by all positions; the default
mtp-1    the same on the final hidden state alone (DeepSeek-V3's and MiMo's form)
medusa   a residual block per position, through the model's own vocabulary
hydra    a block per position that is also fed the drafts before it
eagle3   EAGLE-3's layer on states of three layers below the last, in the published layout
layers   a transformer layer per position in place of the last one (Gloeckle et al. 2024)
modules  an MTP module per position, each fed by the one before (DeepSeek-V3's training)

All but medusa draft through the part of the vocabulary that the model is expected to use.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtpkern.checkpoints.directory import load_tensors
from mtpkern.checkpoints.json_files import read_json_object
from mtpkern.checkpoints.llama import final_norm, fingerprint, layer_parts, load_config
from mtpkern.checkpoints.resolve import model_name
from mtpkern.config import ModelConfig
from mtpkern.errors import UserError, printable
from mtpkern.outputs import writing
from mtpkern.rope import RopeConfig
from mtpkern.train.heads.layers import LayersConfig, LayersHead, ModulesHead
from mtpkern.train.heads.mtp import Eagle3Config, Eagle3Head, HeadConfig, MtpHead
from mtpkern.train.heads.parallel import ParallelConfig, ParallelHeads

Head = MtpHead | ParallelHeads | LayersHead | ModulesHead


def family_taps(family: str, layers: int) -> tuple[int, ...]:
    """The layers, counted from 1, whose states a family is fed; those of the last are normed.

    Raises UserError for a model with too few layers.
    """
    taps: tuple[int, ...] = (layers,)
    if family == "mtp":
        taps = layers // 3, 2 * layers // 3, layers
    elif family == "eagle3":
        taps = 2, layers // 2, layers - 3
    elif family == "layers":
        taps = (layers - 1,)
    if taps[0] < 1 or list(taps) != sorted(set(taps)):
        raise UserError(f"{family} heads take states after layers {taps}: {layers} are too few")
    return taps


def new_head(family: str, directory: Path, *, K: int, vocab_size: int) -> Head:
    """An untrained head for the model in `directory`; its draft vocabulary is chosen later."""
    model = load_config(directory)
    V, taps = model.vocab_size, family_taps(family, model.num_layers)
    shared: dict[str, Any] = {
        "hidden_size": model.hidden_size,
        "tap_layers": taps,
        "draft_vocab_size": V if family == "medusa" else min(vocab_size, V),
        "base_model": model_name(directory),
        "base_model_fingerprint": fingerprint(directory),
    }
    if family in ("medusa", "hydra"):
        config = ParallelConfig(num_heads=K, model_type=f"mtpkern_{family}", **shared)
        return ParallelHeads(config)
    shared |= {"head_dim": model.head_dim, "rms_norm_eps": model.rms_norm_eps}
    if family == "layers":
        last = {f"{h}.{n}": t for n, t in _last_layer(directory, model).items() for h in range(K)}
        return LayersHead(LayersConfig(num_heads=K, rope=model.rope, **shared), last)
    shared |= {
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "intermediate_size": model.intermediate_size,
        "rope_theta": model.rope.theta,
    }
    if family == "eagle3":
        context = model.max_position_embeddings
        head = Eagle3Head(Eagle3Config(vocab_size=V, max_position_embeddings=context, **shared))
        head.set_weights({"final_layernorm.weight": _last_layer(directory, model)["norm.weight"]})
        return head
    if family == "modules":
        return ModulesHead(HeadConfig(num_heads=K, **shared))
    return MtpHead(HeadConfig(**shared))


def _last_layer(directory: Path, model: ModelConfig) -> dict[str, Tensor]:
    """The model's last layer and its final norm, halved: predictions further ahead are less certain
    than the model's own."""
    prefix, norm = f"model.layers.{model.num_layers - 1}.", final_norm(model)
    names = [name for named in layer_parts(model).values() for name, _ in named]
    tensors = load_tensors(directory, [norm, *(f"{prefix}{name}" for name in names)])
    halved = {"norm.weight": tensors.pop(norm) / 2}
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()} | halved


def export_head(head: Head, directory: Path, lm_head: Tensor) -> None:
    """Write model.safetensors (bf16) and config.json, each atomically.

    lm_head [V, E] is the model's; EAGLE-3's layout includes a part of it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / ".mtpkern-heads"

    def stored(tensor: Tensor) -> Tensor:
        tensor = tensor.bfloat16() if tensor.is_floating_point() else tensor
        return tensor.cpu().contiguous()

    tensors = head.tensors()
    if isinstance(head, Eagle3Head):
        tensors |= head.vocabulary(lm_head)
    with writing(directory / "model.safetensors"):
        save_file({name: stored(t) for name, t in tensors.items()}, temporary)
    temporary.chmod(0o644)
    temporary.replace(directory / "model.safetensors")
    temporary.write_text(json.dumps(asdict(head.config), indent=2) + "\n")
    temporary.replace(directory / "config.json")


def load_head(directory: Path) -> Head:
    """Read a head that `export_head` wrote. Raises UserError for other files."""
    settings = read_json_object(directory / "config.json")
    try:
        return _read_head(settings, load_file(directory / "model.safetensors"))
    except (OSError, SafetensorError, LookupError, TypeError, RuntimeError):
        raise UserError(
            f"{printable(directory)} holds no heads as `mtpkern train` writes them, and only "
            "those can be trained on"
        ) from None


def _read_head(settings: dict[str, Any], tensors: dict[str, Tensor]) -> Head:
    settings["tap_layers"] = tuple(settings["tap_layers"])
    settings.pop("max_num_speculative_tokens", None)  # unused, written by older versions
    if settings["model_type"] == "mtpkern_layers":
        rope = RopeConfig(**settings.pop("rope"))
        return LayersHead(LayersConfig(rope=rope, **settings), tensors)
    head: MtpHead | ParallelHeads | ModulesHead
    if "architectures" in settings:
        head = Eagle3Head(Eagle3Config(**settings))
    elif settings["model_type"] == "mtpkern_mtp":
        config = HeadConfig(**settings)
        head = ModulesHead(config) if config.num_heads else MtpHead(config)
    else:
        head = ParallelHeads(ParallelConfig(**settings))
    head.load(tensors)
    return head


def is_reduced(head: Head) -> bool:
    """Whether the head drafts through a part of the vocabulary."""
    return not (isinstance(head, ParallelHeads) and not head.config.is_hydra)


def kind_of(head: Head) -> str:
    """The name of a head's kind, for its card."""
    if isinstance(head, Eagle3Head):
        return "EAGLE-3"
    return "modules" if isinstance(head, ModulesHead) else head.config.model_type
