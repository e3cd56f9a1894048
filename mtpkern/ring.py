"""What steps emitted, read by the host while the device runs ahead.

The device writes (kernels/advance.py); the host polls memory that both see, and waits for nothing
but the words it wants: each carries the number of its step.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy
import torch

from mtpkern.kernels.advance import STEP_MASK

# How long the host sleeps between two looks, and after how long it asks whether the device lives.
_PAUSE, _DOUBT = 20e-6, 1.0


class StepRecord(NamedTuple):
    """What one step decided for one sequence."""

    accepted: int
    drafted: int
    source: int
    target: list[int]  # T tokens, of which accepted + 1 were emitted
    logprobs: list[float]  # of the targets, where the step wrote them
    broken: bool  # the last of those emitted is no token: its logits were NaN or infinite


class Ring:
    """The last `slots` steps' words of `batch` sequences, windows of up to `rows` rows."""

    def __init__(self, slots: int, batch: int, rows: int, *, pinned: bool):
        words = torch.zeros(slots, batch, 1 + 2 * rows, dtype=torch.int64)
        self.words = words.pin_memory() if pinned else words
        self._seen = self.words.numpy()

    def read(
        self,
        step: int,
        batch: int,
        rows: int,
        *,
        logprobs: bool = False,
        check: Callable[[], object] = lambda: None,
    ) -> list[StepRecord]:
        """Wait for step number `step`, counted from 1, of the first `batch` sequences.

        `check` is called now and then while waiting; it raises where the device has failed.
        """
        count = 1 + rows * (2 if logprobs else 1)
        place = self._seen[step % len(self._seen), :batch, :count]
        doubt = time.monotonic() + _DOUBT
        words = place.tolist()
        while any(word >> 32 != step & STEP_MASK for sequence in words for word in sequence):
            time.sleep(_PAUSE)
            if time.monotonic() > doubt:
                check()
                doubt += _DOUBT
            words = place.tolist()
        records = []
        for sequence in words:
            word, *low = (word & 0xFFFFFFFF for word in sequence)
            chances = numpy.array(low[rows:], numpy.uint32).view(numpy.float32).tolist()
            parts = (word & 0xFF, word >> 8 & 0xFF, word >> 16 & 0xFF)
            records.append(StepRecord(*parts, low[:rows], chances, bool(word >> 24 & 2)))
        return records
