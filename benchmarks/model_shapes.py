"""Shapes of real models, and of the steps that are measured, predicted and compiled with them."""

from typing import NamedTuple


class ModelShape(NamedTuple):
    """The sizes of a model, in the letters of the README."""

    E: int
    F: int
    Hq: int
    Hk: int
    D: int
    V: int
    L: int
    qk_norm: bool = False


TINY = ModelShape(E=64, F=128, Hq=4, Hk=2, D=16, V=512, L=2)
MODELS = {
    "smollm2-135m": ModelShape(E=576, F=1536, Hq=9, Hk=3, D=64, V=49152, L=30),
    "llama-3.2-1b": ModelShape(E=2048, F=8192, Hq=32, Hk=8, D=64, V=128256, L=16),
    "llama-3.1-8b": ModelShape(E=4096, F=14336, Hq=32, Hk=8, D=128, V=128256, L=32),
    "qwen3-8b": ModelShape(E=4096, F=12288, Hq=32, Hk=8, D=128, V=151936, L=36, qk_norm=True),
}

# Sequences and window rows [B, T] of a step: plain decoding, K = 4, and K = 4 in batches.
STEPS = ((1, 1), (1, 5), (8, 5), (32, 5))
# Steps in the row tiers that STEPS leaves out: 10, 20 and 125 rows.
OTHER_TIERS = ((2, 5), (4, 5), (25, 5))
