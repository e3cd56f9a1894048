"""Matrices with the bits of their file, or rounded at load: their values, bit for bit."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import tiny_checkpoint
from gguf import GGMLQuantizationType as Kind
from gguf_files import WIDE_CONFIG, write_model
from safetensors.torch import save_file

from mtpkern.checkpoints.directory import load_tensors
from mtpkern.checkpoints.gguf import convert_gguf
from mtpkern.checkpoints.llama import check_checkpoint, fingerprint, load_config
from mtpkern.checkpoints.model_weights import ModelWeights, load_model
from mtpkern.errors import ModelLoadError, UserError
from mtpkern.kernels.cpu.quants import Quants, dequantise, is_held, joined, quantise, widened

E, HEADS, LAYERS = (
    WIDE_CONFIG[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
)
OWN = {Kind.Q4_0: "q4_0", Kind.Q4_1: "q4_1", Kind.Q8_0: "q8_0"}
OWN |= {Kind.Q6_K: "q6_k", Kind.Q4_K: "q4_k"}
OWN |= {Kind.F16: "fp16", Kind.BF16: "bf16", Kind.F32: "fp32"}


def load(directory: Path, weights: str | None = "auto") -> ModelWeights:
    return load_model(directory, dtype=torch.float32, weights=weights)[1]


def matrices(w: ModelWeights) -> dict[str, Any]:
    """Every matrix of the weights, by name; q, k and v as one."""
    found = {f"{i}.{f}": getattr(w.layers[i], f) for i in range(LAYERS) for f in FUSED}
    for name, matrix in found.items():
        if isinstance(matrix, list):
            (found[name],) = matrix
    return found | {"embedding": w.embedding, "lm_head": w.lm_head}


def values(parts: Sequence[Quants]) -> torch.Tensor:
    return torch.cat([torch.from_numpy(dequantise(part)) for part in parts])


FUSED = {
    "qkv": [f"self_attn.{name}_proj" for name in "qkv"],
    "o": ["self_attn.o_proj"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "down": ["mlp.down_proj"],
}


def fused(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values that `matrices` must represent."""
    found = {
        f"{i}.{field}": torch.cat([tensors[f"model.layers.{i}.{n}.weight"] for n in names])
        for i in range(LAYERS)
        for field, names in FUSED.items()
    }
    found["embedding"] = tensors["model.embed_tokens.weight"]
    return found | {"lm_head": tensors.get("lm_head.weight", found["embedding"])}


def assert_same(a: Any, b: Any, name: str) -> None:
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.name)
def test_a_files_own_bits_have_the_values_of_the_expanded_load(
    arch: str, kind: Kind, tmp_path: Path
) -> None:
    true = write_model(tmp_path, kind, arch=arch, tied=arch != "qwen3")
    assert load_config(tmp_path).model_type == arch
    kept, plain = load(tmp_path), load(tmp_path, None)
    wanted = fused(true)
    for name, quants in matrices(kept).items():
        assert (quants.format, quants.shape) == (OWN[kind], wanted[name].shape)
        assert_same(dequantise(quants), wanted[name], name)
        assert_same(matrices(plain)[name], wanted[name], name)
    for name, tensor in load_tensors(tmp_path).items():
        assert_same(tensor.float(), true[name], name)
    for i, layer in enumerate(kept.layers):
        at = f"model.layers.{i}."
        assert_same(layer.input_norm, true[f"{at}input_layernorm.weight"], at)
        if arch == "qwen2":
            biases = [true[f"{at}self_attn.{name}_proj.bias"] for name in "qkv"]
            assert_same(layer.qkv_bias, torch.cat(biases), at)
        if arch == "qwen3":
            assert_same(layer.k_norm, true[f"{at}self_attn.k_norm.weight"], at)
    assert (kept.lm_head is kept.embedding) == (arch != "qwen3")
    assert kept.norm.dtype == torch.float32


def test_mistral_is_llama_with_heads_of_another_size(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        # Twice as many heads of half the size have the same rows in another order.
        for name, value in (("head_count", 8), ("head_count_kv", 4), ("key_length", 32)):
            del writer.kv_data[0][f"llama.attention.{name}"]
            writer.add_uint32(f"llama.attention.{name}", value)

    true = write_model(tmp_path, Kind.Q4_0, change=change)["model.layers.0.self_attn.q_proj.weight"]
    found = load_tensors(tmp_path)["model.layers.0.self_attn.q_proj.weight"]
    in_file = true.view(HEADS, 2, -1, E).transpose(1, 2).reshape(8, -1, 2, E)
    assert_same(found, in_file.transpose(1, 2).reshape(-1, E), "q")


CUT: list[tuple[list[Kind], list[str], str]] = [
    ([Kind.Q4_0, Kind.Q4_1, Kind.Q4_0], ["q4_0", "q4_1", "q4_0"], ""),
    ([Kind.Q4_0, Kind.Q4_0, Kind.Q6_K], ["q4_0", "q6_k"], ""),
    ([Kind.Q8_0, Kind.Q6_K, Kind.F32], ["q8_0", "q6_k", "fp32"], ""),
    ([Kind.F16, Kind.Q8_0, Kind.Q5_0], ["fp16", "q8_0"], "Q5_0 has no kernel"),
    ([Kind.Q5_K, Kind.Q5_K, Kind.Q6_K], ["q8_0", "q6_k"], "Q5_K has no kernel"),
]


@pytest.mark.parametrize(("kinds", "formats", "says"), CUT)
def test_q_k_and_v_keep_a_format_each(
    kinds: list[Kind],
    formats: list[str],
    says: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = [f"{name}_proj" for name in "qkv"]
    own = dict(zip(names, kinds, strict=True))
    true = write_model(tmp_path, lambda name: own.get(name.split(".")[-2], Kind.Q8_0))
    with caplog.at_level(logging.WARNING):
        w = load(tmp_path)
    for i, layer in enumerate(w.layers):
        assert [part.format for part in layer.qkv] == formats
        parts = [true[f"model.layers.{i}.self_attn.{name}.weight"] for name in names]
        wanted = [
            part if kind in OWN else torch.from_numpy(dequantise(quantise(part, "q8_0")))
            for part, kind in zip(parts, kinds, strict=True)
        ]
        assert_same(values(layer.qkv), torch.cat(wanted), "qkv")
    # Logged once for two layers.
    assert sum(says in line for line in caplog.messages) == (1 if says else len(caplog.messages))
    assert bool(says) == bool(caplog.messages)


MIXED: list[tuple[list[Kind], str, str]] = [
    ([Kind.Q4_0, Kind.Q4_1], "q4_1", ""),
    ([Kind.Q4_0, Kind.Q8_0], "q8_0", ""),
    ([Kind.Q6_K, Kind.F32], "fp32", ""),
    ([Kind.Q4_0, Kind.Q6_K], "q8_0", "Q4_0 and Q6_K that form one matrix"),
    ([Kind.F16, Kind.Q5_0], "q8_0", "Q5_0 has no kernel"),
    ([Kind.Q5_1, Kind.Q5_1], "q8_0", "Q5_1 has no kernel"),
]


@pytest.mark.parametrize(("kinds", "format", "says"), MIXED)
def test_gates_and_ups_share_a_format(
    kinds: list[Kind],
    format: str,
    says: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = ["gate_proj", "up_proj"]
    own = dict(zip(names, kinds, strict=True))
    true = write_model(tmp_path, lambda name: own.get(name.split(".")[-2], Kind.Q8_0))
    with caplog.at_level(logging.WARNING):
        w = load(tmp_path)
    for i, layer in enumerate(w.layers):
        assert (layer.gate_up.format, layer.o.format) == (format, "q8_0")
        parts = [true[f"model.layers.{i}.mlp.{name}.weight"] for name in names]
        wanted = [
            part
            if is_held(OWN.get(kind, ""), format)
            else torch.from_numpy(dequantise(quantise(part, format)))
            for part, kind in zip(parts, kinds, strict=True)
        ]
        assert_same(dequantise(layer.gate_up), torch.cat(wanted), "gate_up")
    # Logged once for two layers.
    assert sum(says in line for line in caplog.messages) == (1 if says else len(caplog.messages))
    assert bool(says) == bool(caplog.messages)


@pytest.mark.parametrize("format", ["q4_0", "q4_1", "q8_0", "q8", "bf16", "fp16", "fp32"])
@pytest.mark.parametrize("tied", [True, False])
def test_any_checkpoint_is_rounded_at_load(format: str, tied: bool, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": 4, "tie_word_embeddings": tied}
    tiny_checkpoint(tmp_path, dtype=torch.bfloat16, **sizes)
    true = fused({name: t.float() for name, t in load_tensors(tmp_path).items()})
    w = load_model(tmp_path, dtype=torch.bfloat16, weights=format)[1]
    for name, quants in matrices(w).items():
        outer = name in ("embedding", "lm_head") and format in ("q4_0", "q4_1")
        assert quants.format == ("q8_0" if outer else format)
        assert_same(dequantise(quants), dequantise(quantise(true[name], quants.format)), name)
    assert (w.lm_head is w.embedding) == tied and w.norm.dtype == torch.float32
    made_up = load_model(tmp_path, dtype=torch.bfloat16, weights=format, dummy=True)[1]
    assert {n: m.format for n, m in matrices(made_up).items()} == {
        n: m.format for n, m in matrices(w).items()
    }


def test_a_gguf_can_be_rounded_too(tmp_path: Path) -> None:
    true = fused(write_model(tmp_path, lambda name: Kind.Q4_0 if "mlp" in name else Kind.Q6_K))
    w = matrices(load(tmp_path, "q4_0"))
    assert_same(dequantise(w["0.down"]), true["0.down"], "kept as it is")
    assert_same(dequantise(w["0.o"]), dequantise(quantise(true["0.o"], "q4_0")), "rounded")
    assert w["embedding"].format == "q8_0"
    assert_same(dequantise(matrices(load(tmp_path, "fp32"))["0.qkv"]), true["0.qkv"], "all held")


def test_auto_leaves_safetensors_as_they_are(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, dtype=torch.bfloat16, num_hidden_layers=LAYERS)
    plain, auto = (load_model(tmp_path, dtype=torch.float16, weights=w)[1] for w in (None, "auto"))
    for name, tensor in matrices(plain).items():
        assert_same(matrices(auto)[name], tensor, name)
    assert auto.norm.dtype == torch.float16


def test_a_gguf_and_its_conversion_are_the_same_model(tmp_path: Path) -> None:
    write_model(tmp_path / "a", Kind.Q4_1, tied=False)
    (tmp_path / "b").mkdir()
    convert_gguf(tmp_path / "a" / "model.gguf", tmp_path / "b")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    a, b = (load_model(tmp_path / name, dtype=torch.bfloat16)[1] for name in "ab")
    for name, tensor in matrices(a).items():
        assert_same(tensor, matrices(b)[name], name)
    # One of the values that the fingerprint samples.
    tensors = {name: t.clone() for name, t in load_tensors(tmp_path / "b").items()}
    tensors["model.layers.1.self_attn.k_proj.weight"][-1, -1] += 1
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


def test_safetensors_count_before_a_gguf_beside_them(tmp_path: Path) -> None:
    write_model(tmp_path, Kind.Q4_1)
    convert_gguf(tmp_path / "model.gguf", tmp_path)
    assert "model.gguf beside it is ignored" in load_config(tmp_path).remarks[-1]
    assert {entry.dtype for entry in check_checkpoint(tmp_path)[1].values()} == {"BF16"}


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q6_K, Kind.F16, Kind.Q5_0])
@pytest.mark.parametrize("weights", [None, "auto", "q8_0"])
def test_what_is_not_finite_is_refused_by_name(
    kind: Kind, weights: str | None, tmp_path: Path
) -> None:
    def damage(name: str, data: np.ndarray) -> None:
        if name == "model.layers.1.mlp.down_proj.weight":
            at = 208 if kind == Kind.Q6_K else 0
            data.view(np.uint8)[3, at : at + 2] = np.array([np.inf], np.float16).view(np.uint8)

    write_model(tmp_path, kind, damage=damage)
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(ModelLoadError, match=r"model.gguf: tensor blk.1.ffn_down.weight.*finite"),
    ):
        load(tmp_path, weights)


def test_rows_that_do_not_divide_and_other_formats_are_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    with pytest.raises(ModelLoadError, match="q_proj.weight: .*multiple of 32 for q4_1, got 48"):
        load(tmp_path, "q4_1")
    with pytest.raises(UserError, match="weights must be .*q4_0"):
        load(tmp_path, "q6_k")


VALUES = {
    "q4_0": lambda w: quantise(w, "q4_0"),
    "q4_1": lambda w: quantise(w, "q4_1"),
    "q8_0": lambda w: quantise(w, "q8_0"),
    "q8": lambda w: quantise(w, "q8"),
    "bf16": lambda w: quantise(w, "bf16"),
    "fp16": lambda w: quantise(w, "fp16"),
    "fp32": lambda w: quantise(w, "fp32"),
}


@pytest.mark.parametrize("format", VALUES)
@pytest.mark.parametrize("other", VALUES)
def test_a_wider_format_holds_the_same_values(format: str, other: str) -> None:
    w = VALUES[format](torch.randn(5, 64, generator=torch.Generator().manual_seed(2)))
    if is_held(format, other):
        wide = widened(w, other)
        assert (wide.format, wide.q.dtype) == (other, VALUES[other](torch.zeros(1, 32)).q.dtype)
        assert dequantise(wide).tobytes() == dequantise(w).tobytes()
    else:
        with pytest.raises(ValueError, match=f"{other} does not hold the values of {format}"):
            widened(w, other)


@pytest.mark.parametrize("format", VALUES)
def test_matrices_are_joined_along_their_outputs(format: str) -> None:
    parts = [VALUES[format](torch.randn(rows, 64)) for rows in (1, 5, 3)]
    whole = joined(*parts)
    assert isinstance(whole, Quants) and whole.format == format
    assert_same(dequantise(whole), np.concatenate([dequantise(part) for part in parts]), format)
    with pytest.raises(ValueError, match="K=64 like the first, got"):
        joined(parts[0], VALUES[format](torch.zeros(1, 32)))
