"""config.json and generation_config.json in Hugging Face's format -> ModelConfig.

A setting that this runtime does not compute is refused by name, before any weight is read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mtpkern.checkpoints.generation_config import unapplied_settings
from mtpkern.checkpoints.json_files import read_json_object
from mtpkern.config import DTYPES, ModelConfig
from mtpkern.errors import ModelLoadError, printable
from mtpkern.rope import RopeConfig


class _Family(NamedTuple):
    """What an architecture adds to Llama, and its defaults for keys that config.json omits.

    The defaults are those of the configuration classes in transformers.
    """

    model_type: str
    qkv_bias: bool = False  # biases on Q, K and V whatever config.json says, none on O
    bias_flags: tuple[str, ...] = ()  # those of attention_bias and mlp_bias that are read
    qk_norm: bool = False
    window_key: str = ""  # the key that enables a sliding window
    num_kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_positions: int = 32768


_LLAMA = _Family("llama", bias_flags=("attention_bias", "mlp_bias"), max_positions=2048)
_QWEN2 = _Family("qwen2", qkv_bias=True, window_key="use_sliding_window", num_kv_heads=32)
_FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _Family(
        "mistral", window_key="sliding_window", num_kv_heads=8, max_positions=131072
    ),
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": _QWEN2._replace(
        model_type="qwen3",
        qkv_bias=False,
        bias_flags=("attention_bias",),
        qk_norm=True,
        head_dim=128,
    ),
    "MiMoForCausalLM": _QWEN2._replace(model_type="mimo"),
    "MTPLlamaForCausalLM": _LLAMA._replace(model_type="mtp_llama"),
}
# A model saved without its LM head: the same layers, with names that lack the prefix "model.".
_HEADLESS = {name.replace("ForCausalLM", "Model"): name for name in _FAMILIES}
# Defaults of Mistral and Qwen.
_DEFAULT_SLIDING_WINDOW = 4096
_DEFAULT_MAX_WINDOW_LAYERS = 28

# Keys of config.json that would change the computation, and the values that do not (null included).
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "rope_interleaved": (False,),
    "quantization_config": (),
    "compression_config": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logits_scaling": (1.0,),
    "logit_scale": (1.0,),
    "residual_multiplier": (1.0,),
    "embedding_multiplier": (1.0,),
    "is_decoder": (True,),
    "add_cross_attention": (False,),
}
# Kinds of RoPE (see mtpkern/rope.py), and the keys that each must have.
_REQUIRED_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


def read_hf_config(source: str | Path | Mapping[str, Any]) -> ModelConfig:
    """Read a config.json, given by its path, its directory, or its parsed content.

    Where two keys disagree, the one that transformers uses takes precedence. End-of-text ids in a
    generation_config.json beside the file replace those in config.json. Raises ModelLoadError for
    settings that are missing, malformed or not supported.
    """
    if isinstance(source, Mapping):
        return _ConfigReader("config.json", dict(source)).model_config({})
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    generation_file = path.with_name("generation_config.json")
    generation = read_json_object(generation_file) if generation_file.is_file() else {}
    return _ConfigReader(printable(path), read_json_object(path)).model_config(generation)


class _ConfigReader:
    """Reads the keys of one config.json, checks their types, and collects remarks."""

    def __init__(self, where: str, content: dict[str, Any]):
        self.where, self.content = where, content
        self.remarks: list[str] = []

    def error(self, message: str) -> ModelLoadError:
        return ModelLoadError(f"{self.where}: {message}")

    def number(
        self, name: str, default: float | None = None, section: dict[str, Any] | None = None
    ) -> float:
        """A positive number under `name`, in `section` or at the top level."""
        value = (self.content if section is None else section).get(name)
        value = default if value is None else value
        if value is None:
            raise self.error(f"{name} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**53:
            raise self.error(f"{name} must be a positive number, got {printable(repr(value))}")
        return value

    def count(
        self, name: str, default: int | None = None, section: dict[str, Any] | None = None
    ) -> int:
        value = self.number(name, default, section)
        if value != int(value) or value >= 2**31:
            raise self.error(f"{name} must be an integer in 1..2^31-1, got {value}")
        return int(value)

    def flag(self, name: str) -> bool:
        value = self.content.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(f"{name} must be true or false, got {printable(repr(value))}")
        return bool(value)

    def token_ids(self, name: str, section: dict[str, Any]) -> list[int]:
        value = section.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.error(f"{name} must be token ids >= 0, got {printable(repr(value))}")
        return ids

    def default_if_omitted(self, name: str, default: int | None) -> int | None:
        """A family's default, which applies to an omitted key but not to one that is null."""
        return None if name in self.content else default

    def model_config(self, generation: dict[str, Any]) -> ModelConfig:
        family = self.family()
        self.check_neutral_keys()
        num_heads, hidden_size = self.count("num_attention_heads"), self.count("hidden_size")
        default_kv_heads = self.default_if_omitted("num_key_value_heads", family.num_kv_heads)
        num_kv_heads = self.count("num_key_value_heads", default_kv_heads or num_heads)
        if num_heads % num_kv_heads:
            raise self.error(
                f"num_attention_heads must be a multiple of num_key_value_heads={num_kv_heads}, "
                f"got {num_heads}"
            )
        default_head_dim = self.default_if_omitted("head_dim", family.head_dim)
        if (
            self.content.get("head_dim") is None
            and not default_head_dim
            and (hidden_size % num_heads)
        ):
            raise self.error(
                f"hidden_size must be a multiple of num_attention_heads={num_heads} if head_dim is "
                f"not given, got {hidden_size}"
            )
        head_dim = self.count("head_dim", default_head_dim or hidden_size // num_heads)
        if head_dim % 2:
            raise self.error(f"head_dim must be even, got {head_dim}")
        num_layers = self.count("num_hidden_layers")
        positions = self.count("max_position_embeddings", family.max_positions)
        rope = self.rope(positions)
        attention_bias = "attention_bias" in family.bias_flags and self.flag("attention_bias")
        eos_token_ids = self.token_ids("eos_token_id", generation)
        eos_token_ids = eos_token_ids or self.token_ids("eos_token_id", self.content)
        bos_token_ids = self.token_ids("bos_token_id", self.content)
        if unapplied := unapplied_settings(generation):
            self.remarks.append(f"generation_config.json: not applied: {', '.join(unapplied)}")
        return ModelConfig(
            vocab_size=self.count("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=self.count("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(self.number("rms_norm_eps", 1e-6)),
            rope=rope,
            max_position_embeddings=rope.scaled_context(positions),
            tie_word_embeddings=self.flag("tie_word_embeddings"),
            qkv_bias=family.qkv_bias or attention_bias,
            o_bias=attention_bias,
            mlp_bias="mlp_bias" in family.bias_flags and self.flag("mlp_bias"),
            dtype=self.dtype(),
            bos_token_id=next(iter(bos_token_ids), None),
            eos_token_ids=tuple(dict.fromkeys(eos_token_ids)),
            model_type=family.model_type,
            qk_norm=family.qk_norm,
            sliding_window=self.sliding_window(family, num_layers),
            remarks=tuple(self.remarks),
        )

    def family(self) -> _Family:
        """The family of the architecture and model_type, which must agree."""
        architectures = self.content.get("architectures") or []
        model_type = self.content.get("model_type")
        names = architectures if isinstance(architectures, list) else [architectures]
        known = [_FAMILIES.get(_HEADLESS.get(str(name), str(name))) for name in names]
        by_type = {family.model_type: family for family in _FAMILIES.values()}
        if names and (len(names) > 1 or known[0] is None):
            listed = ", ".join(printable(name) for name in names)
            raise self.error(
                f"architecture {listed} is not supported; supported: {', '.join(_FAMILIES)}"
            )
        if model_type is None and known:
            model_type = known[0].model_type  # type: ignore[union-attr]
        if not isinstance(model_type, str) or model_type not in by_type:
            raise self.error(
                f"model_type {printable(model_type)} is not supported; "
                f"supported: {', '.join(by_type)}"
            )
        if known and known[0] != by_type[model_type]:
            raise self.error(
                f"architectures says {printable(names[0])}, but model_type {model_type}: "
                "one of the two is wrong"
            )
        return by_type[model_type]

    def sliding_window(self, family: _Family, num_layers: int) -> int:
        """The sliding window of all layers, 0 if there is none."""
        kinds = self.content.get("layer_types") or []
        if kinds and (not isinstance(kinds, list) or len(kinds) != num_layers):
            raise self.error(f"layer_types must name num_hidden_layers={num_layers} layers")
        default = _DEFAULT_SLIDING_WINDOW if family.window_key else None
        size = self.content.get("sliding_window", default)
        enabled = size is not None
        if family.window_key == "use_sliding_window":
            enabled = enabled and self.flag("use_sliding_window")
            if enabled and not kinds:
                full = self.content.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)
                if not isinstance(full, int) or full < 0:
                    raise self.error(f"max_window_layers must be a count, got {printable(full)}")
                kinds = ["full_attention"] * min(full, num_layers)
                kinds += ["sliding_attention"] * (num_layers - len(kinds))
            # A window that applies to no layer is the same as none.
            enabled = enabled and "sliding_attention" in kinds
        elif not family.window_key and size:
            raise self.error(
                f"sliding_window attention is not supported in {family.model_type}; supported: null"
            )
        window = 0
        if enabled and family.window_key:
            window = self.count("sliding_window", _DEFAULT_SLIDING_WINDOW)
        if window and "full_attention" in kinds:
            raise self.error(
                f"sliding_window={window} in some layers only (layer_types, max_window_layers) is "
                "not supported; supported: in all of them, or none"
            )
        unknown = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
        if not window and "sliding_attention" in kinds:
            raise self.error("layer_types has sliding_attention, but sliding_window is off")
        if unknown:
            raise self.error(
                f"layer_types has {printable(unknown[0])}, which is not supported; supported: "
                "full_attention, sliding_attention"
            )
        return window

    def check_neutral_keys(self) -> None:
        """Refuse keys that would change the computation."""
        for name, neutral in _NEUTRAL.items():
            value = self.content.get(name)
            if value is not None and value not in neutral:
                supported = " or ".join(json.dumps(v) for v in (*neutral, None))
                got = printable(json.dumps(value))
                raise self.error(f"{name}={got} is not supported; supported: {supported}")

    def rope(self, positions: int) -> RopeConfig:
        """RoPE settings, from `rope_scaling` if it is set, else from `rope_parameters`.

        A key inside either takes precedence over the same key at the top level of config.json,
        except original_max_position_embeddings, for which the top level takes precedence.
        """
        name = "rope_scaling" if self.content.get("rope_scaling") else "rope_parameters"
        section = self.content.get(name) or {}
        if not isinstance(section, dict):
            raise self.error(f"{name} must be an object, got {printable(repr(section))}")
        other = self.content.get("rope_parameters")
        if name == "rope_scaling" and other and other != section:
            self.remarks.append(f"{self.where}: rope_parameters is ignored: rope_scaling is set")
        kind = section.get("rope_type", section.get("type", "default"))
        if not isinstance(kind, str) or kind not in _REQUIRED_ROPE_KEYS:
            kinds = ", ".join(_REQUIRED_ROPE_KEYS)
            raise self.error(f"rope type {printable(kind)} is not supported; supported: {kinds}")
        nested = [key for key, value in section.items() if isinstance(value, dict)]
        if nested:
            raise self.error(f"RoPE per layer type ({printable(nested[0])}) is not supported")
        partial = section.get("partial_rotary_factor", self.content.get("partial_rotary_factor"))
        if partial not in (None, 1.0):
            raise self.error(
                f"partial_rotary_factor={printable(partial)} is not supported; supported: 1.0"
            )
        theta = self.number("rope_theta", self.top_level_theta(section) or 10000.0, section)
        values: dict[str, Any] = {
            key: float(self.number(key, None, section)) for key in _REQUIRED_ROPE_KEYS[kind]
        }
        if kind in ("llama3", "yarn"):
            original = self.content.get("original_max_position_embeddings")
            values["original_max_position_embeddings"] = self.count(
                "original_max_position_embeddings",
                positions if original is None else original,
                section if original is None else {},
            )
        if kind == "yarn":
            for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
                if section.get(key):
                    values[key] = float(self.number(key, None, section))
            if section.get("attention_factor") is not None:
                values["attention_factor"] = float(self.number("attention_factor", None, section))
            values["truncate"] = bool(section.get("truncate", True))
        if kind == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
            raise self.error("low_freq_factor must be below high_freq_factor")
        if theta <= 1:
            raise self.error(f"rope_theta must be above 1, got {theta}")
        return RopeConfig(kind=kind, theta=float(theta), **values)

    def top_level_theta(self, section: dict[str, Any]) -> Any:
        """rope_theta at the top level, with a remark if `section` overrides it."""
        theta, override = self.content.get("rope_theta"), section.get("rope_theta")
        if override is not None and theta not in (None, override):
            self.remarks.append(
                f"{self.where}: rope_theta={printable(theta)} is ignored: the RoPE settings have "
                f"rope_theta={printable(override)}"
            )
        return theta

    def dtype(self) -> torch.dtype | None:
        name = self.content.get("dtype") or self.content.get("torch_dtype")
        if name is None:
            return None
        if not isinstance(name, str) or name.removeprefix("torch.") not in DTYPES:
            raise self.error(
                f"dtype {printable(name)} is not supported; supported: {', '.join(DTYPES)}"
            )
        return DTYPES[name.removeprefix("torch.")]
