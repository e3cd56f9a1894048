"""The ring through which the host reads what steps emitted, while the device runs ahead.

The device writes its words (kernels/advance.py) to memory that the host polls. Each word carries
the number of its step, so that the host waits for no more than the words of the step it reads.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy
import torch

from mtpkern.kernels.advance import STEP_MASK

# Seconds between two polls, and between two checks that the device has not failed.
_POLL_INTERVAL, _CHECK_INTERVAL = 20e-6, 1.0


class StepRecord(NamedTuple):
    """What one step decided for one sequence."""

    accepted: int
    drafted: int
    source: int
    target: list[int]  # T tokens, of which accepted + 1 were emitted
    logprobs: list[float]  # of the targets, if the step wrote them
    broken: bool  # the last emitted target is invalid: its logits were NaN or infinite


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

        `check` is called about once per second while waiting, and raises if the device has failed.
        """
        count = 1 + rows * (2 if logprobs else 1)
        place = self._seen[step % len(self._seen), :batch, :count]
        next_check = time.monotonic() + _CHECK_INTERVAL
        words = place.tolist()
        while any(word >> 32 != step & STEP_MASK for sequence in words for word in sequence):
            time.sleep(_POLL_INTERVAL)
            if time.monotonic() > next_check:
                check()
                next_check += _CHECK_INTERVAL
            words = place.tolist()
        records = []
        for sequence in words:
            word, *low = (word & 0xFFFFFFFF for word in sequence)
            floats = []
            if logprobs:
                floats = numpy.array(low[rows:], numpy.uint32).view(numpy.float32).tolist()
            parts = (word & 0xFF, word >> 8 & 0xFF, word >> 16 & 0xFF)
            records.append(StepRecord(*parts, low[:rows], floats, bool(word >> 24 & 2)))
        return records
