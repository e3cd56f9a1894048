"""A small random model as a compiled CPU program, and decoding with it."""

import numpy as np
import torch
from cpu_machine import helpers, kernels
from paged import make_paged

from mtpkern.kernels.cpu._compile import Kernels
from mtpkern.kernels.cpu.layers import ModelCache, PackedLayer, add_layers
from mtpkern.kernels.cpu.program import Norm, Program
from mtpkern.kernels.cpu.quants import quantise
from mtpkern.kernels.cpu.weights import interleaved, pack

V, E, F, HEADS, HK, D, LAYERS, EPS = 333, 64, 96, 6, 2, 32, 3, 1e-5


BATCH, POSITIONS = 3, 256


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensors(index: int) -> dict[str, torch.Tensor]:
    """One layer's weights."""
    features = {"qkv": ((HEADS + 2 * HK) * D, E), "o": (E, HEADS * D)}
    features |= {"gate_up": (2 * F, E), "down": (E, F)}
    return {
        name: normal(*shape, seed=10 * index + i) / shape[1] ** 0.5
        for i, (name, shape) in enumerate(features.items())
    } | {name: 1 + normal(E, seed=10 * index + i) / 10 for i, name in ((5, "in"), (6, "post"))}


def decoder_layers(format: str) -> list[PackedLayer]:
    def norm(w: torch.Tensor) -> Norm:
        return Norm(w.numpy(), EPS)

    made = []
    for index in range(LAYERS):
        w = tensors(index)
        packed = {
            name: pack(
                quantise(w[name], format), None, interleaved(F) if name == "gate_up" else None
            )
            for name in ("qkv", "o", "gate_up", "down")
        }
        ends = norm(w["in"]), norm(w["post"])
        made.append(
            PackedLayer(
                ends[0], [packed["qkv"]], packed["o"], ends[1], packed["gate_up"], packed["down"]
            )
        )
    return made


class Model:
    """A step over caches of its own."""

    def __init__(
        self,
        format: str = "q8_0",
        *,
        threads: int = 1,
        batch: int = 1,
        max_rows: int = 24,
        dtype: torch.dtype = torch.float32,
        compiled: Kernels | None = None,
    ):
        self.paged = make_paged(batch, POSITIONS // 64, 64, HK, D, dtype)
        shape = (LAYERS, *self.paged.k.shape[1:])
        self.k, self.v = (
            torch.full(shape, torch.nan, dtype=dtype),
            torch.full(shape, torch.nan, dtype=dtype),
        )
        self.program = Program(
            compiled or kernels(), helpers(threads), max_rows=max_rows, max_batch=batch
        )
        x, embedding = self.program.buffer(E), pack(quantise(normal(V, E, seed=99), format))
        self.program.embed(embedding, x)
        cache = ModelCache(self.k, self.v, self.paged.cos, self.paged.sin, HEADS)
        # Side by side, as drafters that tap several layers read them.
        tapped = self.program.buffer(2 * E)
        self.taps = [tapped[:, :E], tapped[:, E:]]
        taps = {1: self.taps[0], 2: self.taps[1]}
        self.hidden = add_layers(self.program, x, decoder_layers(format), cache, taps)
        self.logits = self.program.buffer(V)
        self.best = self.program.project(
            self.hidden, embedding, norm=Norm(np.ones(E, np.float32), EPS), logits=self.logits
        )
        self.program.page_table = self.paged.page_table.numpy()

    def run(self, ids: np.ndarray, lengths: list[int]) -> dict[str, np.ndarray]:
        """ids [B, T] -> copies of what the step left in its buffers."""
        batch, rows = ids.shape
        self.program.ids[: ids.size] = ids.reshape(-1)
        self.program.lengths[:batch] = lengths
        self.program.run(rows, batch)
        kept = {"hidden": self.hidden, "logits": self.logits, "best": self.best}
        kept |= {f"tap {i}": tap for i, tap in enumerate(self.taps)}
        return {name: value[: ids.size].copy() for name, value in kept.items()}


def sequence(count: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, count)


def decoded(model: Model, ids: np.ndarray, width: int) -> dict[str, np.ndarray]:
    """Run a sequence in windows of `width` rows."""
    parts = [
        model.run(ids[None, start : start + width], [start]) for start in range(0, len(ids), width)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
