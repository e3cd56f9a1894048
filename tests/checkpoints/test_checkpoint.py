"""Loading safetensors: the right tensors in the right layout, and clear refusals."""

import json
import re
import resource
import subprocess
import sys

import pytest
import torch
from conftest import TINY_CONFIG, tiny_checkpoint, tiny_tensors, write_sharded
from safetensors.torch import load_file, save_file

from mtpkern.checkpoints.directory import load_tensors
from mtpkern.checkpoints.llama import load_config
from mtpkern.checkpoints.model_weights import load_model
from mtpkern.errors import ModelLoadError

ODD = {
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
    "head_dim": 10,
    "num_key_value_heads": 3,
}


def rewrite(directory, change):
    """Load the single weights file, change the dict of tensors in place, and write it again."""
    tensors = load_file(directory / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def flat(weights):
    fields = [vars(layer) for layer in weights.layers]
    named = {f"{i}.{name}": t for i, layer in enumerate(fields) for name, t in layer.items()}
    return named | {"e": weights.embedding, "n": weights.norm, "h": weights.lm_head}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overrides", [{}, ODD])
def test_fused_weights_are_their_parts_stacked(tmp_path, overrides, dtype):
    tiny_checkpoint(tmp_path, **overrides)
    config, weights = load_model(tmp_path, dtype=dtype)
    raw = {name: tensor.to(dtype) for name, tensor in load_tensors(tmp_path).items()}
    assert len(weights.layers) == config.num_layers == 3
    for i, layer in enumerate(weights.layers):
        name = f"model.layers.{i}."
        for kind in ("weight", "bias"):
            if kind == "bias" and not overrides:
                assert layer.qkv_bias is layer.o_bias is layer.gate_up_bias is layer.down_bias
                assert layer.qkv_bias is None
                continue
            suffix = "" if kind == "weight" else "_bias"
            qkv = [raw[f"{name}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            gate_up = [raw[f"{name}mlp.{part}_proj.{kind}"] for part in ("gate", "up")]
            assert torch.equal(getattr(layer, f"qkv{suffix}"), torch.cat(qkv))
            assert torch.equal(getattr(layer, f"gate_up{suffix}"), torch.cat(gate_up))
            for field, part in (("o", "self_attn.o_proj"), ("down", "mlp.down_proj")):
                assert torch.equal(getattr(layer, field + suffix), raw[f"{name}{part}.{kind}"])
        assert torch.equal(layer.input_norm, raw[f"{name}input_layernorm.weight"])
        post = raw[f"{name}post_attention_layernorm.weight"]
        assert torch.equal(layer.post_attention_norm, post)
    assert torch.equal(weights.embedding, raw["model.embed_tokens.weight"])
    assert (weights.lm_head is weights.embedding) == (not overrides)
    assert all(
        t is None or (t.dtype == dtype and t.is_contiguous()) for t in flat(weights).values()
    )


def test_shards_give_what_a_single_file_gives(tmp_path):
    _, single = load_model(tiny_checkpoint(tmp_path / "1", **ODD), dtype=torch.float32)
    _, sharded = load_model(tiny_checkpoint(tmp_path / "3", shards=3, **ODD), dtype=torch.float32)
    for name, tensor in flat(single).items():
        other = flat(sharded)[name]
        assert tensor is other is None or torch.equal(tensor, other), name


def test_a_checkpoint_does_not_change_when_its_tensors_are_written_to(tmp_path):
    tiny_checkpoint(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    _, weights = load_model(tmp_path, dtype=torch.float32)
    weights.embedding.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


DOWN = "model.layers.2.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(DOWN), f"{DOWN} is missing"),
        (lambda t: t.update({DOWN: t[DOWN].T.contiguous()}), f"{DOWN} must be .48, 112."),
        (lambda t: t.update({DOWN: t[DOWN].double()}), f"{DOWN} has dtype F64; supported: F32"),
        (lambda t: t.update({DOWN: t[DOWN].to(torch.float8_e4m3fn)}), "dtype F8_E4M3"),
        (lambda t: t[DOWN].view(-1)[-1:].fill_(float("nan")), f"{DOWN} holds values.*not finite"),
        (lambda t: t[DOWN].view(-1)[0:1].fill_(float("-inf")), f"{DOWN} holds values"),
        (lambda t: t.update({"model.layers.3.x": torch.ones(1)}), "model.layers.3.x has no place"),
        (lambda t: t.update({"a\x1b[2Jb\n": torch.ones(1)}), r"a\\x1b\[2Jb\\n has no place"),
    ],
)
def test_a_wrong_tensor_is_refused_by_file_and_name(tmp_path, change, message):
    tiny_checkpoint(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ModelLoadError, match=message) as refusal:
        load_model(tmp_path, dtype=torch.float32)
    assert str(refusal.value).isprintable() and str(tmp_path) in str(refusal.value)


def test_not_finite_weights_inside_a_fused_matrix_are_found(tmp_path):
    tiny_checkpoint(tmp_path)
    name = "model.layers.1.self_attn.v_proj.weight"
    rewrite(tmp_path, lambda t: t[name].view(-1)[5:6].fill_(float("inf")))
    with pytest.raises(ModelLoadError, match=name):
        load_model(tmp_path, dtype=torch.bfloat16)


def test_values_that_overflow_the_wanted_dtype_are_refused(tmp_path):
    tiny_checkpoint(tmp_path)
    rewrite(tmp_path, lambda t: t[DOWN].view(-1)[0:1].fill_(1e6))
    load_model(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(ModelLoadError, match=f"{DOWN}.*torch.float16"):
        load_model(tmp_path, dtype=torch.float16)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1, -1000])
def test_half_a_file_is_one_clear_line(tmp_path, keep):
    file = tiny_checkpoint(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match="model.safetensors is not a whole safetensors file"):
        load_model(tmp_path, dtype=torch.float32)


def test_a_garbage_header_is_one_clear_line(tmp_path):
    file = tiny_checkpoint(tmp_path) / "model.safetensors"
    for garbage in (b"\xff" * 64, (20).to_bytes(8, "little") + b"{not json at all....}"):
        file.write_bytes(garbage)
        with pytest.raises(ModelLoadError, match="not a whole safetensors file"):
            load_model(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_refused(tmp_path, file):
    tiny_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    with pytest.raises(ModelLoadError, match=f"{file}.*pickled"):
        load_model(tmp_path, dtype=torch.float32)
    with pytest.raises(ModelLoadError, match="pickled"):
        load_tensors(tmp_path / file)


def edit_index(directory, change):
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "shard",
    ["../w.safetensors", "/etc/w.safetensors", "a/b.safetensors", "..", "w.bin", "C:w.safetensors"],
)
def test_a_shard_is_a_plain_file_name_inside_the_directory(tmp_path, shard):
    tiny_checkpoint(tmp_path / "model", shards=2)
    write_sharded(tmp_path, tiny_tensors(TINY_CONFIG), 1)
    (tmp_path / "model.safetensors").rename(tmp_path / "w.safetensors")
    edit_index(tmp_path / "model", lambda names: names.update({DOWN: shard}))
    with pytest.raises(ModelLoadError, match=f"shard {re.escape(shard)} must be a plain file name"):
        load_model(tmp_path / "model", dtype=torch.float32)


def test_every_weight_is_in_the_shard_that_the_index_names_and_in_no_other(tmp_path):
    tiny_checkpoint(tmp_path / "moved", shards=2)
    files = sorted(p.name for p in (tmp_path / "moved").glob("*.safetensors"))
    names = list(load_file(tmp_path / "moved" / files[0]))
    edit_index(tmp_path / "moved", lambda m: m.update({names[0]: files[1]}))
    with pytest.raises(ModelLoadError, match="is not where"):
        load_model(tmp_path / "moved", dtype=torch.float32)

    tiny_checkpoint(tmp_path / "absent", shards=2)
    edit_index(tmp_path / "absent", lambda m: m.update({"model.ghost": files[1]}))
    with pytest.raises(ModelLoadError, match="model.ghost is missing"):
        load_model(tmp_path / "absent", dtype=torch.float32)

    tiny_checkpoint(tmp_path / "double", shards=2)
    second = load_file(tmp_path / "double" / files[1])
    save_file(second | {names[0]: torch.ones(1)}, tmp_path / "double" / files[1])
    with pytest.raises(ModelLoadError, match="too"):
        load_model(tmp_path / "double", dtype=torch.float32)

    tiny_checkpoint(tmp_path / "gone", shards=2)
    (tmp_path / "gone" / files[1]).unlink()
    with pytest.raises(ModelLoadError, match=f"shard {files[1]} is missing"):
        load_model(tmp_path / "gone", dtype=torch.float32)


def test_the_config_is_judged_before_any_weight_is_read(tmp_path):
    tiny_checkpoint(tmp_path, hidden_act="gelu")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelLoadError, match="hidden_act"):
        load_model(tmp_path, dtype=torch.float32)


def test_a_place_without_a_model_is_one_clear_line(tmp_path):
    with pytest.raises(ModelLoadError, match="not a directory"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(ModelLoadError, match="no config.json"):
        load_config(tmp_path)
    tiny_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="no model.safetensors"):
        load_model(tmp_path, dtype=torch.float32)


def test_raw_tensors_come_under_their_names_in_any_dtype(tmp_path):
    saved = {
        "ids": torch.arange(5, dtype=torch.int32),
        "none": torch.empty(0, 3),
        "x": torch.ones(2),
    }
    save_file(saved, tmp_path / "model.safetensors")
    loaded = load_tensors(tmp_path)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert list(load_tensors(tmp_path, ["x"])) == ["x"]
    with pytest.raises(ModelLoadError, match="tensor y is missing"):
        load_tensors(tmp_path, ["y"])


MEASURE = """
import resource, sys, torch
from mtpkern.checkpoints.model_weights import load_model
load_model(sys.argv[1] + "/small", dtype=torch.bfloat16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_model(sys.argv[1] + "/large", dtype=torch.bfloat16)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_loading_keeps_no_weight_in_memory_twice(tmp_path):
    assert resource.RUSAGE_SELF == 0
    tiny_checkpoint(tmp_path / "small", dtype=torch.bfloat16)
    tiny_checkpoint(
        tmp_path / "large",
        dtype=torch.bfloat16,
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=8,
    )
    run = [sys.executable, "-c", MEASURE, str(tmp_path)]
    grown = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout) * 1024
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert grown < 1.15 * size + 4e6
