"""What bounds a matmul: memory, the L2, the instructions it issues, the tensor cores.

The counts come from a launch's arguments, its grid and the machine code of its loop, or of all its
passes where the compiler has unrolled the loop. The rates of a GPU are assumptions, fixed here;
nothing is a measurement.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Gpu(NamedTuple):
    """Multiprocessors and their clock in Hz; each issues four instructions per cycle."""

    multiprocessors: int
    clock: float


# A100, L40S, H100 and B200, by boost clock.
GPUS = {
    "sm_80": Gpu(108, 1.41e9),
    "sm_89": Gpu(142, 2.52e9),
    "sm_90": Gpu(132, 1.755e9),
    "sm_100": Gpu(148, 1.85e9),
}
# An H100: bytes per second from memory, and from the L2 to the multiprocessors; the share of issue
# slots that a kernel uses; the flops of mma.sync, 62 % of those of wgmma.
DRAM, L2, ISSUED, MMA = 3.0e12, 5.5e12, 0.7, 0.62 * 989e12


class Matmul(NamedTuple):
    """What one launch that multiplies rows by weights does."""

    weight_bytes: int
    l2_bytes: int  # weights and x as requested by the blocks, and the segments' sums written
    flops: int  # rows that pad a tier included
    passes: int  # of all blocks through their loops
    bytes_of_pass: int  # of weights
    passes_of_block: int

    def issue_ceiling(self, loop: int, unrolled: int, warps: int, gpu: Gpu) -> float:
        """Bytes of weights per second with every issue slot used, at `loop` instructions of a warp
        per pass or, where that is 0, `unrolled` in all passes of a block. What comes before and
        after the passes is left out. 0 if nothing was counted."""
        seconds = (loop or unrolled / self.passes_of_block) * warps / 4 / gpu.clock
        return self.bytes_of_pass / seconds * gpu.multiprocessors if seconds else 0.0


def matmul(given: dict[str, Any], grid: Sequence[int]) -> Matmul | None:
    """The matmul of a launch with the arguments `given`; None if it has no weights `w_ptr`."""
    depth = given.get("BLOCK_K") or given.get("BLOCK_E")
    if "w_ptr" not in given or depth is None or given["w_ptr"].dim() < 2:
        return None
    w, R, K = given["w_ptr"], given["R"], given.get("K") or given["E"]
    columns = given.get("BLOCK_N") or 2 * given.get("BLOCK_F", 0)
    grid = (*grid, 1, 1)[:3]
    segments, over_rows, tier, partial = 1, 1, 16, 0
    if "TILES" in given:
        columns, over_rows = given["TILES"] * given["TILE"], grid[0]
        tier = given["CHUNK"] * given["CHUNKS"] + given["TAIL"]
    elif "partial_ptr" in given:
        segments, over_rows, tier = given["SEGMENTS"], grid[0], given["ROWS"] + given["TAIL"]
        partial = 4 * given["partial_ptr"].numel()
    elif "SEGMENTS" in given:  # side by side in every block
        depth, tier = depth * given["SEGMENTS"], given["ROWS"]
    blocks = grid[0] * grid[1] * grid[2] // (segments * over_rows)
    weight_bytes, itemsize = w.numel() * w.element_size(), w.element_size()
    chunk = given.get("DEPTH", depth)
    steps = -(-K // (segments * chunk)) * (chunk // depth)
    return Matmul(
        weight_bytes,
        weight_bytes * over_rows + blocks * R * K * itemsize + partial,
        2 * w.numel() * tier * over_rows,
        blocks * over_rows * segments * steps,
        columns * depth * itemsize,
        steps,
    )


def l2_bytes(given: dict[str, Any], grid: Sequence[int]) -> int:
    """Bytes that a matmul's launch, or the sum of its segments, requests from the L2."""
    multiplied = matmul(given, grid)
    if multiplied is not None:
        return multiplied.l2_bytes
    partial = given.get("partial_ptr")
    return 0 if partial is None else partial.numel() * partial.element_size()
