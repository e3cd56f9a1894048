"""What a model is, and what a caller asks for: frozen, checked values and nothing else.

`ModelConfig.from_json` reads a checkpoint's config.json and refuses by name whatever this runtime
does not compute, before any weight is read. `SamplingParams` shapes one request.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtpkern.errors import ModelLoadError, UserError, printable, reason
from mtpkern.validation import choice, flag, integer, real, shown

MAX_SPECULATIVE_TOKENS = 16
MAX_COMPLETIONS = 1 << 14


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: the base `theta` and how its frequencies are stretched.

    `kind` is "default", "linear" (positions divided by `factor`), "llama3" (Llama 3.1) or "yarn"
    (https://arxiv.org/abs/2309.00071). Fields that a kind does not use keep their defaults.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def inverse_frequencies(self, head_dim: int) -> tuple[Tensor, float]:
        """Radians per position, float32 [D/2], and a factor on cos and sin (1.0 but for yarn)."""
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        plain = 1.0 / self.theta**exponent
        if self.kind == "linear":
            return plain / self.factor, 1.0
        if self.kind == "llama3":
            # Full turns within the original context: fast pairs stay, slow ones are stretched.
            turns = self.original_max_position_embeddings * plain / (2 * math.pi)
            width = self.high_freq_factor - self.low_freq_factor
            keep = ((turns - self.low_freq_factor) / width).clamp(0, 1)
            return plain * keep + plain / self.factor * (1 - keep), 1.0
        if self.kind == "yarn":
            low = self._yarn_pair(self.beta_fast, head_dim)
            high = self._yarn_pair(self.beta_slow, head_dim)
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, head_dim - 1)
            pair = torch.arange(head_dim // 2, dtype=torch.float32)
            stretch = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
            return plain * (1 - stretch) + plain / self.factor * stretch, self._yarn_attention()
        return plain, 1.0

    def reach(self, positions: int) -> int:
        """The positions that a model for `positions` reaches with its frequencies stretched.

        Published configs state a linear or YaRN context before stretching, or after it.
        """
        if self.kind == "linear":
            return max(positions, int(positions * self.factor))
        if self.kind == "yarn":
            return max(positions, int(self.original_max_position_embeddings * self.factor))
        return positions

    def _yarn_pair(self, turns: float, head_dim: int) -> float:
        """The (fractional) pair index that makes `turns` full turns within the original context."""
        wavelength = self.original_max_position_embeddings / (2 * math.pi * turns)
        return head_dim * math.log(wavelength) / (2 * math.log(self.theta))

    def _yarn_attention(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor

        def temperature(mscale: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return temperature(self.mscale) / temperature(self.mscale_all_dim)
        return temperature(1.0)


# Keys of config.json that would change the computation, with the values under which they do not.
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
_ROPE_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Family(NamedTuple):
    """What an architecture adds to Llama's computation, and what it takes keys left out to mean.

    The defaults are those of the configuration classes of transformers.
    """

    model_type: str
    qkv_bias: bool = False  # always, and none for o
    bias_flags: tuple[str, ...] = ()  # of attention_bias and mlp_bias, those that count
    qk_norm: bool = False
    window: str = ""  # what switches a sliding window on: "sliding_window" or "use_sliding_window"
    kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    context: int = 32768


_LLAMA = _Family("llama", bias_flags=("attention_bias", "mlp_bias"), context=2048)
_QWEN2 = _Family("qwen2", qkv_bias=True, window="use_sliding_window", kv_heads=32)
_FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA._replace(
        model_type="mistral", bias_flags=(), window="sliding_window", kv_heads=8, context=131072
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
# A trunk saved without its LM head: the same layers, names without "model." before them.
_TRUNKS = {name.replace("ForCausalLM", "Model"): name for name in _FAMILIES}
# The window that Mistral and Qwen have where config.json names none.
_DEFAULT_WINDOW = 4096
_DEFAULT_MAX_WINDOW_LAYERS = 28
# Settings of generation_config.json that say nothing about which tokens come, and the values at
# which the others say nothing.
_GENERATION_SILENT = {
    "_from_model_config",
    "transformers_version",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "use_cache",
    "return_dict_in_generate",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "trust_remote_code",
}
_GENERATION_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_k": (0,),
    "min_length": (0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "temperature": (1.0,),
    "top_p": (1.0,),
    "typical_p": (1.0,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "length_penalty": (1.0,),
    "guidance_scale": (1.0,),
}


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and settings of one Llama-layout model. Symbols: V, E, F, L, Hq, Hk, D in order."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    dtype: torch.dtype | None  # None where nothing says
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    model_type: str = "llama"
    qk_norm: bool = False  # RMS norm of each head of q and k, before it is rotated
    sliding_window: int = 0  # positions that a token sees, its own included; 0: all
    # What of the files was left out or overruled, a line each, for whoever loads or inspects them.
    remarks: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> "ModelConfig":
        """Read a config.json (its path, its directory, or its content already parsed).

        Where two keys disagree, that one counts which counts in transformers. The end-of-text ids
        of a generation_config.json beside the file, if it has any, replace its own. Raises
        ModelLoadError for what is missing, malformed or not supported.
        """
        if isinstance(source, Mapping):
            return _Reader("config.json", dict(source)).model_config({})
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        generation = path.with_name("generation_config.json")
        extra = read_json_object(generation) if generation.is_file() else {}
        return _Reader(printable(path), read_json_object(path)).model_config(extra)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ModelLoadError when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadError(f"{printable(path)}: {reason(error, path)}") from None
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{printable(path)} is not valid JSON: {printable(error)}") from None
    if not isinstance(content, dict):
        raise ModelLoadError(f"{printable(path)} must hold a JSON object")
    return content


class _Reader:
    """Typed, named access to the fields of one config.json."""

    def __init__(self, where: str, content: dict[str, Any]):
        self.where, self.content = where, content
        self.remarks: list[str] = []

    def refuse(self, message: str) -> ModelLoadError:
        return ModelLoadError(f"{self.where}: {message}")

    def number(self, name: str, default: float | None = None, within: Any = None) -> float:
        value = (self.content if within is None else within).get(name)
        value = default if value is None else value
        if value is None:
            raise self.refuse(f"{name} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**53:
            raise self.refuse(f"{name} must be a positive number, got {printable(repr(value))}")
        return value

    def count(self, name: str, default: int | None = None, within: Any = None) -> int:
        value = self.number(name, default, within)
        if value != int(value) or value >= 2**31:
            raise self.refuse(f"{name} must be an integer in 1..2^31-1, got {value}")
        return int(value)

    def flag(self, name: str) -> bool:
        value = self.content.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(f"{name} must be true or false, got {printable(repr(value))}")
        return bool(value)

    def model_config(self, generation: dict[str, Any]) -> ModelConfig:
        family = self.family()
        self.check_settings()
        heads, hidden = self.count("num_attention_heads"), self.count("hidden_size")
        kv_heads = self.count(
            "num_key_value_heads", self.absent("num_key_value_heads", family.kv_heads) or heads
        )
        if heads % kv_heads:
            raise self.refuse(
                f"num_attention_heads must be a multiple of num_key_value_heads={kv_heads}, "
                f"got {heads}"
            )
        usual = self.absent("head_dim", family.head_dim)
        if self.content.get("head_dim") is None and not usual and hidden % heads:
            raise self.refuse(
                f"hidden_size must be a multiple of num_attention_heads={heads} where head_dim is "
                f"not given, got {hidden}"
            )
        head_dim = self.count("head_dim", usual or hidden // heads)
        if head_dim % 2:
            raise self.refuse(f"head_dim must be even, got {head_dim}")
        layers = self.count("num_hidden_layers")
        positions = self.count("max_position_embeddings", family.context)
        rope = self.rope(positions)
        attention_bias = "attention_bias" in family.bias_flags and self.flag("attention_bias")
        ends = self.token_ids("eos_token_id", generation)
        ends = ends or self.token_ids("eos_token_id", self.content)
        starts = self.token_ids("bos_token_id", self.content)
        self.note_left_out(generation)
        return ModelConfig(
            vocab_size=self.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.count("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(self.number("rms_norm_eps", 1e-6)),
            rope=rope,
            max_position_embeddings=rope.reach(positions),
            tie_word_embeddings=self.flag("tie_word_embeddings"),
            qkv_bias=family.qkv_bias or attention_bias,
            o_bias=attention_bias,
            mlp_bias="mlp_bias" in family.bias_flags and self.flag("mlp_bias"),
            dtype=self.dtype(),
            bos_token_id=next(iter(starts), None),
            eos_token_ids=tuple(dict.fromkeys(ends)),
            model_type=family.model_type,
            qk_norm=family.qk_norm,
            sliding_window=self.sliding_window(family, layers),
            remarks=tuple(self.remarks),
        )

    def family(self) -> _Family:
        """What the architecture adds; ModelLoadError for one that is not supported."""
        architectures = self.content.get("architectures") or []
        model_type = self.content.get("model_type")
        names = architectures if isinstance(architectures, list) else [architectures]
        known = [_FAMILIES.get(_TRUNKS.get(str(name), str(name))) for name in names]
        by_type = {family.model_type: family for family in _FAMILIES.values()}
        if names and (len(names) > 1 or known[0] is None):
            listed = ", ".join(printable(name) for name in names)
            raise self.refuse(
                f"architecture {listed} is not supported; supported: {', '.join(_FAMILIES)}"
            )
        if model_type is None and known:
            model_type = known[0].model_type  # type: ignore[union-attr]
        if not isinstance(model_type, str) or model_type not in by_type:
            raise self.refuse(
                f"model_type {printable(model_type)} is not supported; "
                f"supported: {', '.join(by_type)}"
            )
        if known and known[0] != by_type[model_type]:
            raise self.refuse(
                f"architectures says {printable(names[0])}, but model_type {model_type}: "
                "one of the two is wrong"
            )
        return by_type[model_type]

    def absent(self, name: str, default: int | None) -> int | None:
        """The family's default, which a key that is there and null does not have."""
        return None if name in self.content else default

    def sliding_window(self, family: _Family, layers: int) -> int:
        """Positions that a token sees in every layer; 0 for all of them."""
        kinds = self.content.get("layer_types") or []
        if kinds and (not isinstance(kinds, list) or len(kinds) != layers):
            raise self.refuse(f"layer_types must name num_hidden_layers={layers} layers")
        size = self.content.get("sliding_window", _DEFAULT_WINDOW if family.window else None)
        wanted = size is not None
        if family.window == "use_sliding_window":
            wanted = wanted and self.flag("use_sliding_window")
            if wanted and not kinds:
                full = self.content.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)
                if not isinstance(full, int) or full < 0:
                    raise self.refuse(f"max_window_layers must be a count, got {printable(full)}")
                kinds = ["full_attention"] * min(full, layers)
                kinds += ["sliding_attention"] * (layers - len(kinds))
            # A window that no layer has is none.
            wanted = wanted and "sliding_attention" in kinds
        elif not family.window and size:
            raise self.refuse(
                f"sliding_window attention is not supported in {family.model_type}; supported: null"
            )
        window = self.count("sliding_window", _DEFAULT_WINDOW) if wanted and family.window else 0
        if window and "full_attention" in kinds:
            raise self.refuse(
                f"sliding_window={window} in some layers only (layer_types, max_window_layers) is "
                "not supported; supported: in all of them, or none"
            )
        strange = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
        if not window and "sliding_attention" in kinds:
            raise self.refuse("layer_types has sliding_attention, but sliding_window is off")
        if strange:
            raise self.refuse(
                f"layer_types has {printable(strange[0])}, which is not supported; supported: "
                "full_attention, sliding_attention"
            )
        return window

    def check_settings(self) -> None:
        """Refuse settings that would change the computation."""
        for name, neutral in _NEUTRAL.items():
            value = self.content.get(name)
            if value is not None and value not in neutral:
                only = " or ".join(json.dumps(v) for v in (*neutral, None))
                shown = printable(json.dumps(value))
                raise self.refuse(f"{name}={shown} is not supported; supported: {only}")

    def rope(self, positions: int) -> RopeConfig:
        """RoPE settings: `rope_scaling` if there is any, else `rope_parameters`.

        In either, what it holds counts before the same key beside it in config.json, except
        original_max_position_embeddings, where it is the other way round.
        """
        name = "rope_scaling" if self.content.get("rope_scaling") else "rope_parameters"
        given = self.content.get(name) or {}
        if not isinstance(given, dict):
            raise self.refuse(f"{name} must be an object, got {printable(repr(given))}")
        other = self.content.get("rope_parameters")
        if name == "rope_scaling" and other and other != given:
            self.remarks.append(f"{self.where}: rope_scaling replaces rope_parameters altogether")
        kind = given.get("rope_type", given.get("type", "default"))
        if not isinstance(kind, str) or kind not in _ROPE_REQUIRED:
            kinds = ", ".join(_ROPE_REQUIRED)
            raise self.refuse(f"rope type {printable(kind)} is not supported; supported: {kinds}")
        nested = [key for key, value in given.items() if isinstance(value, dict)]
        if nested:
            raise self.refuse(f"RoPE per layer type ({printable(nested[0])}) is not supported")
        partial = given.get("partial_rotary_factor", self.content.get("partial_rotary_factor"))
        if partial not in (None, 1.0):
            raise self.refuse(
                f"partial_rotary_factor={printable(partial)} is not supported; supported: 1.0"
            )
        theta = self.number("rope_theta", self.beside("rope_theta", given) or 10000.0, given)
        values: dict[str, Any] = {
            key: float(self.number(key, None, given)) for key in _ROPE_REQUIRED[kind]
        }
        if kind in ("llama3", "yarn"):
            original = self.content.get("original_max_position_embeddings")
            values["original_max_position_embeddings"] = self.count(
                "original_max_position_embeddings",
                positions if original is None else original,
                given if original is None else {},
            )
        if kind == "yarn":
            for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
                if given.get(key):
                    values[key] = float(self.number(key, None, given))
            if given.get("attention_factor") is not None:
                values["attention_factor"] = float(self.number("attention_factor", None, given))
            values["truncate"] = bool(given.get("truncate", True))
        if kind == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
            raise self.refuse("low_freq_factor must be below high_freq_factor")
        if theta <= 1:
            raise self.refuse(f"rope_theta must be above 1, got {theta}")
        return RopeConfig(kind=kind, theta=float(theta), **values)

    def beside(self, name: str, given: dict[str, Any]) -> Any:
        """config.json's own value of a key that `given`, an object in it, may have too."""
        outer = self.content.get(name)
        if given.get(name) is not None and outer not in (None, given[name]):
            self.remarks.append(
                f"{self.where}: {name}={printable(given[name])} of the RoPE settings replaces "
                f"{name}={printable(outer)} beside them"
            )
        return outer

    def note_left_out(self, generation: dict[str, Any]) -> None:
        """Remark on what generation_config.json asks for and nothing here applies."""
        left_out = [
            f"{printable(name)}={printable(json.dumps(value))}"
            for name, value in generation.items()
            if name not in _GENERATION_SILENT
            and value not in (None, False, [], {}, *_GENERATION_NEUTRAL.get(name, ()))
        ]
        if left_out:
            self.remarks.append(f"generation_config.json: not applied: {', '.join(left_out)}")

    def dtype(self) -> torch.dtype | None:
        name = self.content.get("dtype") or self.content.get("torch_dtype")
        if name is None:
            return None
        if not isinstance(name, str) or name.removeprefix("torch.") not in _DTYPES:
            raise self.refuse(
                f"dtype {printable(name)} is not supported; supported: {', '.join(_DTYPES)}"
            )
        return _DTYPES[name.removeprefix("torch.")]

    def token_ids(self, name: str, content: dict[str, Any]) -> list[int]:
        value = content.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.refuse(f"{name} must be token ids >= 0, got {printable(repr(value))}")
        return ids


def resolve_dtype(name: str | torch.dtype, config: ModelConfig) -> torch.dtype:
    """The dtype that a user's choice means: one of three, by name or itself, or "auto", the
    checkpoint's, which is float32 where it has no weights either."""
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    name = choice("dtype", name, ("auto", *_DTYPES))
    return (config.dtype or torch.float32) if name == "auto" else _DTYPES[name]


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded. Temperature 0 is greedy; 0 switches top_k and min_p off, 1 top_p.

    `n` is how many completions are drawn for a prompt. One seed gives a prompt the same completions
    in every run, whatever else is decoded beside it, and different prompts different noise; without
    a seed each prompt gets a fresh one, which its completions name.
    `stop` are strings that end the text, and `stop_token_ids` tokens that end it as end-of-text
    does, which `ignore_eos` switches off; a stop string may hold special tokens, though the text
    shows none. include_stop_str_in_output keeps what ended the text in the text. For the first
    `min_tokens` tokens neither end-of-text nor stop_token_ids are chosen, and stop strings are not
    looked for. Names and meanings are vLLM's. numpy's numbers are taken for Python's. UserError for
    what is out of range or of another type.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    n: int = 1

    def __new__(cls, *args: Any, **given: Any) -> "SamplingParams":
        # The generated __init__ would name the stranger, but not what could be meant.
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise UserError(f"{name} is not supported; supported: {', '.join(known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        checked = {
            "stop": _stop_strings(self.stop),
            "stop_token_ids": _stop_token_ids(self.stop_token_ids),
            "max_tokens": (most := integer("max_tokens", self.max_tokens, 1, 2**31 - 1)),
            "min_tokens": integer("min_tokens", self.min_tokens, 0, most),
            "top_k": integer("top_k", self.top_k, 0, 2**31 - 1),
            "seed": None if self.seed is None else integer("seed", self.seed, 0, 2**63 - 1),
            "n": integer("n", self.n, 1, MAX_COMPLETIONS),
            "temperature": real("temperature", self.temperature, 0.0, 1e4),
            "min_p": real("min_p", self.min_p, 0.0, 1.0),
            "top_p": real("top_p", self.top_p, 0.0, 1.0),
            "logprobs": flag("logprobs", self.logprobs),
            "ignore_eos": flag("ignore_eos", self.ignore_eos),
            "include_stop_str_in_output": flag(
                "include_stop_str_in_output", self.include_stop_str_in_output
            ),
        }
        if checked["top_p"] == 0:
            raise UserError("top_p must be above 0 and at most 1, got 0")
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.n > 1 and self.temperature == 0:
            raise UserError(f"n must be 1 at temperature 0, where all are the same, got {self.n}")


def _stop_strings(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    texts = (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, list | tuple) or any(not isinstance(s, str) or not s for s in texts):
        raise UserError(f"stop must be non-empty strings, got {shown(stop)}")
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise UserError("stop must be valid Unicode, got a lone surrogate")
    return tuple(texts)


def _stop_token_ids(ids: Any) -> tuple[int, ...]:
    if ids is None:
        return ()
    if not isinstance(ids, list | tuple):
        raise UserError(f"stop_token_ids must be a list of token ids, got {shown(ids)}")
    return tuple(integer("stop_token_ids", token_id, 0, 2**31 - 1) for token_id in ids)
