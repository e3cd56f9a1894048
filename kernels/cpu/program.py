"""A step as a list of phases: built once, then run with any number of rows up to its capacity.

    program = Program(kernels, helpers, max_rows=8, max_batch=1)
    h = program.buffer(E)
    program.embed(embedding, h)
    program.linear(h, w, out, norm=(norm_w, eps))
    program.run(rows)

Every phase computes rows independently and in one order (see the files of each operation), so a
row's bits do not depend on the number of rows or threads, on the batch, or on which thread computed
which chunk. Programs may run at the same time; one program runs one step at a time.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _layout as L
from ._compile import Kernels
from ._formats import FORMATS, QUANTISED
from ._threads import Helpers
from .quants import Array
from .weights import LANES, Weights, on_cache_line, on_own_pages

# Bytes of weights per chunk: small beside a phase, large beside the cost of a ticket.
CHUNK_BYTES = 24 * 1024
KV_KINDS = {torch.float32: L.FP32, torch.float16: L.FP16, torch.bfloat16: L.BF16}


class Norm(NamedTuple):
    """RMS norm before a matmul."""

    w: Array | None  # [K] float32; None: no norm
    eps: float  # of the norms of q and k too


class LayerCache(NamedTuple):
    """One layer's keys and values, and the layout of their heads."""

    k: Tensor  # [pages, page_size, Hk, D], contiguous
    v: Tensor
    cos: Tensor  # [positions, D] float32
    sin: Tensor  # its first half negated
    heads: int  # query heads
    sliding: int = 0  # positions that a row sees; 0: all
    q_norm: Array | None = None  # [D] float32
    k_norm: Array | None = None
    # Numbers per head that are not padding; 0: all D. The padding, zeros, is at the end of each
    # half.
    head_dim: int = 0


class Program:
    """Phases over rows of B sequences; see the module."""

    def __init__(self, kernels: Kernels, helpers: Helpers, *, max_rows: int, max_batch: int = 1):
        self.kernels, self.helpers = kernels, helpers
        self.max_rows, self.max_batch = max_rows, max_batch
        self.ids = np.zeros(max_rows, np.int64)
        self.lengths = np.zeros(max_batch, np.int64)
        self._phases: list[dict[int, int]] = []
        self._kept: list[object] = []
        self._scratch = 0
        # Shared by all attention phases, which run one after the other.
        self._partials, self._merges = 0, 0
        self._tokens, self._positions, self._page_size = 2**31, 2**31, 2**31
        self._lock = threading.Lock()
        self._table: Array | None = None
        self._head = np.zeros(L.HEAD_WORDS, np.int64)
        self.page_table = np.zeros((max_batch, 1), np.int32)
        self._table_seen: Array | None = None

    def buffer(self, columns: int) -> Array:
        """Rows [max_rows, columns] float32, padded to whole lanes."""
        return on_own_pages((self.max_rows, -(-columns // LANES) * LANES), np.float32)

    def embed(self, w: Weights, out: Array) -> None:
        """out[r] = row ids[r] of w [V, E]."""
        fields = self._weight(w) | self._rows(L.OUT, out)
        self._tokens = min(self._tokens, w.out_features)
        self._add(L.EMBED, 1, fields | {L.WEIGHT_FORMAT: FORMATS.index(w.format), L.TILE: 0})

    def norm(self, x: Array, norm: Norm, out: Array) -> None:
        """out = rms_norm(x)"""
        if norm.w is None:
            raise ValueError("norm must have weights")
        fields = self._rows(L.X, x) | self._rows(L.OUT, out) | self._normed(norm)
        self._add(L.NORM, 1, fields | {L.INPUTS: len(norm.w)})

    def linear(
        self,
        x: Array,
        w: Weights,
        out: Array,
        *,
        norm: Norm | None = None,
        residual: Array | None = None,
    ) -> None:
        """out = x w^T + bias (+ residual), x normalised first if `norm` is given; `residual` may be
        `out`."""
        fields = self._matmul(x, w, norm) | self._rows(L.OUT, out)
        if residual is not None:
            fields |= self._rows(L.RESIDUAL, residual)
        self._chunked(L.LINEAR, w, 1, fields)

    def gate_up_silu(self, x: Array, w: Weights, out: Array, *, norm: Norm | None = None) -> None:
        """out = silu(gate) * up, w packed in the order `interleaved` gives."""
        fields = self._matmul(x, w, norm) | self._rows(L.OUT, out)
        self._chunked(L.GATE_UP, w, 2, fields)

    def qkv_rope_cache(
        self,
        x: Array,
        parts: Sequence[Weights],
        qkv: Array,
        pages: LayerCache,
        *,
        norm: Norm | None = None,
    ) -> None:
        """qkv = x w^T + bias, q and k rotated; k and v written at lengths[b] + t of the pages.

        `parts` are w [(Hq + 2 Hk) D, E], cut between heads where its format changes.
        """
        shared = self._rows(L.OUT, qkv) | self._paged(pages)
        for field, weight in ((L.Q_NORM, pages.q_norm), (L.K_NORM, pages.k_norm)):
            if weight is not None:
                shared[field] = self._address(weight)
        D, heads = shared[L.HEAD_DIM], shared[L.HEADS] + 2 * shared[L.KV_HEADS]
        outputs = [w.out_features for w in parts]
        if sum(outputs) != heads * D or any(count % D for count in outputs):
            raise ValueError(f"w must have {heads} heads of {D}, got {outputs} outputs")
        first = 0
        for w in parts:
            fields = shared | self._matmul(x, w, norm)
            fields |= {L.BLOCKS: D // LANES, L.FIRST_HEAD: first}
            self._add(L.QKV, w.out_features // D, fields)
            first += w.out_features // D

    def attend(
        self, q: Array, out: Array, pages: LayerCache, *, scale: float | None = None
    ) -> None:
        """out [R, Hq D] = attention of q [R, >= Hq D] to the pages; `scale` is 1 / sqrt(D) unless
        given, D without padding."""
        fields = self._rows(L.X, q) | self._rows(L.OUT, out) | self._paged(pages)
        D, Hk = fields[L.HEAD_DIM], fields[L.KV_HEADS]
        splits = -(-pages.cos.shape[0] // L.SPLIT)
        self._partials = max(self._partials, self.max_rows * pages.heads * splits * (D + LANES))
        self._merges = max(self._merges, self.max_batch * Hk)
        fields |= {
            L.SCALE: float_bits(fields[L.HEAD_COUNT] ** -0.5 if scale is None else scale),
            L.MAX_SPLITS: splits,
        }
        rows = self.max_rows * pages.heads // Hk
        self._scratch = max(self._scratch, 4 * (L.KEYS * D + rows * L.SPLIT), 4 * (splits + LANES))
        self._add(L.ATTEND, 0, fields)

    def project(
        self, x: Array, w: Weights, *, norm: Norm | None = None, logits: Array | None = None
    ) -> Array:
        """Rows through a vocabulary w [V, K] -> [max_rows, 3] int64, filled by `run`: the likeliest
        column (ties to the lowest), its logit's bits and those of log(sum(exp(logits))), both NaN
        where a logit is."""
        best = np.zeros((self.max_rows, 3), np.int64)
        fields = self._matmul(x, w, norm)
        chunks = -(-w.blocks // L.VOCABULARY_BLOCKS)
        partials = np.zeros((self.max_rows, chunks, 2), np.int64)
        merges = on_cache_line((1, L.COUNTER_WORDS), np.int64)
        fields |= {
            L.BLOCKS: L.VOCABULARY_BLOCKS,
            L.BEST: self._address(best),
            L.PARTIALS: self._address(partials),
            L.MERGES: self._address(merges),
        }
        if logits is not None:
            fields |= self._rows(L.OUT, logits) | {L.WRITE_LOGITS: 1}
        self._work(fields, L.VOCABULARY_BLOCKS)
        self._add(L.PROJECT, chunks, fields)
        return best

    def read(self, memory: Array) -> None:
        """Read memory, in whole MiB: a lower bound of the time that reading weights takes."""
        sums = np.zeros(memory.nbytes >> 20, np.float32)
        fields = {L.X: self._address(memory), L.OUT: self._address(sums)}
        self._add(L.READ, len(sums), fields)

    def run(self, rows: int, batch: int = 1) -> int:
        """Run all phases for `rows` = T rows of each of `batch` sequences, described by `ids`,
        `lengths` and `page_table` -> the share of the time, in thousandths, that the calling thread
        waited for helpers."""
        with self._lock:
            if self._table is None:
                self._seal()
            self._check(rows, batch)
            head = self._head
            head[L.BATCH], head[L.WINDOW_ROWS] = batch, rows
            if self.page_table is not self._table_seen:
                self._table_seen = self.page_table
                head[L.PAGE_TABLE] = self.page_table.ctypes.data
                head[L.TABLE_STRIDE] = self.page_table.shape[1]
            # The step before has opened this one: a helper that is late finds nothing to do.
            epoch = int(head[L.EPOCH])
            self.helpers.call(lambda thread: self._run(self._at, epoch, thread))
            waited = self._run(self._at, epoch, 0)
            self.helpers.learn(waited)
            return waited

    def _check(self, rows: int, batch: int) -> None:
        """ValueError for ids, lengths or counts outside the model's memory."""
        if not 1 <= rows * batch <= self.max_rows or not 1 <= batch <= self.max_batch:
            raise ValueError(
                f"rows x batch must be 1..{self.max_rows} and batch 1..{self.max_batch}, "
                f"got {rows} x {batch}"
            )
        ids, lengths = self.ids[: rows * batch].tolist(), self.lengths[:batch].tolist()
        if min(ids) < 0 or max(ids) >= self._tokens:
            raise ValueError(f"ids must be 0..{self._tokens - 1}, got {ids}")
        positions = min(self._positions, self.page_table.shape[1] * self._page_size)
        if min(lengths) < 0 or max(lengths) + rows > positions:
            raise ValueError(f"lengths + {rows} rows must be at most {positions}, got {lengths}")

    def _seal(self) -> None:
        partials = on_own_pages((self._partials,), np.float32)
        merges = on_cache_line((self._merges, L.COUNTER_WORDS), np.int64)
        shared = {L.PARTIALS: self._address(partials), L.MERGES: self._address(merges)}
        self._table = on_cache_line((len(self._phases), L.PHASE_WORDS), np.int64)
        for row, fields in zip(self._table, self._phases, strict=True):
            if fields[L.OP] == L.ATTEND:
                fields |= shared
            for field, value in fields.items():
                row[field] = value
        phases, threads = len(self._phases), self.helpers.threads
        self._tickets = on_cache_line((phases, threads, L.COUNTER_WORDS), np.int64)
        self._done = on_cache_line((phases, L.COUNTER_WORDS), np.int64)
        size = -(-self._scratch // 4096) * 4096
        scratch = on_cache_line((self.helpers.threads, size))
        head = self._head
        head[L.PHASES], head[L.PHASE_TABLE] = len(self._phases), self._table.ctypes.data
        head[L.TICKETS], head[L.DONE] = self._tickets.ctypes.data, self._done.ctypes.data
        head[L.SCRATCH], head[L.SCRATCH_BYTES] = scratch.ctypes.data, size
        head[L.THREADS] = threads
        head[L.LENGTHS], head[L.IDS] = self.lengths.ctypes.data, self.ids.ctypes.data
        self._kept.append(scratch)
        self._run, self._at = self.kernels.entry("run_program"), head.ctypes.data

    def _add(self, op: int, chunks: int, fields: dict[int, int]) -> None:
        if self._table is not None:
            raise ValueError("phases must be added before the program's first run")
        self._phases.append(fields | {L.OP: op, L.CHUNKS: chunks})

    def _chunked(self, op: int, w: Weights, multiple: int, fields: dict[int, int]) -> None:
        blocks = max(1, CHUNK_BYTES // w.data.shape[1] // multiple) * multiple
        blocks = min(blocks, w.blocks)
        self._work(fields, blocks)
        self._add(op, -(-w.blocks // blocks), fields | {L.BLOCKS: blocks})

    def _matmul(self, x: Array, w: Weights, norm: Norm | None) -> dict[int, int]:
        fields = self._rows(L.X, x) | self._weight(w)
        if x.shape[1] < w.in_features:
            raise ValueError(f"x must be [R, {w.in_features}] to match w, got {list(x.shape)}")
        if norm is not None:
            if norm.w is not None and len(norm.w) != w.in_features:
                raise ValueError(f"norm must be [{w.in_features}], got [{len(norm.w)}]")
            fields |= self._normed(norm)
        self._work(fields, w.blocks if w.blocks < 64 else 64)
        return fields

    def _work(self, fields: dict[int, int], blocks: int) -> None:
        """Reserve scratch for prepared rows and `blocks` blocks of their outputs."""
        per_row = fields[L.GROUPS] * (48 if fields[L.QUANTISED] else 128) + 64
        self._scratch = max(self._scratch, self.max_rows * (per_row + 4 * LANES * blocks))

    def _weight(self, w: Weights) -> dict[int, int]:
        return {
            L.TILE: self.kernels.tile(w.format),
            L.WEIGHT: self._address(w.data),
            L.BLOCK_BYTES: w.data.shape[1],
            L.ALL_BLOCKS: w.blocks,
            L.INPUTS: w.in_features,
            L.OUTPUTS: w.out_features,
            L.GROUPS: w.groups,
            L.QUANTISED: int(w.format in QUANTISED),
            L.BIAS: 0 if w.bias is None else self._address(w.bias),
        }

    def _normed(self, norm: Norm) -> dict[int, int]:
        if norm.w is None:
            return {L.EPS: float_bits(norm.eps)}
        w = np.pad(norm.w.astype(np.float32), (0, -len(norm.w) % LANES))
        return {L.NORM_W: self._address(w), L.EPS: float_bits(norm.eps)}

    def _rows(self, field: int, rows: Array) -> dict[int, int]:
        if rows.dtype != np.float32 or rows.ndim != 2 or rows.strides[1] != 4:
            raise ValueError(f"rows must be float32 [R, columns], got {rows.dtype} {rows.shape}")
        return {field: self._address(rows), field + 1: rows.strides[0] // 4}

    def _paged(self, pages: LayerCache) -> dict[int, int]:
        _, page_size, Hk, D = pages.k.shape
        if D % 16 or page_size % L.KEYS or pages.heads % Hk:
            raise ValueError(
                f"D must be a multiple of 16, page_size of {L.KEYS} and heads of Hk={Hk}, "
                f"got D={D}, page_size={page_size}, heads={pages.heads}"
            )
        tensors = (pages.k, pages.v, pages.cos, pages.sin)
        if not all(tensor.is_contiguous() for tensor in tensors):
            raise ValueError("k, v, cos and sin must be contiguous")
        self._kept.extend(tensors)
        self._positions, self._page_size = min(self._positions, len(pages.cos)), page_size
        return {
            L.HEADS: pages.heads,
            L.KV_HEADS: Hk,
            L.HEAD_DIM: D,
            L.HEAD_COUNT: pages.head_dim or D,
            L.K_PAGES: pages.k.data_ptr(),
            L.V_PAGES: pages.v.data_ptr(),
            L.PAGE_SIZE: page_size,
            L.KV_KIND: KV_KINDS[pages.k.dtype],
            L.COS: pages.cos.data_ptr(),
            L.SIN: pages.sin.data_ptr(),
            L.SLIDING: pages.sliding,
        }

    def keep(self, *objects: object) -> None:
        """Keep references to objects for as long as the program lives."""
        self._kept.extend(objects)

    def _address(self, array: Array) -> int:
        self._kept.append(array)
        return array.ctypes.data


def float_bits(value: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
