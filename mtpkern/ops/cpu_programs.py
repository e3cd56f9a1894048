"""The programs of kernels/cpu that `CpuOps` runs, and how rows get into and out of them.

A `Unit` is a program for given weights (and a given cache), built when it is first needed and kept.
It holds MAX_ROWS rows; more rows take several runs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from mtpkern.errors import UserError
from mtpkern.kernels.cpu._compile import Kernels, default_cache
from mtpkern.kernels.cpu._threads import Helpers
from mtpkern.kernels.cpu.layers import ModelCache, PackedLayer, add_layers
from mtpkern.kernels.cpu.program import LayerCache, Norm, Program
from mtpkern.kernels.cpu.quants import Array, Quants, quantise
from mtpkern.kernels.cpu.weights import LANES, Weights, padded_heads

if TYPE_CHECKING:
    from mtpkern.cache import KVCache
    from mtpkern.config import ModelConfig
    from mtpkern.model import DecoderLayer, Llama

MAX_ROWS = 128
# An operation on fewer bytes of weights is over before a second thread has woken up.
ONE_THREAD_BYTES = 2**18
AnyUnit = TypeVar("AnyUnit")
FORMATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class CpuPlan(NamedTuple):
    """What the layers share for T rows of each of B sequences."""

    cache: KVCache
    rows: int  # T
    config: ModelConfig


class Unit:
    """A program with its input and output rows, [MAX_ROWS, columns] float32 each.

    Its outputs are overwritten by its next run. What a step needs again and again (views of the
    first rows, numpy's views of a cache) is kept: after a pass over a model's weights nothing is in
    the CPU's caches, and each call of a tensor library costs some ten microseconds.
    """

    def __init__(
        self,
        program: Program,
        inputs: Sequence[Array],
        outputs: Sequence[Array],
        *kept: object,
        best: Array | None = None,
    ):
        """`kept` is what the unit's key names by address; `best` [MAX_ROWS, 3] int64 is what
        `Program.project` returns."""
        program.keep(*kept)
        self.program = program
        self.inputs, self.outputs = tuple(inputs), tuple(map(torch.from_numpy, outputs))
        self.best = None if best is None else torch.from_numpy(best)
        self._results: dict[int, tuple[Tensor, ...]] = {}
        self._window: Tensor | None = None
        self._lengths: Tensor | None = None
        self._page_table: Tensor | None = None

    def results(self, rows: int) -> tuple[Tensor, ...]:
        """The first `rows` rows of the outputs; with `best`, then also its ids, values and
        logarithms of sums, [rows] each."""
        if rows not in self._results:
            views = [out[:rows] for out in self.outputs]
            if self.best is not None:
                words = self.best[:rows].view(torch.float32)  # the low half of each comes first
                views += [self.best[:rows, 0], words[:, 2], words[:, 4]]
            self._results[rows] = tuple(views)
        return self._results[rows]

    def copies(self, runs: Iterable[int]) -> list[Tensor]:
        """The results of runs of so many rows each, copied after each run and joined."""
        made = [list(map(copied, self.results(count))) for count in runs]
        return [joined(column) for column in zip(*made, strict=True)]

    def run_rows(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Run x [R, K], any R, added to `residual` [R, N] -> a copy of the first output [R, N]."""
        made = []
        for begin in range(0, max(1, len(x)), MAX_ROWS):
            rows = x[begin : begin + MAX_ROWS]
            count = len(rows)
            if count:
                # Gates are padded to whole lanes, so that x may have more columns than w.
                self.inputs[0][:count] = rows.numpy()[:, : self.inputs[0].shape[1]]
                if residual is not None:
                    self.inputs[1][:count] = residual[begin : begin + count].numpy()
                self.program.run(count)
            made.append(copied(self.results(count)[0]))
        return joined(made)

    def run_windows(
        self, x: Tensor | None, ids: Tensor | None, lengths: Tensor, page_table: Tensor, T: int
    ) -> Iterator[int]:
        """Run T rows of each sequence, rows x [B * T, K] and ids [B * T], as many at a time as the
        program holds; yields how many rows each run had, in order."""
        for b, count, t, rows in parts(len(lengths), T):
            begin, total = b * T + t, count * rows
            if x is not None:
                self.inputs[0][:total] = x[begin : begin + total].numpy()
            some = None if ids is None else ids[begin : begin + total]
            self._run_part(some, lengths[b : b + count] + t, page_table[b:], rows)
            yield total

    def run_window(self, window: Tensor, lengths: Tensor, page_table: Tensor) -> None:
        """Run window [B, T] of ids, all rows of which the program holds."""
        batch, rows = window.shape
        if window is not self._window:
            self._window, self._given = window, window.numpy()
            self._ids = self.program.ids[: batch * rows].reshape(batch, rows)
        self._ids[:] = self._given
        self._run_part(None, lengths, page_table, rows)

    def _run_part(self, ids: Tensor | None, lengths: Tensor, page_table: Tensor, rows: int) -> None:
        program = self.program
        if lengths is not self._lengths:
            self._lengths, self._numbers = lengths, lengths.numpy()
        if page_table is not self._page_table:
            self._page_table, program.page_table = page_table, page_table.numpy()
        batch = len(self._numbers)
        program.lengths[:batch] = self._numbers
        if ids is not None:
            program.ids[: batch * rows] = ids.numpy()
        program.run(rows, batch)


class Units:
    """Units by what they are built for, named by address; each keeps that alive."""

    def __init__(self) -> None:
        self._units: dict[Hashable, Any] = {}

    def get(self, key: Hashable, build: Callable[[], AnyUnit]) -> AnyUnit:
        if key not in self._units:
            self._units[key] = build()
        return self._units[key]


@cache
def kernels() -> Kernels:
    """This process's kernels, compiled on first use. Raises UserError where this CPU cannot run
    them."""
    try:
        return Kernels(directory=default_cache())
    except ValueError as error:
        raise UserError(f"device cpu: {error}") from None


@cache
def helpers(threads: int) -> Helpers:
    """This process's threads, shared by all programs."""
    return Helpers(threads)


def new_program(weight_bytes: int, batch: int = 1) -> Program:
    threads = 1 if weight_bytes < ONE_THREAD_BYTES else torch.get_num_threads()
    return Program(kernels(), helpers(threads), max_rows=MAX_ROWS, max_batch=batch)


def new_rows(program: Program, columns: int) -> Array:
    """Uninitialised rows [MAX_ROWS, columns] float32 of a program."""
    return program.buffer(columns)[:, :columns]


def parts(batch: int, rows: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut [B, T] rows into runs: first sequence, sequences, first row, rows of each."""
    if rows > MAX_ROWS:
        for b in range(batch):
            for t in range(0, rows, MAX_ROWS):
                yield b, 1, t, min(MAX_ROWS, rows - t)
        return
    most = MAX_ROWS // max(1, rows)
    for b in range(0, batch, most):
        yield b, min(most, batch - b), 0, rows


def copied(rows: Tensor) -> Tensor:
    """A copy, made by NumPy as all copies here: a large one by torch would wake its own threads,
    which then spin beside the kernels' for some milliseconds."""
    return torch.from_numpy(rows.numpy().copy())


def joined(made: Sequence[Tensor], axis: int = 0) -> Tensor:
    if len(made) == 1:
        return made[0]
    return torch.from_numpy(np.concatenate([part.numpy() for part in made], axis))


def quants_of(w: Tensor | Quants) -> Quants:
    return w if isinstance(w, Quants) else quantise(w, FORMATS[w.dtype])


def norm_of(w: Tensor | None, eps: float) -> Norm:
    return Norm(None if w is None else w.float().numpy(), eps)


def head_norm(w: Tensor | None) -> Array | None:
    """The weights [D] of a norm per head, padded like the heads."""
    if w is None:
        return None
    order = padded_heads(1, len(w))
    return np.where(order < 0, np.float32(0), w.float().numpy()[order])


def layer_of(layer: DecoderLayer, eps: float) -> PackedLayer:
    return PackedLayer(
        norm_of(layer.input_norm, eps),
        layer.qkv,
        layer.o,
        norm_of(layer.post_attention_norm, eps),
        layer.gate_up,
        layer.down,
        head_norm(layer.q_norm),
        head_norm(layer.k_norm),
    )


def layer_cache(
    k_pages: Tensor,
    v_pages: Tensor,
    plan: CpuPlan,
    q_norm: Array | None = None,
    k_norm: Array | None = None,
) -> LayerCache:
    cache, config = plan.cache, plan.config
    settings = (config.num_heads, config.sliding_window, q_norm, k_norm, config.head_dim)
    return LayerCache(k_pages, v_pages, cache.cos, cache.sin, *settings)


def cache_of(cache: KVCache, config: ModelConfig, layers: slice) -> ModelCache:
    heads, sliding, head_dim = config.num_heads, config.sliding_window, config.head_dim
    k, v = cache.k[layers], cache.v[layers]
    return ModelCache(k, v, cache.cos, cache.sin, heads, sliding, head_dim)


def add_trunk(program: Program, model: Llama, cache: KVCache, taps: Mapping[int, Array]) -> Array:
    """Add a model's layers -> the hidden states [MAX_ROWS, E] after the last; see `add_layers`."""
    config = model.config
    x = new_rows(program, config.hidden_size)
    program.embed(model.embedding, x)
    layers = [layer_of(layer, config.rms_norm_eps) for layer in model.layers]
    table = cache_of(cache, config, slice(None))
    return add_layers(program, x, layers, table, taps)[:, : config.hidden_size]


def forward_unit(model: Llama, cache: KVCache, taps: Sequence[int]) -> Unit:
    """Layers, final norm and vocabulary -> features, normed rows, logits, and the best of them.

    The features are the states after the layers `taps` side by side, the last layer's normed, each
    padded to whole lanes, which a norm writes.
    """
    config = model.config
    E, last = config.hidden_size, config.num_layers
    lanes = -(-E // LANES) * LANES
    program = new_program(ONE_THREAD_BYTES, MAX_ROWS)
    features = program.buffer(len(taps) * lanes)
    kept = {tap: features[:, i * lanes :][:, :E] for i, tap in enumerate(taps)}
    normed = kept.pop(last, None)
    if normed is None:
        normed = new_rows(program, E)
    hidden = add_trunk(program, model, cache, kept)
    program.norm(hidden, norm_of(model.norm, config.rms_norm_eps), normed)
    logits = new_rows(program, model.vocabulary.out_features)
    best = program.project(normed, model.vocabulary, logits=logits)
    return Unit(program, (), (features, normed, logits), model, best=best)


def project_unit(vocabulary: Weights, norm: tuple[Tensor, float] | None) -> Unit:
    """Rows through a vocabulary, after a norm if `norm` gives its weights and eps -> the rows that
    are multiplied, their logits, and the best of them."""
    program, E = new_program(vocabulary.data.nbytes), vocabulary.in_features
    source = normed = new_rows(program, E)
    if norm is not None:
        normed = new_rows(program, E)
        program.norm(source, norm_of(*norm), normed)
    logits = new_rows(program, vocabulary.out_features)
    best = program.project(normed, vocabulary, logits=logits)
    return Unit(program, (source,), (normed, logits), norm, best=best)
