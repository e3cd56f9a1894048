"""Where two files or keys disagree, the one that transformers uses takes precedence."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from llama_layouts import write_layout
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtpkern import LLM, SamplingParams
from mtpkern.checkpoints.hf_config import read_hf_config
from mtpkern.checkpoints.llama import load_config
from mtpkern.cli.inspect import describe_checkpoint
from mtpkern.errors import ModelLoadError

PROMPT = [1, 40, 17, 5, 93, 40, 17, 66, 2, 81, 12, 7, 29]
NEW_TOKENS = 16
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def edit(directory: Path, file: str = "config.json", /, **values: Any) -> None:
    """Set keys of a JSON file; ... removes one."""
    path = directory / file
    content = json.loads(path.read_text()) if path.exists() else {}
    content = {key: value for key, value in (content | values).items() if value is not ...}
    path.write_text(json.dumps(content))


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Replace the tensors of the single file by `change(tensors)`."""
    tensors = change(load_file(directory / "model.safetensors"))
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(own, directory / "model.safetensors", metadata={"format": "pt"})


def theirs(directory: Path, prompt: list[int] = PROMPT) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def ours(directory: Path, prompt: list[int] = PROMPT) -> list[int]:
    llm = LLM(directory, dtype="float32", max_batch=1, max_length=512)
    return llm.generate([prompt], SamplingParams(max_tokens=NEW_TOKENS))[0].token_ids


DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e4}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "rope_scaling beside rope_parameters": (
        "qwen3",
        {"rope_parameters": DEFAULT_ROPE, "rope_scaling": YARN},
    ),
    "the other way round": (
        "qwen2",
        {"rope_parameters": YARN | {"rope_theta": 500.0}, "rope_scaling": DEFAULT_ROPE},
    ),
    "rope_scaling of null beside rope_parameters": (
        "tied",
        {"rope_parameters": YARN | {"rope_theta": 500.0}, "rope_scaling": None},
    ),
    "rope_theta inside and beside": (
        "mistral",
        {"rope_theta": 50.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "the original context inside and beside": (
        "tied",
        {
            "rope_theta": 500.0,
            "rope_parameters": YARN,
            "original_max_position_embeddings": 16,
        },
    ),
    "type and rope_type": (
        "tied",
        {"rope_parameters": {"type": "linear", "rope_type": "default", "factor": 8.0}},
    ),
    "a window that Mistral's config cannot switch off": (
        "mistral_window_7",
        {"use_sliding_window": False},
    ),
    "a window that Qwen's config does not switch on": (
        "qwen2",
        {"sliding_window": 5, "use_sliding_window": ..., "layer_types": ...},
    ),
    "Mistral without a count of KV heads": (
        "mistral",
        {"num_key_value_heads": ...},
    ),
    "flags of biases that the architecture does not have": (
        "mistral",
        {"attention_bias": True, "mlp_bias": True},
    ),
    "a flag of biases that the architecture always has": (
        "qwen2",
        {"attention_bias": False, "mlp_bias": True},
    ),
    "an end of text in generation_config.json": ("tied", {"eos_token_id": 7}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CONFIGS)
def test_the_tokens_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    family, values = CONFIGS[case]
    changes: dict[str, Any] = {}
    if "num_key_value_heads" in values:
        changes = {"num_key_value_heads": 8, "num_attention_heads": 16}
    write_layout(family, tmp_path, **changes)
    (tmp_path / "generation_config.json").unlink()
    edit(tmp_path, **values)
    if "eos_token_id" in values:
        endless = theirs(tmp_path)
        edit(tmp_path, "generation_config.json", eos_token_id=[endless[5], 3])
        edit(tmp_path, eos_token_id=endless[2])
    tokens = theirs(tmp_path)
    assert ours(tmp_path) == tokens
    assert len(set(tokens)) > 3


def test_a_trained_lm_head_is_used_although_it_is_called_tied(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_layout("qwen2", tmp_path)
    tied = ours(tmp_path)
    head = 0.3 * torch.randn(131, 48, generator=torch.Generator().manual_seed(5))
    rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": head})
    assert not load_config(tmp_path).tie_word_embeddings
    with caplog.at_level(logging.WARNING, "mtpkern"):
        assert ours(tmp_path) == theirs(tmp_path) != tied
    assert [r.message for r in caplog.records if "lm_head.weight differs" in r.message]
    rows = dict(describe_checkpoint(tmp_path))
    assert "lm_head.weight differs" in rows["remark"] and "(tied)" not in rows["sizes"]


def test_a_copy_of_the_embedding_stays_tied(tmp_path: Path) -> None:
    write_layout("qwen2", tmp_path)
    tied = ours(tmp_path)
    rewrite(tmp_path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]})
    assert load_config(tmp_path).tie_word_embeddings
    assert ours(tmp_path) == theirs(tmp_path) == tied


def test_a_tied_matrix_may_be_saved_as_the_lm_head_alone(tmp_path: Path) -> None:
    write_layout("tied", tmp_path)
    tied = ours(tmp_path)

    def swap(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        return tensors

    rewrite(tmp_path, swap)
    assert ours(tmp_path) == theirs(tmp_path) == tied


def test_a_single_file_counts_before_an_index(tmp_path: Path) -> None:
    write_layout("tied", tmp_path / "index")
    write_layout("mlp_biases", tmp_path / "other", mlp_bias=False, tie_word_embeddings=True)
    directory = tmp_path / "index"
    shard = directory / "model-00001-of-00001.safetensors"
    (directory / "model.safetensors").rename(shard)
    index = {"weight_map": dict.fromkeys(load_file(shard), shard.name)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    of_index = ours(directory)
    single = (tmp_path / "other" / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(single)
    assert ours(directory) == theirs(directory) != of_index
    assert "model.safetensors.index.json beside it is ignored" in dict(
        describe_checkpoint(directory)
    ).get("remark", "")


@pytest.mark.parametrize("family", ["tied", "qwen2", "qwen3", "mistral"])
def test_a_trunk_saved_without_its_head_is_a_model_where_they_are_tied(
    family: str, tmp_path: Path
) -> None:
    model = write_layout(family, tmp_path / "whole", tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path / "bare")
    assert ours(tmp_path / "bare") == theirs(tmp_path / "bare") == ours(tmp_path / "whole")
    edit(tmp_path / "bare", tie_word_embeddings=False)
    with pytest.raises(ModelLoadError, match="lm_head.weight is missing.*tie_word_embeddings"):
        ours(tmp_path / "bare")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: name.replace("model.layers.0.", "model.layers.0._orig_mod."),
        lambda name: (
            f"_fsdp_wrapped_module.{name.replace('.mlp.', '._checkpoint_wrapped_module.mlp.')}"
        ),
    ],
)
def test_what_wrappers_put_into_names_is_taken_out(
    wrap: Callable[[str], str], tmp_path: Path
) -> None:
    write_layout("qwen3", tmp_path)
    plain = theirs(tmp_path)
    rewrite(tmp_path, lambda tensors: {wrap(name): t for name, t in tensors.items()})
    assert ours(tmp_path) == plain


def test_two_tensors_of_one_name_are_both_named(tmp_path: Path) -> None:
    write_layout("tied", tmp_path)
    norm = "model.norm.weight"
    rewrite(tmp_path, lambda tensors: tensors | {f"module.{norm}": torch.ones(48)})
    with pytest.raises(
        ModelLoadError, match=f"module.{norm} and {norm} are both|{norm} and module"
    ):
        ours(tmp_path)


def test_buffers_that_trainers_save_are_passed_over(tmp_path: Path) -> None:
    write_layout("tied", tmp_path)
    buffers = {
        "model.rotary_emb.inv_freq": torch.ones(6),
        "model.rotary_emb.original_inv_freq": torch.ones(6),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(6),
        "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 9, 12),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 9, 9, dtype=torch.bool),
    }
    rewrite(tmp_path, lambda tensors: tensors | buffers)
    assert ours(tmp_path) == theirs(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.0.self_attn.q_proj.bias", r"has no place.*attention_bias"),
        ("model.layers.0.mlp.up_proj.bias", r"has no place.*mlp_bias"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "adapter"),
        ("score.weight", "score.weight has no place"),
    ],
)
def test_a_surplus_tensor_is_named_with_the_setting_that_excludes_it(
    name: str, message: str, tmp_path: Path
) -> None:
    write_layout("tied", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {name: torch.ones(48)})
    with pytest.raises(ModelLoadError, match=message):
        ours(tmp_path)


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_yarns_context_is_the_stretched_one(spelling: str, tmp_path: Path) -> None:
    write_layout("rope_yarn", tmp_path, spelling=spelling)
    edit(tmp_path, max_position_embeddings=32)
    assert load_config(tmp_path).max_position_embeddings == 128
    edit(tmp_path, max_position_embeddings=256)
    assert load_config(tmp_path).max_position_embeddings == 256
    prompt = [(i * 37 + 11) % 131 for i in range(100)]
    edit(tmp_path, max_position_embeddings=32)
    llm = LLM(tmp_path, dtype="float32", max_batch=1, max_length=128)
    tokens = llm.generate([prompt], SamplingParams(max_tokens=NEW_TOKENS))[0].token_ids
    assert tokens == theirs(tmp_path, prompt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_config_without_a_dtype_leaves_it_to_the_tensors(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    write_layout("tied", tmp_path)
    rewrite(tmp_path, lambda tensors: {name: t.to(dtype) for name, t in tensors.items()})
    edit(tmp_path, dtype=..., torch_dtype=None)
    assert read_hf_config(tmp_path).dtype is None
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert LLM(tmp_path, max_length=32).dtype == model.dtype == dtype
    edit(tmp_path, dtype="float32", torch_dtype="bfloat16")
    assert LLM(tmp_path, max_length=32).dtype == torch.float32


def test_settings_of_generation_config_that_are_not_applied_are_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_layout("tied", tmp_path)
    edit(
        tmp_path,
        "generation_config.json",
        do_sample=True,
        temperature=0.6,
        top_k=None,
        top_p=1.0,
        repetition_penalty=1.1,
        eos_token_id=[2],
    )
    with caplog.at_level(logging.WARNING, "mtpkern"):
        ours(tmp_path)
    (message,) = [r.getMessage() for r in caplog.records]
    assert message == (
        "generation_config.json: not applied: do_sample=true, temperature=0.6, "
        "repetition_penalty=1.1"
    )
    assert dict(describe_checkpoint(tmp_path))["remark"] == message


def test_a_model_without_a_tokenizer_is_described(tmp_path: Path) -> None:
    write_layout("tied", tmp_path)
    rows = dict(describe_checkpoint(tmp_path))
    expected = "none: prompts must be token ids (generate --token-ids)"
    assert rows["tokenizer"] == expected
    assert rows["will run"].startswith("yes") and rows["dtype"].startswith("F32 on disk")
