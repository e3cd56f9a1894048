"""The compiled CPU kernels for the tests, kept where the package keeps its own."""

import ctypes
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mtpkern.kernels.cpu._compile import Kernels, default_cache, host_target
from mtpkern.kernels.cpu._formats import FLOATS, FORMATS, GROUP
from mtpkern.kernels.cpu._threads import Helpers
from mtpkern.kernels.cpu.program import Program
from mtpkern.kernels.cpu.quants import K_QUANTS, Array, Quants, of_integers, quantise
from mtpkern.kernels.cpu.weights import Weights

ROUNDABLE = tuple(name for name in FORMATS if name not in K_QUANTS)


@cache
def kernels() -> Kernels:
    return Kernels(directory=default_cache())


@cache
def portable_kernels() -> Kernels:
    """The integer tile without any instruction of its own for dot products."""
    return Kernels(host_target()._replace(form="portable"), directory=default_cache())


@cache
def helpers(threads: int) -> Helpers:
    return Helpers(threads)


def program(max_rows: int, *, threads: int = 1, max_batch: int = 1) -> Program:
    return Program(kernels(), helpers(threads), max_rows=max_rows, max_batch=max_batch)


def floats(w: Tensor) -> Quants:
    return quantise(w, "fp32")


def random_q6_k(N: int, K: int) -> Quants:
    rng = np.random.default_rng(6)
    q = rng.integers(0, 64, (N, K), dtype=np.uint8)
    scales = rng.integers(-128, 128, (N, K // 16)).astype(np.int8)
    d = (rng.random((N, -(-K // 256))) / 1000).astype(np.float16)
    return of_integers("q6_k", q, (d, scales))


def random_q4_k(N: int, K: int) -> Quants:
    rng = np.random.default_rng(4)
    q, factors = rng.integers(0, 16, (N, K)), rng.integers(0, 64, (2, N, K // 32), dtype=np.uint8)
    d, m = (rng.random((2, N, -(-K // 256))) / [[[1000]], [[200]]]).astype(np.float16)
    return of_integers("q4_k", q, (d, m, *factors))


def random_quants(format: str, N: int, K: int) -> Quants:
    if format == "q6_k":
        return random_q6_k(N, K)
    if format == "q4_k":
        return random_q4_k(N, K)
    generator = torch.Generator().manual_seed(N + K)
    return quantise(torch.randn(N, K, generator=generator) / K**0.5, format)


def as_rounded(x: Array) -> tuple[Array, Array]:
    """Activations rounded by numpy: (xq [R, K] int8, stats [R, groups, 4] float32 words)."""
    groups = x.reshape(len(x), -1, GROUP)
    dx = (np.abs(groups).max(-1) / np.float32(127)).astype(np.float32)
    inverse = np.float32(1) / dx
    xq = np.rint(groups * inverse[..., None]).astype(np.int8)
    stats = np.zeros((*dx.shape, 4), np.float32)
    halves = xq.reshape(*dx.shape, 2, 16).sum(-1, dtype=np.int32)
    stats[..., 0], stats[..., 1] = dx, dx * halves.sum(-1).astype(np.float32)
    stats[..., 2:].view(np.int32)[:] = halves
    return xq.reshape(x.shape), stats


def tile(compiled: Kernels, w: Weights, x: Array, stats: Array, *, blocks: int = 10**6) -> Array:
    """Call the matmul tile itself, some blocks at a time: [R, 8 blocks]."""
    kinds = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 4
    function = ctypes.CFUNCTYPE(None, *kinds)(compiled.tile(w.format))
    out = np.full((len(x), 8 * w.blocks), np.nan, np.float32)
    for first in range(0, w.blocks, blocks):
        function(
            w.data[first:].ctypes.data,
            x.ctypes.data,
            stats.ctypes.data,
            out[:, 8 * first :].ctypes.data,
            min(blocks, w.blocks - first),
            w.groups,
            out.shape[1],
            len(x),
        )
    return out


def activations(format: str, x: Array) -> tuple[Array, Array]:
    """What the tile takes for rows x [R, K] float32."""
    return (x, np.zeros(4, np.float32)) if format in FLOATS else as_rounded(x)


def as_floats(bits: Array) -> Array:
    """Float32 of a column of `Program.project`'s result."""
    return bits.astype(np.int32).view(np.float32)


def poison(w: Weights, row: int) -> None:
    """Make all numbers of one output NaN, w in float32."""
    w.data[row // 8].view(np.float32).reshape(-1, 8)[:, row % 8] = np.nan


def same_bits(a: Array, b: Array) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()
