"""A program that drafts several tokens in one run: each pass is given the draft of the one before.

    program = DraftProgram(kernels, helpers, max_rows=128, max_batch=8, drafts=4)
    ...                          phases over all rows of a window, as in any `Program`
    program.pick(x, hidden)      from here on one row per sequence
    ...                          phases up to the vocabulary
    program.draft(best, ids)     the first draft, whose token the phases after this embed
    ...
    program.run_chain(rows, last, following, count, least)

Passes whose drafts would hardly ever be accepted are skipped.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import _layout as L
from ._compile import Kernels
from ._threads import Helpers
from .program import Program, float_bits
from .quants import Array


class DraftProgram(Program):
    """A chain of up to `drafts` passes. The first has the rows of `run`; the others have one row
    per sequence, at its positions `following` and those after it."""

    def __init__(
        self, kernels: Kernels, helpers: Helpers, *, max_rows: int, max_batch: int, drafts: int
    ):
        super().__init__(kernels, helpers, max_rows=max_rows, max_batch=max_batch)
        # The last head is never run: it only receives the last draft.
        self._heads = np.zeros((drafts + 1, L.HEAD_WORDS), np.int64)
        self._own_ids, self._own_lengths = (
            np.zeros((drafts + 1, max_batch), np.int64) for _ in range(2)
        )
        self._heads[:, L.WINDOW_ROWS] = 1
        for head, ids, lengths in zip(self._heads, self._own_ids, self._own_lengths, strict=True):
            head[L.IDS], head[L.LENGTHS] = ids.ctypes.data, lengths.ctypes.data
        self._first, self._skipped = self._heads[0], self._heads[:, L.SKIPPED]
        self._reached = np.zeros((drafts, max_batch), np.float32)
        # What `run_chain` gives: drafts and their probabilities, [drafts, max_batch].
        self.tokens = np.zeros((drafts, max_batch), np.int64)
        self.probabilities = np.zeros((drafts, max_batch), np.float32)
        self._drafts = 0
        self._single = False

    def pick(self, x: Array, out: Array) -> None:
        """out[b] = the row of sequence b that `run_chain` names; x and out have the same columns,
        whole lanes."""
        self._single = True
        fields = self._rows(L.X, x) | self._rows(L.OUT, out)
        self._add(L.PICK, 1, fields | {L.INPUTS: x.shape[1]})

    def draft(self, best: Array, token_ids: Array) -> None:
        """Draft token_ids[best[b, 0]], where `best` is what `project` returned.

        token_ids [V] int64 are the tokens of the vocabulary's rows.

        Phases after this belong to the next draft.
        """
        if token_ids.min() < 0 or token_ids.max() >= self._tokens:
            raise ValueError(f"token_ids must be 0..{self._tokens - 1}")
        i = self._drafts
        fields = {
            L.BEST: best.ctypes.data,
            L.TOKEN_IDS: self._address(token_ids),
            L.CHOSEN: self.tokens[i].ctypes.data,
            L.PROBABILITIES: self.probabilities[i].ctypes.data,
            L.X: self._reached[i - 1].ctypes.data if i else 0,
            L.OUT: self._reached[i].ctypes.data,
        }
        self._add(L.DRAFT, 1, fields)
        self._drafts += 1

    def run_chain(
        self, rows: int, last: Sequence[int], following: Sequence[int], count: int, least: float
    ) -> int:
        """Run the first `count` passes, the first of them over `rows` rows of each of B sequences,
        described by `ids`, `lengths` and `page_table`, of which row last[b] drafts; following[b] is
        the position of the second pass -> how many tokens were drafted for each sequence, 1..count.

        Drafting ends early where, in every sequence, the probability that all drafts so far are
        accepted is below `least`.
        """
        batch, first, skipped = len(last), self._first, self._skipped
        positions = min(self._positions, self.page_table.shape[1] * self._page_size)
        if max(following) + count - 1 > positions:
            raise ValueError(f"following + {count - 1} rows must be at most {positions}")
        self._own_lengths[0, :batch] = [position - 1 for position in following]
        self._own_ids[0, :batch] = [b * rows + row for b, row in enumerate(last)]
        first[L.BATCH], first[L.LEAST] = batch, float_bits(least)
        if self.page_table is not self._table_seen:
            first[L.PAGE_TABLE] = self.page_table.ctypes.data
            first[L.TABLE_STRIDE] = self.page_table.shape[1]
        skipped[:count], skipped[count:] = 0, 1
        self.run(rows, batch)
        return skipped[:count].tolist().count(0)

    def _add(self, op: int, chunks: int, fields: dict[int, int]) -> None:
        own = self._heads[self._drafts].ctypes.data if self._single else 0
        super()._add(op, chunks, fields | {L.ROWS_OF: own})
