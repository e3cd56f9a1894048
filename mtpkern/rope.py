"""Rotary position embedding (RoPE): frequencies, and how published models extend their context.

A new kind is a branch of `RopeConfig.inverse_frequencies`, and the keys that it needs of
config.json in checkpoints/hf_config.py (of a GGUF in checkpoints/gguf.py). The kernels read cosines
and sines from the cache's tables and are the same for all kinds.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeConfig:
    """The base `theta` and how its frequencies are scaled.

    `kind` is "default", "linear" (positions divided by `factor`), "llama3" (Llama 3.1) or "yarn"
    (https://arxiv.org/abs/2309.00071). Fields that a kind does not use keep their defaults.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def inverse_frequencies(self, head_dim: int) -> tuple[Tensor, float]:
        """Radians per position, float32 [D/2], and the factor on cos and sin (1.0 except YaRN)."""
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        unscaled = 1.0 / self.theta**exponent
        if self.kind == "linear":
            return unscaled / self.factor, 1.0
        if self.kind == "llama3":
            # Pairs with many rotations within the original context keep their frequency.
            rotations = self.original_max_position_embeddings * unscaled / (2 * math.pi)
            width = self.high_freq_factor - self.low_freq_factor
            keep = ((rotations - self.low_freq_factor) / width).clamp(0, 1)
            return unscaled * keep + unscaled / self.factor * (1 - keep), 1.0
        if self.kind == "yarn":
            low = self._yarn_pair(self.beta_fast, head_dim)
            high = self._yarn_pair(self.beta_slow, head_dim)
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, head_dim - 1)
            pair = torch.arange(head_dim // 2, dtype=torch.float32)
            scaled = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
            frequencies = unscaled * (1 - scaled) + unscaled / self.factor * scaled
            return frequencies, self._yarn_attention_factor()
        return unscaled, 1.0

    def scaled_context(self, positions: int) -> int:
        """The context length with scaled frequencies, given config.json's `positions`.

        Published configs state a linear or YaRN context either before scaling or after it.
        """
        if self.kind == "linear":
            return max(positions, int(positions * self.factor))
        if self.kind == "yarn":
            return max(positions, int(self.original_max_position_embeddings * self.factor))
        return positions

    def _yarn_pair(self, rotations: float, head_dim: int) -> float:
        """The fractional index of the pair with `rotations` turns within the original context."""
        wavelength = self.original_max_position_embeddings / (2 * math.pi * rotations)
        return head_dim * math.log(wavelength) / (2 * math.log(self.theta))

    def _yarn_attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor

        def temperature(mscale: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return temperature(self.mscale) / temperature(self.mscale_all_dim)
        return temperature(1.0)
