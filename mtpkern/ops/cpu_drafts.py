"""The programs of sequential heads: one pass over pairs, and a whole chain of greedy drafts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtpkern.kernels.cpu.drafts import DraftProgram
from mtpkern.kernels.cpu.layers import add_layers
from mtpkern.kernels.cpu.program import Program
from mtpkern.kernels.cpu.quants import Array
from mtpkern.kernels.cpu.weights import LANES, Weights
from mtpkern.ops.cpu_programs import (
    MAX_ROWS,
    ONE_THREAD_BYTES,
    Unit,
    cache_of,
    helpers,
    kernels,
    layer_of,
    new_program,
    new_rows,
    norm_of,
)

if TYPE_CHECKING:
    from mtpkern.cache import KVCache


def add_pairs(
    program: Program, w: Any, embedding: Weights, hidden: Array, cache: KVCache, index: int
) -> Array:
    """Add a pass of a sequential head: pairs of hidden [MAX_ROWS, E] and token, one decoder layer,
    the norm -> o [MAX_ROWS, E].

    With an input projection the pair is (hidden, token) and goes through it; without one (EAGLE-3)
    it is (token, hidden), and the attention's input.
    """
    eps, E = w.config.rms_norm_eps, hidden.shape[1]
    projects = w.input_proj is not None
    x, token_rows = (new_rows(program, E) for _ in range(2))
    # A norm writes whole lanes: one that is not the last half is written before what follows it.
    pair = program.buffer(2 * E + LANES)
    first, second = pair[:, :E], pair[:, E : 2 * E]
    program.embed(embedding, token_rows)
    hidden_norm, token_norm = norm_of(w.hidden_norm, eps), norm_of(w.token_norm, eps)
    if projects:
        program.norm(hidden, hidden_norm, first)
        program.norm(token_rows, token_norm, second)
        program.linear(pair, w.input_proj, x)
    else:
        program.norm(token_rows, token_norm, first)
        program.norm(hidden, hidden_norm, second)
        if w.norm_before_residual:
            program.norm(hidden, hidden_norm, x)
        else:
            x = hidden
    table = cache_of(cache, w.config, slice(index, index + 1))
    layer = layer_of(w.layer, eps)
    out = add_layers(program, x, [layer], table, inputs=None if projects else pair)
    if projects:
        normed = new_rows(program, E)
        program.norm(out, norm_of(w.final_norm, eps), normed)
        out = normed
    return out[:, :E]


def pair_unit(w: Any, embedding: Weights, E: int, cache: KVCache, index: int) -> Unit:
    """A pass of a sequential head over pairs whose hidden states [R, E] are given."""
    program = new_program(ONE_THREAD_BYTES, MAX_ROWS)
    source = new_rows(program, E)
    out = add_pairs(program, w, embedding, source, cache, index)
    return Unit(program, (source,), (out,), w, embedding)


class ChainUnit:
    """A chain of `drafts` greedy passes of a sequential head, from the pairs' tapped states on."""

    def __init__(self, w: Any, embedding: Weights, width: int, cache: KVCache, drafts: int):
        """`width` is that of the tapped states; the head's cache has one layer."""
        E, eps = len(w.final_norm), w.config.rms_norm_eps
        threads = helpers(torch.get_num_threads())
        self.program = program = DraftProgram(
            kernels(), threads, max_rows=MAX_ROWS, max_batch=MAX_ROWS, drafts=drafts
        )
        program.keep(w, embedding)
        self._page_table: Tensor | None = None
        # Views of the drafts and their probabilities, by the number of sequences.
        self._results: dict[int, tuple[Tensor, ...]] = {}
        self.features = features = new_rows(program, width)
        hidden = features
        if w.input_norm is not None:
            hidden = new_rows(program, width)
            program.norm(features, norm_of(w.input_norm, eps), hidden)
        if w.fc is not None:
            source, hidden = hidden, new_rows(program, E)
            program.linear(source, w.fc, hidden)
        out = add_pairs(program, w, embedding, hidden, cache, 0)
        hidden = new_rows(program, E)
        program.pick(out, hidden)
        token_ids = w.token_ids.numpy()
        for i in range(drafts):
            if i:
                hidden = add_pairs(program, w, embedding, hidden, cache, 0)
            scored = hidden
            if w.input_proj is None:
                scored = new_rows(program, E)
                program.norm(hidden, norm_of(w.final_norm, eps), scored)
            program.draft(program.project(scored, w.vocabulary), token_ids)

    def run(self, pairs: Any, step: Any, count: int) -> tuple[Tensor, int, Tensor]:
        """Write `HostPairs` [B, n] and draft -> tokens [B, count] int64, of which the returned
        number are drafts and the rest copies of the last, and their probabilities [B, count].
        Overwritten by the next call."""
        program = self.program
        batch, rows = pairs.features.shape[:2]
        program.lengths[:batch] = pairs.begin
        if step.page_table is not self._page_table:
            self._page_table, program.page_table = step.page_table, step.page_table.numpy()
        given = self.features[: batch * rows]
        given.reshape(batch, rows, -1)[:] = pairs.features
        program.ids[: batch * rows] = pairs.tokens.reshape(-1)
        least = step.min_probability
        drafted = program.run_chain(rows, pairs.last, pairs.lengths, count, least)
        for drafts in (program.tokens, program.probabilities):
            drafts[drafted:count] = drafts[drafted - 1]
        if batch not in self._results:
            made = (program.tokens[:count, :batch].T, program.probabilities[:count, :batch].T)
            self._results[batch] = tuple(map(torch.from_numpy, made))
        tokens, probabilities = self._results[batch]
        return tokens, drafted, probabilities
