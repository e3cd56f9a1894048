"""What every launcher shares: Triton where there is one, kernel names, tiles of rows, checks.

Numbers here are the same for every launch of an op, so that a row's bits cannot depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for macOS and Windows: the references work without it
    triton = tl = None

# Blocks that a launch wants at least: the multiprocessors of an H100.
FILL = 132

# Row counts that share one pass over the weights. Rows are padded to the first tier that holds
# them; more than the last tier's take further passes.
TIERS = (16, 32, 64, 128, 192)

# Columns of a block of a launch that adds up the segments of a matmul with many rows.
BLOCK_END = 512

# Arguments that count what a step happens to hold, in the letters of the README. Left to itself
# Triton compiles a kernel of its own for 1 and for multiples of 16, whose bits may differ.
COUNTS = ("B", "R", "S", "T")

# Arguments of which a sequence has a row: a batch may begin at any slot, and so at any multiple of
# a row's bytes. Left to itself Triton compiles a kernel of its own where that is one of 16. They
# hold single numbers; what is loaded 16 bytes at a time (x, weights, K and V) is not among them.
PER_SEQUENCE = (
    *("page_table_ptr", "lengths_ptr", "known_ptr", "tokens_ptr", "window_ptr", "tree_ptr"),
    "ids_ptr",
    *("active_ptr", "limits_ptr", "ends_ptr", "source_ptr", "drafted_ptr", "clock_ptr", "ring_ptr"),
)
PER_SEQUENCE_STRIDES = ("stride_pb", "stride_tb")


def jit(
    *named: str, do_not_specialize: tuple[str, ...] = (), definition: str | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Compile a kernel `_op_kernel` under the symbol mtpkern_op_<the constants `named`>.

    `do_not_specialize` names further counts, `definition` the reference in the kernel's own file
    (None: <the file's name>_ref), which a launch that cannot run recommends.
    """

    def decorate(fn: Callable[..., Any]) -> Any:
        op = fn.__name__.strip("_").removesuffix("_kernel")
        reference = definition or f"{fn.__module__.rpartition('.')[2]}_ref"
        if triton is None:
            return _Kernel(fn, None, reference)

        def symbol(specialization: Any) -> str:
            values = (specialization.constants[name] for name in named)
            return "_".join([f"mtpkern_{op}", *(str(int(value)) for value in values)])

        compiled = triton.jit(
            fn,
            repr=symbol,
            do_not_specialize=(*COUNTS, *PER_SEQUENCE_STRIDES, *do_not_specialize),
            do_not_specialize_on_alignment=PER_SEQUENCE,
            launch_metadata=_costs,
        )
        return _Kernel(fn, compiled, reference)

    return decorate


class _Kernel:
    """A kernel; its launch says what is missing where it cannot run, and what runs instead."""

    def __init__(self, fn: Callable[..., Any], compiled: Any, definition: str):
        self.compiled, self.definition = compiled, definition
        self.arguments = fn.__code__.co_varnames

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """A launch over `grid`: the kernel's arguments, `num_warps`, `pdl` and further options."""

        def launch(*args: Any, num_warps: int, pdl: bool, **options: Any) -> None:
            self.check(**dict(zip(self.arguments, args, strict=False)))
            options |= {"PDL": pdl, "launch_pdl": pdl, "enable_fp_fusion": True}
            self.compiled[grid](*args, num_warps=num_warps, **options)

        return launch

    def check(self, **arguments: Any) -> None:
        """Raise what a launch with `arguments` would: for an op whose first launch is another's."""
        op = self.definition.removesuffix("_ref")
        if self.compiled is None:
            raise ImportError(
                f"{op} needs Triton, which is not installed; {self.definition} does not"
            )
        for name, value in arguments.items():
            if isinstance(value, Tensor) and not _is_reachable(value):
                raise ValueError(
                    f"{op} needs tensors on a GPU, got {name.removesuffix('_ptr')} on the CPU; "
                    f"its definition, {self.definition}, takes those"
                )


def _is_reachable(tensor: Tensor) -> bool:
    """Whether a GPU reads the tensor's memory: pinned memory on the host is mapped."""
    return tensor.device.type != "cpu" or tensor.is_pinned()


def _costs(grid: Any, metadata: Any, args: dict[str, Any]) -> dict[str, Any]:
    """What a profiler that asks (Proton) may show beside a matmul's time: its weights and work.

    What the other kernels move depends on counts that only the device knows.
    """
    costs, w = {"name": metadata.name}, args.get("w_ptr")
    if w is not None and w.dim() > 1:
        costs["bytes"] = w.numel() * w.element_size()
        costs[f"flops{8 * w.element_size()}"] = 2 * w.numel() * args["R"]
    return costs


def device(fn: Callable[..., Any]) -> Any:
    """Compile a function that kernels call."""
    return fn if triton is None else triton.jit(fn)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << (n - 1).bit_length())


def row_tier(rows: int) -> int:
    """The tier that holds `rows` rows, or the largest one."""
    return next((tier for tier in TIERS if rows <= tier), TIERS[-1])


def segment(N: int, K: int) -> int:
    """Inputs whose products a matmul [N, K] adds up before it adds the sums, in ascending order.

    So many segments that blocks of 128 columns and a segment nearly fill an H100; of 512 inputs at
    least. The rows do not count: whatever tile takes them, a row's sums are the same.
    """
    segments = 1
    while ceil_div(N, 128) * segments < 0.9 * FILL and 2 * segments * 512 <= K:
        segments *= 2
    return ceil_div(ceil_div(K, segments), 128) * 128


def column_tile(N: int, K: int, tier: int) -> int:
    """Output columns of a block: the more, the less often x is read; fewer where that would leave
    multiprocessors without any."""
    if tier == 16:  # a block takes all segments, and x is small beside the weights
        return 32 if N >= 32 * FILL else 16
    blocks = ceil_div(K, segment(N, K))
    wide = (128, 64) if tier >= 128 else (64,)
    return next((n for n in wide if ceil_div(N, n) * blocks >= 0.9 * FILL), 32)


def depth_tile(tier: int) -> tuple[int, int]:
    """Bytes of a row in a block's step, and Triton's num_stages, which is one more than the steps
    under way: at most 96 KB, so that two blocks fit on a multiprocessor."""
    return {16: (256, 8), 32: (256, 5), 64: (256, 4), 128: (128, 4), 192: (128, 3)}[tier]


def check_shape(name: str, tensor: Tensor, symbols: str, *shape: int) -> None:
    """Raise ValueError unless `tensor` has `shape`, its last stride 1.

    `symbols` is the shape in letters, as in "[R, K]".
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {symbols}={list(shape)}, got {list(tensor.shape)}")
    if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must have last stride 1, got strides {list(tensor.stride())}")


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless `tensor` is of `dtype`."""
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")


@device
def wait_for_producer():
    """Let the next kernel be set up, then wait for the one before (sm_90 and newer).

    To come before the first read of what an earlier kernel wrote, and before the first write
    of what one may still be reading; a kernel of a chain that lacks it breaks those behind it.
    """
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()


@device
def prefetch_l2(w_ptr, n, in_n, stride_wn, K, LINES: tl.constexpr = 16):
    """Prefetch the first LINES times 64 elements of the rows n of w [N, K], of which in_n exist."""
    k = tl.arange(0, LINES) * 64  # 128 bytes of a 16-bit weight
    ptrs = w_ptr + n.to(tl.int64)[:, None] * stride_wn + k[None, :]
    # For a row or column that does not exist, any address in w will do.
    ptrs = tl.where(in_n[:, None] & (k < K)[None, :], ptrs, w_ptr)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [ptrs],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
