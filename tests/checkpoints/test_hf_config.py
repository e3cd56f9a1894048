"""What config.json may say, and what is refused by name."""

import json
import math

import pytest
import torch
from conftest import TINY_CONFIG
from hypothesis import given, settings
from hypothesis import strategies as st

from mtpkern.checkpoints.hf_config import read_hf_config
from mtpkern.config import SamplingParams
from mtpkern.errors import ModelLoadError, UserError
from mtpkern.rope import RopeConfig

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_both_spellings_of_a_config_mean_the_same():
    old = TINY_CONFIG | {
        "torch_dtype": "bfloat16",
        "rope_theta": 5e5,
        "rope_scaling": LLAMA3 | {"type": "llama3"},
    }
    new = TINY_CONFIG | {
        "dtype": "bfloat16",
        "rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5},
    }
    del new["rope_theta"]
    parsed = read_hf_config(old)
    assert parsed == read_hf_config(new)
    assert parsed.dtype is torch.bfloat16
    assert parsed.rope == RopeConfig(kind="llama3", theta=5e5, **LLAMA3)


def test_fields_that_are_left_out_have_the_layouts_defaults():
    config = {
        k: v for k, v in TINY_CONFIG.items() if k not in ("num_key_value_heads", "rope_theta")
    }
    parsed = read_hf_config(config)
    assert (parsed.num_kv_heads, parsed.head_dim, parsed.rope.theta) == (6, 8, 10000.0)
    assert (parsed.qkv_bias, parsed.o_bias, parsed.mlp_bias) == (False, False, False)
    assert read_hf_config(TINY_CONFIG | {"head_dim": 10}).head_dim == 10


def test_end_of_text_ids_are_those_of_generation_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    for ids, expected in [([7, 0, 7], (7, 0)), (5, (5,)), (None, (2,)), ([], (2,))]:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        assert read_hf_config(tmp_path).eos_token_ids == expected
        assert read_hf_config(tmp_path / "config.json").eos_token_ids == expected
    assert read_hf_config(TINY_CONFIG).eos_token_ids == (2,)


@pytest.mark.parametrize("key", ["do_sample", "temperature", "max_new_tokens", "stop_strings"])
def test_what_generation_config_asks_for_is_remarked_on(tmp_path, key):
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    (tmp_path / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, key: 3}))
    (remark,) = read_hf_config(tmp_path).remarks
    assert remark == f"generation_config.json: not applied: {key}=3"
    (tmp_path / "generation_config.json").write_text(json.dumps({"pad_token_id": 1, key: None}))
    assert read_hf_config(tmp_path).remarks == ()


FAMILY = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
}


@pytest.mark.parametrize("model_type", FAMILY)
def test_keys_that_are_left_out_mean_what_they_mean_to_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    config_class, architecture = FAMILY[model_type]
    content = {
        "hidden_size": 64,
        "num_attention_heads": 32,
        "num_hidden_layers": 2,
        "vocab_size": 64,
        "intermediate_size": 64,
    }
    theirs = getattr(transformers, config_class)(**content)
    ours = read_hf_config(content | {"model_type": model_type, "architectures": [architecture]})
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 2)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.sliding_window == (getattr(theirs, "sliding_window", None) or 0)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    # A key that is null does not have the default of an omitted key.
    null = read_hf_config(
        content | {"model_type": model_type, "num_key_value_heads": None, "sliding_window": None}
    )
    assert (null.num_kv_heads, null.sliding_window) == (32, 0)


@pytest.mark.parametrize(
    ("given_window", "window"),
    [
        ({"sliding_window": 16}, 0),
        ({"sliding_window": 16, "use_sliding_window": False}, 0),
        ({"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}, 16),
        ({"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3}, 0),
        ({"sliding_window": 16, "use_sliding_window": True}, 0),
        ({"sliding_window": 16, "use_sliding_window": True, "layer_types": ["sliding"] * 3}, 16),
        ({"sliding_window": 16, "use_sliding_window": True, "layer_types": ["full"] * 3}, 0),
        ({"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, 0),
        ({"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, "some layers"),
        ({"sliding_window": 16, "layer_types": ["sliding"] * 3}, "sliding_window is off"),
        ({"layer_types": ["full"] * 2}, "layer_types must name num_hidden_layers=3"),
        ({"layer_types": ["linear"] * 3}, "linear_attention, which is not supported"),
    ],
)
def test_a_window_is_every_layers_or_none(given_window, window):
    content = TINY_CONFIG | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    content |= given_window
    if "layer_types" in given_window:
        content["layer_types"] = [f"{kind}_attention" for kind in given_window["layer_types"]]
    if isinstance(window, str):
        with pytest.raises(ModelLoadError, match=window):
            read_hf_config(content)
    else:
        assert read_hf_config(content).sliding_window == window


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "default", "factor": 4.0}, 512),
        ({"rope_type": "linear", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 512),
        (LLAMA3 | {"rope_type": "llama3"}, 512),
    ],
)
def test_a_context_is_as_long_as_its_rotations_are_stretched_for(rope, positions):
    config = read_hf_config(TINY_CONFIG | {"rope_scaling": rope})
    assert config.max_position_embeddings == positions


def optional(**choices):
    return st.fixed_dictionaries(
        {}, optional={name: st.sampled_from(values) for name, values in choices.items()}
    )


ROPE = optional(
    rope_type=["default", "linear", "yarn", "llama3"],
    type=["default", "linear", "yarn"],
    factor=[4.0, 2],
    rope_theta=[1e4, 1e6],
    original_max_position_embeddings=[128, 64],
    beta_fast=[16, 0],
    attention_factor=[1.2, None],
    mscale=[0.7],
    mscale_all_dim=[0.3, 0],
    truncate=[False, True],
    low_freq_factor=[1.0],
    high_freq_factor=[4.0],
    partial_rotary_factor=[1.0],
)


@settings(max_examples=150, deadline=None)
@given(
    given_rope=st.fixed_dictionaries(
        {}, optional={"rope_scaling": ROPE | st.none(), "rope_parameters": ROPE | st.none()}
    ),
    beside=optional(rope_theta=[5e5], original_max_position_embeddings=[32]),
)
def test_rope_settings_in_several_places_are_read_as_transformers_reads_them(given_rope, beside):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    content = {k: v for k, v in TINY_CONFIG.items() if k != "rope_theta"} | {"head_dim": 16}
    content = json.loads(json.dumps(content | given_rope | beside))
    try:
        config = read_hf_config(json.loads(json.dumps(content)))
    except ModelLoadError as error:
        assert "missing" in str(error)
        return
    theirs = llama.LlamaRotaryEmbedding(llama.LlamaConfig(**content))
    ours, factor = config.rope.inverse_frequencies(16)
    torch.testing.assert_close(ours, theirs.inv_freq, rtol=3e-6, atol=0)
    assert factor == pytest.approx(theirs.attention_scaling)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"architectures": ["Qwen9ForCausalLM"]}, "Qwen9ForCausalLM.*supported: LlamaForCausalLM"),
        (
            {"architectures": ["Qwen3ForCausalLM"]},
            "architectures says Qwen3ForCausalLM, but model_type llama",
        ),
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"architectures": None, "model_type": "gemma"}, "gemma.*supported: llama, mistral"),
        ({"architectures": ["LlamaForCausalLM", "LlamaModel"]}, "architecture LlamaForCausalLM, "),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_act": "gelu"}, "hidden_act.*gelu.*supported.*silu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*gptq"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type dynamic.*supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype float8_e4m3fn.*supported: float32"),
        ({"num_key_value_heads": 4}, "multiple of num_key_value_heads=4, got 6"),
        ({"hidden_size": 50}, "hidden_size must be a multiple"),
        ({"head_dim": 7}, "head_dim must be even, got 7"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": -1}, "vocab_size must be a positive number, got -1"),
        ({"vocab_size": 10.5}, "vocab_size must be an integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(overrides, message):
    with pytest.raises(ModelLoadError, match=message) as refusal:
        read_hf_config(TINY_CONFIG | overrides)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", "[" * 100_000])
def test_a_config_that_is_not_an_object_is_one_clear_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelLoadError, match="config.json"):
        read_hf_config(tmp_path)


def test_control_characters_of_a_config_do_not_reach_the_terminal():
    with pytest.raises(ModelLoadError) as refusal:
        read_hf_config(TINY_CONFIG | {"architectures": ["\x1b[31mEvil\n"]})
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("head_dim", [8, 64, 10])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3"} | LLAMA3,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.8, "truncate": False},
        {"rope_type": "yarn", "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 16},
    ],
)
def test_rope_frequencies_are_those_of_transformers(rope, head_dim):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    content = TINY_CONFIG | {"head_dim": head_dim, "rope_scaling": rope, "rope_theta": 20000.0}
    theirs = llama.LlamaRotaryEmbedding(llama.LlamaConfig(**content))
    ours, factor = read_hf_config(content).rope.inverse_frequencies(head_dim)
    torch.testing.assert_close(ours, theirs.inv_freq, rtol=2e-6, atol=0)
    assert factor == pytest.approx(theirs.attention_scaling)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2.0},
        {"seed": -1},
        {"seed": True},
        {"n": 0},
        {"n": 2},
        {"stop": ("",)},
        {"stop": (1,)},
        {"stop": 1},
        {"stop": "\ud800"},
        {"stop_token_ids": (-1,)},
        {"stop_token_ids": 5},
        {"stop_token_ids": ("</s>",)},
        {"min_tokens": -1},
        {"min_tokens": 257},
    ],
)
def test_sampling_parameters_out_of_range_are_named(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=name):
        SamplingParams(**wrong)


def test_sampling_parameters_that_are_not_supported_are_refused_with_a_list():
    with pytest.raises(UserError, match="repetition_penalty is not supported.*temperature"):
        SamplingParams(repetition_penalty=1.1)


def test_a_single_stop_string_is_one_stop_string():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None, stop_token_ids=None).stop == ()  # type: ignore[arg-type]
