"""Dot products summed like a tensor core's, for the CPU that ttsem presents as a GPU.

ttsem's own dot adds one product after another, which hides the size of a tile. mma.sync m16n8k16
adds sixteen products to a sum at once, so that a different order of the sums shows.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def dots_of_sixteen() -> Iterator[None]:
    """Inside the block, dots of 16-bit operands add 16 inputs at a time in float32, in ascending
    order. On a GPU nothing changes."""
    if "ttsem.ops" not in sys.modules:
        yield
        return
    ops: Any = sys.modules["ttsem.ops"]
    handlers = ops.OPS
    plain = handlers["tt.dot"]

    def dot(interp: Any, op: Any, args: list[Any]) -> list[Any]:
        a_type, b_type, acc_type = op.operand_types[:3]
        if a_type.scalar.name not in ("bf16", "f16"):
            return plain(interp, op, args)
        a, b = (
            ops.to_float(arg, its).astype(np.float64)
            for arg, its in zip(args[:2], (a_type, b_type), strict=True)
        )
        acc = ops.to_float(args[2], acc_type).astype(np.float32)
        for k in range(0, a.shape[-1], 16):
            # The sixteen products and their sum are exact in float64, unless they differ by 2^30.
            acc = (acc + a[..., k : k + 16] @ b[..., k : k + 16, :]).astype(np.float32)
        return [ops.from_float(acc, op.result_types[0])]

    handlers["tt.dot"] = dot
    try:
        yield
    finally:
        handlers["tt.dot"] = plain
