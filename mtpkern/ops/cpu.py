"""The kernels compiled for this CPU (kernels/cpu) as one `Ops`.

Hidden states are float32 whatever the weights are; weights keep the bits in which they are given. A
row's bits depend on its own inputs alone, by construction (see kernels/cpu), in prefill as in
decoding. All decoder layers and the vocabulary are one program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.kernels.cpu.quants import Quants
from mtpkern.kernels.cpu.weights import Weights, interleaved, pack, padded_dim, padded_heads
from mtpkern.kernels.sample import SamplingRows, gumbel_sample
from mtpkern.ops.base import Ops, Projected, positions_of
from mtpkern.ops.cpu_drafts import ChainUnit, pair_unit
from mtpkern.ops.cpu_programs import (
    MAX_ROWS,
    ONE_THREAD_BYTES,
    CpuPlan,
    Unit,
    Units,
    add_trunk,
    copied,
    forward_unit,
    head_norm,
    joined,
    kernels,
    layer_cache,
    new_program,
    new_rows,
    norm_of,
    project_unit,
    quants_of,
)
from mtpkern.ops.cpu_step import CpuLogits, Forward, StepEnd, is_greedy

if TYPE_CHECKING:
    from mtpkern.cache import KVCache
    from mtpkern.config import ModelConfig
    from mtpkern.model import Llama


class CpuOps(Ops):
    """The operations; programs are kept for as long as the value lives."""

    host_may_read = True
    takes_quants = True
    row_dtype = torch.float32

    def __init__(self) -> None:
        self._units = Units()
        self._end = StepEnd()
        # Of the last call of `forward`: the next step's is the same.
        self._forward: Forward | None = None

    def compile(self) -> None:
        kernels().compile_entries()

    def padded_dim(self, head_dim: int) -> int:
        return padded_dim(head_dim)

    # Weights.

    def pack(self, w: Tensor | Quants, bias: Tensor | None = None) -> Weights:
        return pack(quants_of(w), bias)

    def pack_qkv(
        self, w: Tensor | Quants | list[Quants], bias: Tensor | None, head_dim: int
    ) -> tuple[Weights, ...]:
        parts = w if isinstance(w, list) else [quants_of(w)]
        counts = [len(part.q) for part in parts]
        biases = [None] * len(parts) if bias is None else bias.split(counts)
        padded = padded_dim(head_dim) != head_dim
        orders = [padded_heads(count // head_dim, head_dim) if padded else None for count in counts]
        return tuple(pack(*part) for part in zip(parts, biases, orders, strict=True))

    def pack_o(self, w: Tensor | Quants, bias: Tensor | None, head_dim: int) -> Weights:
        quants = quants_of(w)
        if padded_dim(head_dim) != head_dim:
            heads = quants.shape[1] // head_dim
            quants = quants.take_inputs(padded_heads(heads, head_dim))
        return pack(quants, bias)

    def pack_gate_up(self, w: Tensor | Quants, bias: Tensor | None) -> Weights:
        quants = quants_of(w)
        return pack(quants, bias, interleaved(len(quants.q) // 2))

    def pack_heads(self, heads: Sequence[Sequence[tuple[Any, Tensor]]]) -> list[list[Weights]]:
        return [[self.pack(*block) for block in stack] for stack in heads]

    def pack_embedding(self, w: Any, vocabulary: Weights | None = None) -> Weights:
        return self.pack(w) if vocabulary is None else vocabulary

    # Rows.

    def embed(self, embedding: Weights, ids: Tensor) -> Tensor:
        def build() -> Unit:
            program = new_program(0)
            out = new_rows(program, embedding.in_features)
            program.embed(embedding, out)
            return Unit(program, (), (out,))

        unit = self._units.get(("embed", id(embedding.data)), build)
        made = []
        for some in ids.reshape(-1).split(MAX_ROWS):
            unit.program.ids[: len(some)] = some.numpy()
            unit.program.run(len(some))
            made.append(copied(unit.results(len(some))[0]))
        return joined(made)

    def rms_norm(
        self,
        x: Tensor | Weights,
        w: Tensor,
        eps: float,
        *,
        ids: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        if isinstance(x, Weights):
            assert ids is not None, "rows of an embedding are named by ids"
            x = self.embed(x, ids)
        K = x.shape[1]

        def build() -> Unit:
            program = new_program(0)
            source, normed = new_rows(program, K), new_rows(program, K)
            program.norm(source, norm_of(w, eps), normed)
            return Unit(program, (source,), (normed,), w)

        normed = self._units.get(("norm", w.data_ptr(), K), build).run_rows(x)
        if out is not None:
            out.numpy()[:] = normed.numpy()
        return normed if out is None else out

    def linear(self, x: Tensor, w: Weights, *, residual: Tensor | None = None) -> Tensor:
        def build() -> Unit:
            program = new_program(w.data.nbytes)
            source, out = new_rows(program, w.in_features), new_rows(program, w.out_features)
            program.linear(source, w, out, residual=None if residual is None else out)
            return Unit(program, (source, out), (out,))

        unit = self._units.get(("linear", id(w.data), residual is None), build)
        return unit.run_rows(x, residual)

    def gate_up_silu(self, x: Tensor, norm_w: Tensor, eps: float, w: Weights) -> Tensor:
        columns = w.out_features // 2  # whole lanes; `linear` takes the first F

        def build() -> Unit:
            program = new_program(w.data.nbytes)
            source, out = new_rows(program, w.in_features), new_rows(program, columns)
            program.gate_up_silu(source, w, out, norm=norm_of(norm_w, eps))
            return Unit(program, (source,), (out,), norm_w)

        return self._units.get(("gate_up", id(w.data)), build).run_rows(x)

    # Attention.

    def plan(self, cache: KVCache, rows: int, config: ModelConfig) -> CpuPlan:
        return CpuPlan(cache, rows, config)

    def qkv_rope_cache(
        self,
        x: Tensor,
        norm_w: Tensor | None,
        eps: float,
        w: tuple[Weights, ...],
        k_pages: Tensor,
        v_pages: Tensor,
        plan: CpuPlan,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
    ) -> Tensor:
        heads, D = plan.config.num_heads, k_pages.shape[3]

        def build() -> Unit:
            program = new_program(sum(part.data.nbytes for part in w), MAX_ROWS)
            source = new_rows(program, w[0].in_features)
            qkv = new_rows(program, sum(part.out_features for part in w))
            pages = layer_cache(k_pages, v_pages, plan, head_norm(q_norm), head_norm(k_norm))
            program.qkv_rope_cache(source, w, qkv, pages, norm=norm_of(norm_w, eps))
            return Unit(program, (source,), (qkv,), norm_w)

        unit = self._units.get(("qkv", id(w[0].data), k_pages.data_ptr()), build)
        runs = unit.run_windows(x, None, plan.cache.lengths, plan.cache.page_table, plan.rows)
        made = [copied(unit.results(count)[0][:, : heads * D]) for count in runs]
        return joined(made).view(-1, plan.rows, heads, D)

    def verify_attention(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, plan: CpuPlan
    ) -> Tensor:
        rows, width = q.flatten(2).flatten(0, 1), q.shape[2] * q.shape[3]

        def build() -> Unit:
            program = new_program(ONE_THREAD_BYTES, MAX_ROWS)
            queries, out = new_rows(program, width), new_rows(program, width)
            program.attend(queries, out, layer_cache(k_pages, v_pages, plan))
            return Unit(program, (queries,), (out,))

        unit = self._units.get(("attend", k_pages.data_ptr()), build)
        runs = unit.run_windows(rows, None, plan.cache.lengths, page_table, plan.rows)
        return unit.copies(runs)[0].view(q.shape)

    # Whole layers.

    def layers(
        self, model: Llama, window: Tensor, cache: KVCache, taps: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        def build() -> Unit:
            program = new_program(ONE_THREAD_BYTES, MAX_ROWS)
            kept = {tap: new_rows(program, model.config.hidden_size) for tap in taps}
            hidden = add_trunk(program, model, cache, kept)
            return Unit(program, (), (hidden, *kept.values()), model)

        unit = self._units.get(("layers", id(model), cache.k.data_ptr(), tuple(taps)), build)
        ids, T = window.reshape(-1), window.shape[1]
        runs = unit.run_windows(None, ids, cache.lengths, cache.page_table, T)
        hidden, *tapped = unit.copies(runs)
        return hidden, tapped

    def forward(
        self, model: Llama, window: Tensor, cache: KVCache, taps: Sequence[int], heads: Any
    ) -> tuple[Tensor, Projected]:
        last = self._forward
        if last is None or not (model is last.model and cache.k is last.k and taps is last.taps):
            wanted = tuple(taps) or (model.config.num_layers,)
            key = ("forward", id(model), cache.k.data_ptr(), wanted)
            unit = self._units.get(key, lambda: forward_unit(model, cache, wanted))
            self._forward = last = Forward(model, cache.k, taps, unit)
        features, normed, projected = last.run(window, cache)
        if heads:
            projected = projected._replace(heads=self._later(normed, model.vocabulary, heads))
        return features, projected

    def side_by_side(self, parts: list[Tensor]) -> Tensor:
        return joined(parts, axis=1)

    def pair_layer(
        self,
        w: Any,
        embedding: Weights,
        hidden: Tensor,
        tokens: Tensor,
        cache: KVCache,
        index: int,
        rows: int,
    ) -> Tensor:
        key = ("pairs", id(w), id(embedding), cache.k[index].data_ptr())
        unit = self._units.get(key, lambda: pair_unit(w, embedding, hidden.shape[1], cache, index))
        runs = unit.run_windows(hidden, tokens, cache.lengths, cache.page_table, rows)
        return unit.copies(runs)[0]

    def draft_chain(
        self, w: Any, embedding: Weights, cache: KVCache, pairs: Any, step: Any, count: int
    ) -> tuple[Tensor, int, Tensor] | None:
        batch, rows, width = pairs.features.shape
        if batch * rows > MAX_ROWS or not is_greedy(step.sampling):
            return None
        key = ("chain", id(w), id(embedding), cache.k.data_ptr(), count)
        unit = self._units.get(key, lambda: ChainUnit(w, embedding, width, cache, count))
        return unit.run(pairs, step, count)

    # The vocabulary.

    def project(
        self, hidden: Tensor, norm_w: Tensor, eps: float, vocabulary: Weights, heads: Any
    ) -> tuple[Tensor, Projected]:
        normed, projected = self.project_rows(hidden, vocabulary, (norm_w, eps))
        later = self._later(normed, vocabulary, heads) if heads else None
        return normed, projected._replace(heads=later)

    def _later(self, normed: Tensor, vocabulary: Weights, heads: Any) -> Callable[[Tensor], Tensor]:
        """-> a function from rows [B] to the parallel heads' logits [B, H, V] there."""

        def logits(rows: Tensor) -> Tensor:
            drafting = self.parallel_heads(normed[rows], heads)
            drafted = self.project_rows(drafting.flatten(0, 1), vocabulary)[1].logits
            return drafted.view(len(rows), len(heads), -1)

        return logits

    def parallel_heads(self, rows: Tensor, heads: Any) -> Tensor:
        made = []
        for stack in heads:
            hidden = rows
            for block in stack:
                hidden = hidden + F.silu(self.linear(hidden, block))
            made.append(hidden)
        return torch.stack(made, 1)

    def choose(
        self,
        hidden: Tensor,
        vocabulary: Weights,
        token_ids: Tensor,
        lengths: Tensor,
        draft: int,
        sampling: SamplingRows,
    ) -> tuple[Tensor, Tensor]:
        _, kept = self.project_rows(hidden, vocabulary)
        probability = (kept.values - kept.logsumexp).exp()
        if is_greedy(sampling):
            return token_ids[kept.best], probability
        logits, at = kept.logits[:, None], positions_of(lengths + draft, 1)
        return gumbel_sample(logits, at, sampling, token_ids)[:, 0], probability

    def project_rows(
        self, x: Tensor, vocabulary: Weights, norm: tuple[Tensor, float] | None = None
    ) -> tuple[Tensor, CpuLogits]:
        """Rows [R, E] through a vocabulary, after a norm if `norm` gives its weights and eps ->
        (the rows that were multiplied, their logits)."""
        # Units of their own for the trunk and a drafter, which must not overwrite each other's.
        whose = None if norm is None else norm[0].data_ptr()
        key = ("project", id(vocabulary.data), whose)
        unit = self._units.get(key, lambda: project_unit(vocabulary, norm))
        made, splits = [], x.split(MAX_ROWS)
        for rows in splits:
            unit.inputs[0][: len(rows)] = rows.numpy()
            unit.program.run(len(rows))
            found = unit.results(len(rows))
            made.append(found if len(splits) == 1 else tuple(map(copied, found)))
        normed, logits, best, values, sums = (joined(column) for column in zip(*made, strict=True))
        return normed, CpuLogits(logits, best, values, sums, None)

    # The end of a step.

    def advance(self, *step: Any) -> tuple[Tensor, Tensor]:
        return self._end.advance(*step)

    def ngram(
        self, tokens: Tensor, lengths: Tensor, drafts: int, size: int = 3
    ) -> tuple[Tensor, Tensor | bool]:
        return self._end.ngram(tokens, lengths, drafts, size)
