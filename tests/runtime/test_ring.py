"""Ring: the host reads a step when all of its words have arrived, and not before."""

import threading
import time

import pytest
import torch

from mtpkern.kernels.advance import STEP_MASK
from mtpkern.ring import Ring


def write(ring: Ring, step: int, batch: int, rows: int, skip: int | None = None) -> None:
    """The words of one step: accepted b, drafted 2, source 1, tokens 10 b + t, log-prob -t; the
    second sequence is broken."""
    for b in range(batch):
        bits = torch.arange(rows).float().neg().view(torch.int32).long() & 0xFFFFFFFF
        counts = b | 2 << 8 | 1 << 16 | (1 + 2 * (b == 1)) << 24
        words = [counts, *(10 * b + t for t in range(rows)), *bits.tolist()]
        for i, word in enumerate(words):
            if (b, i) != (batch - 1, skip):
                ring.words[step % len(ring.words), b, i] = (step & STEP_MASK) << 32 | word


def test_what_was_written_is_read() -> None:
    ring = Ring(3, 4, 5, pinned=False)
    for step in (1, 2, 3, 4, STEP_MASK, STEP_MASK + 7):
        write(ring, step, 2, 3)
        records = ring.read(step, 2, 3, logprobs=True)
        assert [(r.accepted, r.drafted, r.source) for r in records] == [(0, 2, 1), (1, 2, 1)]
        assert [r.target for r in records] == [[0, 1, 2], [10, 11, 12]]
        assert [r.broken for r in records] == [False, True]
        assert records[1].logprobs == [0.0, -1.0, -2.0]
        assert ring.read(step, 2, 3)[0].logprobs == []


@pytest.mark.parametrize("late", range(7))
def test_the_host_waits_for_the_last_word(late: int) -> None:
    ring = Ring(2, 2, 3, pinned=False)
    write(ring, 1, 2, 3)  # left in the ring by the step before the last
    write(ring, 3, 2, 3, skip=late)
    threading.Timer(0.05, lambda: write(ring, 3, 2, 3)).start()
    begin = time.monotonic()
    ring.read(3, 2, 3, logprobs=True)
    assert time.monotonic() - begin > 0.02


def test_a_device_that_died_is_noticed() -> None:
    def check() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        Ring(2, 1, 1, pinned=False).read(1, 1, 1, check=check)
