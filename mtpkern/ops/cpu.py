"""The operations of a step on a CPU, by the compiled kernels of kernels/cpu.

Rows are float32, whatever the weights are; weights stay in the bits in which they are given. A
row's bits depend on its own inputs alone, by construction (see kernels/cpu), in prefill as in
decoding. Every operation is a program that is built when it is first wanted and kept; a trunk's
layers are one program.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtpkern.errors import UserError
from mtpkern.kernels.advance import STEP_MASK, Progress
from mtpkern.kernels.cpu._compile import Kernels, default_cache
from mtpkern.kernels.cpu._threads import Helpers
from mtpkern.kernels.cpu.layers import Cache, Layer, add_layers
from mtpkern.kernels.cpu.program import Norm, Pages, Program
from mtpkern.kernels.cpu.weights import (
    LANES,
    Array,
    Quants,
    Weights,
    interleaved,
    pack,
    padded_dim,
    padded_heads,
    rounded,
)
from mtpkern.kernels.sample import GREEDY, SamplingRows, sample_ref
from mtpkern.ops.base import Ops, Projected, Withheld, positions_of

# Rows that a program holds; more take several runs.
MAX_ROWS = 128
# Below so many bytes of weights an operation is over before a second thread has woken up.
ALONE = 2**18
FORMATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class CpuPlan(NamedTuple):
    """What the layers share for T rows of each of B sequences."""

    lengths: Tensor  # [B] int64
    rows: int  # T
    page_table: Tensor  # [B, max_pages] int32
    cos: Tensor  # [capacity, D] float32
    sin: Tensor
    group: int  # query heads per KV head
    sliding: int  # positions that a row sees; 0: all
    head_dim: int  # without padding


@dataclass(frozen=True)
class _Unit:
    """A program and the rows that go in and come out, [MAX_ROWS, columns] float32 each."""

    program: Program
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    best: Tensor | None = None  # [MAX_ROWS, 3] int64; see `Program.project`
    # By how many rows: the first rows of `outputs`, and the columns of `best`.
    _views: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    def first(self, rows: int) -> tuple[Tensor, ...]:
        """The first rows of the outputs; with `best`, its ids, values and sums behind them. Like
        all of a program's rows they are overwritten by its next run."""
        if rows not in self._views:
            views = [out[:rows] for out in self.outputs]
            if self.best is not None:
                words = self.best[:rows].view(torch.float32)  # the low half of each comes first
                views += [self.best[:rows, 0], words[:, 2], words[:, 4]]
            self._views[rows] = tuple(views)
        return self._views[rows]


class CpuLogits(NamedTuple):
    """`Projected` of R = B * T rows. Until the next projection: the rows are the program's own."""

    logits: Tensor  # [R, V] float32
    best: Tensor  # [R] int64, the likeliest of each row
    values: Tensor  # [R] float32, its logit
    logsumexp: Tensor  # [R] float32
    heads: Callable[[Tensor], Tensor] | None  # rows [B] -> logits [B, H, V] of the parallel heads

    def target(
        self,
        shape: tuple[int, int],
        behind: Tensor,
        sampling: SamplingRows,
        withheld: Withheld | None = None,
    ) -> Tensor:
        if withheld is None and _is_greedy(sampling):
            return self.best.view(shape)
        own, positions = self.logits.view(*shape, -1), positions_of(behind, shape[1])
        if withheld is not None:
            early = positions < withheld.until[:, None]
            own = own.masked_fill(early[:, :, None] & withheld.tokens[:, None], float("-inf"))
        return sample_ref(own, positions, sampling)

    def largest(self, shape: tuple[int, int]) -> Tensor:
        return self.values.view(shape)

    def drafts(
        self, accepted: Tensor, count: int, behind: Tensor, sampling: SamplingRows
    ) -> Tensor:
        assert self.heads is not None, "there are parallel heads where they are asked for drafts"
        batch = len(accepted)
        rows = torch.arange(0, len(self.logits), len(self.logits) // batch) + accepted
        return sample_ref(self.heads(rows)[:, :count], positions_of(behind, count), sampling)

    def logprobs(self, target: Tensor) -> Tensor:
        chosen = self.logits.gather(1, target.reshape(-1, 1))[:, 0] - self.logsumexp
        return chosen.view(target.shape)


@cache
def kernels() -> Kernels:
    """This process's kernels, compiled by the first run on a machine. UserError where this CPU
    cannot run them."""
    try:
        found = Kernels(directory=default_cache())
    except ValueError as error:
        raise UserError(f"device cpu: {error}") from None
    found.run_program()
    return found


@cache
def helpers(threads: int) -> Helpers:
    """This process's threads, shared by all programs."""
    return Helpers(threads)


class _Cpu:
    """The operations, with their programs."""

    def __init__(self) -> None:
        # Each program keeps what its key names by address.
        self._units: dict[Hashable, _Unit] = {}

    def program(self, weight_bytes: int, batch: int = 1) -> Program:
        threads = 1 if weight_bytes < ALONE else torch.get_num_threads()
        return Program(kernels(), helpers(threads), max_rows=MAX_ROWS, max_batch=batch)

    def unit(self, key: Hashable, make: Callable[[], _Unit]) -> _Unit:
        if key not in self._units:
            self._units[key] = make()
        return self._units[key]

    # Weights.

    def pack(self, w: Tensor | Quants, bias: Tensor | None = None) -> Weights:
        return pack(_quants(w), bias)

    def pack_qkv(self, w: Tensor | Quants, bias: Tensor | None, head_dim: int) -> Weights:
        quants = _quants(w)
        if padded_dim(head_dim) == head_dim:
            return pack(quants, bias)
        return pack(quants, bias, padded_heads(len(quants.q) // head_dim, head_dim))

    def pack_o(self, w: Tensor | Quants, bias: Tensor | None, head_dim: int) -> Weights:
        quants = _quants(w)
        if padded_dim(head_dim) != head_dim:
            heads = quants.q.shape[1] // head_dim
            quants = quants.take_inputs(padded_heads(heads, head_dim))
        return pack(quants, bias)

    def pack_gate_up(self, w: Tensor | Quants, bias: Tensor | None) -> Weights:
        quants = _quants(w)
        return pack(quants, bias, interleaved(len(quants.q) // 2))

    def pack_heads(self, heads: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> Any:
        return [[self.pack(*block) for block in stack] for stack in heads]

    # Operations on rows.

    def embed(self, embedding: Weights, ids: Tensor) -> Tensor:
        def make() -> _Unit:
            program = self.program(0)
            out = _rows(program, embedding.in_features)
            program.embed(embedding, out)
            return _unit(program, (), (out,))

        unit = self.unit(("embed", id(embedding.data)), make)
        flat = ids.reshape(-1)
        made = []
        for some in flat.split(MAX_ROWS):
            unit.program.ids[: len(some)] = some.numpy()
            unit.program.run(len(some))
            made.append(unit.first(len(some))[0].clone())
        return _joined(made)

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
            assert ids is not None, "rows of a matrix have ids"
            x = self.embed(x, ids)
        K = x.shape[1]

        def make() -> _Unit:
            program = self.program(0)
            source, normed = _rows(program, K), _rows(program, K)
            program.norm(source, _norm(w, eps), normed)
            return _unit(program, (source,), (normed,), w)

        normed = self._run(self.unit(("norm", w.data_ptr(), K), make), x)
        return normed if out is None else out.copy_(normed)

    def linear(self, x: Tensor, w: Weights, *, residual: Tensor | None = None) -> Tensor:
        def make() -> _Unit:
            program = self.program(w.data.nbytes)
            source, out = _rows(program, w.in_features), _rows(program, w.out_features)
            program.linear(source, w, out, residual=None if residual is None else out)
            return _unit(program, (source, out), (out,))

        unit = self.unit(("linear", id(w.data), residual is None), make)
        return self._run(unit, x, residual)

    def gate_up_silu(self, x: Tensor, norm_w: Tensor, eps: float, w: Weights) -> Tensor:
        # Of gates that are padded to whole lanes; what takes them has fewer inputs.
        columns = w.out_features // 2

        def make() -> _Unit:
            program = self.program(w.data.nbytes)
            source, out = _rows(program, w.in_features), _rows(program, columns)
            program.gate_up_silu(source, w, out, norm=_norm(norm_w, eps))
            return _unit(program, (source,), (out,), norm_w)

        return self._run(self.unit(("gate_up", id(w.data)), make), x)

    def _run(self, unit: _Unit, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Run rows x [R, K] through a unit -> its output [R, N]."""
        made = []
        for begin in range(0, max(1, len(x)), MAX_ROWS):
            rows = x[begin : begin + MAX_ROWS]
            count = len(rows)
            if count:
                # Gates that were padded to whole lanes have more columns than what takes them.
                unit.inputs[0][:count].copy_(rows[:, : unit.inputs[0].shape[1]])
                if residual is not None:
                    unit.inputs[1][:count].copy_(residual[begin : begin + count])
                unit.program.run(count)
            made.append(unit.first(count)[0].clone())
        return _joined(made)

    # Attention.

    def plan(
        self,
        lengths: Tensor,
        rows: int,
        *,
        k_cache: Tensor,
        v_cache: Tensor,
        page_table: Tensor,
        cos_table: Tensor,
        sin_table: Tensor,
        group: int,
        window: int = 0,
        head_dim: int,
    ) -> CpuPlan:
        return CpuPlan(lengths, rows, page_table, cos_table, sin_table, group, window, head_dim)

    def qkv_rope_cache(
        self,
        x: Tensor,
        norm_w: Tensor | None,
        eps: float,
        w: Weights,
        k_pages: Tensor,
        v_pages: Tensor,
        plan: CpuPlan,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
    ) -> Tensor:
        pages = self._pages(k_pages, v_pages, plan, q_norm, k_norm)
        D, width = k_pages.shape[3], w.out_features

        def make() -> _Unit:
            program = self.program(w.data.nbytes, MAX_ROWS)
            source, qkv = _rows(program, w.in_features), _rows(program, width)
            program.qkv_rope_cache(source, w, qkv, pages, norm=_norm(norm_w, eps))
            return _unit(program, (source,), (qkv,), norm_w)

        unit = self.unit(("qkv", id(w.data), k_pages.data_ptr()), make)
        queries = pages.heads * D
        made = [
            unit.first(count)[0][:, :queries].clone()
            for count in self._windows(unit, plan, x.view(len(plan.lengths), plan.rows, -1))
        ]
        return _joined(made).view(len(plan.lengths), plan.rows, pages.heads, D)

    def verify_attention(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, plan: CpuPlan
    ) -> Tensor:
        pages, width = self._pages(k_pages, v_pages, plan), q.shape[2] * q.shape[3]

        def make() -> _Unit:
            program = self.program(ALONE, MAX_ROWS)
            queries, out = _rows(program, width), _rows(program, width)
            program.attend(queries, out, pages)
            return _unit(program, (queries,), (out,))

        unit = self.unit(("attend", k_pages.data_ptr()), make)
        made = [unit.first(count)[0].clone() for count in self._windows(unit, plan, q.flatten(2))]
        return _joined(made).view(q.shape)

    def _pages(
        self,
        k_pages: Tensor,
        v_pages: Tensor,
        plan: CpuPlan,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
    ) -> Pages:
        heads = k_pages.shape[2] * plan.group
        norms = (_head_norm(q_norm), _head_norm(k_norm))
        tables = (plan.cos, plan.sin)
        return Pages(k_pages, v_pages, *tables, heads, plan.sliding, *norms, plan.head_dim)

    def _windows(self, unit: _Unit, plan: CpuPlan, x: Tensor) -> Iterator[int]:
        """Run rows x [B, T, K], in order and as many at a time as a program holds -> how many."""
        for b, count, t, rows in _parts(len(plan.lengths), plan.rows):
            _set_window(unit.program, plan.lengths, plan.page_table, b, count, t)
            source = x[b : b + count, t : t + rows].flatten(0, 1)
            unit.inputs[0][: len(source)].copy_(source)
            unit.program.run(rows, count)
            yield len(source)

    def layers(
        self, model: Any, window: Tensor, cache: Any, taps: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """`run_trunk` in one program."""

        def make() -> _Unit:
            program = self.program(ALONE, MAX_ROWS)
            kept = {tap: _rows(program, model.config.hidden_size) for tap in taps}
            hidden = self._trunk(program, model, cache, kept)
            return _unit(program, (), (hidden, *kept.values()), model)

        unit = self.unit(("layers", id(model), cache.k.data_ptr(), tuple(taps)), make)
        made = [tuple(part.clone() for part in parts) for parts in _forward(unit, window, cache)]
        hidden, *tapped = (_joined(parts) for parts in zip(*made, strict=True))
        return hidden, tapped

    def forward(
        self, model: Any, window: Tensor, cache: Any, taps: Sequence[int], heads: Any
    ) -> tuple[Tensor, Projected]:
        """`run_trunk` and `project` in one program, tapped states side by side; what comes back is
        overwritten by the next call."""
        config = model.config
        E, last = config.hidden_size, config.num_layers
        wanted = tuple(taps) or (last,)
        lanes = -(-E // LANES) * LANES

        def make() -> _Unit:
            program = self.program(ALONE, MAX_ROWS)
            features = program.buffer(len(wanted) * lanes)
            kept = {tap: features[:, i * lanes :][:, :E] for i, tap in enumerate(wanted)}
            normed = kept.pop(last, None)
            if normed is None:
                normed = _rows(program, E)
            hidden = self._trunk(program, model, cache, kept)
            program.norm(hidden, _norm(model.norm, config.rms_norm_eps), normed)
            logits = _rows(program, model.vocabulary.out_features)
            best = program.project(normed, model.vocabulary, logits=logits)
            return _unit(program, (), (features, normed, logits), model, best=best)

        unit = self.unit(("forward", id(model), cache.k.data_ptr(), wanted), make)
        parts = list(_forward(unit, window, cache, whole := _is_whole(window)))
        columns = parts[0] if whole else [torch.cat(column) for column in zip(*parts, strict=True)]
        features, normed, logits, ids, values, sums = columns
        features = features.unflatten(1, (-1, lanes))[:, :, :E].flatten(1)
        later = self._later(normed, model.vocabulary, heads) if heads else None
        return features, CpuLogits(logits, ids, values, sums, later)

    def _trunk(self, program: Program, model: Any, cache: Any, taps: Mapping[int, Array]) -> Array:
        """Add a model's layers -> the hidden states [MAX_ROWS, E] after the last; see
        `add_layers`."""
        config = model.config
        x = _rows(program, config.hidden_size)
        program.embed(model.embedding, x)
        layers = [_layer(layer, config.rms_norm_eps) for layer in model.layers]
        table = self._cache(cache, config, slice(None))
        return add_layers(program, x, layers, table, taps)[:, : config.hidden_size]

    def pair_layer(
        self,
        w: Any,
        embedding: Weights,
        hidden: Tensor,
        tokens: Tensor,
        cache: Any,
        index: int,
        rows: int,
    ) -> Tensor:
        """One pass of a sequential head in one program; see `MtpDrafter.run_pairs`."""
        E = hidden.shape[1]
        k = cache.k[index]

        def make() -> _Unit:
            program = self.program(ALONE, MAX_ROWS)
            source, x = _rows(program, E), _rows(program, E)
            # Half a row that is no whole lanes runs over into what follows it.
            pair = program.buffer(2 * E + LANES)
            halves = pair[:, :E], pair[:, E : 2 * E]
            of_hidden, of_token = halves if w.input_proj is not None else halves[::-1]
            eps, token_rows = w.config.rms_norm_eps, _rows(program, E)
            program.embed(embedding, token_rows)
            steps = [(source, w.hidden_norm, of_hidden), (token_rows, w.token_norm, of_token)]
            for rows, norm, half in steps if w.input_proj is not None else steps[::-1]:
                program.norm(rows, _norm(norm, eps), half)
            if w.input_proj is not None:
                program.linear(pair, w.input_proj, x)
            elif w.norm_before_residual:
                program.norm(source, _norm(w.hidden_norm, eps), x)
            else:
                x = source
            table = self._cache(cache, w.config, slice(index, index + 1))
            inputs = None if w.input_proj is not None else pair
            out = add_layers(program, x, [_layer(w.layer, eps)], table, inputs=inputs)
            if w.input_proj is not None:
                normed = _rows(program, E)
                program.norm(out, _norm(w.final_norm, eps), normed)
                out = normed
            return _unit(program, (source,), (out[:, :E],), w, embedding)

        unit = self.unit(("pairs", id(w), id(embedding), k.data_ptr()), make)
        made = []
        batch = len(hidden) // rows
        for b, count, t, some in _parts(batch, rows):
            _set_window(unit.program, cache.lengths, cache.page_table, b, count, t)
            of = slice(b * rows + t, b * rows + t + count * some)
            total = of.stop - of.start
            unit.inputs[0][:total].copy_(hidden[of])
            unit.program.ids[:total] = tokens[of].numpy()
            unit.program.run(some, count)
            made.append(unit.first(total)[0].clone())
        return _joined(made)

    def _cache(self, cache: Any, config: Any, layers: slice) -> Cache:
        return Cache(
            cache.k[layers],
            cache.v[layers],
            cache.cos,
            cache.sin,
            config.num_heads,
            config.sliding_window,
            config.head_dim,
        )

    # The vocabulary.

    def project(
        self, hidden: Tensor, norm_w: Tensor, eps: float, vocabulary: Weights, heads: Any
    ) -> tuple[Tensor, Projected]:
        normed, projected = self._project(hidden, vocabulary, (norm_w, eps))
        later = self._later(normed, vocabulary, heads) if heads else None
        return normed, projected._replace(heads=later)

    def _later(self, normed: Tensor, vocabulary: Weights, heads: Any) -> Callable[[Tensor], Tensor]:
        """Logits [B, H, V] of parallel heads for rows [B], once they are known."""

        def logits(rows: Tensor) -> Tensor:
            drafting = self.parallel_heads(normed[rows], heads)
            drafted = self._project(drafting.flatten(0, 1), vocabulary)[1].logits
            return drafted.view(len(rows), len(heads), -1)

        return logits

    def choose(
        self,
        hidden: Tensor,
        vocabulary: Weights,
        token_ids: Tensor,
        behind: Tensor,
        draft: int,
        sampling: SamplingRows,
    ) -> tuple[Tensor, Tensor]:
        _, kept = self._project(hidden, vocabulary)
        chance = (kept.values - kept.logsumexp).exp()
        if _is_greedy(sampling):
            return token_ids[kept.best], chance
        positions = positions_of(behind + draft, 1)
        return sample_ref(kept.logits[:, None], positions, sampling, token_ids)[:, 0], chance

    def parallel_heads(self, rows: Tensor, heads: Any) -> Tensor:
        made = []
        for stack in heads:
            hidden = rows
            for block in stack:
                hidden = hidden + F.silu(self.linear(hidden, block))
            made.append(hidden)
        return torch.stack(made, 1)

    def _project(
        self, x: Tensor, vocabulary: Weights, norm: tuple[Tensor, float] | None = None
    ) -> tuple[Tensor, CpuLogits]:
        """Rows [R, E], normed where `norm` gives weights and eps, through a vocabulary -> the rows
        as multiplied, and their logits. Those of rows that are normed here stay apart from others.
        """
        E, V = vocabulary.in_features, vocabulary.out_features

        def make() -> _Unit:
            program = self.program(vocabulary.data.nbytes)
            source = normed = _rows(program, E)
            if norm is not None:
                normed = _rows(program, E)
                program.norm(source, _norm(*norm), normed)
            logits = _rows(program, V)
            best = program.project(normed, vocabulary, logits=logits)
            return _unit(program, (source,), (normed, logits), norm, best=best)

        whose = None if norm is None else norm[0].data_ptr()
        unit = self.unit(("project", id(vocabulary.data), whose), make)
        made, parts = [], x.split(MAX_ROWS)
        for rows in parts:
            unit.inputs[0][: len(rows)].copy_(rows)
            unit.program.run(len(rows))
            found = unit.first(len(rows))
            made.append(found if len(parts) == 1 else tuple(part.clone() for part in found))
        normed, own, ids, values, sums = (_joined(column) for column in zip(*made, strict=True))
        return normed, CpuLogits(own, ids, values, sums, None)


class _Numbers:
    """A state's progress as numpy sees it, kept from step to step."""

    def __init__(self) -> None:
        self.of: Progress | None = None

    def __call__(self, progress: Progress) -> Any:
        if self.of is not progress:
            arrays: list[Any] = [tensor.numpy() for tensor in progress]
            self.of, self.views = progress, Progress(*arrays)
        return self.views


def _advance(
    window: Tensor,
    target: Tensor,
    largest: Tensor,
    logprobs: Tensor | None,
    progress: Progress,
    numbers: Callable[[Progress], Any],
) -> tuple[Tensor, Tensor]:
    """`advance_ref` for the few numbers of a step, one by one: a library's call takes longer."""
    T = window.shape[1]
    windows, targets = window.numpy(), target.tolist()
    sound = [[isfinite(value) for value in row] for row in largest.tolist()]
    chances = [[0] * T] * len(targets)
    if logprobs is not None:
        chances = (logprobs.view(torch.int32).long() & 0xFFFFFFFF).tolist()
    p = numbers(progress)
    made = []
    for b, chosen in enumerate(targets):
        drafts, active, length = windows[b].tolist(), int(p.active[b]), int(p.lengths[b])
        n = 0
        while n + 1 < T and sound[b][n] and drafts[n + 1] == chosen[n]:
            n += 1
        broken = active and not sound[b][n]
        count = (n + 1) * active
        p.clock[b] += 1
        step = int(p.clock[b])
        above = (step & STEP_MASK) << 32
        facts = n | int(p.drafted[b]) << 8 | int(p.source[b]) << 16
        words = [facts | (active + 2 * broken) << 24, *chosen, *chances[b]]
        p.ring[step % len(p.ring), b, : 1 + 2 * T] = [above | word for word in words]
        if active:
            p.tokens[b, length + 1 : length + 1 + T] = chosen
            windows[b, 0] = chosen[n]
            ended = not set(p.ends[b].tolist()).isdisjoint(chosen[:count])
            p.lengths[b] = length + count
            p.active[b] = not (ended or broken or length + count + 1 >= p.limits[b])
        p.drafted[b] = p.source[b] = 0
        made.append((n, count))
    accepted, counts = torch.tensor(made).unbind(1)
    return accepted, counts


def _ngram(tokens: Tensor, known: Tensor, drafts: int, size: int = 3) -> tuple[Tensor, Tensor]:
    """`ngram_ref` by a search for bytes."""
    rows = tokens.numpy()
    copied = torch.zeros(len(rows), drafts, dtype=torch.int64)
    found = torch.zeros(len(rows), dtype=torch.bool)
    for b, (row, count) in enumerate(zip(rows, known.tolist(), strict=True)):
        if count <= size:
            continue
        text, pattern = row[: count - 1].tobytes(), row[count - size : count].tobytes()
        at = text.rfind(pattern)
        while at % row.itemsize and at >= 0:  # across two tokens
            at = text.rfind(pattern, 0, at + len(pattern) - 1)
        if at >= 0:
            begin = at // row.itemsize + size
            found[b] = True
            copied[b] = torch.tensor([int(row[begin + i % (count - begin)]) for i in range(drafts)])
    return copied, found


def cpu_ops() -> Ops:
    """The kernels of this CPU. Programs are kept for the weights and caches that they are called
    with, for as long as the value lives."""
    cpu = _Cpu()
    return Ops(
        pack=cpu.pack,
        pack_qkv=cpu.pack_qkv,
        pack_o=cpu.pack_o,
        pack_gate_up=cpu.pack_gate_up,
        pack_heads=cpu.pack_heads,
        pack_embedding=cpu.pack,
        embed=cpu.embed,
        plan=cpu.plan,
        rms_norm=cpu.rms_norm,
        qkv_rope_cache=cpu.qkv_rope_cache,
        verify_attention=cpu.verify_attention,
        linear=cpu.linear,
        gate_up_silu=cpu.gate_up_silu,
        layers=cpu.layers,
        forward=cpu.forward,
        pair_layer=cpu.pair_layer,
        parallel_heads=cpu.parallel_heads,
        project=cpu.project,
        choose=cpu.choose,
        advance=partial(_advance, numbers=_Numbers()),
        ngram=_ngram,
        host_may_read=True,
        padded_dim=padded_dim,
        rows=torch.float32,
        takes_quants=True,
    )


def _unit(
    program: Program,
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    *kept: object,
    best: Array | None = None,
) -> _Unit:
    """`kept` is what the key of the unit names by address."""
    program.keep(*kept)
    sources, found = (tuple(map(torch.from_numpy, arrays)) for arrays in (inputs, outputs))
    return _Unit(program, sources, found, None if best is None else torch.from_numpy(best))


def _rows(program: Program, columns: int) -> Array:
    """[MAX_ROWS, columns] float32, with padding behind each row that counts for nothing."""
    return program.buffer(columns)[:, :columns]


def _forward(
    unit: _Unit, window: Tensor, cache: Any, whole: bool = False
) -> Iterator[tuple[Tensor, ...]]:
    """Run a window [B, T], as many rows at a time as a program holds -> copies of what comes out;
    itself where that is the whole."""
    for b, count, t, rows in _parts(*window.shape):
        _set_window(unit.program, cache.lengths, cache.page_table, b, count, t)
        unit.program.ids[: count * rows] = window[b : b + count, t : t + rows].numpy().reshape(-1)
        unit.program.run(rows, count)
        found = unit.first(count * rows)
        yield found if whole else tuple(part.clone() for part in found)


def _is_whole(window: Tensor) -> bool:
    return window.numel() <= MAX_ROWS


def _is_greedy(sampling: SamplingRows) -> bool:
    return max(sampling.temperature.tolist(), default=0.0) < GREEDY


def _quants(w: Tensor | Quants) -> Quants:
    return w if isinstance(w, Quants) else rounded(w, FORMATS[w.dtype])


def _norm(w: Tensor | None, eps: float) -> Norm:
    return Norm(None if w is None else w.float().numpy(), eps)


def _head_norm(w: Tensor | None) -> Array | None:
    """The weights [D] of a norm of each head, padded like the heads."""
    if w is None:
        return None
    order = padded_heads(1, len(w))
    return np.where(order < 0, np.float32(0), w.float().numpy()[order])


def _layer(layer: Any, eps: float) -> Layer:
    return Layer(
        _norm(layer.input_norm, eps),
        layer.qkv,
        layer.o,
        _norm(layer.post_attention_norm, eps),
        layer.gate_up,
        layer.down,
        _head_norm(layer.q_norm),
        _head_norm(layer.k_norm),
    )


def _parts(batch: int, rows: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut [B, T] into what a program holds: first sequence, how many, first row, how many."""
    if rows > MAX_ROWS:
        for b in range(batch):
            for t in range(0, rows, MAX_ROWS):
                yield b, 1, t, min(MAX_ROWS, rows - t)
        return
    most = MAX_ROWS // max(1, rows)
    for b in range(0, batch, most):
        yield b, min(most, batch - b), 0, rows


def _set_window(
    program: Program, lengths: Tensor, page_table: Tensor, first: int, count: int, row: int
) -> None:
    program.lengths[:count] = lengths.numpy()[first : first + count] + row
    pages = page_table.numpy()[first:]
    if not np.shares_memory(pages[:1], program.page_table[:1]):
        program.page_table = pages


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
