"""What loading takes: temporaries of a few rows, and no page of a file after it."""

import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_checkpoint
from head_files import write_mtp

from mtpkern import LLM
from mtpkern.kernels.cpu.quants import quantise
from mtpkern.kernels.cpu.weights import on_own_pages, pack


def traced_peak(build: Callable[[], object]) -> int:
    """The most bytes that numpy and Python hold while `build` runs, its result included."""
    tracemalloc.start()
    try:
        kept = build()
        assert kept is not None
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("format", ["q4_0", "q4_1", "q8_0"])
def test_rounding_and_packing_hold_little_beside_the_result(format: str) -> None:
    w = torch.randn(8192, 256, generator=torch.Generator().manual_seed(1))
    quants = quantise(w, format)
    size = quants.q.nbytes + sum(part.nbytes for part in quants.scales)
    # Parts of 512 rows are joined at the end, so that the result is there twice.
    assert traced_peak(lambda: quantise(w, format)) < 2.2 * size + 9 * 512 * 256 * 4
    assert traced_peak(lambda: pack(quants)) < 1.1 * size + 2 * 512 * 256 * 4


@pytest.mark.skipif(sys.platform != "linux", reason="/proc shows what is mapped")
def test_packed_heads_leave_nothing_of_their_file_mapped(tmp_path: Path) -> None:
    heads = write_mtp(tmp_path / "heads")
    llm = LLM(tiny_checkpoint(tmp_path / "model"), heads=heads, device="cpu", threads=1)
    assert llm.k > 0
    assert str(heads) not in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc shows what is resident")
def test_rows_that_are_not_written_take_no_memory() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])  # pages

    before = resident()
    rows = on_own_pages((1 << 14, 1 << 12), np.float32)  # 256 MiB
    rows[:2] = 1
    assert rows[:3].sum() == 2 << 12
    assert resident() - before < 1 << 13  # 32 MiB
