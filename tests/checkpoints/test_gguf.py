"""GGUF metadata that changes the computation is converted, or refused by name."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_files import TOKENS, write_gguf

from mtpkern.checkpoints.directory import load_tensors
from mtpkern.checkpoints.gguf import convert_gguf
from mtpkern.checkpoints.llama import check_checkpoint, load_config
from mtpkern.errors import ModelLoadError
from mtpkern.tokenizer import Tokenizer

STRING, BOOL = gguf.GGUFValueType.STRING, gguf.GGUFValueType.BOOL
UINT32, FLOAT32 = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32
KINDS = {str: STRING, bool: BOOL, int: UINT32, float: FLOAT32}


def converted(directory: Path, **metadata: Any) -> Path:
    """Convert a small GGUF with metadata added ("__" for "."), or removed where it is None."""

    def change(writer: gguf.GGUFWriter) -> None:
        for key, value in metadata.items():
            name = key.replace("__", ".")
            writer.kv_data[0].pop(name, None)
            if value is not None:
                writer.add_key_value(name, value, KINDS[type(value)])

    file = write_gguf(directory / "model.gguf", change=change)
    target = directory / "out"
    target.mkdir()
    convert_gguf(file, target)
    return target


ROPE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"kind": "default"}),
    ({"type": "none", "factor": 4.0}, {"kind": "default"}),
    ({"factor": 4.0}, {"kind": "linear", "factor": 4.0}),
    ({"type": "linear", "factor": 2.5}, {"kind": "linear", "factor": 2.5}),
    ({"type": "linear", "factor": 1.0}, {"kind": "default"}),
    (
        {"type": "yarn", "factor": 4.0, "original_context_length": 64, "yarn_beta_fast": 16.0},
        {
            "kind": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 16.0,
        },
    ),
    (
        {"type": "yarn", "factor": 2.0, "yarn_attn_factor": 1.0, "finetuned": True},
        {"kind": "yarn", "factor": 2.0, "original_max_position_embeddings": 256},
    ),
]


@pytest.mark.parametrize(("scaling", "wanted"), ROPE)
def test_rope_scaling_is_carried_over(
    scaling: dict[str, Any], wanted: dict[str, Any], tmp_path: Path
) -> None:
    metadata = {f"llama__rope__scaling__{key}": value for key, value in scaling.items()}
    rope = load_config(converted(tmp_path, **metadata)).rope
    assert {name: getattr(rope, name) for name in wanted} == wanted
    assert rope.theta == 1e5


def test_optional_keys_are_optional(tmp_path: Path) -> None:
    directory = converted(
        tmp_path,
        llama__rope__freq_base=None,
        tokenizer__ggml__bos_token_id=None,
        tokenizer__ggml__eos_token_id=None,
        tokenizer__chat_template=None,
    )
    config, _ = check_checkpoint(directory)
    assert (config.rope.theta, config.bos_token_id, config.eos_token_ids) == (10000.0, None, (0,))
    tokenizer = Tokenizer.from_directory(directory)
    assert (tokenizer.bos_token_id, tokenizer.has_chat_template) == (None, False)


def test_as_many_kv_heads_as_heads_are_the_default(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"model.gguf.*attn_k.weight must be \[64, 64\]"):
        converted(tmp_path, llama__attention__head_count_kv=None)


NEUTRAL: dict[str, Any] = {
    "general__quantization_version": 2,
    "general__license": "mit",
    "quantize__imatrix__file": "x.dat",
    "llama__vocab_size": len(TOKENS),
    "llama__rope__dimension_count": 16,
    "llama__attention__key_length": 16,
    "llama__attention__value_length": 16,
    "llama__attention__scale": 0.25,
    "llama__attention__sliding_window": 0,
    "llama__expert_count": 0,
    "llama__logit_scale": 1.0,
    "split__count": 1,
    "tokenizer__ggml__add_space_prefix": False,
    "tokenizer__ggml__add_bos_token": False,
    "tokenizer__ggml__padding_token_id": 0,
    "tokenizer__ggml__unknown_token_id": 0,
}


def test_what_changes_nothing_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "more").mkdir()
    plain, more = converted(tmp_path / "plain"), converted(tmp_path / "more", **NEUTRAL)
    for file in plain.iterdir():
        assert (more / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.type", "adapter"),
        ("split.count", 3),
        ("llama.attention.scale", 0.5),
        ("llama.attention.sliding_window", 64),
        ("llama.attention.causal", False),
        ("llama.attention.value_length", 8),
        ("llama.attn_logit_softcapping", 30.0),
        ("llama.final_logit_softcapping", 30.0),
        ("llama.logit_scale", 0.0625),
        ("llama.residual_scale", 0.2),
        ("llama.embedding_scale", 12.0),
        ("llama.expert_count", 8),
        ("llama.rope.dimension_count", 8),
        ("llama.rope.scaling.type", "longrope"),
        ("llama.rope.scaling.type", "yarn"),
        ("llama.rope.scaling.attn_factor", 1.2),
        ("llama.rope.scaling.yarn_log_multiplier", 0.1),
        ("llama.vocab_size", 999),
        ("llama.some_new_switch", True),
        ("tokenizer.ggml.add_space_prefix", True),
        ("tokenizer.ggml.remove_extra_whitespaces", True),
        ("tokenizer.ggml.add_sep_token", True),
        ("tokenizer.ggml.model", "bert"),
        ("tokenizer.ggml.precompiled_charsmap", "x"),
        ("tokenizer.ggml.normalizer.lowercase", True),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(
    key: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=key.replace(".", r"\.")) as refusal:
        converted(tmp_path, **{key.replace(".", "__"): value})
    assert str(refusal.value).count(str(tmp_path)) == 1
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize(
    "key", ["llama.block_count", "tokenizer.ggml.pre", "tokenizer.ggml.tokens"]
)
def test_what_is_needed_and_missing_is_named(key: str, tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        del writer.kv_data[0][key]

    file = write_gguf(tmp_path / "model.gguf", change=change)
    with pytest.raises(ModelLoadError, match=f"has no {key}"):
        convert_gguf(file, tmp_path)


def test_flags_put_tokens_at_the_edges_of_a_text(tmp_path: Path) -> None:
    directory = converted(
        tmp_path, tokenizer__ggml__add_bos_token=True, tokenizer__ggml__add_eos_token=True
    )
    tokenizer = Tokenizer.from_directory(directory)
    the = TOKENS.index("the")
    assert tokenizer.encode("the") == [1, the, 2]
    assert tokenizer.encode("the", add_special_tokens=False) == [the]


def test_every_end_of_turn_ends_a_text(tmp_path: Path) -> None:
    directory = converted(tmp_path, tokenizer__ggml__eot_token_id=1)
    assert load_config(directory).eos_token_ids == (2, 1, 0)


def test_sampling_settings_are_kept_in_the_file_and_reported_as_not_applied(tmp_path: Path) -> None:
    directory = converted(tmp_path, general__sampling__temp=0.5)
    assert json.loads((directory / "generation_config.json").read_text())["temperature"] == 0.5
    assert "temperature=0.5" in load_config(directory).remarks[0]


def test_biases_set_the_flags(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        for i in range(3):
            for name, rows in (("q", 64), ("k", 32), ("v", 32), ("output", 64)):
                bias = torch.arange(rows, dtype=torch.float32).numpy()
                writer.add_tensor(f"blk.{i}.attn_{name}.bias", bias)

    file = write_gguf(tmp_path / "model.gguf", change=change)
    convert_gguf(file, tmp_path)
    config, _ = check_checkpoint(tmp_path)
    assert config.qkv_bias and config.o_bias and not config.mlp_bias
    q = load_tensors(tmp_path)["model.layers.0.self_attn.q_proj.bias"]
    assert q[:16].tolist() == [*range(0, 16, 2), *range(1, 16, 2)]
