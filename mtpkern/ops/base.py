"""The operations of a decode step as a protocol, `Ops`: the same step runs on any implementation.

    GpuOps       the Triton kernels (gpu.py)
    CpuOps       kernels compiled for this CPU (cpu.py)
    DEFINITIONS  the kernels' definitions in plain torch, for tests (definitions.py)

`layers` and `forward` run all decoder layers in one call. Here they are composed of the single
operations; an implementation that can do better overrides them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.kernels.advance import Progress
from mtpkern.kernels.sample import SamplingRows

if TYPE_CHECKING:
    from mtpkern.cache import KVCache
    from mtpkern.config import ModelConfig
    from mtpkern.model import DecoderLayer, Llama

# What `pack`, `pack_qkv`, ... return and the operations take: a layout of the implementation's own.
Packed = Any
# What `plan` returns: what the layers share for one window.
Plan = Any


class Withheld(NamedTuple):
    """Tokens that B sequences may not choose yet, because of `min_tokens`."""

    tokens: Tensor  # [B, V] bool
    until: Tensor  # [B] int64, the index of the first token that may be any

    def mask(self, logits: Tensor, positions: Tensor) -> Tensor:
        """logits [B, T, V] of the tokens at positions [B, T], minus infinity where withheld."""
        early = positions < self.until[:, None]
        return logits.masked_fill(early[:, :, None] & self.tokens[:, None], float("-inf"))


class PackedWeight(NamedTuple):
    """A weight as the kernels and their definitions read it."""

    data: Tensor  # [N, K]
    bias: Tensor | None  # [N]

    @property
    def out_features(self) -> int:
        return len(self.data)


class Projected(Protocol):
    """The vocabulary's answer for the B * T rows of a window: the LM head's, and that of H parallel
    heads.

    `lengths` [B] int64 are the tokens before each window's first; row t chooses the token at index
    lengths[b] + 1 + t.
    """

    def target(
        self,
        shape: tuple[int, int],
        lengths: Tensor,
        sampling: SamplingRows,
        withheld: Withheld | None = None,
    ) -> Tensor:
        """The tokens that the model itself chooses, [B, T] = shape, int64."""

    def largest(self, shape: tuple[int, int]) -> Tensor:
        """The largest logit of each row, [B, T] = shape, float32; NaN if any of its logits is."""

    def drafts(
        self, accepted: Tensor, count: int, lengths: Tensor, sampling: SamplingRows
    ) -> Tensor:
        """The tokens that the first `count` heads choose at row accepted[b]: [B, count] int64."""

    def logprobs(self, target: Tensor) -> Tensor:
        """Log-probabilities [B, T] float32 of `target` under the model, at temperature 1."""


class Ops(Protocol):
    """One implementation of every operation. Rows R are B * T unless a comment says otherwise."""

    # Whether the host may read values inside a step: free on a CPU, impossible in a CUDA graph.
    host_may_read: bool
    # Whether `pack` takes `Quants`, weights in a file's own bits, besides tensors.
    takes_quants: bool
    # The dtype of hidden states; None: that of the weights.
    row_dtype: torch.dtype | None

    def compile(self) -> None:
        """Compile what a first run on a machine lacks, which takes several seconds."""
        return

    def padded_dim(self, head_dim: int) -> int:
        """The head dimension of the KV cache."""
        return head_dim

    # Weights.

    def pack(self, w: Any, bias: Tensor | None = None) -> Packed:
        """w [N, K], bias [N] -> what `linear`, `project` and `choose` take."""
        ...

    def pack_qkv(self, w: Any, bias: Tensor | None, head_dim: int) -> Packed:
        """w [(Hq + 2 Hk) * D, E] -> what `qkv_rope_cache` takes."""
        return self.pack(w, bias)

    def pack_o(self, w: Any, bias: Tensor | None, head_dim: int) -> Packed:
        """w [E, Hq * D] -> what `linear` takes for the rows of `verify_attention`."""
        return self.pack(w, bias)

    def pack_gate_up(self, w: Any, bias: Tensor | None) -> Packed:
        """w [2F, E], the gates first -> what `gate_up_silu` takes."""
        return self.pack(w, bias)

    def pack_heads(self, heads: Sequence[Sequence[tuple[Any, Tensor]]]) -> Packed:
        """H heads of residual blocks, each (w [E, E], bias [E]) -> what `project` takes."""
        ...

    def pack_embedding(self, w: Any, vocabulary: Packed | None = None) -> Packed:
        """w [V, E] -> what `embed` takes; `vocabulary` is w packed, where the two are tied."""
        return w

    # Rows.

    def embed(self, embedding: Packed, ids: Tensor) -> Tensor:
        """ids [...] int64 -> rows [R, E], one per id."""
        return F.embedding(ids.reshape(-1), embedding)

    def rms_norm(
        self,
        x: Tensor | Packed,
        w: Tensor,
        eps: float,
        *,
        ids: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """x [R, E], w [E] -> [R, E]; with `ids` [R], the rows ids of an embedding x."""
        ...

    def linear(self, x: Tensor, w: Packed, *, residual: Tensor | None = None) -> Tensor:
        """x [R, K] -> x w^T + bias + residual, [R, N]."""
        ...

    def gate_up_silu(self, x: Tensor, norm_w: Tensor, eps: float, w: Packed) -> Tensor:
        """x [R, E] -> silu(gate) * up of its norm, [R, F]."""
        ...

    # Attention.

    def plan(self, cache: KVCache, rows: int, config: ModelConfig) -> Plan:
        """What the layers share for T = `rows` rows after each sequence's committed tokens."""
        ...

    def qkv_rope_cache(
        self,
        x: Tensor,
        norm_w: Tensor | None,
        eps: float,
        w: Packed,
        k_pages: Tensor,
        v_pages: Tensor,
        plan: Plan,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
    ) -> Tensor:
        """x [R, E] -> q [B, T, Hq, D], rotated; K and V are written to their pages."""
        ...

    def verify_attention(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, plan: Plan
    ) -> Tensor:
        """q [B, T, Hq, D] -> [B, T, Hq, D]; row t sees the committed tokens and rows 0..t."""
        ...

    def layer(
        self,
        x: Tensor,
        layer: DecoderLayer,
        eps: float,
        cache: KVCache,
        index: int,
        plan: Plan,
        *,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """Run one decoder layer, x [R, E] -> [R, E], with layer `index` of the cache.

        Q, K and V are projections of `inputs` if given (EAGLE-3), of x otherwise.
        """
        k, v = cache.k[index], cache.v[index]
        norms = {"q_norm": layer.q_norm, "k_norm": layer.k_norm}
        source = x if inputs is None else inputs
        q = self.qkv_rope_cache(source, layer.input_norm, eps, layer.qkv, k, v, plan, **norms)
        attended = self.verify_attention(q, k, v, cache.page_table, plan)
        x = self.linear(attended.view(x.shape[0], -1), layer.o, residual=x)
        gated = self.gate_up_silu(x, layer.post_attention_norm, eps, layer.gate_up)
        return self.linear(gated, layer.down, residual=x)

    def layers(
        self, model: Llama, window: Tensor, cache: KVCache, taps: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Run all decoder layers on a window [B, T] int64 after each sequence's committed tokens.

        -> (hidden states [R, E] before the final norm, those after each layer in `taps`, counted
        from 1). K and V are written at slots lengths[b] .. lengths[b] + T - 1; nothing is
        committed.
        """
        plan, eps = self.plan(cache, window.shape[1], model.config), model.config.rms_norm_eps
        x, tapped = self.embed(model.embedding, window), {}
        for index, layer in enumerate(model.layers):
            x = self.layer(x, layer, eps, cache, index, plan)
            if index + 1 in taps:
                tapped[index + 1] = x
        return x, [tapped[tap] for tap in taps]

    def prefill(
        self, model: Llama, chunk: Tensor, cache: KVCache, taps: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """`layers` for a chunk [1, R] of a prompt; cache.lengths [1] is on the host."""
        return self.layers(model, chunk, cache, taps)

    def forward(
        self, model: Llama, window: Tensor, cache: KVCache, taps: Sequence[int], heads: Packed
    ) -> tuple[Tensor, Projected]:
        """Run a window through layers, final norm and vocabulary -> (features, logits).

        The features [B, T, n*E] are the hidden states after the n layers `taps` side by side, those
        of the last layer normed (without taps: that one). Both may be overwritten by the next call.
        """
        last = model.config.num_layers
        hidden, tapped = self.layers(model, window, cache, [tap for tap in taps if tap < last])
        normed, projected = self.project(
            hidden, model.norm, model.config.rms_norm_eps, model.vocabulary, heads
        )
        features = self.join_taps(taps, tapped, normed, last)
        return features.view(*window.shape, -1), projected

    def join_taps(
        self, taps: Sequence[int], tapped: list[Tensor], normed: Tensor, layers: int
    ) -> Tensor:
        """The hidden states [R, n*E] of `forward`, of which `tapped` precede the last layer."""
        return self.side_by_side([*tapped, normed] if layers in taps or not tapped else tapped)

    def side_by_side(self, parts: list[Tensor]) -> Tensor:
        """Rows [R, a], [R, b], ... -> [R, a + b + ...]."""
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def pair_layer(
        self,
        w: Any,
        embedding: Packed,
        hidden: Tensor,
        tokens: Tensor,
        cache: KVCache,
        index: int,
        rows: int,
    ) -> Tensor | None:
        """`MtpDrafter.run_pairs` in one call; None: it is composed of the single operations."""
        return None

    def draft_chain(
        self, w: Any, embedding: Packed, cache: KVCache, pairs: Any, step: Any, count: int
    ) -> tuple[Tensor, int, Tensor] | None:
        """`MtpDrafter.guess` in one call, for the `HostPairs` taken at `step` -> (tokens [B, count]
        int64, how many of them are drafts, probabilities [B, count]), overwritten by the next call;
        None: it is composed of others."""
        return None

    # The vocabulary.

    def project(
        self, hidden: Tensor, norm_w: Tensor, eps: float, vocabulary: Packed, heads: Packed
    ) -> tuple[Tensor, Projected]:
        """hidden [R, E] -> (its norm [R, E], its logits and those of the parallel heads)."""
        ...

    def parallel_heads(self, rows: Tensor, heads: Packed) -> Tensor:
        """Residual blocks of H heads: rows [B, E] -> [B, H, E]."""
        ...

    def choose(
        self,
        hidden: Tensor,
        vocabulary: Packed,
        token_ids: Tensor,
        lengths: Tensor,
        draft: int,
        sampling: SamplingRows,
    ) -> tuple[Tensor, Tensor | None]:
        """One row per sequence [B, E] through a head's own vocabulary, whose row i is token
        token_ids[i] -> draft number `draft`, counted from 0: [B] int64, and the probability [B] of
        the most likely token, or None where the host may not read it."""
        ...

    # The end of a step.

    def advance(
        self,
        window: Tensor,
        target: Tensor,
        largest: Tensor,
        logprobs: Tensor | None,
        progress: Progress,
    ) -> tuple[Tensor, Tensor]:
        """Accept, commit and report a step: see kernels/advance.py -> (accepted, count), [B],
        overwritten by the next call."""
        ...

    def ngram(
        self, tokens: Tensor, lengths: Tensor, drafts: int, size: int = 3
    ) -> tuple[Tensor, Tensor | bool]:
        """Draft from each sequence's own text, of which the first lengths[b] + 1 tokens are known:
        see kernels/ngram.py -> ([B, K], found [B]), overwritten by the next call. Where the host
        may read, found is a bool if it is the same for all sequences."""
        ...


def positions_of(lengths: Tensor, count: int) -> Tensor:
    """Indices [B, count] of the tokens that the first `count` rows of a window choose."""
    return lengths[:, None] + 1 + torch.arange(count, device=lengths.device)
