"""Drafters: what guesses the next K tokens. A wrong guess costs time, never a token.

    parallel     Medusa: head i guesses token i + 1 from the same hidden state as the LM head
    sequential   MTP module: one decoder layer fed with (hidden state, next token), applied K times
    n-gram       what followed the last occurrence of the sequence's own end
    both         the n-gram's copy where there is a match, else the heads

Every drafter is told of each step after it was committed, through one `DraftInput`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.cache import KVCache
from mtpkern.checkpoint import LayerWeights, load_tensors
from mtpkern.config import (
    ModelConfig,
    ModelLoadError,
    RopeConfig,
    UserError,
    printable,
    read_json_object,
)
from mtpkern.model import DecoderLayer, Llama, decoder_layer, pack_layer, plan_window
from mtpkern.ops import Ops

# Where a step's drafts came from; statistics are kept per source.
SOURCES = ("none", "heads", "ngram")
NONE, HEADS, NGRAM = range(3)


class DraftInput(NamedTuple):
    """One committed step, as a drafter sees it. n is the number of taps, H of parallel heads."""

    features: Tensor  # [B, T, n*E], the tapped hidden states of the window's rows
    head_logits: Tensor  # [B, T, H, V]
    tokens: Tensor  # [B, max_length + ...] int64, committed ones, then garbage
    lengths: Tensor  # [B] int64, after the commit: tokens[b, lengths[b]] is the bonus token
    accepted: Tensor  # [B] int64
    advance: Tensor  # [B] int64, accepted + 1, or 0 for a finished sequence
    sampling: Any  # SamplingRows


class Drafts(NamedTuple):
    """Guesses tokens [B, K] int64 and their source [B], an index into SOURCES."""

    tokens: Tensor
    source: Tensor


class Drafter(Protocol):
    """What a decode step needs of a drafter. `taps` are layers counted from 1; L is post-norm."""

    taps: tuple[int, ...]
    blocks: Sequence[Sequence[Any]]

    def prefill(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        """Take in the next pairs of a prompt: features [n, ...] and the tokens [n] after them."""

    def observe(self, step: DraftInput) -> None:
        """Take in a committed step, whether or not a guess is wanted after it."""

    def is_due(self, step: DraftInput) -> bool:
        """Whether `guess` must run now, since no further step could be taken in before it."""

    def guess(self, step: DraftInput, count: int) -> Drafts:
        """Guess the `count` tokens after the bonus token of each sequence."""

    def reset(self, sequence: int) -> None:
        """Forget a sequence, so that its slot can serve another."""


class NoDrafter:
    """Drafts nothing: plain decoding is K = 0, and fillers before there is anything better."""

    taps: tuple[int, ...] = ()
    blocks: Sequence[Sequence[Any]] = ()

    def prefill(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        pass

    def observe(self, step: DraftInput) -> None:
        pass

    def is_due(self, step: DraftInput) -> bool:
        return False

    def guess(self, step: DraftInput, count: int) -> Drafts:
        batch = step.tokens.shape[0]
        return Drafts(
            torch.zeros(batch, count, dtype=torch.int64),
            torch.full((batch,), NONE),
        )

    def reset(self, sequence: int) -> None:
        pass


class NgramDrafter(NoDrafter):
    """Copies what followed the last earlier occurrence of the last `size` tokens."""

    def __init__(self, ops: Ops, size: int = 3):
        self.ops, self.size = ops, size

    def guess(self, step: DraftInput, count: int) -> Drafts:
        drafts, found = self.ops.ngram(step.tokens, step.lengths + 1, count, self.size)
        return Drafts(drafts, torch.where(found, NGRAM, NONE))


class MedusaDrafter(NoDrafter):
    """Parallel heads: residual blocks on the final hidden state, through the model's own LM head.

    Their logits come with the step's one read of the vocabulary matrix. Cai et al. 2024.
    """

    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], ops: Ops):
        heads, depth = config["num_heads"], config["num_layers"]
        self.ops = ops
        self.blocks = [
            [
                ops.pack(tensors[f"{h}.{d}.linear.weight"], tensors[f"{h}.{d}.linear.bias"])
                for d in range(depth)
            ]
            for h in range(heads)
        ]

    def guess(self, step: DraftInput, count: int) -> Drafts:
        batch, _, _, vocabulary = step.head_logits.shape
        row = step.accepted.view(-1, 1, 1, 1).expand(-1, 1, count, vocabulary)
        logits = step.head_logits.gather(1, row)[:, 0]
        position = step.lengths[:, None] + 1 + torch.arange(count)
        drafts = self.ops.sample(logits, position, step.sampling)
        return Drafts(drafts, torch.full((batch,), HEADS))


@dataclass(frozen=True)
class MtpWeights:
    """A sequential MTP module: its weights, and the settings of its one decoder layer."""

    taps: tuple[int, ...]
    fc: Any | None  # [E, n*E]; None where one layer is tapped
    hidden_norm: Tensor  # [E]
    token_norm: Tensor  # [E]
    input_proj: Any  # [E, 2E], input order (hidden, embedding)
    layer: DecoderLayer
    final_norm: Tensor  # [E]
    vocabulary: Any  # [Vd, E]
    token_ids: Tensor  # [Vd] int64
    config: ModelConfig  # the trunk's, with the layer's head counts and sizes

    @classmethod
    def pack(
        cls,
        tensors: Mapping[str, Tensor],
        config: ModelConfig,
        taps: Sequence[int],
        trunk: Llama,
        ops: Ops,
    ) -> "MtpWeights":
        """Pack a module's tensors (names as in MiMo's MTP layers, plus fc and draft_vocab)."""
        dtype = trunk.embedding.dtype

        def named(*names: str) -> Tensor:
            return torch.cat([tensors[f"{name}.weight"].to(dtype) for name in names])

        attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        layer = LayerWeights(
            input_norm=named("input_layernorm"),
            qkv=named(*attention),
            qkv_bias=None,
            o=named("self_attn.o_proj"),
            o_bias=None,
            post_attention_norm=named("post_attention_layernorm"),
            gate_up=named("mlp.gate_proj", "mlp.up_proj"),
            gate_up_bias=None,
            down=named("mlp.down_proj"),
            down_bias=None,
        )
        reduced = "draft_vocab" in tensors
        token_ids = (
            tensors["draft_vocab"].long() if reduced else torch.arange(trunk.config.vocab_size)
        )
        return cls(
            taps=tuple(taps),
            fc=ops.pack(named("fc")) if len(taps) > 1 else None,
            hidden_norm=named("hidden_layernorm"),
            token_norm=named("token_layernorm"),
            input_proj=ops.pack(named("input_proj")),
            layer=pack_layer(layer, ops),
            final_norm=named("final_layernorm"),
            vocabulary=ops.pack(trunk.lm_head[token_ids]) if reduced else trunk.vocabulary,
            token_ids=token_ids,
            config=config,
        )


class MtpDrafter:
    """Sequential head: row j pairs the features of token j with the embedding of token j + 1.

        x_j = P [norm(h_j), norm(e_{j+1})];  o_j = norm(layer(x_j));  draft = argmax(o_j V^T)

    h_j is a projection of the tapped states for committed rows, and o_{j-1} for drafted ones
    (DeepSeek-V3, section 2.2; features of several layers as in EAGLE-3, Li et al. 2025). Its own
    K/V cache holds the committed pairs; drafted ones are overwritten when the real ones come.
    Committed pairs wait in `pending` until a pass is wanted, so that a step whose drafts come from
    elsewhere costs nothing here.
    """

    blocks: Sequence[Sequence[Any]] = ()

    def __init__(self, weights: MtpWeights, trunk: Llama, *, batch: int, capacity: int, ops: Ops):
        config = weights.config
        inverse_frequencies, scaling = config.rope.inverse_frequencies(config.head_dim)
        self.weights, self.ops = weights, ops
        self.embedding, self.taps = trunk.embedding, weights.taps
        self.cache = KVCache.contiguous(
            layers=1,
            batch=batch,
            capacity=capacity + MAX_PENDING,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            inverse_frequencies=inverse_frequencies,
            rope_scaling=scaling,
            dtype=trunk.embedding.dtype,
        )
        width = len(weights.taps) * trunk.config.hidden_size
        self.pending = torch.zeros(batch, MAX_PENDING, width, dtype=trunk.embedding.dtype)

    def prefill(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        cache = self.cache.rows(sequence, sequence + 1)
        plan = plan_window(cache, features.shape[0], self.weights.config.num_heads, self.ops)
        # Only K and V are wanted, and those come from the layer's input.
        x = self._inputs(self._hidden(features), tokens)
        layer, eps = self.weights.layer, self.weights.config.rms_norm_eps
        self.ops.qkv_rope_cache(x, layer.input_norm, eps, layer.qkv, cache.k[0], cache.v[0], plan)
        cache.lengths.add_(features.shape[0])

    def observe(self, step: DraftInput) -> None:
        # Behind the pending rows; those that were not committed do not count.
        begin = step.lengths - step.advance - self._cache_of(step).lengths
        index = begin[:, None] + torch.arange(step.features.shape[1])
        pending = self.pending[: len(begin)]
        pending.scatter_(1, index[:, :, None].expand_as(step.features), step.features)

    def is_due(self, step: DraftInput) -> bool:
        waiting = (step.lengths - self._cache_of(step).lengths).max()
        return bool(waiting > MAX_PENDING - step.features.shape[1])

    def guess(self, step: DraftInput, count: int) -> Drafts:
        cache = self._cache_of(step)
        waiting = (step.lengths - cache.lengths).clamp_(min=1)
        rows = int(waiting.max())
        after = cache.lengths[:, None] + 1 + torch.arange(rows)
        batch = after.shape[0]
        x = self._inputs(
            self._hidden(self.pending[:batch, :rows].flatten(0, 1)),
            step.tokens.gather(1, after).view(-1),
        )
        out = self._layer(x, cache, rows).view(batch, rows, -1)
        hidden = out[torch.arange(batch), waiting - 1]
        cache.lengths.copy_(step.lengths)
        drafts = []
        for i in range(count):
            token = self._choose(hidden, step, i)
            drafts.append(token)
            if i + 1 < count:
                ahead = cache.at(step.lengths + i)
                hidden = self._layer(self._inputs(hidden, token), ahead, 1)
        return Drafts(torch.stack(drafts, 1), torch.full((batch,), HEADS))

    def reset(self, sequence: int) -> None:
        self.cache.reset(sequence)

    def _cache_of(self, step: DraftInput) -> KVCache:
        """The cache of the sequences in this step, which may be fewer than there are slots."""
        return self.cache.rows(0, step.lengths.shape[0])

    def _hidden(self, features: Tensor) -> Tensor:
        fc = self.weights.fc
        return features if fc is None else self.ops.linear(features, fc)

    def _inputs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        w, eps = self.weights, self.weights.config.rms_norm_eps
        normed = self.ops.rms_norm(hidden, w.hidden_norm, eps)
        token = self.ops.rms_norm(F.embedding(tokens, self.embedding), w.token_norm, eps)
        return self.ops.linear(torch.cat([normed, token], -1), w.input_proj)

    def _layer(self, x: Tensor, cache: KVCache, rows: int) -> Tensor:
        w = self.weights
        plan = plan_window(cache, rows, w.config.num_heads, self.ops)
        x = decoder_layer(x, w.layer, w.config.rms_norm_eps, cache, 0, plan, self.ops)
        return self.ops.rms_norm(x, w.final_norm, w.config.rms_norm_eps)

    def _choose(self, hidden: Tensor, step: DraftInput, i: int) -> Tensor:
        logits = self.ops.linear(hidden, self.weights.vocabulary)[:, None]
        position = step.lengths[:, None] + 1 + i
        return self.ops.sample(logits, position, step.sampling, self.weights.token_ids)[:, 0]


# Committed pairs that a sequential head may put off: more are taken in whether needed or not.
MAX_PENDING = 64


class CompanionDrafter:
    """The n-gram's copy for sequences that have a match, the heads' guesses for the others.

    Where every sequence has a match, the heads are skipped, which is where the time is.
    """

    def __init__(self, ngram: NgramDrafter, heads: Drafter):
        self.ngram, self.heads = ngram, heads
        self.taps, self.blocks = heads.taps, heads.blocks

    def prefill(self, sequence: int, features: Tensor, tokens: Tensor) -> None:
        self.heads.prefill(sequence, features, tokens)

    def observe(self, step: DraftInput) -> None:
        self.heads.observe(step)

    def is_due(self, step: DraftInput) -> bool:
        return self.heads.is_due(step)

    def guess(self, step: DraftInput, count: int) -> Drafts:
        copied = self.ngram.guess(step, count)
        found = copied.source == NGRAM
        if bool((found | (step.advance == 0)).all()) and not self.heads.is_due(step):
            return copied
        guessed = self.heads.guess(step, count)
        return Drafts(
            torch.where(found[:, None], copied.tokens, guessed.tokens),
            torch.where(found, copied.source, guessed.source),
        )

    def reset(self, sequence: int) -> None:
        self.heads.reset(sequence)


PRETRAINED = Path(__file__).with_name("pretrained")


def find_heads(name: str, model: str) -> Path | None:
    """The directory of heads that `name` means for `model`; None where there are to be none.

    "auto" is what ships for the model, if anything; "none" nothing; else a name in the package or
    a directory. Raises UserError for a name that is neither.
    """
    if name == "none":
        return None
    shipped = sorted(path.parent.name for path in PRETRAINED.glob("*/config.json"))
    if name == "auto":
        return PRETRAINED / model if model in shipped else None
    if name in shipped:
        return PRETRAINED / name
    if Path(name).is_dir():
        return Path(name)
    raise UserError(
        f"heads {printable(name)}: no such directory; names: auto, none, {', '.join(shipped)}"
    )


def load_heads(
    directory: Path, trunk: Llama, *, batch: int, capacity: int, k: int, ops: Ops
) -> Drafter:
    """Load heads for a trunk. Raises ModelLoadError where they do not fit it.

    config.json names the kind by `model_type`: "mtpkern_mtp" or "mtpkern_medusa".
    """
    path = directory / "config.json"
    settings = read_json_object(path)
    kind = settings.get("model_type")
    expected = {"mtpkern_mtp": _mtp_shapes, "mtpkern_medusa": _medusa_shapes}.get(str(kind))
    if expected is None:
        raise ModelLoadError(
            f"{printable(path)}: model_type {printable(kind)} is not supported; supported: "
            "mtpkern_mtp, mtpkern_medusa"
        )
    tensors = load_tensors(directory)
    try:
        shapes = expected(settings, trunk.config)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(f"{printable(path)} is not complete: {printable(error)}") from None
    for name, shape in shapes.items():
        if name not in tensors:
            raise ModelLoadError(f"{printable(directory)}: tensor {name} is missing")
        if tuple(tensors[name].shape) != shape:
            raise ModelLoadError(
                f"{printable(directory)}: tensor {name} must be {list(shape)} to match the model, "
                f"got {list(tensors[name].shape)}"
            )
    if kind == "mtpkern_medusa":
        if k > settings["num_heads"]:
            raise UserError(
                f"num_speculative_tokens must be at most {settings['num_heads']}, the number of "
                f"heads, got {k}"
            )
        dtype = trunk.embedding.dtype
        typed = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        return MedusaDrafter(typed, settings, ops)
    config = _mtp_layer_config(settings, trunk.config)
    weights = MtpWeights.pack(tensors, config, settings["tap_layers"], trunk, ops)
    return MtpDrafter(weights, trunk, batch=batch, capacity=capacity, ops=ops)


def _medusa_shapes(settings: Mapping[str, Any], trunk: ModelConfig) -> dict[str, tuple[int, ...]]:
    width = trunk.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    for h in range(settings["num_heads"]):
        for d in range(settings["num_layers"]):
            shapes[f"{h}.{d}.linear.weight"] = (width, width)
            shapes[f"{h}.{d}.linear.bias"] = (width,)
    return shapes


def _mtp_layer_config(settings: Mapping[str, Any], trunk: ModelConfig) -> ModelConfig:
    """The trunk's config with the module's own layer sizes."""
    return replace(
        trunk,
        num_layers=1,
        num_heads=settings["num_attention_heads"],
        num_kv_heads=settings["num_key_value_heads"],
        head_dim=settings["head_dim"],
        intermediate_size=settings["intermediate_size"],
        rms_norm_eps=settings["rms_norm_eps"],
        rope=RopeConfig(theta=settings["rope_theta"]),
    )


def _mtp_shapes(settings: Mapping[str, Any], trunk: ModelConfig) -> dict[str, tuple[int, ...]]:
    config = _mtp_layer_config(settings, trunk)
    taps, E, F_ = settings["tap_layers"], trunk.hidden_size, config.intermediate_size
    if taps != sorted(set(taps)) or taps[0] < 1 or taps[-1] != trunk.num_layers:
        raise ValueError(f"tap_layers must ascend to {trunk.num_layers}, got {taps}")
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "hidden_layernorm.weight": (E,),
        "token_layernorm.weight": (E,),
        "input_proj.weight": (E, 2 * E),
        "input_layernorm.weight": (E,),
        "self_attn.q_proj.weight": (q, E),
        "self_attn.k_proj.weight": (kv, E),
        "self_attn.v_proj.weight": (kv, E),
        "self_attn.o_proj.weight": (E, q),
        "post_attention_layernorm.weight": (E,),
        "mlp.gate_proj.weight": (F_, E),
        "mlp.up_proj.weight": (F_, E),
        "mlp.down_proj.weight": (E, F_),
        "final_layernorm.weight": (E,),
    }
    if len(taps) > 1:
        shapes["fc.weight"] = (E, len(taps) * E)
    if settings.get("draft_vocab_size"):
        shapes["draft_vocab"] = (settings["draft_vocab_size"],)
    return shapes
