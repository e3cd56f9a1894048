"""What LLM loads: tokenizer, trunk, drafter and cache, and the defaults that depend on them."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from mtpkern.cache import KVCache
from mtpkern.checkpoints.directory import is_gguf
from mtpkern.checkpoints.llama import check_checkpoint
from mtpkern.checkpoints.quantised import ROUNDED_FORMATS
from mtpkern.checkpoints.resolve import model_name
from mtpkern.checkpoints.tokenizer_files import has_tokenizer
from mtpkern.config import ModelConfig, dtype_name, resolve_dtype
from mtpkern.device import settings_for
from mtpkern.drafters.base import Drafter, NoDrafter
from mtpkern.drafters.load import OpenHeads, open_heads
from mtpkern.drafters.ngram import CompanionDrafter, NgramDrafter
from mtpkern.errors import UserError, counted
from mtpkern.kernels.cpu.quants import GROUP, Quants
from mtpkern.memory import check_fit, explain_out_of_memory, weight_bytes
from mtpkern.model import Llama
from mtpkern.ops.base import Ops
from mtpkern.runner import Runner, capacity
from mtpkern.status import Status
from mtpkern.tokenizer import Tokenizer
from mtpkern.validation import choice, integer

DEFAULT_SPECULATIVE_TOKENS = 4
# The default of max_length for models that take more, so that the cache stays small.
DEFAULT_MAX_LENGTH = 8192


def resolve_length(length: int | None, config: ModelConfig) -> int:
    """max_length, where `length` is the caller's."""
    limit = config.max_position_embeddings
    if length is None:
        return min(limit, DEFAULT_MAX_LENGTH)
    return integer("max_length", length, 2, limit)


def check_length(
    prompt: Sequence[int], max_length: int, config: ModelConfig, *, by_default: bool
) -> None:
    """Raise UserError for a prompt that leaves no token for the answer. `by_default`: max_length is
    not the caller's."""
    if len(prompt) < max_length:
        return
    limit = config.max_position_embeddings
    longer = f"{limit}: raise max_length" if max_length < limit else "no more"
    raise UserError(
        f"the prompt has {counted(len(prompt), 'token')}; the context holds {max_length}"
        f"{' by default' if by_default else ''}, of which at least one must be left for the "
        f"answer, and the model takes {longer}"
    )


def load_tokenizer(directory: Path, config: ModelConfig) -> Tokenizer | None:
    """The checkpoint's tokenizer; None if it has none, and prompts must be token ids."""
    if not has_tokenizer(directory):
        return None
    tokenizer = Tokenizer.from_directory(directory)
    tokenizer.check_against(config)
    return tokenizer


def end_tokens(config: ModelConfig, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The end-of-text tokens: the checkpoint's, else the tokenizer's."""
    if config.eos_token_ids or tokenizer is None or tokenizer.eos_token_id is None:
        return config.eos_token_ids
    return (tokenizer.eos_token_id,)


def check_formats(dtype: str | torch.dtype, weights: str, ops: Ops) -> None:
    """Raise UserError unless there are such a dtype and such a format of weights for `ops`."""
    dtype_name(dtype)
    choice("weights", weights, ("auto", *ROUNDED_FORMATS))
    if weights != "auto" and not ops.takes_quants:
        raise UserError(f"weights {weights} needs device cpu")


class RunnerPlan:
    """A checkpoint and heads to load, and the cache for them.

    What a caller may have mistaken is found here, before kernels are compiled and weights are read:
    raises UserError.
    """

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        heads: Path | None,
        *,
        ops: Ops,
        device: torch.device,
        dtype: str | torch.dtype,
        weights: str,
        dummy: bool,
        ngram: bool,
        num_speculative_tokens: int | None,
        max_batch: int,
        max_length: int,
        cache_tokens: int | None,
    ):
        """`heads`: their directory, None without any. `dummy` is load_format "dummy"; the others
        are as in `LLM`."""
        self.directory, self.ops, self.device, self.ngram = directory, ops, device, ngram
        self.dummy, self.max_length = dummy, max_length
        self.k = _resolve_k(num_speculative_tokens, has_drafter=heads is not None or ngram)
        self.heads: OpenHeads | None = None
        if heads is not None and self.k:
            self.heads = open_heads(heads, config, None if dummy else directory)
            most = self.heads.most
            if most is not None and self.k > most:
                if num_speculative_tokens is not None:
                    raise UserError(
                        f"num_speculative_tokens must be at most {most}, the number of heads, "
                        f"got {self.k}"
                    )
                self.k = most
        self.dtype = cache_dtype = resolve_dtype(dtype, config)
        entries = {} if dummy else check_checkpoint(directory)[1]
        # A dtype that the caller gave is what a quantised checkpoint is expanded to.
        keep_format = weights != "auto" or (dtype == "auto" and ops.takes_quants)
        self.weights = weights if keep_format else None
        if keep_format and (weights != "auto" or is_gguf(entries)) and dtype == "auto":
            cache_dtype = torch.float16
        page_size, max_pages, pages = _count_pages(
            capacity(max_length, self.k), max_batch, max_length, cache_tokens, device
        )
        lower = "max_length" if max_batch == 1 else "max_length, max_batch or cache_tokens"
        head = ops.padded_dim(config.head_dim)
        slots = (1 + pages) * page_size * config.num_layers * config.num_kv_heads
        if ops.takes_quants or device.type == "cuda":
            size = partial(weight_bytes, config, entries, packed=ops.takes_quants)
            check_fit(
                model_name(directory),
                size(dtype=self.dtype, weights=self.weights),
                device,
                cache=2 * slots * head * cache_dtype.itemsize if device.type == "cuda" else 0,
                lower=lower,
                smaller=_smaller(size, config, ops),
            )
        with explain_out_of_memory(
            f"a cache of max_batch={max_batch} sequences of max_length={max_length}",
            f"lower {lower}",
        ):
            self.cache = _make_cache(
                config, ops, max_batch, pages, max_pages, page_size, cache_dtype, device
            )
        self.layers = config.num_layers

    def load(
        self, *, ends: int, synthetic_acceptance: Sequence[float] | None, status: Status
    ) -> Runner:
        """Load the weights; `ends` is the most end tokens of a sequence."""
        with explain_out_of_memory("the model", "lower max_length, or take a smaller model"):
            return self._load(ends, synthetic_acceptance, status)

    def _load(
        self, ends: int, synthetic_acceptance: Sequence[float] | None, status: Status
    ) -> Runner:
        ops, heads = self.ops, self.heads
        with status.phase("loading the model", self.layers, "layers") as phase:
            trunk = Llama.load(
                self.directory,
                dtype=self.dtype,
                ops=ops,
                device=self.device,
                dummy=self.dummy,
                weights=self.weights,
                on_layer=phase.advance,
            )
        drafter: Drafter
        drafter = copier = NgramDrafter(ops) if self.ngram else NoDrafter()
        if heads is not None:
            with status.phase("loading the heads"):
                drafter = heads.build(trunk, self.cache, ops)
            if self.ngram or ops.host_may_read:
                drafter = CompanionDrafter(copier, drafter, ops)
        return Runner(
            trunk,
            drafter,
            self.cache,
            ops,
            ngram=copier,
            k=self.k,
            max_length=self.max_length,
            ends=ends,
            synthetic_acceptance=synthetic_acceptance,
            device=self.device,
            status=status,
        )


def weights_format(trunk: Llama) -> str:
    """The format of a model's weights: a quantised one's, or its dtype's name."""
    if isinstance(trunk.lm_head, Quants):
        return trunk.layers[0].down.format
    return str(trunk.dtype).removeprefix("torch.")


def _resolve_k(k: int | None, *, has_drafter: bool) -> int:
    """The largest K, where `k` is the caller's."""
    if k is None:
        return DEFAULT_SPECULATIVE_TOKENS if has_drafter else 0
    if k and not has_drafter:
        raise UserError(f"num_speculative_tokens is {k}, but there is nothing to draft with")
    return k


def _smaller(size: Callable[..., int], config: ModelConfig, ops: Ops) -> dict[str, int]:
    """Settings that make a model smaller, the finest first, and the bytes of its weights then."""
    half = {"dtype=bfloat16": size(dtype=torch.bfloat16, weights=None)}
    formats = ("q8_0", "q4_1") if ops.takes_quants and config.hidden_size % GROUP == 0 else ()
    return half | {f"weights={name}": size(dtype=torch.bfloat16, weights=name) for name in formats}


def _count_pages(
    most: int, max_batch: int, max_length: int, cache_tokens: int | None, device: torch.device
) -> tuple[int, int, int]:
    """Slots of a page, pages of a sequence of `most` slots, and pages of the cache: for max_batch
    sequences, or for cache_tokens in all."""
    page_size = settings_for(device).page_size or most
    max_pages = -(-most // page_size)
    pages = max_pages * max_batch
    if cache_tokens is not None:
        pages = min(pages, cache_tokens // page_size)
    if pages < max_pages:
        raise UserError(
            f"cache_tokens must be at least {max_pages * page_size} to hold one sequence of "
            f"max_length={max_length}, got {cache_tokens}"
        )
    return page_size, max_pages, pages


def _make_cache(
    config: ModelConfig,
    ops: Ops,
    max_batch: int,
    pages: int,
    max_pages: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KVCache:
    """A cache of `pages` pages, of which a sequence has `max_pages` at most."""
    inverse_frequencies, scaling = config.rope.inverse_frequencies(config.head_dim)
    return KVCache.empty(
        layers=config.num_layers,
        pages=pages,
        page_size=page_size,
        page_table=torch.zeros(max_batch, max_pages, dtype=torch.int32, device=device),
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        inverse_frequencies=inverse_frequencies,
        rope_scaling=scaling,
        dtype=dtype,
        padded_dim=ops.padded_dim,
    )
