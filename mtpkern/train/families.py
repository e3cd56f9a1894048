"""The kinds of heads that can be trained: made new for a model, written to a directory, read back.

mtp      one MTP module, features of three layers, shared by all positions; the default
mtp-1    the same on the final hidden state alone (DeepSeek-V3's and MiMo's form)
medusa   a residual block a position, through the model's own vocabulary
hydra    a block a position that also sees the drafts before it
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtpkern.config import ModelConfig
from mtpkern.train.mtp_head import HeadConfig, MtpHead
from mtpkern.train.parallel_heads import ParallelConfig, ParallelHeads

FAMILIES = ("mtp", "mtp-1", "medusa", "hydra")

Head = MtpHead | ParallelHeads


def family_taps(family: str, layers: int) -> tuple[int, ...]:
    """The layers, counted from 1, whose states a family is fed; the last one's are normed."""
    if family == "eagle3":
        return 2, layers // 2, layers - 3
    if family == "layers":
        return (layers - 1,)
    return (layers // 3, 2 * layers // 3, layers) if family == "mtp" else (layers,)


def new_head(
    family: str, model: ModelConfig, *, K: int, vocab_size: int, base_model: str, fingerprint: str
) -> Head:
    """An untrained head that fits the model; a reduced draft vocabulary is still to be chosen."""
    V, taps = model.vocab_size, family_taps(family, model.num_layers)
    if family in ("medusa", "hydra"):
        return ParallelHeads(
            ParallelConfig(
                hidden_size=model.hidden_size,
                tap_layers=taps,
                num_heads=K,
                draft_vocab_size=V if family == "medusa" else min(vocab_size, V),
                base_model=base_model,
                base_model_fingerprint=fingerprint,
                model_type=f"mtpkern_{family}",
            )
        )
    return MtpHead(
        HeadConfig(
            hidden_size=model.hidden_size,
            tap_layers=taps,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            intermediate_size=model.intermediate_size,
            rope_theta=model.rope.theta,
            rms_norm_eps=model.rms_norm_eps,
            draft_vocab_size=min(vocab_size, V),
            base_model=base_model,
            base_model_fingerprint=fingerprint,
        )
    )


def export_head(head: Head, directory: Path) -> None:
    """Write model.safetensors (bf16) and config.json, each in one rename."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{os.getpid()}"

    def stored(tensor: Tensor) -> Tensor:
        tensor = tensor.bfloat16() if tensor.is_floating_point() else tensor
        return tensor.cpu().contiguous()

    save_file({name: stored(t) for name, t in head.tensors().items()}, temporary)
    temporary.chmod(0o644)
    temporary.replace(directory / "model.safetensors")
    temporary.write_text(json.dumps(asdict(head.config), indent=2) + "\n")
    temporary.replace(directory / "config.json")


def load_head(directory: Path) -> Head:
    """A head as export_head wrote it, to measure it or to train on."""
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    settings["tap_layers"] = tuple(settings["tap_layers"])
    head: Head
    if settings["model_type"] == "mtpkern_mtp":
        head = MtpHead(HeadConfig(**settings))
    else:
        head = ParallelHeads(ParallelConfig(**settings))
    head.load(load_file(directory / "model.safetensors"))
    return head


def is_reduced(head: Head) -> bool:
    """Whether the draft vocabulary is a choice."""
    return isinstance(head, MtpHead) or head.config.is_hydra


def full_vocabulary(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.int32)
